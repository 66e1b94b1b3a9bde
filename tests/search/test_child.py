"""Children: they answer, they fail with a typed reason, and nothing of them is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.test_conf import composed
from winnow.benchmark import harness
from winnow.build import preloads
from winnow.core.cli import options
from winnow.core.errors import Reason
from winnow.hardware.device import RUNTIMES
from winnow.search import child, fork_server

# what the fork server does with its modules, on a torch that looks as if it were built for CUDA
LEAVES_OUT = """
import json, sys
from tests.search import cuda_built
from winnow.search.fork_safety import unsafe_modules
found = unsafe_modules(sys.argv[1:])
print(json.dumps({"asked": cuda_built.asked, "left_out": found, "imported": sorted(sys.modules)}))
"""
# a child of a fork server with these modules
CALLS = """
import json, sys
from pathlib import Path
from tests.logged import logged
from winnow.search import child, fork_server
fork_server.PRELOAD = ("tests.search.cuda_built", *sys.argv[2:])
if __name__ == "__main__":
    fork_server.start_server()
    with logged() as lines:
        answer = child.call("tests.search.workers:cuda", {}, child.Limits(), Path(sys.argv[1]))
        again = child.call("tests.search.workers:cuda", {}, child.Limits(), Path(sys.argv[1]))
    print(json.dumps({**answer, "log": lines, "again": answer == again, "method": fork_server.server.method}))
"""


def run_python(program: Path, *arguments: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}",
    }
    line = [sys.executable, str(program), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def every_preload() -> list[str]:
    """Of every method and benchmark, and the modules of agents and runtimes."""
    methods = ",".join(options("method"))
    wanted = list(fork_server.PRELOAD)
    for benchmark in options("benchmark"):
        wanted += preloads(composed("search", f"method=[{methods}]", f"benchmark={benchmark}", "hardware=l40s_x2"))
    agents = [composed("search", f"agent={name}").agent._target_.rpartition(".")[0] for name in options("agent")]
    runtimes = [f"winnow.runtime.{name}" for name in RUNTIMES]
    return list(dict.fromkeys([*wanted, *agents, *runtimes]))


def test_the_fork_server_leaves_cuda_to_its_children(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(LEAVES_OUT)
    seen = run_python(tmp_path / "program.py", *every_preload())
    assert seen["asked"] == []
    assert {"torch", "transformers", "winnow.search.preload", "lightning"} <= set(seen["imported"])  # not all left out
    assert not {"torch", "transformers", "lm_eval", "winnow.search.preload"} & set(seen["left_out"])


def test_a_preload_that_starts_cuda_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CALLS)
    seen = run_python(tmp_path / "program.py", str(tmp_path / "log"), "tests.search.asks_cuda", "colorsys")
    assert not seen["initialized"] and not seen["bad_fork"]
    assert "colorsys" in seen["imported"] and "tests.search.asks_cuda" not in seen["imported"]
    assert seen["log"] == [
        "tests.search.asks_cuda starts CUDA when it is imported, or cannot be imported: it is left to each trial"
    ]
    assert seen["method"] == "forkserver" and seen["again"]


def test_where_every_fork_is_spoilt_children_are_fresh_processes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CALLS)
    seen = run_python(tmp_path / "program.py", str(tmp_path / "log"), "tests.search.asks_cuda_in_a_server")
    assert not seen["initialized"] and not seen["bad_fork"]
    assert seen["method"] == "spawn" and "fresh process" in seen["log"][0]


def test_without_anything_that_starts_cuda_the_server_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CALLS)
    seen = run_python(tmp_path / "program.py", str(tmp_path / "log"), "colorsys")
    assert seen["log"] == [] and seen["method"] == "forkserver" and "colorsys" in seen["imported"]


def test_a_worker_of_joblib_can_start_children(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    begin = "import multiprocessing, joblib.externals.loky\nif __name__ == '__main__':\n    multiprocessing.set_start_method('loky')\n"
    (tmp_path / "program.py").write_text(begin + CALLS)
    assert run_python(tmp_path / "program.py", str(tmp_path / "log"))["method"] == "forkserver"


def test_the_fork_server_imports_what_methods_and_benchmark_name() -> None:
    assert {*harness.PRELOAD, "compressed_tensors"} <= set(preloads(composed("search", "method=[rtn]")))
    assert "winnow.training.fit" in preloads(composed("search", "method=[lora]"))


WORKERS = "tests.search.workers"


def call(function: str, tmp_path: Path, limits: child.Limits | None = None, prefix: str | None = "", **arguments):
    return child.call(f"{WORKERS}:{function}", arguments, limits or child.Limits(), tmp_path / "log.txt", prefix)


def test_a_child_answers_from_a_process_group_of_its_own(tmp_path: Path, log_lines: list[str]) -> None:
    answer = call("add", tmp_path, a=2, b=3)
    assert answer["sum"] == 5
    assert answer["group"] == answer["pid"] != os.getpgid(0)
    assert log_lines == ["adding"]
    assert "printed by the child" in (tmp_path / "log.txt").read_text()


def test_its_lines_bear_a_prefix_or_are_hidden_and_its_warnings_lie_with_what_it_prints(
    tmp_path: Path, log_lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for prefix in ("[7] ", None):
        call("add", tmp_path, prefix=prefix, a=2, b=3)
    assert log_lines == ["[7] adding"]
    printed = (tmp_path / "log.txt").read_text()
    assert printed.count("2 and 3 are small") == 2 and "adding" not in printed
    assert capfd.readouterr() == ("", "")


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


def test_a_timeout_ends_the_child_and_its_children(tmp_path: Path, log_lines: list[str]) -> None:
    with pytest.raises(child.Failed) as failed:
        call("hang", tmp_path, child.Limits(seconds=1))
    assert failed.value.reason is Reason.TIMEOUT
    pids = [int(pid) for pid in log_lines[0].split()]
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)


def test_it_has_variables_of_its_own(tmp_path: Path) -> None:
    assert child.call(
        f"{WORKERS}:variable",
        {"name": "CUDA_VISIBLE_DEVICES"},
        child.Limits(),
        tmp_path / "log.txt",
        environment={"CUDA_VISIBLE_DEVICES": "1"},
    ) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "1"


def test_one_that_nobody_waits_for_any_more_is_ended(tmp_path: Path, log_lines: list[str]) -> None:
    with pytest.raises(child.Cancelled):
        child.call(
            f"{WORKERS}:hang",
            {},
            child.Limits(),
            tmp_path / "log.txt",
            cancelled=lambda: bool(log_lines),
        )
    assert all(gone(int(pid)) for pid in log_lines[0].split()[:1])


def test_several_threads_may_call_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda a: call("add", tmp_path, a=a, b=1)["sum"], range(12)))
    assert answers == list(range(1, 13))


def test_a_child_over_its_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(child.Failed, match="over the limit") as failed:
        call("swell", tmp_path, child.Limits(seconds=60, memory_bytes=400 * 2**20))
    assert failed.value.reason is Reason.OUT_OF_MEMORY
