"""Turns a composed configuration into objects: the only caller of `hydra.utils.instantiate`, behind an allow-list.

A `cfg` stops here: what comes out are values and objects of `winnow`.
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
from winnow.core.targets import target_of
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method.knobs import Stage
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.hardware.device import Hardware
    from winnow.study.policy import Policy

ALLOWED_TARGETS = ("winnow.",)  # prefixes; `_target_` may name nothing else


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str, dict[Any, Any]]]:
    """Each key with a `_target_`, that, and what stands beside it."""
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
    """The object that `cfg` (found under `key`) describes.

    Raises:
        UserError: a `_target_` outside the allow-list, or arguments that its class refuses.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    plain = OmegaConf.to_container(cfg, resolve=True)
    for where, target, values in _targets(plain, key):
        if where.startswith("agent.") and where.endswith(".llm") and _is_chat_model(target, where):
            continue
        # "winnow.x.os.system" would pass a mere prefix check: attributes reached through a module's imports are refused
        if not target.startswith(ALLOWED_TARGETS) or not _defined_in_winnow(target):
            allowed = "targets must be classes or functions of winnow, or as agent.llm a chat model that conf/agent/llm.yaml names"
            raise UserError(f"{where}._target_={target} is not allowed: {allowed}")
        check_scalars(target_of(target), values, where)
    try:
        return hydra.utils.instantiate(cfg, **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            raise UserError(f"{key}: {error.__cause__}; see the keys there are with --cfg job") from error
        raise


def _is_chat_model(target: str, where: str) -> bool:
    """Whether a target is one of the chat models, named one by one, that may steer a search; it is installed then."""
    from winnow.agent.llm.providers import PROVIDERS, check_installed

    if target in PROVIDERS:
        check_installed(target, where)
    return target in PROVIDERS


def _defined_in_winnow(target: str) -> bool:
    try:
        found = target_of(target)
    except (ImportError, AttributeError):
        return False
    return getattr(found, "__module__", "").startswith("winnow.")


def methods(cfg: DictConfig) -> dict[str, Any]:
    """The configurations of the methods that are chosen, by name.

    An experiment also configures methods that `method=[...]` then leaves out: what it says of them is not used.
    """
    return {str(name): node for name, node in (cfg.method or {}).items() if node is not None and "_target_" in node}


def stages(cfg: DictConfig) -> dict[str, Stage]:
    """The stages of `cfg.method` by name, in their order, with the order of slots checked."""
    from winnow.method.pipeline import check_order

    made = {name: instantiate(node, f"method.{name}") for name, node in methods(cfg).items()}
    check_order(made)
    return made


def model(cfg: DictConfig, weights: bool = True, dequantize: bool = True) -> LM:
    """The base model, not in memory yet; that its files exist and may be read is checked.

    Without `weights` it is only asked for its configuration, and need not have more; without `dequantize` a GGUF file stays as
    it is.
    """
    told = {} if weights else {"weights": False}
    if not dequantize and cfg.model.get("path"):
        told["dequantize"] = False
    lm: LM = instantiate(cfg.model, "model", **told)
    return lm


def hardware(cfg: DictConfig) -> Hardware:
    """The hardware; that it is there is for `Hardware.check`."""
    made: Hardware = instantiate(cfg.hardware, "hardware")
    return made


def benchmark(cfg: DictConfig) -> Benchmark:
    made: Benchmark = instantiate(cfg.benchmark, "benchmark")
    return made


def policy(cfg: DictConfig) -> Policy:
    """The agent; an agent that it names as its fall-back is read from that one's own file."""
    from omegaconf import open_dict

    from winnow.core.cli import CONF, options, unknown_option

    def fill(node: Any) -> None:
        name = node.get("fallback")
        if isinstance(name, str):
            if name not in options("agent"):
                raise UserError(unknown_option("agent", name).replace("agent=", "agent.fallback=", 1))
            read = OmegaConf.load(CONF / "agent" / f"{name}.yaml")
            if "defaults" in read:
                raise UserError(
                    f"agent.fallback={name} may need help itself; give an optimizer, e.g. agent.fallback=gp"
                )
            node["fallback"] = read
        for child in node.values():
            if OmegaConf.is_dict(child):
                fill(child)

    root = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    with open_dict(root):
        fill(root.agent)
    made: Policy = instantiate(root.agent, "agent")
    return made


def calibration(cfg: DictConfig) -> Calibration:
    from winnow.data import corpus

    given: dict[str, Any] = OmegaConf.to_container(cfg.calibration, resolve=True)  # type: ignore[assignment]
    check_scalars(Calibration, given, "calibration")
    if given["source"] == corpus.AUTO:
        model = cfg.get("model") or {}
        given["source"] = corpus.suited(str(model.get("_target_")), model.get("path"))
    return Calibration(**given)


def run(cfg: DictConfig, folder: Path, log: Callable[[str], None]) -> Run:
    """What stages and probes are given beside the model."""
    from winnow.data.corpus import check_source
    from winnow.hardware.compute import slow_here

    check_scalars(Run, {"seed": cfg.seed})
    known = calibration(cfg)
    check_source(known)
    folder.mkdir(parents=True, exist_ok=True)
    used = hardware(cfg)
    slow = slow_here(used.compute_dtype, used.device)
    if slow and "study" not in cfg:  # a search says it once, not in each trial
        log(f"hardware.dtype={used.dtype}: {slow}")
    return Run(
        folder=folder,
        seed=cfg.seed,
        device=used.device,
        dtype=used.compute_dtype,
        log=log,
        calibration=known,
        base=cfg.get("base"),
        devices=used.devices,
        parallel=used.parallel,
        tflops=used.tflops,
        memory_limit_bytes=used.memory_limit_bytes,
        carbon_g_per_kwh=used.carbon_g_per_kwh,
        cache=Path(cfg.outputs) / "cache",
        stage_cache_bytes=int(cfg.get("stage_cache_gb", 0) * 1e9),
    )


def output(cfg: DictConfig, command: str, lm: LM, parts: Mapping[str, Any]) -> Path:
    """Where results go: `cfg.output`, or a name under `cfg.outputs` that the settings determine."""
    if cfg.output:
        return Path(cfg.output)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    ignored = ("outputs", "output", "dry_run", "wandb")
    relevant = json.dumps({k: v for k, v in settings.items() if k not in ignored}, sort_keys=True)
    digest = hashlib.sha256(relevant.encode()).hexdigest()[:8]
    return Path(cfg.outputs) / command / "-".join([lm.name, *parts, digest])


def scratch(cfg: DictConfig, output: Path) -> Path:
    """A folder for checkpoints and intermediate files of what becomes `output`: the same for the same command."""
    return (
        Path(cfg.outputs)
        / "scratch"
        / f"{output.name}-{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]}"
    )
