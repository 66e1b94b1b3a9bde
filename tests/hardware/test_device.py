"""The hardware options: each composes, says what is missing, and identifies itself."""

from __future__ import annotations

import json

import pytest

from tests.test_conf import composed
from winnow import build
from winnow.core.cli import options
from winnow.core.errors import UserError
from winnow.hardware import device
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import Gpu, filter_visible

GPUS = [Gpu("A", "GPU-aa11", 10), Gpu("B", "GPU-bb22", 20)]


@pytest.mark.parametrize("name", options("hardware"))
def test_every_option_makes_hardware_of_its_own_name(name: str) -> None:
    made = build.hardware(composed("evaluate", f"hardware={name}"))
    assert isinstance(made, Hardware)
    assert made.name == name
    assert made.device == "cpu" or made.memory_limit_bytes is not None


def test_a_missing_device_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "visible_gpus", lambda: ())
    with pytest.raises(UserError, match="hardware=l40s_x2 wants 2 CUDA devices, this machine has 0; use hardware=cpu"):
        Hardware("l40s_x2", device="cuda", devices=2).check()
    monkeypatch.setattr(device, "visible_gpus", lambda: GPUS[:1])
    with pytest.raises(UserError, match="has 1; use hardware=l40s_x2 hardware.devices=1"):
        Hardware("l40s_x2", device="cuda", devices=2).check()
    Hardware("cpu").check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "tpu"),
        ("dtype", "int4"),
        ("decode", "compiled"),
        ("repeats", 0),
        ("output_tokens", 1),
        ("threads", 0),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"hardware\.{field}={value}"):
        Hardware("x", **{field: value})  # type: ignore[arg-type]


def test_a_fingerprint_is_plain_and_tells_hardware_apart() -> None:
    one, two = Hardware("cpu").fingerprint(), Hardware("cpu", threads=1, output_tokens=64).fingerprint()
    assert json.loads(json.dumps(one)) == one
    assert one["cpu"] and one["threads"] >= 1
    assert {key for key in one if one[key] != two[key]} >= {"output_tokens"}
    assert Hardware("cpu").fingerprint() == one


def test_memory_is_the_limit_or_what_there_is() -> None:
    assert Hardware("cpu", memory_limit_bytes=123).memory_bytes() == 123
    assert Hardware("cpu").memory_bytes() > 2**28


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "AB"), ("", ""), ("1", "B"), ("1,0", "BA"), ("0,7,1", "A"), ("GPU-bb", "B"), ("-1", ""), ("GPU-", "")],
)
def test_cuda_visible_devices_narrows_as_cuda_does(visible: str | None, names: str) -> None:
    assert "".join(gpu.name for gpu in filter_visible(GPUS, visible)) == names
