"""The optimizer of matrices: what its updates are, and that no product of theirs is in a type that is slow here."""

from __future__ import annotations

import pytest
import torch

from tests.training.products import Products
from winnow.training import optimizer
from winnow.training.optimizer import Float32Muon, MuonAdamW


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_updates_are_those_of_torch_but_for_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Float32Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(shape)
        for parameter, one in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            one.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert (ours - theirs).norm() > 0, "they have the same rounding"


@pytest.mark.parametrize("fastest", ["float32", "float16", "bfloat16"])
def test_products_are_in_bfloat16_only_where_that_is_fast(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "fastest_dtype", lambda device: fastest)
    matrix, vector = torch.nn.Parameter(torch.randn(8, 16)), torch.nn.Parameter(torch.randn(16))
    made = MuonAdamW([matrix], [vector], lr=0.1, weight_decay=0.1)
    matrix.grad, vector.grad = torch.randn(8, 16), torch.randn(16)
    with Products() as products:
        made.step()
    assert products.types == {torch.bfloat16 if fastest == "bfloat16" else torch.float32}
