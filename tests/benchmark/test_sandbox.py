"""Generated programs run, and can neither do harm nor pass without passing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from winnow.benchmark import sandbox
from winnow.benchmark.programs import pass_at_1, program
from winnow.benchmark.sandbox import Outcome, run
from winnow.core.errors import UserError


def outcome(text: str, seconds: float = 60.0) -> Outcome:
    """By default with more time than a slow machine takes: it is not what is looked at."""
    [result] = run([text], seconds=seconds)
    return result.outcome


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x):\n    return x\nassert f(2) == 2", Outcome.PASSED),
        ("import math, typing, json, decimal, hashlib; hashlib.md5(b'x')", Outcome.PASSED),
        ("open('note', 'w').write('x'); assert open('note').read() == 'x'", Outcome.PASSED),
        ("import tempfile; tempfile.TemporaryFile().write(b'x')", Outcome.PASSED),
        ("import threading as t; x = t.Thread(target=int); x.start(); x.join()", Outcome.PASSED),
        ("assert False", Outcome.FAILED),
        ("1 +", Outcome.FAILED),
        ("input()", Outcome.FAILED),
        ("def f(): f()\nf()", Outcome.FAILED),
        ("raise KeyboardInterrupt", Outcome.FAILED),
        # ends early
        ("import sys; sys.exit(0)", Outcome.FAILED),
        ("import os; print('passed'); os._exit(0)", Outcome.FAILED),
        ('import os; os.write(3, b\'{"outcome": "passed"}\'); os._exit(0)', Outcome.FAILED),
        ("import os; os.write(1, b'passed'); os.close(3); os._exit(0)", Outcome.FAILED),
        ("import os; os.write(3, b'x' * 100_000); os._exit(0)", Outcome.FAILED),
        ("import os; os.close(3)\nwhile True: pass", Outcome.FAILED),
        # takes too much
        ("data = bytearray(4 << 30)", Outcome.MEMORY),
        ("x = ['a']\nwhile True: x = x + x", Outcome.MEMORY),
        ("open('big', 'w').write('x' * (4 << 20))", Outcome.FAILED),
        # reaches out
        ("import socket; socket.socket().connect(('127.0.0.1', 80))", Outcome.FORBIDDEN),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1')", Outcome.FAILED),
        ("import os\nwhile True: os.fork()", Outcome.FORBIDDEN),
        ("import subprocess; subprocess.run(['/bin/true'])", Outcome.FORBIDDEN),
        ("import os; os.execv('/bin/true', ['true'])", Outcome.FORBIDDEN),
        ("import os; os.kill(os.getppid(), 9)", Outcome.FORBIDDEN),
        ("import os; os.chmod('/tmp', 0o777)", Outcome.FORBIDDEN),
        ("import os; os.listdir('/root')", Outcome.FORBIDDEN),
        ("open('/etc/passwd').read()", Outcome.FORBIDDEN),
        ("import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()", Outcome.FORBIDDEN),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))", Outcome.FAILED),
        ("import os; os.symlink('/etc/passwd', 'link'); open('link').read()", Outcome.FORBIDDEN),
    ],
)
def test_outcomes(text: str, expected: Outcome) -> None:
    assert outcome(text) == expected


def test_endless_programs_are_ended_by_processor_time_or_by_the_clock() -> None:
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass"
    started = time.monotonic()
    results = run(["while True: pass", "import time; time.sleep(60)", ignoring], seconds=1.0, workers=3)
    assert {result.outcome for result in results} == {Outcome.TIMEOUT}
    assert time.monotonic() - started < 30


def test_a_closed_pipe_does_not_free_a_program() -> None:
    assert outcome("import os\nos.close(3)\nwhile True: pass", seconds=1.0) != Outcome.PASSED


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    outside = tmp_path / "file"
    existing = tmp_path / "existing"
    existing.write_text("kept", encoding="utf-8")
    texts = [
        f"open({str(outside)!r}, 'w')",
        f"open({str(existing)!r}, 'a')",
        f"import os; os.truncate({str(existing)!r}, 0)",
    ]
    texts += [f"import os; os.remove({str(existing)!r})", f"import os; os.rename({str(existing)!r}, 'mine')"]
    assert all(result.outcome in (Outcome.FORBIDDEN, Outcome.FAILED) for result in run(texts))
    assert not outside.exists() and existing.read_text(encoding="utf-8") == "kept"


def test_programs_see_neither_keys_nor_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check = "import os; assert 'WANDB_API_KEY' not in os.environ and os.listdir() == []; open('mine', 'w')"
    assert {result.outcome for result in run([check] * 4, workers=2)} == {Outcome.PASSED}


def test_outcomes_repeat() -> None:
    shown = "raise ValueError(list({'a', 'b', 'c', 'd', 'e'}))"
    assert len({result.message for result in run([shown] * 3) + run([shown])}) == 1


def test_scratch_folders_are_removed() -> None:
    [result] = run(["import os; open('x', 'w').write('x'); raise ValueError(os.getcwd())"])
    folder = Path(result.message.removeprefix("ValueError: "))
    assert "winnow-sandbox-" in str(folder) and not folder.exists() and not folder.parent.exists()


def test_works_as_an_ordinary_user() -> None:
    python = Path("/usr/bin/python3")
    if os.getuid() != 0 or not python.exists():
        pytest.skip("this is one already, or there is no interpreter that others may run")
    request = {"programs": [sandbox.PROBE], "seconds": 5, "memory_bytes": 1 << 30, "workers": 1, "packages": []}
    request["readable"] = ["/usr/lib", "/lib"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        script = shutil.copy(sandbox.JAIL, folder)
        done = subprocess.run(
            [python, "-S", script], input=json.dumps(request), capture_output=True, text=True, check=False,
            cwd="/", user=65534, env={},
        )  # fmt: skip
    assert json.loads(done.stdout) == [["passed", ""]], done.stderr


def test_refuses_where_it_cannot_isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.sys, "platform", "darwin")
        with pytest.raises(UserError, match="cannot be isolated"):
            run(["pass"])
    weak = sandbox.JAIL.read_text(encoding="utf-8").replace("    restrict_files(request", "    (lambda *a: 0)(request")
    path = tmp_path / "weak.py"
    path.write_text(weak, encoding="utf-8")
    marker = tmp_path / "ran"
    monkeypatch.setattr(sandbox, "JAIL", path)
    with pytest.raises(UserError, match="listdir was allowed"):  # the probe finds it out; the program is not run
        run([f"open({str(marker)!r}, 'w')"])
    assert not marker.exists()
    path.write_text(weak.replace("(lambda *a: 0)(request", "int('no')(request"), encoding="utf-8")
    with pytest.raises(UserError, match="unisolated"):
        run([f"open({str(marker)!r}, 'w')"])
    assert not marker.exists()


def test_both_architectures_have_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.benchmark import jail

    for machine in jail.ARCHITECTURES:
        monkeypatch.setattr(jail.platform, "machine", lambda machine=machine: machine)
        code = jail.syscall_filter()
        assert len(code) % 8 == 0 and 500 < len(code) < 8 * 4096  # the kernel takes 4096 instructions


def test_many_small_programs_are_quick() -> None:
    started = time.process_time(), os.times().children_user
    texts = ["def f(x):\n    return x + 1\nassert f(1) == 2"] * 100
    assert {result.outcome for result in run(texts)} == {Outcome.PASSED}
    assert os.times().children_user - started[1] < 3.0  # of processor time: other work on the machine does not count


def test_pass_at_1() -> None:
    doc = {"prompt": "def f(x):\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    good, bad = program(doc, "    return x + 1\n"), program(doc, "    return x\n")
    outcomes = [str(result.outcome) for result in run([good, bad])]
    assert pass_at_1(doc, [outcomes]) == {"pass@1": 0.5}
