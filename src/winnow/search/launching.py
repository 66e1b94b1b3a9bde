"""Runs trials through Hydra's launchers, one at a time from each of several threads.

Hydra's launchers are built for batches of jobs from one thread.

- The basic launcher runs a job in this process, where the job owns Hydra's globals, the environment and the logging. Here a job
  only composes the configuration, and leaves the logging alone: the search and other trials log meanwhile. The trial itself then
  runs in child processes beside other trials.
- joblib, Ray and submitit run each job in a process of its own, which calls the task of `search.py`, and wait for it.

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

from omegaconf import DictConfig, open_dict

from winnow.build.job_settings import job_settings
from winnow.core.errors import Reason, UserError, describe
from winnow.core.libraries import require
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import available_cores, visible_gpus
from winnow.search import trial
from winnow.search.outcome import failure

MAX_FAILURES = 3  # failures in a row after which the launcher, not the trial, is at fault


class Launching:
    """Adapter around one Hydra launcher.

    Attributes:
        here: whether jobs run on this machine and share its devices; on other machines a cluster assigns the devices.
    """

    def __init__(self, context: Any, task: Any, config: DictConfig) -> None:
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher
        from hydra.core.plugins import Plugins

        self._context, self._config = context, config
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=config
        )
        self._basic = isinstance(self._launcher, BasicLauncher)
        self._kind = type(self._launcher).__name__
        self.here = self._kind in ("BasicLauncher", "JoblibLauncher")
        self._composing = threading.Lock()
        self._failures = Failures(self.name)

    @property
    def name(self) -> str:
        return str(self._config.hydra.runtime.choices["hydra/launcher"])

    def prepare(self, workers: int) -> None:
        """Prepares the launcher for so many concurrent jobs, before the first one starts."""
        if self._kind == "JoblibLauncher":
            from joblib._parallel_backends import LokyBackend

            # with fewer than two jobs joblib would run them in this process
            self._launcher.joblib["n_jobs"] = max(2, workers)
            _allow_all_cores(LokyBackend.MAX_NUM_THREADS_VARS)
        elif self._kind == "RayLauncher":
            self._start_ray()

    def run(self, number: int, overrides: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """Runs the trial with this number and returns its outcome.

        Raises:
            UserError: the launcher itself failed several times in a row.
        """
        # Hydra sets these variables for a job, also where a launcher runs it on another machine
        lines = [*overrides, *(f"++hydra.job.env_set.{key}='{value}'" for key, value in environment.items())]
        if self._basic:
            return self._run_here(number, lines)
        with self._composing:
            launcher = self._copy_launcher()
            # composes once here, so that mistakes show here and not on a node
            launcher.hydra_context.config_loader.load_sweep_config(launcher.config, lines)
        started = time.monotonic()
        try:
            job = launcher.launch([lines], initial_job_idx=number)[0]
        except (Exception, SystemExit) as error:
            # exceptions of the job itself come back in `job`: here a node or a worker was lost
            self._failures.add(error, started)
            return failure(Reason.LOST, f"{self.name}: {describe(error)}")
        self._failures.clear()
        if job.status.name != "COMPLETED":
            return failure(Reason.ERROR, describe(job._return_value))  # `return_value` would raise it
        return job.return_value  # type: ignore[no-any-return]

    def _copy_launcher(self) -> Any:
        """Returns a copy of the launcher for one thread: it pickles configurations, which change a little when they are read."""
        launcher = copy.copy(self._launcher)
        launcher.config, launcher.hydra_context = copy.deepcopy((self._config, self._context))
        return launcher

    def _run_here(self, number: int, lines: Sequence[str]) -> dict[str, Any]:
        from hydra.core.utils import run_job

        with self._composing:
            sweep_config = self._context.config_loader.load_sweep_config(self._config, list(lines))
            with open_dict(sweep_config):
                sweep_config.hydra.job.id = sweep_config.hydra.job.num = number
            job: Any = run_job(
                task_function=job_settings,
                config=sweep_config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=self._context,
                configure_logging=False,
            )
            if job.status.name != "COMPLETED":
                raise job._return_value
            runtime: Any = job.hydra_cfg.hydra
            folder, environment = Path(runtime.runtime.output_dir), dict(runtime.job.env_set)
        return trial.run(job.return_value, job.overrides, folder, environment)

    def _start_ray(self) -> None:
        """Connects to Ray or starts it here, once, from the main thread."""
        require("ray")
        import ray

        settings = self._launcher.ray_cfg
        # the search repeats a failed trial once itself; retries by Ray would be invisible to it
        settings.remote.setdefault("max_retries", 0)
        _allow_all_cores(("OMP_NUM_THREADS",))
        # a local Ray gives its processes 30 s to start, which a busy machine may miss: hence two attempts
        for is_last in (True,) if settings.init.get("address") else (False, True):
            if ray.is_initialized():
                return
            try:
                ray.init(**dict(settings.init))
            except Exception as error:
                ray.shutdown()
                if is_last:
                    raise UserError(
                        f"hydra/launcher=ray: Ray cannot be started or reached ({describe(error)}); "
                        "see hydra.launcher.ray.init, or leave it out to run here"
                    ) from error


class Failures:
    """Counts failures of the launcher itself in a row; failures of concurrent jobs count once."""

    def __init__(self, launcher: str) -> None:
        self._launcher = launcher
        self._lock = threading.Lock()
        self._kind, self._count, self._last_failure = "", 0, 0.0

    def add(self, error: BaseException, started: float) -> None:
        """Counts the failure of a job that `started` at this time of the monotonic clock.

        Raises:
            UserError: there are `MAX_FAILURES` of the same kind in a row.
        """
        with self._lock:
            kind = type(error).__name__
            if kind == self._kind and started < self._last_failure:
                return
            self._count = self._count + 1 if kind == self._kind else 1
            self._kind, self._last_failure = kind, time.monotonic()
            if self._count >= MAX_FAILURES:
                raise UserError(
                    f"hydra/launcher={self._launcher} has failed {self._count} times in a row, and no trial came back: "
                    f"{describe(error)}; check its settings (hydra.launcher.*), or leave it out to run here"
                ) from error

    def clear(self) -> None:
        with self._lock:
            self._kind, self._count = "", 0


def device_shares(hardware: Hardware, workers: int) -> list[dict[str, str]]:
    """Returns the environment variables that assign each worker its own devices.

    Raises:
        UserError: the machine has fewer devices than the workers need.
    """
    if hardware.device != "cuda":
        return [{} for _ in range(workers)]
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu_count = len(visible_gpus())
    if gpu_count < workers * hardware.devices:
        max_workers = gpu_count // hardware.devices
        raise UserError(
            f"workers={workers} with hardware.devices={hardware.devices} each need {workers * hardware.devices} GPUs, and "
            f"this machine has {gpu_count}"
            + (f" to give; use workers={max_workers}" if outer is not None else f"; use workers={max_workers}")
        )
    entries = outer.split(",") if outer is not None else [str(index) for index in range(gpu_count)]
    # CUDA numbers the fastest device first unless its order is set to that of NVML
    order = {} if outer is not None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    devices = hardware.devices
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(e.strip() for e in entries[k * devices : (k + 1) * devices]), **order}
        for k in range(workers)
    ]


def _allow_all_cores(variables: Sequence[str]) -> None:
    """Lets processes use all cores, as trials of this process do: each measurement has the machine to itself."""
    for variable in variables:
        os.environ.setdefault(variable, str(available_cores()))
