"""Round to nearest: its grid, and that nothing is lost on the way to the disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.method.test_conformance import logits
from winnow.core.errors import UserError
from winnow.method import pipeline
from winnow.model.layers import linears
from winnow.model.pretrained import pretrained


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rtn_is_lossless_on_disk_at_every_width(bits: int, tmp_path: Path, run_in) -> None:
    from winnow.method.rtn import RTN
    from winnow.model.save import save
    from winnow.nano.embedded import trained

    compressed = pipeline.apply(trained(), {"rtn": RTN(bits, 32)}, run_in)
    before = logits(compressed)
    save(compressed, tmp_path / "artifact")
    torch.testing.assert_close(logits(pretrained(str(tmp_path / "artifact"))), before, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_rtn_rounds_to_the_nearest_point_of_its_grid(tiny: Path, run_in, bits: int, group_size: int) -> None:
    from winnow.method.rtn import RTN

    base = {n: m.weight.detach().clone().float() for n, m in linears(pretrained(str(tiny)).model).items()}
    quantized = RTN(bits, group_size)(pretrained(str(tiny)), run_in).lm.model
    for name, linear in linears(quantized).items():
        groups, step = base[name].view(-1, group_size), linear.weight_scale.float().view(-1, 1)
        torch.testing.assert_close(step, groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2), rtol=0.01, atol=0)
        integers = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        # the product is rounded to the 8 binary digits of bfloat16
        torch.testing.assert_close(linear.weight.float().view(-1, group_size), integers * step, rtol=2**-8, atol=0)


def test_an_unknown_group_size_for_the_width_names_the_layer(tmp_path: Path, tiny: Path, run_in) -> None:
    from winnow.method.rtn import RTN

    with pytest.raises(UserError, match=r"group_size=128 does not divide the width 64 of model\.layers"):
        RTN(4, 128)(pretrained(str(tiny)), run_in)
