"""GGUF files: llama.cpp computes what transformers does, and writes the types and bytes that were predicted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

import gguf as library
import llama_cpp
import numpy as np

from tests.model.gguf_files import LLAMA3, LOCAL, YARN
from winnow.core.errors import MissingExtra, UserError
from winnow.core.libraries import require
from winnow.estimate.layout import ModelLayout, dense_tensors
from winnow.method import pipeline
from winnow.method.gguf import GGUF, TYPES
from winnow.method.imatrix import collect
from winnow.model.gguf import mix
from winnow.model.gguf.architectures import TensorNames
from winnow.model.gguf.export import export
from winnow.model.gguf.native import silent
from winnow.model.gguf.quantize import quantize
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import WEIGHTS, trained
from winnow.nano.items import held_out_text

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-3": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "gemma2": ("gemma2", {"sliding_window": 32, "query_pre_attn_scalar": 40}),
    "gemma3": ("gemma3_text", {"sliding_window": 32, "query_pre_attn_scalar": 100}),
    "gemma3-none-slides": ("gemma3_text", {"sliding_window": 32, "layer_types": ["full_attention"] * 7}),
    "gemma3-all-slide": ("gemma3_text", {"sliding_window": 32, "layer_types": ["sliding_attention"] * 7}),
    "gemma3-4b": ("gemma3_text", {"sliding_window": 32, "query_pre_attn_scalar": 32, "rope_parameters": LOCAL}),
}


def random_model(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> LM:
    """A random model with weights large enough that attention matters, and norms and biases that differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **usual | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return LM(model=model.to(dtype), tokenizer=trained().tokenizer, name=kind)


