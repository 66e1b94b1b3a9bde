"""Builds objects from a composed configuration: the only caller of `hydra.utils.instantiate`, behind an allow-list.

No configuration passes beyond this package: `command_settings`, `search_settings` and `job_settings` read it once and return frozen
values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from winnow.benchmark.protocol import Benchmark
from winnow.core.errors import UserError, check_seed
from winnow.core.scalars import check_scalars
from winnow.core.targets import MOVED, target_of
from winnow.core.types import Calibration
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


def instantiate(cfg: DictConfig | Mapping[str, Any], key: str, **extra: Any) -> Any:
    """Builds the object that `cfg`, the configuration under `key`, describes.

    Raises:
        UserError: a `_target_` is outside the allow-list, or its class refuses the arguments.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    container = copy.deepcopy(plain(cfg))
    for where, target, values in _targets(container, key):
        if where.startswith("agent.") and where.endswith(".llm") and _is_chat_model(target, where):
            continue
        # a mere prefix check would pass "winnow.x.os.system": the definition itself must be in winnow
        if not target.startswith(ALLOWED_TARGETS) or not _defined_in_winnow(target):
            allowed = "targets must be classes or functions of winnow, or as agent.llm a chat model that conf/agent/llm.yaml names"
            raise UserError(f"{where}._target_={target} is not allowed: {allowed}")
        check_scalars(target_of(target), values, where)
        if isinstance(values.get("seed"), int):
            check_seed(values["seed"], f"{where}.seed")
        values["_target_"] = MOVED.get(target, target)
    try:
        return hydra.utils.instantiate(container, **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            raise UserError(f"{key}: {error.__cause__}; see the keys there are with --cfg job") from error
        raise


def plain(node: Any) -> Any:
    """Returns a node of a configuration as plain Python values, with its interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


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


def methods(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Returns the settings of the chosen methods by name, `_target_` among them.

    Settings of an experiment for methods that `method=[...]` leaves out are ignored.
    """
    nodes = (cfg.method or {}).items()
    return {str(name): plain(node) for name, node in nodes if node is not None and "_target_" in node}


def preloads(cfg: DictConfig) -> list[str]:
    """Returns the modules that the chosen methods and the benchmark ask the fork server to import once."""
    users = [target_of(node["_target_"]) for node in [*methods(cfg).values(), cfg.benchmark]]
    return sorted({module for user in users for module in user.preload})


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

    settings = plain(cfg.calibration)
    check_scalars(Calibration, settings, "calibration")
    if settings["source"] == corpus.AUTO:
        model = cfg.get("model") or {}
        settings["source"] = corpus.default_source(str(model.get("_target_")), model.get("path"))
    return Calibration(**settings)
