"""What a whole study has in common: one way of decoding, from CUDA graphs or eagerly, and one type that is computed in.

Latencies that were measured in different ways cannot be compared, so `hardware.decode=auto` is settled before the first trial, for
all of them: for graphs where the hardware, the base model and every method of the space allow them. Each trial is told the outcome,
and one that cannot keep to it fails as unservable. Trials on other machines are told the type, too: each would else take what its
own processor computes fastest.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from winnow import build
from winnow.core.errors import Reason, UserError
from winnow.core.targets import target_of
from winnow.hardware.compute import slow_here
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.search import child
from winnow.search.overrides import Typed

KEY, DTYPE = "hardware.decode", "hardware.dtype"


def settle(
    config: DictConfig, hardware: Hardware, here: bool, typed: Typed, lm: LM, log: Callable[[str], None]
) -> tuple[Hardware, Typed]:
    """The hardware and the command line of every trial of the search that `config` describes; see `settled` and `told`."""
    hardware = settled(hardware, here, build.methods(config), lm, log)
    if slow := slow_here(hardware.compute_dtype, hardware.device) if here else "":
        log(f"{DTYPE}={hardware.dtype}: {slow}")
    if not here:
        hardware = dataclasses.replace(hardware, dtype=hardware.compute_dtype)
        typed = _with(typed, DTYPE, hardware.dtype)
    return hardware, told(typed, hardware, "decode" in config.hardware)


def settled(hardware: Hardware, here: bool, methods: Mapping[str, Any], lm: LM, log: Callable[[str], None]) -> Hardware:
    """The hardware with `decode` as every trial will have it; it stays `auto` for runtimes that decide themselves.

    Args:
        here: whether this machine has the device.
        methods: the configuration of each method of the space, by name.
        lm: the base model; a child process looks at its configuration, and captures a few such layers where the device is.

    Raises:
        UserError: graphs are asked for, and a method or the base model does not allow them.
    """
    if hardware.decode == "eager" or hardware.device != "cuda" or hardware.runtime != "transformers":
        return hardware
    because = _methods_because(methods) or _base_because(lm, hardware.device if here else None, log)
    if because and hardware.decode == "graph":
        raise UserError(f"{KEY}=graph: {because}; or set {KEY}=eager")
    if because:
        log(f"latency is measured without CUDA graphs: {because} for graphs")
    return dataclasses.replace(hardware, decode="eager" if because else "graph")


def told(typed: Typed, hardware: Hardware, known: bool) -> Typed:
    """The command line with the way of decoding that was settled, which every trial's own repeats.

    Args:
        known: whether the configuration of the hardware has the key.
    """
    if hardware.device != "cuda" or hardware.decode == "auto":
        return typed
    return _with(typed, KEY, hardware.decode, known)


def _with(typed: Typed, key: str, value: str, known: bool = True) -> Typed:
    others = [line for line in typed.shared if line.lstrip("+").split("=")[0] != key]
    return dataclasses.replace(typed, shared=(*others, f"{'' if known else '++'}{key}={value}"))


def _methods_because(methods: Mapping[str, Any]) -> str:
    """Which methods do not allow graphs, why, and what to leave out; empty where all do."""
    found = {name: target_of(node["_target_"]).eager_because for name, node in methods.items()}
    eager = {name: because for name, because in found.items() if because is not None}
    said = " and ".join(f"method {name} {because}" for name, because in eager.items())
    return f"{said}; leave {'it' if len(eager) == 1 else ', '.join(eager)} out of method=[...]" if eager else ""


def _base_because(lm: LM, device: str | None, log: Callable[[str], None]) -> str:
    """Why the base model does not allow graphs, as far as can be told without its weights; empty where it does."""
    loading = lm.loading
    arguments = {
        "path": lm.path,
        "attention": loading.attention,
        "trust_remote_code": loading.trust_remote_code,
        "device": device,
    }
    function = "winnow.runtime.graph_support:unsupported_base"
    with tempfile.TemporaryDirectory() as scratch:  # nothing is written to the study's folder yet
        try:
            result = child.call(function, arguments, child.Limits(), log, Path(scratch) / "log.txt")
        except child.Failed as failed:
            if failed.reason is Reason.INVALID:
                raise UserError(f"model.path={lm.path} cannot be read: {failed.message}") from None
            result = {"because": f"capturing layers like its own failed ({failed.message})"}
    return f"{lm.name}: {result['because']}; take another model" if result["because"] else ""
