"""Bytes held are counted exactly: by dtype, tied once, packed as packed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from winnow.core.errors import UserError
from winnow.hardware.footprint import PeakMemory, disk_bytes, weights_memory_bytes
from winnow.model.lm import LM


def test_half_the_width_is_half_the_bytes(make_llama: Any) -> None:
    model = make_llama()
    parameters = sum(p.numel() for p in model.parameters())
    held = weights_memory_bytes(model)
    buffers = sum(b.numel() * b.element_size() for b in {b.data_ptr(): b for b in model.buffers()}.values())
    assert held == 4 * parameters + buffers
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert weights_memory_bytes(model) == 2 * parameters + buffers


def test_tied_weights_count_once(make_llama: Any) -> None:
    tied, free = make_llama(), make_llama(tie_word_embeddings=False)
    assert weights_memory_bytes(free) - weights_memory_bytes(tied) == 4 * 96 * 32


def test_a_view_keeps_its_whole_storage_and_meta_holds_nothing() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(100, 4)[:4])
    assert weights_memory_bytes(layer) == 4 * 100 * 4
    assert weights_memory_bytes(nn.Linear(4, 4, device="meta")) == 0


def test_loading_holds_what_was_saved(folder: Path, make_llama: Any) -> None:
    assert weights_memory_bytes(LM(folder).model) == weights_memory_bytes(make_llama())


@pytest.mark.parametrize("double", [False, True])
def test_nf4_counts_packed_with_its_scales(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    size, block = 256, 64
    layer = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compress_statistics=double)
    layer.load_state_dict({"weight": torch.randn(size, size)})
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.uint8
    state = layer.weight.quant_state
    blocks = size * size // block
    scales = (blocks + 4 * blocks // 256 + 4 * 256 + 4) if double else 4 * blocks
    held = weights_memory_bytes(layer)
    assert held == size * size // 2 + scales + 4 * state.code.numel()


def test_int8_counts_its_row_scales() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer = layer.to("cpu")
    with torch.inference_mode():
        layer(torch.randn(1, 64))
    assert 32 * 64 + 4 * 32 <= weights_memory_bytes(layer) <= 32 * 64 + 4 * 32 + 64


def test_size_on_disk_is_of_files(folder: Path, make_llama: Any) -> None:
    assert disk_bytes(LM(folder)) == sum(p.stat().st_size for p in folder.iterdir())
    with pytest.raises(UserError, match="save it first"):
        disk_bytes(LM(model=make_llama(), name="fresh"))
    with pytest.raises(UserError, match="neither a folder nor"):
        disk_bytes(LM("nobody/no-such-model"))


def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    size = 2**27
    with PeakMemory("cpu") as idle:
        pass
    with PeakMemory("cpu") as busy:
        mapped = mmap.mmap(-1, size)  # not the allocator's: it may have as much left from other tests
        for page in range(0, size, mmap.PAGESIZE):
            mapped[page] = 1
        mapped.close()
    assert busy.peak_bytes - idle.peak_bytes >= 0.9 * size
    if not busy.since_start:
        with PeakMemory("cpu") as after:
            pass
        assert after.peak_bytes < busy.peak_bytes
