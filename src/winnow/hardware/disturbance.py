"""Notices that a measurement was disturbed: by other programs on the processor or the GPU, or by a slowed clock.

A figure that was measured beside another program says little: the embedded model's requests took 0.35 s on two idle cores, and
1.0 s beside one busy program. Such a measurement is repeated. If that does not help, the least disturbed one is kept and the
sources of its figures end with `disturbed`, so that the report can say so and the front does not rest on them.

Measured on two cores of an AMD EPYC, shares of the wall time, beside 0, 1 and 2 programs that use a core each:

    threads  programs  latency  waited for a core  processor time of the thread  pressure
    1        0         315 ms   0.001              0.99                          0.002
    1        1         333      0.015              0.98                          0.011    (each has a core to itself)
    1        2         503      0.403              0.60                          0.502
    2        0         328      0.008              1.00                          0.020
    2        1         956      0.368              0.63                          0.498
    2        2         900      0.504              0.49                          0.997

    with (watch := Watch("cpu")):
        requests()
    print(watch.found.words)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from winnow.hardware import counters
from winnow.hardware.counters import Counters
from winnow.hardware.inventory import available_cores

T = TypeVar("T")

# Share of the wall time that may be lost. Latencies that differ by 5 % are equal on the front (`winnow.study.objectives.TIME`);
# the table above has 0.015 at most where the latency did not suffer, and 0.37 at least where it did.
MOST_LOST = 0.05
# The thread that puts requests computes, or spins while others do, all the time: 0.98 at least in the table, 0.64 at most beside
# other programs. It is less where the memory of the process is swapped, and on systems that do not count waiting times.
LEAST_CPU = 0.8
# Of all cores: beyond it the process has as many threads as cores, or more, and they wait for one another
ALL_CORES = 0.9
# Clocks move by some percent from one request to the next; a GPU that is held down loses far more
SLOWER_CLOCK = 0.15
TICK_S = 0.01  # of /proc/stat: a difference may be too large by one

PAUSES_S = (0.5, 1.0, 2.0)  # before each repetition of a disturbed measurement; there are no more of them


@dataclass(frozen=True)
class Disturbance:
    """What disturbed a measurement: `words` with figures, empty for nothing, and the largest `share` of the time that it took."""

    share: float = 0.0
    words: str = ""

    def __bool__(self) -> bool:
        return bool(self.words)


class Watch:
    """Context manager around a measurement; `found` says afterwards what disturbed it.

    One instance serves all measurements of a process: a GPU's clock is compared with the fastest that it has seen under load.
    """

    def __init__(self, device: str, read: Callable[..., Counters] = counters.read) -> None:
        self.device = device
        self.found = Disturbance()
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
        self.found = judge(self._before, after, self.device, available_cores(), os.getpid(), self._fastest_mhz)


def judge(
    before: Counters,
    after: Counters,
    device: str,
    cores: int,
    process: int = 0,
    fastest_mhz: Mapping[str, int] | None = None,
) -> Disturbance:
    """What disturbed the work between two readings of the counters.

    Args:
        cores: that this process may use.
        process: its id.
        fastest_mhz: clocks that the GPUs have been seen to reach under load, by name.
    """
    found = [*_processor(before, after, cores, device), *_gpus(after, process, fastest_mhz or {})]
    return Disturbance(max((share for share, _ in found), default=0.0), "; ".join(words for _, words in found))


def _processor(before: Counters, after: Counters, cores: int, device: str) -> Iterator[tuple[float, str]]:
    """Share of the wall time that was lost, and to what. On a GPU, too: the processor feeds it."""
    wall_s = after.wall_s - before.wall_s
    if wall_s <= 0:
        return
    own = (after.process_cpu_s - before.process_cpu_s) / wall_s
    others = _difference(before.busy_s, after.busy_s, wall_s)
    others = None if others is None else max(0.0, others - own)
    beside = "" if others is None else f" (other programs used {others:.1f} of {cores} cores)"

    # threads that are more than the cores wait for one another, which is how they were meant to be measured
    from_outside = others is None or others > MOST_LOST
    if before.waited_s is not None and after.waited_s is not None:
        waited = (
            max((s - before.waited_s.get(thread, 0.0) for thread, s in after.waited_s.items()), default=0.0) / wall_s
        )
        if waited > MOST_LOST and from_outside:
            yield waited, f"a thread was ready and waited for a core {waited:.0%} of the time{beside}"
    else:
        # others may wait for one another on cores that this process does not use, so this is only the second choice
        pressed = _difference(before.pressure_s, after.pressure_s, wall_s) or 0.0
        if pressed > MOST_LOST and from_outside and own < ALL_CORES * cores:
            yield pressed, f"processes waited for a core {pressed:.0%} of the time{beside}"

    used = (after.thread_cpu_s - before.thread_cpu_s) / wall_s
    if device == "cpu" and used < LEAST_CPU and own < ALL_CORES * cores:
        yield 1 - used, f"the process had a core {used:.0%} of the time"

    throttled = (_difference(before.throttled_s, after.throttled_s, wall_s) or 0.0) / cores
    if throttled > MOST_LOST:
        yield (
            throttled,
            f"its control group was stopped at its quota {throttled:.0%} of the time (set hardware.threads to it)",
        )

    stolen = after.stolen_s or {}
    taken = [(stolen[core] - s - TICK_S) / wall_s for core, s in (before.stolen_s or {}).items() if core in stolen]
    if (most := max(taken, default=0.0)) > MOST_LOST:
        yield most, f"the hypervisor gave a core to another machine {most:.0%} of the time"


def _difference(before: float | None, after: float | None, wall_s: float) -> float | None:
    return None if before is None or after is None else (after - before) / wall_s


def _gpus(after: Counters, process: int, fastest_mhz: Mapping[str, int]) -> Iterator[tuple[float, str]]:
    for gpu in after.gpus:
        # in a container the driver has other process ids: then the busiest is taken for this one
        own = process if process in gpu.used else max(gpu.used, key=gpu.used.__getitem__, default=0)
        others = {pid: share for pid, share in gpu.used.items() if pid != own}
        share = sum(others.values())
        if share > MOST_LOST:
            names = f"process {next(iter(others))}" if len(others) == 1 else f"{len(others)} other processes"
            yield share, f"{names} used {share:.0%} of the {gpu.name}"
        fastest = fastest_mhz.get(gpu.name, 0)
        slower = 1 - gpu.clock_mhz / fastest if gpu.clock_mhz and fastest else 0.0
        if gpu.slowdowns:
            yield max(slower, MOST_LOST), f"the clock of the {gpu.name} is held down: {', '.join(gpu.slowdowns)}"
        elif slower > SLOWER_CLOCK:
            yield slower, f"the {gpu.name} runs at {gpu.clock_mhz} MHz, {slower:.0%} below the {fastest} MHz of before"


class Repeater:
    """Measures, and measures again what was disturbed: `len(PAUSES_S)` times at most, after growing pauses.

    Args:
        watch: tells whether a measurement was disturbed; None takes each as it is.
        seconds: that the pauses and repetitions of all measurements may take together.
    """

    def __init__(
        self,
        watch: Watch | None,
        seconds: float,
        log: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._watch, self._left_s, self._log, self._sleep = watch, seconds, log, sleep

    def __call__(self, name: str, measure: Callable[[], T]) -> tuple[T, Disturbance]:
        """The result of `measure` and what disturbed it; of several disturbed results the least disturbed one.

        Args:
            name: of what is measured, for the log.
        """
        best, found, lasted_s = self._once(measure)
        said = False
        for pause_s in PAUSES_S:
            if not found or pause_s + lasted_s > self._left_s:
                break
            if not said:
                self._log(f"{name}: disturbed ({found.words}); it is measured again")
                said = True
            self._sleep(pause_s)
            again, disturbed, lasted_s = self._once(measure)
            self._left_s -= pause_s + lasted_s
            if disturbed.share < found.share:
                best, found = again, disturbed
        if found:
            self._log(f"{name}: marked as disturbed ({found.words})")
        return best, found

    def _once(self, measure: Callable[[], T]) -> tuple[T, Disturbance, float]:
        started = time.perf_counter()
        with self._watch or contextlib.nullcontext():
            result = measure()
        found = self._watch.found if self._watch else Disturbance()
        return result, found, time.perf_counter() - started
