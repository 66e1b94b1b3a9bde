"""Fixes for a whole study how models decode (from CUDA graphs or eagerly) and in which data type they compute.

Latencies that were measured in different ways cannot be compared, so `hardware.decode=auto` is resolved before the first trial for
all of them: to graphs where the hardware, the base model and every method of the space allow them. Each trial gets the result as an
override, and a trial that cannot keep to it fails as unservable. Trials on other machines get the data type, too: each of them
would otherwise take the type that its own processor computes fastest.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.build.search_settings import SearchSettings
from winnow.core.errors import Reason, UserError
from winnow.core.targets import target_of
from winnow.hardware.compute import slow_dtype_warning
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.search import child
from winnow.search.overrides import CommandLine

logger = logging.getLogger(__name__)

KEY, DTYPE = "hardware.decode", "hardware.dtype"


def resolve_hardware(settings: SearchSettings, here: bool, command_line: CommandLine) -> tuple[Hardware, CommandLine]:
    """Returns the hardware and the command line of every trial; see `resolve_decode` and `add_decode`."""
    hardware = resolve_decode(settings.hardware, here, settings.methods, settings.lm)
    if slow := slow_dtype_warning(hardware.compute_dtype, hardware.device) if here else "":
        logger.info(f"{DTYPE}={hardware.dtype}: {slow}")
    if not here:
        hardware = dataclasses.replace(hardware, dtype=hardware.compute_dtype)
        command_line = _with_override(command_line, DTYPE, hardware.dtype)
    return hardware, add_decode(command_line, hardware, "decode" in settings.composed["hardware"])


def resolve_decode(hardware: Hardware, here: bool, methods: Mapping[str, Any], lm: LM) -> Hardware:
    """Returns the hardware with the `decode` of every trial; it stays `auto` for runtimes that decide themselves.

    Args:
        here: whether this machine has the device.
        methods: the configuration of each method of the space, by name.
        lm: the base model; a child process reads its configuration, and captures a few such layers if the device is here.

    Raises:
        UserError: `hardware.decode=graph`, and a method or the base model does not allow graphs.
    """
    if hardware.decode == "eager" or hardware.device != "cuda" or hardware.runtime != "transformers":
        return hardware
    reason = _methods_reason(methods) or _base_reason(lm, hardware.device if here else None)
    if reason and hardware.decode == "graph":
        raise UserError(f"{KEY}=graph: {reason}; or set {KEY}=eager")
    if reason:
        logger.info(f"latency is measured without CUDA graphs: {reason} for graphs")
    return dataclasses.replace(hardware, decode="eager" if reason else "graph")


def add_decode(command_line: CommandLine, hardware: Hardware, in_config: bool) -> CommandLine:
    """Returns the command line with the resolved `hardware.decode`, which every trial repeats.

    Args:
        in_config: whether the configuration of the hardware has the key.
    """
    if hardware.device != "cuda" or hardware.decode == "auto":
        return command_line
    return _with_override(command_line, KEY, hardware.decode, in_config)


def _with_override(command_line: CommandLine, key: str, value: str, in_config: bool = True) -> CommandLine:
    others = [line for line in command_line.shared if line.lstrip("+").split("=")[0] != key]
    return dataclasses.replace(command_line, shared=(*others, f"{'' if in_config else '++'}{key}={value}"))


def _methods_reason(methods: Mapping[str, Any]) -> str:
    """Returns which methods do not allow graphs, why, and what to leave out; empty if all allow them."""
    reasons = {name: target_of(node["_target_"]).eager_reason for name, node in methods.items()}
    eager = {name: reason for name, reason in reasons.items() if reason is not None}
    why = " and ".join(f"method {name} {reason}" for name, reason in eager.items())
    return f"{why}; leave {'it' if len(eager) == 1 else ', '.join(eager)} out of method=[...]" if eager else ""


def _base_reason(lm: LM, device: str | None) -> str:
    """Returns why the base model does not allow graphs, judged without its weights; empty if it allows them."""
    loading = lm.loading
    arguments = {
        "path": lm.path,
        "attention": loading.attention,
        "trust_remote_code": loading.trust_remote_code,
        "device": device,
    }
    function = "winnow.runtime.graph_support:unsupported_base_reason"
    with tempfile.TemporaryDirectory() as scratch:  # nothing is written to the study's folder yet
        try:
            result = child.call(function, arguments, child.Limits(), Path(scratch) / "log.txt")
        except child.Failed as failed:
            if failed.reason is Reason.INVALID:
                raise UserError(f"model.path={lm.path} cannot be read: {failed.message}") from None
            result = {"because": f"capturing layers like its own failed ({failed.message})"}
    return f"{lm.name}: {result['because']}; take another model" if result["because"] else ""
