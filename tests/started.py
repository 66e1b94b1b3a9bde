"""Runs the commands as a user would, from a process that has imported their libraries: a start takes seconds, and there are many.

    python -m tests.started    # reads a JSON line for each run, and answers with its exit status

Each run is a fork of that process, with the command as its main module, and ends as any process does.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, TextIO

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOAD = "winnow.search.preload", "winnow.training.fit", "lm_eval", "hydra", "optuna", "lightning"
TIMEOUT_S = 600
OWN = ("PYTEST_CURRENT_TEST", "COLUMNS", "LINES")  # differ from test to test, and mean nothing to a command


def run(*words: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS`; in a process of its own where the environment is not that in which the libraries were imported."""
    if environment or not _server().same_environment():
        line, env = [sys.executable, *words], {**os.environ, **environment}
        return subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, env=env, check=False)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = _server().run(list(words), cwd, out, err)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess([sys.executable, *words], status, *texts)


class _Server:
    def __init__(self) -> None:
        self.environment = _environment()
        line = [sys.executable, "-m", "tests.started"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(line, text=True, cwd=REPOSITORY, **pipes)

    def same_environment(self) -> bool:
        return _environment() == self.environment

    def run(self, words: list[str], cwd: Path, out: TextIO, err: TextIO) -> int:
        asked = {"words": words, "cwd": str(cwd), "files": [f"/proc/{os.getpid()}/fd/{f.fileno()}" for f in (out, err)]}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@functools.cache
def _server() -> _Server:
    return _Server()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in OWN}


def _serve() -> dict[str, Any] | None:
    """Answers until there is nothing more to run; in a fork, returns what it shall run."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            answers.close()
            asked: dict[str, Any] = json.loads(line)
            return asked
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{status}\n")
        answers.flush()
    return None


def _become(words: list[str], cwd: str, files: list[str]) -> None:
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    signal.alarm(TIMEOUT_S)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.chdir(cwd)
    script = str(Path(cwd) / words[0])
    sys.argv = [words[0], *words[1:]]
    sys.path[0] = str(Path(script).parent)
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"), vars(main))


if __name__ == "__main__":
    import importlib

    for name in PRELOAD:
        importlib.import_module(name)
    if asked := _serve():
        _become(**asked)
