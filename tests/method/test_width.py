"""Width pruning: slices of the base, chosen by activations, that compute the same where what was cut did nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.method.shapes import FAMILIES, config_of, random_model
from winnow.core.errors import UserError
from winnow.data.calibration import calibration_batches
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.method import pipeline
from winnow.method.importance import importances
from winnow.method.rtn import RTN
from winnow.method.width import Width, head_dim, strongest, strongest_heads
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save

HALF = Width(mlp=0.5, heads=0.5, hidden=0.5)


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    return lm.model(input_ids=torch.arange(40)[None] + 5).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_computes_what_it_did_in_memory(family: str, tmp_path: Path, run_in) -> None:
    base = random_model(family, tmp_path / "base")
    config = pretrained(str(base)).config()
    compressed = pipeline.apply(pretrained(str(base)), {"width": HALF}, run_in)
    before = logits(compressed)
    made = save(compressed, tmp_path / "artifact")
    again = pretrained(str(tmp_path / "artifact"))
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    new = again.model.config
    assert (new.intermediate_size, new.hidden_size, new.head_dim) == (256, 128, 64)
    assert (new.num_attention_heads, new.num_key_value_heads) == (2, 1)  # whole groups: the cache gets smaller too

    quantized = pipeline.apply(again, {"rtn": RTN(4, 64)}, run_in)
    assert logits(quantized).isfinite().all()
    plan = HALF.predict(ModelLayout(config, dense_tensors(config)))
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["weight_bytes"], rel=0.005)
    smaller = save(quantized, tmp_path / "quantized").manifest["sizes"]["weight_bytes"]
    assert RTN(4, 64).predict(plan).disk_bytes == pytest.approx(smaller, rel=0.01)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_what_did_nothing_is_cut_and_nothing_changes(family: str, tmp_path: Path, run_in) -> None:
    """Dead channels, heads and dimensions: the choice must find them, and norms and embeddings make up for their absence."""
    # the norms' epsilon is the one thing that a gain cannot make up for
    lm = pretrained(str(random_model(family, tmp_path / "base", rms_norm_eps=1e-12)), dtype="float32")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randperm(256, generator=generator)[:128]
    model: Any = lm.model.model
    model.embed_tokens.weight.data[:, hidden] = 0
    for layer in model.layers:
        layer.mlp.gate_proj.weight.data[torch.randperm(512, generator=generator)[:256]] = 0
        layer.self_attn.v_proj.weight.data[64:] = 0  # of the second key/value head
        if layer.self_attn.v_proj.bias is not None:
            layer.self_attn.v_proj.bias.data[64:] = 0
        layer.self_attn.o_proj.weight.data[hidden] = 0
        layer.mlp.down_proj.weight.data[hidden] = 0
    before = logits(lm)
    made = HALF(lm, run_in).lm
    assert made.model.config.hidden_size == 128
    torch.testing.assert_close(logits(made), before, rtol=1e-4, atol=1e-4 * before.std().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_a_slice_of_the_base(family: str, tmp_path: Path, run_in) -> None:
    base = random_model(family, tmp_path / "base")
    whole = pretrained(str(base)).model
    batches, _ = calibration_batches(pretrained(str(base)), run_in)
    found = importances(whole, 4, batches, run_in)
    made = Width(mlp=0.5, heads=0.5)(pretrained(str(base)), run_in).lm.model
    for old, new, channels, heads in zip(
        whole.model.layers, made.model.layers, found.channels, found.heads, strict=True
    ):
        rows = strongest(channels, 256)
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, rows])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[rows])
        queries, keys = strongest_heads(heads, 2, 2, 1)
        assert queries.tolist() == [2 * keys.item(), 2 * keys.item() + 1]
        for name, kept in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
                slices = getattr(old.self_attn, name).get_parameter(kind).unflatten(0, (-1, 64))[kept].flatten(0, 1)
                assert torch.equal(getattr(new.self_attn, name).get_parameter(kind), slices)
    untouched = [n for n, _ in whole.named_parameters() if "norm" in n or "embed" in n or "lm_head" in n]
    assert untouched
    for name in untouched:
        assert torch.equal(whole.get_parameter(name), made.get_parameter(name))


def test_importances_are_those_of_the_paper(tmp_path: Path, run_in) -> None:
    """Mean magnitude over a text's tokens, L2 norm over texts (Minitron, section 2.2), against plain loops."""
    lm = pretrained(str(random_model("gemma3_text", tmp_path / "base")), dtype="float32")
    batches, _ = calibration_batches(lm, run_in)
    found = importances(lm.model, 4, batches, run_in)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in lm.model.named_modules():
        if name.endswith(("down_proj", "o_proj", "q_proj", "gate_proj", "lm_head", "input_layernorm")):
            inputs[name] = []
            module.register_forward_pre_hook(lambda m, args, name=name: inputs[name].append(args[0][0]))
    with torch.inference_mode():
        for batch in batches:
            for row in batch:
                lm.model(input_ids=row[None])

    def l2_of_means(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([x.abs().mean(0) for x in values]).norm(dim=0).double()

    hidden = torch.zeros(256, dtype=torch.float64)
    for index in range(2):
        at = f"model.layers.{index}"
        torch.testing.assert_close(
            found.channels[index], l2_of_means(inputs[f"{at}.mlp.down_proj"]), rtol=1e-3, atol=1e-6
        )
        heads = [x.unflatten(-1, (4, 64)).norm(dim=-1) for x in inputs[f"{at}.self_attn.o_proj"]]
        torch.testing.assert_close(found.heads[index], l2_of_means(heads), rtol=1e-3, atol=1e-6)
        hidden += l2_of_means(inputs[f"{at}.self_attn.q_proj"]) + l2_of_means(inputs[f"{at}.mlp.gate_proj"])
        entered = torch.cat(inputs[f"{at}.input_layernorm"]).square()
        share = (entered / entered.sum(-1, keepdim=True)).mean(0).double()
        norm = lm.model.model.layers[index].input_layernorm
        torch.testing.assert_close(found.energy[norm], share, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.hidden, hidden + l2_of_means(inputs["lm_head"]), rtol=1e-3, atol=1e-6)
    assert len(found.energy) == 2 * 4 + 1  # Gemma-3 has four norms a layer, and the last


def test_heads_are_dropped_evenly() -> None:
    score = torch.tensor([5.0, 1.0, 0.0, 4.0, 3.0, 9.0, 8.0, 7.0])  # two key/value heads with four queries each
    queries, keys = strongest_heads(score, 2, 4, 2)
    assert (queries.tolist(), keys.tolist()) == ([0, 3, 5, 6], [0, 1])
    queries, keys = strongest_heads(score, 2, 4, 1)
    assert (queries.tolist(), keys.tolist()) == ([4, 5, 6, 7], [1])
    queries, keys = strongest_heads(score, 2, 2, 1)
    assert (queries.tolist(), keys.tolist()) == ([5, 6], [1])


@pytest.mark.parametrize(
    ("family", "shape", "stage", "expected"),
    [
        ("llama", {}, Width(mlp=0.75), (384, 256, 4, 2)),
        ("llama", {}, Width(mlp=0.8, multiple=128), (384, 256, 4, 2)),
        ("llama", {}, Width(mlp=0.99, multiple=256), (256, 256, 4, 2)),  # a share below 1 drops something
        ("llama", {}, Width(mlp=1.0, heads=0.75), (512, 256, 2, 1)),  # three heads do not divide 256
        ("qwen2", {"num_key_value_heads": 4}, Width(mlp=1.0, heads=0.75), (512, 256, 3, 3)),
        ("mistral", {"num_key_value_heads": 1}, Width(mlp=1.0, heads=0.75), (512, 256, 3, 1)),
        ("llama", {"hidden_size": 384, "num_attention_heads": 6}, Width(mlp=1.0, hidden=0.6), (512, 192, 6, 2)),
        ("qwen2", {"hidden_size": 384, "num_attention_heads": 6}, Width(mlp=1.0, hidden=0.6), (512, 256, 6, 2)),
        ("gemma3_text", {}, Width(mlp=0.25, heads=0.25, hidden=0.25), (128, 64, 1, 1)),
    ],
)
def test_the_sizes_that_are_kept(family: str, shape: dict[str, int], stage: Width, expected: tuple[int, ...]) -> None:
    new = stage.narrow_config(config_of(family, **shape))
    assert (new.intermediate_size, new.hidden_size, new.num_attention_heads, new.num_key_value_heads) == expected
    assert new.head_dim == 64


def test_a_head_keeps_its_width_where_the_configuration_implies_it() -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(hidden_size=256, num_attention_heads=8, num_key_value_heads=2)
    assert head_dim(config) == Width(hidden=0.5, multiple=32).narrow_config(config).head_dim == 32


@pytest.mark.parametrize(
    ("stage", "shape", "message"),
    [
        (
            Width(multiple=256),
            {"intermediate_size": 192},
            r"method\.width\.mlp=0\.75: there is no multiple of 256 below 192",
        ),
        (Width(mlp=1.0, heads=0.5), {"num_attention_heads": 1, "num_key_value_heads": 1}, r"method\.width\.heads=0\.5"),
        (
            Width(hidden=0.5),
            {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3},
            r"heads; take a smaller",
        ),
    ],
)
def test_sizes_that_cannot_be_kept_are_refused(stage: Width, shape: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage.predict(ModelLayout(config_of("llama", **shape), {}))


def test_other_architectures_are_refused() -> None:
    from transformers import MixtralConfig, Phi3Config

    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    for config in (
        MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2),
        Phi3Config(**small, num_key_value_heads=2, pad_token_id=0),
    ):
        with pytest.raises(UserError, match="plain attention and a gated MLP"):
            Width().predict(ModelLayout(config, {}))
