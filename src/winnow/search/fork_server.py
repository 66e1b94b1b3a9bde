"""Runs the fork server of this process: children fork from it with torch, transformers and lm-eval already imported."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from winnow.search import fork_safety

logger = logging.getLogger(__name__)

# modules for every trial; the first one knows how to import torch and transformers quickly
PRELOAD = ("winnow.search.preload", "lm_eval")
PROCESS_LOCK = threading.Lock()  # the bookkeeping of children in multiprocessing is not thread-safe


class ForkServer:
    """The fork server and the state of CUDA in its children.

    Attributes:
        modules: modules that the server imports.
        left_out: requested modules that would break CUDA in children (`winnow.search.fork_safety`).
        method: start method of `multiprocessing` for children: `spawn` if CUDA is broken in every fork.
    """

    def __init__(self) -> None:
        self.modules: tuple[str, ...] = PRELOAD
        self.left_out: tuple[str, ...] = ()
        self.method = "forkserver"
        self._checked = False
        self._lock = threading.Lock()

    def start(self, modules: Sequence[str]) -> None:
        """Starts the server, if it is not running, with these modules to import."""
        with self._lock:
            if not self._checked:
                self.modules = tuple(modules)
            self._ensure_running()

    def _ensure_running(self) -> None:
        from multiprocessing import forkserver

        # torch then counts GPUs through NVML and not through the driver, which would break CUDA in every fork
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        # a child learns the start method of this process and must know it: it does not know the one of joblib's workers
        if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
            multiprocessing.set_start_method("forkserver", force=True)
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(self.modules))
        forkserver.ensure_running()

    def context(self) -> Any:
        """Returns the multiprocessing context for children; the first call drops modules that break CUDA in a child."""
        with self._lock:
            self._ensure_running()
            if not self._checked:
                if self._cuda_is_broken():
                    self._drop_unsafe_modules()
                self._checked = True
        return multiprocessing.get_context(self.method)

    def _drop_unsafe_modules(self) -> None:
        from multiprocessing import forkserver

        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        command = [sys.executable, "-m", fork_safety.__name__, *self.modules]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        self.left_out = tuple(json.loads(done.stdout or "[]"))
        for name in self.left_out:
            logger.info(f"{name} starts CUDA when it is imported, or cannot be imported: it is left to each trial")
        self.modules = tuple(name for name in self.modules if name not in self.left_out)
        self._ensure_running()
        if self._cuda_is_broken():
            logger.info("CUDA cannot be used in a fork here: each trial starts a fresh process, which takes seconds")
            self.method = "spawn"

    def _cuda_is_broken(self) -> bool:
        """Returns whether a child cannot use CUDA, or cannot even be started."""
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_cuda_state, args=(sender,))
        try:
            with PROCESS_LOCK:
                process.start()
            sender.close()
            return bool(receiver.recv())
        except (EOFError, OSError):  # an import has killed the server
            return True
        finally:
            receiver.close()


server = ForkServer()


def start_server(extra: Sequence[str] = ()) -> None:
    """Starts the fork server; it imports `PRELOAD` and `extra` in the background while the caller prepares its work."""
    server.start((*PRELOAD, *extra))


def left_out() -> tuple[str, ...]:
    """Returns the modules that children import themselves."""
    server.context()
    return server.left_out


def _send_cuda_state(connection: Connection) -> None:
    """Runs in a child: sends whether CUDA is broken there."""
    connection.send(fork_safety.cuda_is_broken())
    os._exit(0)
