"""What a device computes fastest in, read off flags and capabilities; what is saved does not depend on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from winnow.hardware import compute, inventory
from winnow.hardware.device import Hardware
from winnow.hardware.inventory import Gpu
from winnow.hardware.run import Run

EPYC_MILAN = {"avx", "avx2", "fma", "f16c"}
ICE_LAKE = {*EPYC_MILAN, "avx512f", "avx512bw", "avx512_vnni"}
EPYC_GENOA = {*ICE_LAKE, "avx512_bf16"}
SAPPHIRE_RAPIDS = {*EPYC_GENOA, "amx_bf16", "amx_tile"}
GRAVITON_3 = {"asimd", "sve", "bf16", "svebf16"}


@pytest.mark.parametrize(
    ("flags", "environment", "fast"),
    [
        (EPYC_MILAN, {}, False),
        (ICE_LAKE, {}, False),
        (EPYC_GENOA, {}, True),
        (SAPPHIRE_RAPIDS, {}, True),
        (GRAVITON_3, {}, True),
        (set(), {}, False),
        (EPYC_GENOA, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (EPYC_GENOA, {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        (EPYC_GENOA, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (SAPPHIRE_RAPIDS, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
        (EPYC_GENOA, {"ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        (EPYC_MILAN, {"ONEDNN_MAX_CPU_ISA": "ALL"}, False),
    ],
)
def test_processors(flags: set[str], environment: dict[str, str], fast: bool) -> None:
    assert compute.has_fast_bfloat16(flags, environment) is fast


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), "float32"), ((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_gpus(capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute.dtype_for_capability(capability) == dtype
    slower = [Gpu("new", "GPU-0", 1, (9, 0)), Gpu("old", "GPU-1", 1, capability)]
    monkeypatch.setattr(inventory, "visible_gpus", lambda: tuple(slower))
    assert compute.fastest_dtype("cuda") == dtype


def test_a_gpu_that_is_not_here_is_taken_for_a_recent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "visible_gpus", lambda: ())
    assert compute.fastest_dtype("cuda") == "bfloat16"


def on(monkeypatch: pytest.MonkeyPatch, flags: set[str]) -> None:
    monkeypatch.setattr(compute, "_processor_flags", lambda: frozenset(flags))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_auto_is_resolved_and_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, flags in (("old", EPYC_MILAN), ("new", EPYC_GENOA)):
        on(monkeypatch, flags)
        found[name] = Hardware("cpu").fingerprint()["dtype"], Run(Path()).compute_dtype
        assert Hardware("cpu", dtype="float16").compute_dtype == "float16"
    assert found == {"old": ("float32", "float32"), "new": ("bfloat16", "bfloat16")}


def test_what_is_slow_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, EPYC_MILAN)
    assert "float32 is up to 10 times faster" in compute.slow_dtype_warning("bfloat16", "cpu")
    assert not compute.slow_dtype_warning("float32", "cpu")
    on(monkeypatch, EPYC_GENOA)
    assert not compute.slow_dtype_warning("bfloat16", "cpu")


@pytest.mark.parametrize("flags", [EPYC_MILAN, EPYC_GENOA], ids=["old", "new"])
def test_a_training_takes_the_faster_precision_and_says_if_another_one_was_asked_for(
    flags: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, log_lines: list[str]
) -> None:
    pytest.importorskip("peft")
    from winnow.method.lora import Lora
    from winnow.model.pretrained import pretrained

    on(monkeypatch, flags)
    fast = "32-true" if flags is EPYC_MILAN else "bf16-mixed"
    quick: dict[str, Any] = {"steps": 2, "tokens_per_batch": 128, "max_length": 32, "rank": 4}
    for precision, expected in (("auto", fast), ("bf16-mixed", "bf16-mixed")):
        log_lines.clear()
        lm, notes = Lora(**quick, precision=precision)(pretrained(str(tiny)), Run(tmp_path))
        assert notes["training"]["precision"] == expected
        said = [line for line in log_lines if "slow on this processor" in line]
        assert len(said) == (precision != "auto" and flags is EPYC_MILAN)
        assert str(lm.model.dtype) == "torch.bfloat16"


def test_a_served_model_is_computed_in_the_fastest_type(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    import torch

    from winnow.model.pretrained import pretrained
    from winnow.runtime import serving

    for flags, dtype in ((EPYC_MILAN, torch.float32), (EPYC_GENOA, torch.bfloat16)):
        on(monkeypatch, flags)
        with serving(pretrained(str(tiny)), Hardware("cpu")) as served:
            assert served.model.dtype == dtype  # type: ignore[attr-defined]
        with serving(pretrained(str(tiny), dtype="float16"), Hardware("cpu")) as served:
            assert served.model.dtype == torch.float16  # type: ignore[attr-defined]


def test_weights_that_are_wider_than_the_fastest_type_are_not_narrowed_to_be_compressed(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    import torch

    from winnow.method.blocks import compute_dtype
    from winnow.model.pretrained import pretrained

    run = Run(Path(), dtype="bfloat16")
    for stored, expected in (("float32", torch.float32), ("float16", torch.float32), ("auto", torch.bfloat16)):
        assert compute_dtype(pretrained(str(tiny), dtype=stored).model, run) == expected
    on_gpu = dataclasses.replace(run, device="cuda")
    assert compute_dtype(pretrained(str(tiny), dtype="float16").model, on_gpu) == torch.float16
