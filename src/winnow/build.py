"""Builds objects from a composed configuration: the only caller of `hydra.utils.instantiate`, behind an allow-list.

No `cfg` passes beyond this module: it returns values and objects of `winnow`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from winnow.benchmark.protocol import Benchmark
from winnow.core.errors import UserError
from winnow.core.scalars import check_scalars
from winnow.core.targets import MOVED, target_of
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.knobs import Stage
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.hardware.device import Hardware
    from winnow.study.policy import Policy

ALLOWED_TARGETS = ("winnow.",)  # prefixes; `_target_` may name nothing else


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str, dict[Any, Any]]]:
    """Yields each key that has a `_target_`, with the target and the mapping that contains it."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "_target_":
                yield key, str(value), node
            else:
                yield from _targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{key}.{index}")


def instantiate(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Builds the object that `cfg`, the configuration under `key`, describes.

    Raises:
        UserError: a `_target_` is outside the allow-list, or its class refuses the arguments.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    container = OmegaConf.to_container(cfg, resolve=True)
    for where, target, values in _targets(container, key):
        if where.startswith("agent.") and where.endswith(".llm") and _is_chat_model(target, where):
            continue
        # a mere prefix check would pass "winnow.x.os.system": the definition itself must be in winnow
        if not target.startswith(ALLOWED_TARGETS) or not _defined_in_winnow(target):
            allowed = "targets must be classes or functions of winnow, or as agent.llm a chat model that conf/agent/llm.yaml names"
            raise UserError(f"{where}._target_={target} is not allowed: {allowed}")
        check_scalars(target_of(target), values, where)
        if target in MOVED:
            values["_target_"] = MOVED[target]
            cfg = OmegaConf.create(container)  # type: ignore[assignment]
    try:
        return hydra.utils.instantiate(cfg, **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            raise UserError(f"{key}: {error.__cause__}; see the keys there are with --cfg job") from error
        raise


def _is_chat_model(target: str, where: str) -> bool:
    """Returns whether a target is one of the listed chat models that may steer a search; raises if it is not installed."""
    from winnow.agent.llm.providers import PROVIDERS, check_installed

    if target in PROVIDERS:
        check_installed(target, where)
    return target in PROVIDERS


def _defined_in_winnow(target: str) -> bool:
    try:
        definition = target_of(target)
    except (ImportError, AttributeError):
        return False
    return getattr(definition, "__module__", "").startswith("winnow.")


def methods(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configurations of the chosen methods by name.

    Settings of an experiment for methods that `method=[...]` leaves out are ignored.
    """
    return {str(name): node for name, node in (cfg.method or {}).items() if node is not None and "_target_" in node}


def stages(cfg: DictConfig) -> dict[str, Stage]:
    """Builds the stages of `cfg.method` by name, in their order, and checks the order of their slots."""
    from winnow.method.pipeline import check_order

    pipeline_stages = {name: instantiate(node, f"method.{name}") for name, node in methods(cfg).items()}
    check_order(pipeline_stages)
    return pipeline_stages


def model(cfg: DictConfig, weights: bool = True, dequantize: bool = True) -> LM:
    """Builds the base model without loading it; checks that its files exist and can be read.

    Without `weights` only the configuration of the model is needed. Without `dequantize` a GGUF file stays as it is.
    """
    options = {} if weights else {"weights": False}
    if not dequantize and cfg.model.get("path"):
        options["dequantize"] = False
    lm: LM = instantiate(cfg.model, "model", **options)
    return lm


def hardware(cfg: DictConfig) -> Hardware:
    """Builds the hardware; `Hardware.check` checks that it is present."""
    built: Hardware = instantiate(cfg.hardware, "hardware")
    return built


def benchmark(cfg: DictConfig) -> Benchmark:
    """Builds the benchmark."""
    built: Benchmark = instantiate(cfg.benchmark, "benchmark")
    return built


def policy(cfg: DictConfig) -> Policy:
    """Builds the agent; reads a fallback agent that it names from that agent's own file."""
    from omegaconf import open_dict

    from winnow.core.cli import CONF, options, unknown_option

    def fill(node: Any) -> None:
        name = node.get("fallback")
        if isinstance(name, str):
            if name not in options("agent"):
                raise UserError(unknown_option("agent", name).replace("agent=", "agent.fallback=", 1))
            fallback = OmegaConf.load(CONF / "agent" / f"{name}.yaml")
            if "defaults" in fallback:
                raise UserError(
                    f"agent.fallback={name} may need help itself; give an optimizer, e.g. agent.fallback=gp"
                )
            node["fallback"] = fallback
        for child in node.values():
            if OmegaConf.is_dict(child):
                fill(child)

    root = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    with open_dict(root):
        fill(root.agent)
    built: Policy = instantiate(root.agent, "agent")
    return built


def calibration(cfg: DictConfig) -> Calibration:
    """Builds the calibration; replaces an automatic source by the default source of the model."""
    from winnow.data import corpus

    settings: dict[str, Any] = OmegaConf.to_container(cfg.calibration, resolve=True)  # type: ignore[assignment]
    check_scalars(Calibration, settings, "calibration")
    if settings["source"] == corpus.AUTO:
        model = cfg.get("model") or {}
        settings["source"] = corpus.default_source(str(model.get("_target_")), model.get("path"))
    return Calibration(**settings)


def run(cfg: DictConfig, folder: Path, log: Callable[[str], None]) -> Run:
    """Builds the run: what stages and meters need besides the model."""
    from winnow.data.corpus import check_source
    from winnow.hardware.compute import slow_dtype_warning

    check_scalars(Run, {"seed": cfg.seed})
    calibration_set = calibration(cfg)
    check_source(calibration_set)
    folder.mkdir(parents=True, exist_ok=True)
    machine = hardware(cfg)
    warning = slow_dtype_warning(machine.compute_dtype, machine.device)
    if warning and "study" not in cfg:  # a search logs it once, not in each trial
        log(f"hardware.dtype={machine.dtype}: {warning}")
    return Run(
        folder=folder,
        seed=cfg.seed,
        device=machine.device,
        dtype=machine.compute_dtype,
        log=log,
        calibration=calibration_set,
        base=cfg.get("base"),
        devices=machine.devices,
        parallel=machine.parallel,
        tflops=machine.tflops,
        memory_limit_bytes=machine.memory_limit_bytes,
        carbon_g_per_kwh=machine.carbon_g_per_kwh,
        cache=Path(cfg.outputs) / "cache",
        stage_cache_bytes=int(cfg.get("stage_cache_gb", 0) * 1e9),
    )


def output(cfg: DictConfig, command: str, lm: LM, parts: Mapping[str, Any]) -> Path:
    """Returns the folder for results: `cfg.output`, or a name under `cfg.outputs` derived from the settings."""
    if cfg.output:
        return Path(cfg.output)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    ignored = ("outputs", "output", "dry_run", "wandb")
    relevant = json.dumps({k: v for k, v in settings.items() if k not in ignored}, sort_keys=True)
    digest = hashlib.sha256(relevant.encode()).hexdigest()[:8]
    return Path(cfg.outputs) / command / "-".join([lm.name, *parts, digest])


def scratch(cfg: DictConfig, output: Path) -> Path:
    """Returns the folder for checkpoints and intermediate files of `output`, which is the same for the same command."""
    return (
        Path(cfg.outputs)
        / "scratch"
        / f"{output.name}-{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]}"
    )
