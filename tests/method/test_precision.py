"""Every method that trains multiplies in the type that its `precision` names, whatever type the model is stored in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.test_conf import class_of, composed
from tests.training.products import Products
from winnow.core.cli import options
from winnow.hardware.run import Run
from winnow.method.trainable import Training
from winnow.model.pretrained import pretrained

CLASSES = {name: class_of(composed("compress", f"method=[{name}]").method[name]) for name in options("method")}
TRAININGS = [name for name, kind in CLASSES.items() if issubclass(kind, Training)]
FEW = {"distill": {"student": {"num_hidden_layers": 1}}, "progressive": {"rounds": 1}, "pretrain": {"stream": 60}}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_products_are_in_the_type_that_precision_names(
    tiny: Path, run_in: Run, name: str, precision: str, dtype: torch.dtype
) -> None:
    stage = CLASSES[name](steps=1, tokens_per_batch=64, max_length=32, precision=precision, **FEW.get(name, {}))
    with Products() as products:
        stage(pretrained(str(tiny)), run_in)
    assert dtype in products.types
    assert products.types <= {dtype, torch.float32}
