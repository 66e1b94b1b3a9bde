"""Runs generated Python programs in the sandbox of `jail.py`.

Before the programs, a probe runs in the same way and checks that files, network, processes and signals are out of reach; no
program runs if the probe fails. 400 small programs take about 2 s on two cores.

    python -c "from winnow.benchmark.sandbox import run; print(run(['assert 1 + 1 == 2', 'import socket; socket.socket()']))"
"""

from __future__ import annotations

import enum
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from winnow.core.errors import UserError
from winnow.hardware.inventory import available_cores

JAIL = Path(__file__).with_name("jail.py")
SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/usr/share/zoneinfo", "/dev/urandom", "/dev/zero")

# run like any program; it passes only if all of these operations are refused
PROBE = """
import os, socket

def refused(action, *arguments):
    try:
        action(*arguments)
    except PermissionError:
        return
    raise AssertionError(f"{action.__name__} was allowed")

refused(os.listdir, "/")
refused(open, os.path.join(os.path.dirname(os.getcwd()), "probe"), "w")
refused(socket.socket)
refused(os.fork)
refused(os.kill, os.getppid(), 0)
refused(os.execv, "/bin/true", ["true"])
open("inside", "w").close()
assert set(os.environ) == {"TMPDIR"}, "the environment was passed on"
"""


class Outcome(enum.StrEnum):
    """The outcome of a program."""

    PASSED = "passed"  # control came back after its last line
    FAILED = "failed"  # an exception, a failed assertion, an early exit, a crash
    TIMEOUT = "timeout"
    MEMORY = "memory"
    FORBIDDEN = "forbidden"  # it failed because files, network or processes were refused


@dataclass(frozen=True)
class Result:
    outcome: Outcome
    message: str = ""


def run(
    programs: Sequence[str], seconds: float = 3.0, memory_bytes: int = 1 << 30, workers: int | None = None
) -> list[Result]:
    """Runs each program in a process of its own, and returns its outcome.

    Args:
        seconds: processor time that a program may take; the wall-clock limit is four times as long.
        memory_bytes: address space that a program may use.
        workers: programs at once; None runs one per core.

    Raises:
        UserError: this machine cannot isolate programs; none is run.
    """
    if not programs:
        return []
    [probe] = _serve([PROBE], 10.0, memory_bytes, 1)
    if probe[0] != Outcome.PASSED:
        raise _isolation_error(f"{probe[0]}, {probe[1]}")
    results = _serve(programs, seconds, memory_bytes, workers or available_cores())
    if any(outcome == "unisolated" for outcome, _ in results):
        raise _isolation_error(next(message for outcome, message in results if outcome == "unisolated"))
    return [Result(Outcome(outcome), message) for outcome, message in results]


def _isolation_error(reason: str) -> UserError:
    return UserError(
        f"generated code is not run here, because it cannot be isolated ({reason}); that takes Linux 5.13 or later with "
        "Landlock and seccomp, on x86-64 or aarch64. Leave out the benchmarks that run code, or run them elsewhere"
    )


def _serve(programs: Sequence[str], seconds: float, memory_bytes: int, workers: int) -> list[tuple[str, str]]:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise _isolation_error(f"this is {platform.system()} on {platform.machine()}")
    paths = sysconfig.get_paths()
    packages = list(dict.fromkeys((paths["purelib"], paths["platlib"])))
    standard = [os.path.realpath(paths[key]) for key in ("stdlib", "platstdlib")]
    request = {
        "programs": list(programs),
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "workers": workers,
        "packages": packages,
        "readable": [*standard, str(Path(sys.base_prefix).resolve() / "lib"), *packages, *SYSTEM, *DEVICES],
    }
    environment = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}  # a fixed order of sets of strings: outcomes repeat
    flags = ["-B", "-P", "-S", "-s"]
    server = subprocess.run(
        [sys.executable, *flags, str(JAIL)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd="/",
        env=environment,
        check=False,
    )
    try:
        results: list[tuple[str, str]] = json.loads(server.stdout)
    except json.JSONDecodeError:
        last_line = (server.stderr.strip().splitlines() or [f"exit code {server.returncode}"])[-1]
        raise RuntimeError(f"the sandbox's server failed: {last_line}") from None
    return results
