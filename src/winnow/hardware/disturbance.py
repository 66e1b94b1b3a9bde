"""Detects measurements that were disturbed by other programs on the processor or the GPU, or by a slowed clock.

A figure measured beside another program says little: requests to the embedded model took 0.35 s on two idle cores and 1.0 s
beside one busy program. A disturbed measurement is repeated. If repeating does not help, the least disturbed result is used and
the sources of its figures end with `disturbed`, so that the report can mark them and the front does not rest on them.

Measured on two cores of an AMD EPYC, as shares of the wall time, beside 0, 1 and 2 programs that use one core each:

    threads  programs  latency  waited for a core  processor time of the thread  pressure
    1        0         315 ms   0.001              0.99                          0.002
    1        1         333      0.015              0.98                          0.011    (each has a core to itself)
    1        2         503      0.403              0.60                          0.502
    2        0         328      0.008              1.00                          0.020
    2        1         956      0.368              0.63                          0.498
    2        2         900      0.504              0.49                          0.997

    with (watch := Watch("cpu")):
        requests()
    print(watch.disturbance.description)
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from winnow.hardware import counters
from winnow.hardware.counters import Counters
from winnow.hardware.inventory import available_cores

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Largest share of the wall time that may be lost. Latencies within 5 % are equal on the front (`winnow.study.objectives.TIME`).
# In the table above the share is at most 0.015 where the latency did not suffer, and at least 0.37 where it did.
MAX_LOST_SHARE = 0.05
# The requesting thread computes or spins all the time: its share is at least 0.98 in the table when undisturbed, and at most 0.64
# beside other programs. A smaller share also shows swapping, and it is the only sign on systems that do not count waiting times.
MIN_THREAD_SHARE = 0.8
# Share of all cores above which the process has at least as many threads as cores; its threads then wait for one another.
SATURATED_SHARE = 0.9
# A GPU's clock varies by a few percent between requests; a throttled GPU loses far more.
MAX_CLOCK_DROP = 0.15
TICK_S = 0.01  # resolution of /proc/stat: a difference may be one tick too large

PAUSES_S = (0.5, 1.0, 2.0)  # pause before each repetition of a disturbed measurement


@dataclass(frozen=True)
class Disturbance:
    """What disturbed a measurement.

    Attributes:
        share: the largest share of the wall time that a cause took.
        description: the causes with their figures; empty if nothing disturbed the measurement.
    """

    share: float = 0.0
    description: str = ""

    def __bool__(self) -> bool:
        return bool(self.description)


class Watch:
    """Watches a measurement as a context manager; `disturbance` then says what disturbed it.

    Use one instance for all measurements of a process, because a GPU's clock is compared with the fastest clock seen under load.
    """

    def __init__(self, device: str, read: Callable[..., Counters] = counters.read) -> None:
        self.device = device
        self.disturbance = Disturbance()
        self._read = read
        self._fastest_mhz: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._since_epoch_s = time.time()
        self._before = self._read(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = self._read(self.device, self._since_epoch_s)
        for gpu in after.gpus:
            self._fastest_mhz[gpu.name] = max(self._fastest_mhz.get(gpu.name, 0), gpu.clock_mhz or 0)
        self.disturbance = find_disturbance(
            self._before, after, self.device, available_cores(), os.getpid(), self._fastest_mhz
        )


def find_disturbance(
    before: Counters,
    after: Counters,
    device: str,
    cores: int,
    process: int = 0,
    fastest_mhz: Mapping[str, int] | None = None,
) -> Disturbance:
    """Returns what disturbed the work between two readings of the counters.

    Args:
        cores: number of cores that this process may use.
        process: id of this process.
        fastest_mhz: the fastest clock seen under load, by GPU name.
    """
    causes = [*_processor(before, after, cores, device), *_gpus(after, process, fastest_mhz or {})]
    return Disturbance(
        max((share for share, _ in causes), default=0.0), "; ".join(description for _, description in causes)
    )


def _processor(before: Counters, after: Counters, cores: int, device: str) -> Iterator[tuple[float, str]]:
    """Yields the lost shares of the wall time and their causes; also used for GPU work, which the processor feeds."""
    wall_s = after.wall_s - before.wall_s
    if wall_s <= 0:
        return
    own_busy = (after.process_cpu_s - before.process_cpu_s) / wall_s
    others_busy = _difference(before.busy_s, after.busy_s, wall_s)
    others_busy = None if others_busy is None else max(0.0, others_busy - own_busy)
    others_note = "" if others_busy is None else f" (other programs used {others_busy:.1f} of {cores} cores)"

    # If only the process itself is busy, its threads wait for one another; that is part of the intended measurement.
    from_outside = others_busy is None or others_busy > MAX_LOST_SHARE
    if before.waited_s is not None and after.waited_s is not None:
        waited = (
            max((seconds - before.waited_s.get(thread, 0.0) for thread, seconds in after.waited_s.items()), default=0.0)
            / wall_s
        )
        if waited > MAX_LOST_SHARE and from_outside:
            yield waited, f"a thread was ready and waited for a core {waited:.0%} of the time{others_note}"
    else:
        # Pressure is the second choice: other processes may wait for one another on cores that this process does not use.
        pressure = _difference(before.pressure_s, after.pressure_s, wall_s) or 0.0
        if pressure > MAX_LOST_SHARE and from_outside and own_busy < SATURATED_SHARE * cores:
            yield pressure, f"processes waited for a core {pressure:.0%} of the time{others_note}"

    thread_busy = (after.thread_cpu_s - before.thread_cpu_s) / wall_s
    if device == "cpu" and thread_busy < MIN_THREAD_SHARE and own_busy < SATURATED_SHARE * cores:
        yield 1 - thread_busy, f"the process had a core {thread_busy:.0%} of the time"

    throttled = (_difference(before.throttled_s, after.throttled_s, wall_s) or 0.0) / cores
    if throttled > MAX_LOST_SHARE:
        yield (
            throttled,
            f"its control group was stopped at its quota {throttled:.0%} of the time (set hardware.threads to it)",
        )

    stolen = after.stolen_s or {}
    stolen_shares = [
        (stolen[core] - seconds - TICK_S) / wall_s
        for core, seconds in (before.stolen_s or {}).items()
        if core in stolen
    ]
    if (largest := max(stolen_shares, default=0.0)) > MAX_LOST_SHARE:
        yield largest, f"the hypervisor gave a core to another machine {largest:.0%} of the time"


def _difference(before: float | None, after: float | None, wall_s: float) -> float | None:
    return None if before is None or after is None else (after - before) / wall_s


def _gpus(after: Counters, process: int, fastest_mhz: Mapping[str, int]) -> Iterator[tuple[float, str]]:
    """Yields the shares of GPU time lost to other processes or to a slowed clock, and their causes."""
    for gpu in after.gpus:
        # In a container the driver reports other process ids; the busiest process is then taken to be this one.
        own_pid = (
            process
            if process in gpu.process_shares
            else max(gpu.process_shares, key=gpu.process_shares.__getitem__, default=0)
        )
        other_shares = {pid: share for pid, share in gpu.process_shares.items() if pid != own_pid}
        share = sum(other_shares.values())
        if share > MAX_LOST_SHARE:
            names = (
                f"process {next(iter(other_shares))}"
                if len(other_shares) == 1
                else f"{len(other_shares)} other processes"
            )
            yield share, f"{names} used {share:.0%} of the {gpu.name}"
        fastest = fastest_mhz.get(gpu.name, 0)
        slower = 1 - gpu.clock_mhz / fastest if gpu.clock_mhz and fastest else 0.0
        if gpu.slowdowns:
            yield max(slower, MAX_LOST_SHARE), f"the clock of the {gpu.name} is held down: {', '.join(gpu.slowdowns)}"
        elif slower > MAX_CLOCK_DROP:
            yield slower, f"the {gpu.name} runs at {gpu.clock_mhz} MHz, {slower:.0%} below the {fastest} MHz of before"


class Repeater:
    """Repeats disturbed measurements at most `len(PAUSES_S)` times, after growing pauses.

    Args:
        watch: detects whether a measurement was disturbed; None accepts every measurement.
        seconds: time that the pauses and repetitions of all measurements may take together.
    """

    def __init__(
        self,
        watch: Watch | None,
        seconds: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._watch, self._left_s, self._sleep = watch, seconds, sleep

    def __call__(self, name: str, measure: Callable[[], T]) -> tuple[T, Disturbance]:
        """Returns the result of `measure` and what disturbed it; among disturbed results, the least disturbed one.

        Args:
            name: name of the measurement, for the log.
        """
        best_result, disturbance, duration_s = self._measure_once(measure)
        logged = False
        for pause_s in PAUSES_S:
            if not disturbance or pause_s + duration_s > self._left_s:
                break
            if not logged:
                logger.info(f"{name}: disturbed ({disturbance.description}); it is measured again")
                logged = True
            self._sleep(pause_s)
            result, new_disturbance, duration_s = self._measure_once(measure)
            self._left_s -= pause_s + duration_s
            if new_disturbance.share < disturbance.share:
                best_result, disturbance = result, new_disturbance
        if disturbance:
            logger.info(f"{name}: marked as disturbed ({disturbance.description})")
        return best_result, disturbance

    def _measure_once(self, measure: Callable[[], T]) -> tuple[T, Disturbance, float]:
        started = time.perf_counter()
        with self._watch or contextlib.nullcontext():
            result = measure()
        disturbance = self._watch.disturbance if self._watch else Disturbance()
        return result, disturbance, time.perf_counter() - started