def llama_logits(path: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [T, vocabulary] by llama.cpp, with a cache in single precision."""
    with silent():
        model = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_batch=512,
            n_ubatch=512,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            flash_attn=False,
            type_k=library.GGMLQuantizationType.F32.value,
            type_v=library.GGMLQuantizationType.F32.value,
            verbose=False,
        )
        found = []
        for ids in rows:
            model.reset()
            model.eval(ids)
            found.append(torch.tensor(np.array(model.scores[: len(ids)])))
        model.close()
    return found


def plan_of(config: Any, other_bytes: int = 0) -> ModelLayout:
    return ModelLayout(config, dense_tensors(config), other_bytes)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_llama_cpp_computes_what_transformers_does(shape: str, tmp_path: Path) -> None:
    kind, settings = SHAPES[shape]
    lm = random_model(kind, **settings)
    export(lm, tmp_path / "model.gguf")
    ids = torch.randint(3, 1024, (1, 200))
    ours = lm.model(input_ids=ids).logits[0]
    (theirs,) = llama_logits(tmp_path / "model.gguf", ids.tolist())
    # llama.cpp reads GELU from a table in half precision
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-3 if kind.startswith("gemma") else 5e-5)


@torch.inference_mode()
def test_the_embedded_model_is_exported_exactly(tmp_path: Path) -> None:
    lm = trained()
    rows = [lm.tokenizer([item.completion]).input_ids[0] for item in held_out_text(5)]
    for dtype, atol in (("F32", 1e-3), ("BF16", 0.5)):  # llama.cpp multiplies bfloat16 by inputs in bfloat16
        export(lm, tmp_path / f"{dtype}.gguf", dtype)
        for ids, theirs in zip(rows, llama_logits(tmp_path / f"{dtype}.gguf", rows), strict=True):
            ours = trained(dtype="float32").model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(theirs, ours, rtol=0, atol=atol)
    tensors = {t.name: t for t in library.GGUFReader(tmp_path / "F32.gguf").tensors}
    down = lm.model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(torch.tensor(tensors["blk.0.ffn_down.weight"].data), down.float())
    assert "output.weight" not in tensors  # tied


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"num_hidden_layers": 10, "num_key_value_heads": 1}),
        ("llama", {"num_hidden_layers": 17, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("llama", {"num_hidden_layers": 80, "hidden_size": 32, "intermediate_size": 256, "head_dim": 8}),
        ("qwen2", {"hidden_size": 256, "head_dim": 64, "intermediate_size": 288, "num_hidden_layers": 3}),
        ("gemma3_text", {"hidden_size": 160, "head_dim": 64, "num_hidden_layers": 4}),
    ],
)
def test_types_are_those_that_llama_cpp_chooses(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    lm = random_model(kind, torch.bfloat16, **{"hidden_size": 256, "vocab_size": 1024} | settings)
    export(lm, tmp_path / "model.gguf", "BF16")
    names = TensorNames(lm.model.config)
    weights = dict(lm.model.named_parameters())
    model = mix.ModelShape.of(lm.model.config, weights)
    for file_type in TYPES:
        quantize(tmp_path / "model.gguf", tmp_path / "quantized.gguf", file_type)
        written = {t.name: t for t in library.GGUFReader(tmp_path / "quantized.gguf").tensors}
        for name, weight in weights.items():
            shape = tuple(weight.shape)
            kind_of_it, tensor = mix.tensor_type(file_type, name, shape, model), written[names[name]]
            assert (file_type, name, tensor.tensor_type.name) == (file_type, name, kind_of_it)
            assert 0 <= mix.tensor_bytes(kind_of_it, shape) - tensor.n_bytes < mix.ALIGNMENT


def test_an_artifact_is_one_file_with_what_belongs_to_it(tmp_path: Path, run_in, capfd) -> None:
    stage = GGUF("Q4_K_M")
    made = pipeline.compress(trained(), {"gguf": stage}, run_in, tmp_path / "artifact")
    assert capfd.readouterr() == ("", "")
    files = {path.name for path in (tmp_path / "artifact").iterdir()}
    assert files >= {"model-Q4_K_M.gguf", "config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"}
    assert len([name for name in files if name.endswith(".gguf")]) == 1
    assert json.loads((tmp_path / "artifact" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    record = made.manifest["stages"][-1]
    assert len(record["calibration_sha256"]) == 64
    assert record["tensor_types"] == {"F32": 11, "Q4_K": 31, "Q6_K": 5}
    assert "nearest" in record["pre_tokenizer"]
    assert not list(run_in.folder.glob("*.gguf"))  # no scratch is left

    again = pipeline.compress(trained(), {"gguf": stage}, run_in, tmp_path / "again")
    assert again.manifest["sha256"] == made.manifest["sha256"]


@pytest.mark.parametrize("stage", [GGUF(t, imatrix=False) for t in TYPES] + [GGUF(dense="F16")], ids=str)
def test_bytes_on_disk_are_as_predicted(stage: GGUF, tmp_path: Path, run_in) -> None:
    made = pipeline.compress(trained(), {"gguf": stage}, run_in, tmp_path / "artifact")
    rest = sum(p.stat().st_size for p in WEIGHTS.iterdir() if p.name.endswith(".json") and p.name != "manifest.json")
    plan = stage.predict(plan_of(trained().model.config, rest))
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.01)


@pytest.mark.parametrize("stage", [GGUF(), GGUF("Q2_K"), GGUF("Q8_0")], ids=str)
def test_perplexity_stays_within_the_stated_bound(stage: GGUF, tmp_path: Path, run_in) -> None:
    lm = trained(dtype="float32")
    rows = [lm.tokenizer([item.completion]).input_ids[0] for item in held_out_text(60)]
    with torch.inference_mode():
        base = [lm.model(input_ids=torch.tensor([ids])).logits[0] for ids in rows]
    pipeline.compress(trained(), {"gguf": stage}, run_in, tmp_path / "artifact")
    (file,) = (tmp_path / "artifact").glob("*.gguf")
    allowed = GGUF.perplexity_bound + (0.02 if stage.type == "Q2_K" else 0)
    assert perplexity(llama_logits(file, rows), rows) <= allowed * perplexity(base, rows)


def perplexity(logits: list[torch.Tensor], rows: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(scores[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        for scores, ids in zip(logits, rows, strict=True)
    ]
    return math.exp(sum(losses) / sum(len(ids) - 1 for ids in rows))


def test_importance_is_the_mean_square_of_the_inputs(tiny: Path, run_in) -> None:
    from winnow.data.calibration import calibration_batches

    lm = pretrained(str(tiny), dtype="float32")
    found, digest = collect(lm, run_in)
    batches, expected_digest = calibration_batches(lm, run_in)
    assert digest == expected_digest
    assert set(found) == {names for names in found if names.startswith("blk.")} and len(found) == 2 * 7
    seen: list[torch.Tensor] = []
    layer = lm.model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for batch in batches:
            lm.model(input_ids=batch)
    handle.remove()
    expected = torch.cat(seen).double().square().mean(0)
    torch.testing.assert_close(torch.tensor(found["blk.1.ffn_down.weight"]).double(), expected, rtol=1e-4, atol=1e-9)
    assert np.array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"])  # the same input


def test_importance_lowers_the_error_where_inputs_are_large(tmp_path: Path, run_in) -> None:
    lm = trained()
    export(lm, tmp_path / "model.gguf", "BF16")
    importance, _ = collect(lm, run_in)
    errors = {}
    for label, weights in (("plain", None), ("weighed", importance)):
        quantize(tmp_path / "model.gguf", tmp_path / f"{label}.gguf", "Q2_K", weights)
        values = {t.name: t for t in library.GGUFReader(tmp_path / f"{label}.gguf").tensors}
        errors[label] = 0.0
        for index, layer in enumerate(lm.model.model.layers):
            name = f"blk.{index}.ffn_up.weight"
            tensor = torch.tensor(library.quants.dequantize(values[name].data, values[name].tensor_type))
            squares = (tensor - layer.mlp.up_proj.weight.float()).square()
            errors[label] += float((squares * torch.tensor(importance[name])).sum())
    assert errors["weighed"] < 0.95 * errors["plain"]


def test_a_tokenizer_of_another_kind_leaves_a_file_that_takes_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lm = random_model("llama", num_hidden_layers=1)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain = LM(model=lm.model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b"), name="plain")
    assert export(plain, tmp_path / "model.gguf") == {"tokenizer": "none"}
    (scores,) = llama_logits(tmp_path / "model.gguf", [[5, 6, 7]])
    assert scores.shape == (3, 1024) and scores.isfinite().all()


def test_a_file_knows_the_special_tokens_and_the_context(tmp_path: Path) -> None:
    lm = trained()
    export(lm, tmp_path / "model.gguf", "BF16")
    fields = library.GGUFReader(tmp_path / "model.gguf").fields
    value = {name: field.contents() for name, field in fields.items() if name.startswith(("tokenizer", "llama"))}
    assert value["tokenizer.ggml.bos_token_id"] == 1 and value["tokenizer.ggml.add_bos_token"] is True
    assert value["tokenizer.ggml.eos_token_id"] == 2 and value["tokenizer.ggml.add_eos_token"] is False
    assert value["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, control, control, normal
    assert value["llama.context_length"] == 1024
    # llama.cpp computes no sliding attention for Mistral: the two agree up to the window
    export(random_model("mistral", sliding_window=64), tmp_path / "mistral.gguf")
    fields = library.GGUFReader(tmp_path / "mistral.gguf").fields
    assert fields["llama.context_length"].contents() == 64


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gpt_neox", {}, "cannot write a model of type gpt_neox: it knows llama, mistral"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=dynamic"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type=llama3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("qwen2", {"num_attention_heads": 2}, "2 heads of 32 beside hidden_size=128"),
        ("llama", {"hidden_size": 80, "head_dim": 16}, r"method.gguf.type=Q4_K_M: \S+ is 80 wide.*dense=F16"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(kind: str, settings: dict[str, Any], message: str, run_in) -> None:
    with pytest.raises(UserError, match=message):
        GGUF()(random_model(kind, num_hidden_layers=1, **settings), run_in)


def test_a_weight_too_large_for_f16_is_named(tiny: Path, run_in) -> None:
    lm = pretrained(str(tiny))
    lm.model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e6
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight holds values that F16 cannot.*dense=BF16"):
        GGUF(dense="F16")(lm, run_in)


def test_what_llama_cpp_says_of_a_failure_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(RuntimeError, match="could not quantize to Q8_0: .*failed"):
        quantize(tmp_path / "model.gguf", tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("module", "library_name"), [("gguf", "gguf"), ("llama_cpp", "llama-cpp-python")])
def test_a_missing_library_is_named(module: str, library_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"{library_name} is not installed; .*winnow\[gguf\]"):
        require("gguf", "llama_cpp")
