"""Depth pruning: the right layers go, and what is left is the same model without them, also when it is loaded again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.method.shapes import FAMILIES, random_model
from winnow.core.errors import UserError
from winnow.data.calibration import calibration_batches
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.method import pipeline
from winnow.method.depth import Depth, answer_starts, block_influences, config_of_layers, losses_without
from winnow.method.rtn import RTN
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save

LAYERS = 5
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": [f"{kind}_attention" for kind in "sliding sliding full sliding full".split()],
    },
}


def deep(family: str, folder: Path) -> Path:
    """Five layers of a family, where windows are shorter than the texts."""
    return random_model(
        family, folder, num_hidden_layers=LAYERS, hidden_size=128, head_dim=32, **CHANGES.get(family, {})
    )


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    ids = torch.arange(40)[None] + 5
    return lm.model(input_ids=ids).logits.float()


@pytest.mark.parametrize("by", ["influence", "perplexity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_is_the_base_without_some_layers(family: str, by: str, tmp_path: Path, run_in) -> None:
    base = deep(family, tmp_path / "base")
    compressed = pipeline.apply(pretrained(str(base)), {"depth": Depth(0.4, by)}, run_in)
    before = logits(compressed)
    made = save(compressed, tmp_path / "artifact")
    again, whole = pretrained(str(tmp_path / "artifact")), pretrained(str(base))
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)

    dropped = made.manifest["stages"][-1]["dropped_layers"]
    kept = [i for i in range(LAYERS) if i not in dropped]
    assert len(kept) == 3
    for new, old in enumerate(kept):
        layer = again.model.model.layers[new]
        assert layer.self_attn.layer_idx == new
        for name, parameter in whole.model.model.layers[old].named_parameters():
            assert torch.equal(parameter, layer.get_parameter(name))
    kinds = getattr(whole.model.config, "layer_types", None)
    if kinds is not None:
        assert again.model.config.layer_types == [kinds[i] for i in kept]
    if family == "qwen2":
        assert again.model.config.max_window_layers == sum(i < 3 for i in kept)

    # the base itself, its dropped layers passed over, computes the same
    for index in dropped:
        whole.model.model.layers[index].forward = lambda hidden_states, **kwargs: hidden_states
    with torch.inference_mode():
        expected = whole.model(input_ids=torch.arange(40)[None] + 5, use_cache=False).logits.float()
    torch.testing.assert_close(before, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_as_predicted_and_it_can_be_quantized(family: str, tmp_path: Path, run_in) -> None:
    base = deep(family, tmp_path / "base")
    config = pretrained(str(base)).config()
    stages = {"depth": Depth(0.6), "rtn": RTN(4, 32)}
    made = pipeline.compress(pretrained(str(base)), stages, run_in, tmp_path / "artifact")
    plan = ModelLayout(config, dense_tensors(config))
    for stage in stages.values():
        plan = stage.predict(plan)
    assert plan.config.num_hidden_layers == 2
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["weight_bytes"], rel=0.005)
    assert logits(pretrained(str(tmp_path / "artifact"))).isfinite().all()


@pytest.mark.parametrize("by", ["influence", "perplexity"])
def test_a_layer_that_does_nothing_goes_first(by: str, tmp_path: Path, run_in) -> None:
    lm = pretrained(str(deep("llama", tmp_path / "base")))
    for linear in (lm.model.model.layers[3].self_attn.o_proj, lm.model.model.layers[3].mlp.down_proj):
        linear.weight.data.zero_()
    before = logits(lm)
    made, notes = Depth(0.2, by)(lm, run_in)
    assert notes["dropped_layers"] == [3] or by == "perplexity"  # a random layer may do harm
    if by == "influence":
        torch.testing.assert_close(logits(made), before, rtol=0, atol=0)


def test_influence_is_the_angle_between_input_and_output(tmp_path: Path, run_in) -> None:
    lm = pretrained(str(deep("gemma3_text", tmp_path / "base")))
    batches, _ = calibration_batches(lm, run_in)
    found = block_influences(lm.model, batches, run_in)
    cosines = torch.zeros(LAYERS)
    states: list[torch.Tensor] = []
    for layer in lm.model.model.layers:
        layer.register_forward_hook(lambda m, args, output: states.extend((args[0], output)))
    with torch.inference_mode():
        for batch in batches:
            states.clear()
            lm.model(input_ids=batch)
            pairs = list(zip(states[::2], states[1::2], strict=True))
            cosines += torch.tensor([torch.cosine_similarity(a.float(), b.float(), dim=-1).sum() for a, b in pairs])
    expected = 1 - cosines / sum(batch.numel() for batch in batches)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
def test_losses_are_those_of_the_model_without_the_layers(family: str, tmp_path: Path, run_in) -> None:
    base = deep(family, tmp_path / "base")
    lm = pretrained(str(base))
    batches, _ = calibration_batches(lm, run_in)
    starts = answer_starts(lm, run_in)
    rows = [row for batch in batches for row in batch]
    assert any(start > 1 for start in starts) and all(start < len(row) for start, row in zip(starts, rows, strict=True))
    found = losses_without(lm.model, batches, starts, [1], run_in)
    assert sorted(found) == [0, 2, 3, 4]
    for index, loss in found.items():
        model = pretrained(str(base)).model
        for skipped in (1, index):
            model.model.layers[skipped].forward = lambda hidden_states, **kwargs: hidden_states
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for row, start in zip(rows, starts, strict=True):
                scores = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
                total -= sum(scores[t - 1, row[t]].item() for t in range(start, len(row)))
                tokens += len(row) - start
        assert loss == pytest.approx(total / tokens, rel=2e-3)  # rows of other lengths are other sums in bfloat16


@pytest.mark.parametrize(("share", "left"), [(0.02, 4), (0.5, 3), (0.75, 1)])
def test_at_least_one_layer_goes_and_one_is_kept(share: float, left: int, tmp_path: Path, run_in) -> None:
    lm = pretrained(str(deep("llama", tmp_path / "base")))
    config = lm.model.config
    assert Depth(share).predict(ModelLayout(config, {})).config.num_hidden_layers == left
    assert len(Depth(share)(lm, run_in).lm.model.model.layers) == left


def test_what_cannot_be_shallower_is_refused(tmp_path: Path, run_in) -> None:
    lm = pretrained(str(random_model("llama", tmp_path / "base", num_hidden_layers=1)))
    with pytest.raises(UserError, match=r"method\.depth\.share=0\.2: the model has one layer only"):
        Depth()(lm, run_in)
    lm.model.config.num_kv_shared_layers = 1
    with pytest.raises(UserError, match="share keys and values"):
        config_of_layers(lm.model.config, [0])
    short = dataclasses.replace(run_in, calibration=dataclasses.replace(run_in.calibration, max_length=8))
    with pytest.raises(UserError, match=r"raise calibration\.max_length"):
        Depth(0.4, "perplexity")(pretrained(str(deep("llama", tmp_path / "deep"))), short)
