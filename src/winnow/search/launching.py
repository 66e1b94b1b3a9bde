"""Hydra's launchers, for one trial at a time from each of several threads; they are made for batches, from one thread.

- The basic launcher runs a job in this process, and while it does the job owns Hydra's globals, the environment and the logging.
  Here it composes and leaves; the trial itself then runs beside others, in its child processes.
- joblib, Ray and submitit run a job in a process of its own, which calls `search.py`'s task, and wait for it.

    python search.py workers=2
    python search.py hydra/launcher=joblib workers=2
    python search.py hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 workers=8
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from winnow.core.cli import say
from winnow.core.errors import Reason, UserError, describe
from winnow.core.libraries import require
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import available_cores, visible_gpus
from winnow.search import trial

MOST_FAILURES = 3  # of the launcher itself, one after the other: then it is not the trials


class Launching:
    """One launcher.

    Attributes:
        here: whether its jobs run on this machine, and share its devices among them; elsewhere a cluster assigns devices.
    """

    def __init__(self, context: Any, task: Any, config: DictConfig) -> None:
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher
        from hydra.core.plugins import Plugins

        self._context, self._config = context, config
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )
        self._basic = isinstance(self._launcher, BasicLauncher)
        if self._basic:
            self._launcher.setup(hydra_context=context, task_function=_resolved, config=config)
        self._kind = type(self._launcher).__name__
        self.here = self._kind in ("BasicLauncher", "JoblibLauncher")
        self._composing = threading.Lock()
        self._failures = Failures(self.name)

    @property
    def name(self) -> str:
        return str(self._config.hydra.runtime.choices["hydra/launcher"])

    def prepare(self, workers: int) -> None:
        """Makes ready for so many jobs at a time, before the first one starts."""
        if self._kind == "JoblibLauncher":
            from joblib._parallel_backends import LokyBackend

            # of fewer jobs at a time than two joblib makes none at all, but runs them in this process
            self._launcher.joblib["n_jobs"] = max(2, workers)
            _keep_threads(LokyBackend.MAX_NUM_THREADS_VARS)
        elif self._kind == "RayLauncher":
            self._start_ray()

    def run(self, number: int, overrides: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """Runs the trial of a number; returns its outcome.

        Raises:
            UserError: the launcher itself has failed again and again.
        """
        # Hydra's own way to set variables for a job; a launcher that runs it elsewhere takes them along
        lines = [*overrides, *(f"++hydra.job.env_set.{key}='{value}'" for key, value in environment.items())]
        if self._basic:
            return self._run_here(number, lines)
        with self._composing:
            launcher = self._copy()
            launcher.hydra_context.config_loader.load_sweep_config(
                launcher.config, lines
            )  # mistakes show here, not on a node
        started = time.monotonic()
        try:
            job = launcher.launch([lines], initial_job_idx=number)[0]
        except (
            Exception,
            SystemExit,
        ) as error:  # the job's own exceptions come back in `job`: this is a lost node or worker
            self._failures.add(error, started)
            return trial.failure(Reason.LOST, f"{self.name}: {describe(error)}")
        self._failures.clear()
        if job.status.name != "COMPLETED":
            return trial.failure(Reason.ERROR, describe(job._return_value))  # `return_value` would raise it
        return job.return_value  # type: ignore[no-any-return]

    def _copy(self) -> Any:
        """The launcher for one thread: it pickles configurations, and those change a little whenever they are read."""
        launcher = copy.copy(self._launcher)
        launcher.config, launcher.hydra_context = copy.deepcopy((self._config, self._context))
        return launcher

    def _run_here(self, number: int, lines: Sequence[str]) -> dict[str, Any]:
        with self._composing:
            job: Any = self._launcher.launch([list(lines)], initial_job_idx=number)[0]
            if job.status.name != "COMPLETED":
                raise job._return_value
            runtime: Any = job.hydra_cfg.hydra
            folder, environment = Path(runtime.runtime.output_dir), dict(runtime.job.env_set)
        return trial.run(job.return_value, job.overrides, folder, say, environment)

    def _start_ray(self) -> None:
        """Connects to Ray, or starts it here: once, and from the main thread."""
        require("ray")
        import ray

        settings = self._launcher.ray_cfg
        # Ray would start the task again by itself, and the search, which does so once, would not hear of it
        settings.remote.setdefault("max_retries", 0)
        _keep_threads(("OMP_NUM_THREADS",))
        # started here, its own processes have 30 s, which they may miss on a busy machine
        for last in (True,) if settings.init.get("address") else (False, True):
            if ray.is_initialized():
                return
            try:
                ray.init(**dict(settings.init))
            except Exception as error:
                ray.shutdown()
                if last:
                    raise UserError(
                        f"hydra/launcher=ray: Ray cannot be started or reached ({describe(error)}); "
                        "see hydra.launcher.ray.init, or leave it out to run here"
                    ) from error


class Failures:
    """Of the launcher itself, one after the other; those of jobs that ran at the same time count once."""

    def __init__(self, launcher: str) -> None:
        self._launcher = launcher
        self._lock = threading.Lock()
        self._kind, self._count, self._last = "", 0, 0.0

    def add(self, error: BaseException, started: float) -> None:
        """One of a job that was `started` at that time of the monotonic clock.

        Raises:
            UserError: it is one too many, all of one kind.
        """
        with self._lock:
            kind = type(error).__name__
            if kind == self._kind and started < self._last:
                return
            self._count = self._count + 1 if kind == self._kind else 1
            self._kind, self._last = kind, time.monotonic()
            if self._count >= MOST_FAILURES:
                raise UserError(
                    f"hydra/launcher={self._launcher} has failed {self._count} times in a row, and no trial came back: "
                    f"{describe(error)}; check its settings (hydra.launcher.*), or leave it out to run here"
                ) from error

    def clear(self) -> None:
        with self._lock:
            self._kind, self._count = "", 0


def shares(hardware: Hardware, workers: int) -> list[dict[str, str]]:
    """Each worker's own devices, as variables for its trials.

    Raises:
        UserError: there are fewer than the workers want.
    """
    if hardware.device != "cuda":
        return [{} for _ in range(workers)]
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len(visible_gpus())
    if found < workers * hardware.devices:
        most = found // hardware.devices
        raise UserError(
            f"workers={workers} with hardware.devices={hardware.devices} each need {workers * hardware.devices} GPUs, and "
            f"this machine has {found}"
            + (f" to give; use workers={most}" if outer is not None else f"; use workers={most}")
        )
    entries = outer.split(",") if outer is not None else [str(index) for index in range(found)]
    # CUDA counts the fastest first unless it is told to count as NVML does
    order = {} if outer is not None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    each = hardware.devices
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(e.strip() for e in entries[k * each : (k + 1) * each]), **order}
        for k in range(workers)
    ]


def _resolved(cfg: DictConfig) -> DictConfig:
    """The task that the basic launcher is given: interpolations may ask for Hydra's globals, which are the job's only now."""
    OmegaConf.resolve(cfg)
    return cfg


def _keep_threads(variables: Sequence[str]) -> None:
    """Has processes use all cores, as trials of this process do: each thinks that it has the machine alone when it measures."""
    for variable in variables:
        os.environ.setdefault(variable, str(available_cores()))
