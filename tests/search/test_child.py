"""Children: they answer, they fail with a typed reason, and nothing of them is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.test_conf import composed
from winnow.benchmark import harness
from winnow.cli import options
from winnow.search import child
from winnow.search.trial import preloads
from winnow.types import Reason

# torch answers from NVML where the variable is set, and else through CUDA, which then works in no fork
WITHOUT_CUDA = """
import importlib, os, sys, torch
asked = []
def watch(name, real):
    def watched(*arguments):
        if name != "is_available" or os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1":
            asked.append(name)
        return real(*arguments)
    setattr(torch.cuda, name, watched)
for name in ("is_available", "init", "_lazy_init", "current_device", "get_device_properties", "get_device_capability"):
    watch(name, getattr(torch.cuda, name))
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError:
        pass  # of an extra that is not installed
    if asked:
        sys.exit(f"{module} asks CUDA: {asked}")
"""


def test_the_fork_server_leaves_cuda_to_its_children() -> None:
    methods = ",".join(options("method"))
    modules = preloads(composed("search", f"method=[{methods}]", "hardware=l40s_x2"))
    line = [sys.executable, "-c", WITHOUT_CUDA, *child.PRELOAD, *modules]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert {"bitsandbytes", "peft"} <= set(preloads(composed("search", f"method=[{methods}]", "hardware=cpu")))


def test_the_fork_server_imports_what_methods_and_benchmark_name() -> None:
    assert {*harness.PRELOAD, "compressed_tensors"} <= set(preloads(composed("search", "method=[rtn]")))
    assert "winnow.recovery.fit" in preloads(composed("search", "method=[lora]"))


WORKERS = "tests.search.workers"


def call(function: str, tmp_path: Path, limits: child.Limits | None = None, log=lambda line: None, **arguments):
    return child.call(f"{WORKERS}:{function}", arguments, limits or child.Limits(), log, tmp_path / "log.txt")


def test_a_child_answers_from_a_process_group_of_its_own(tmp_path: Path) -> None:
    lines: list[str] = []
    answer = call("add", tmp_path, a=2, b=3, log=lines.append)
    assert answer["sum"] == 5
    assert answer["group"] == answer["pid"] != os.getpgid(0)
    assert lines == ["adding"]
    assert "printed by the child" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("value", Reason.ERROR, "ValueError: a bad value"),
        ("user", Reason.INVALID, "method.x=1 is out of range"),
        ("missing", Reason.MISSING, "winnow[some]"),
        ("memory", Reason.OUT_OF_MEMORY, "MemoryError"),
        ("torch_memory", Reason.OUT_OF_MEMORY, "can't allocate memory"),
        ("disk", Reason.DISK_FULL, "No space left"),
        ("exit", Reason.ERROR, "SystemExit"),
        ("segfault", Reason.CRASHED, "SIGSEGV"),
        ("vanish", Reason.CRASHED, "code 7"),
    ],
)
def test_failures_are_typed(tmp_path: Path, kind: str, reason: Reason, message: str) -> None:
    with pytest.raises(child.Failed) as failed:
        call("fail", tmp_path, kind=kind)
    assert failed.value.reason is reason
    assert message in failed.value.message


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_timeout_ends_the_child_and_its_children(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(child.Failed) as failed:
        call("hang", tmp_path, child.Limits(seconds=1), log=lines.append)
    assert failed.value.reason is Reason.TIMEOUT
    pids = [int(pid) for pid in lines[0].split()]
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)


def test_it_has_variables_of_its_own(tmp_path: Path) -> None:
    assert child.call(
        f"{WORKERS}:variable",
        {"name": "CUDA_VISIBLE_DEVICES"},
        child.Limits(),
        print,
        tmp_path / "log.txt",
        environment={"CUDA_VISIBLE_DEVICES": "1"},
    ) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "1"


def test_one_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(child.Cancelled):
        child.call(
            f"{WORKERS}:hang",
            {},
            child.Limits(),
            lines.append,
            tmp_path / "log.txt",
            cancelled=lambda: bool(lines),
        )
    assert all(gone(int(pid)) for pid in lines[0].split()[:1])


def test_several_threads_may_call_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda a: call("add", tmp_path, a=a, b=1)["sum"], range(12)))
    assert answers == list(range(1, 13))


def test_a_child_over_its_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(child.Failed, match="over the limit") as failed:
        call("swell", tmp_path, child.Limits(seconds=60, memory_bytes=400 * 2**20))
    assert failed.value.reason is Reason.OUT_OF_MEMORY
