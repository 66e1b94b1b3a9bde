"""GGUF files as base models: what winnow writes comes back bit for bit, and what it cannot read is refused by name."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed")

import gguf
import numpy as np

from tests.model.gguf_files import SHAPES, byte_level, random_model, rewritten, sentencepiece_like
from winnow.core.errors import MissingExtra, UserError
from winnow.method.gguf import GGUF
from winnow.model.gguf import architectures, read
from winnow.model.gguf import vocabulary as tokenizers
from winnow.model.gguf.export import export
from winnow.model.gguf.file import open_gguf
from winnow.model.gguf.read_vocabulary import SPLITS, merges_of, read_tokenizer
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained

TEXTS = (*tokenizers.SAMPLES, "<s>a <tool> b</s>", "")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in single precision, as a file."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    export(random_model("llama"), path)
    return path


def state(lm: LM) -> dict[str, torch.Tensor]:
    return dict(lm.model.named_parameters())


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_what_is_written_comes_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    ours = random_model(shape)
    export(ours, tmp_path / "model.gguf")
    theirs = pretrained(str(tmp_path / "model.gguf"))
    assert theirs.model.dtype == torch.float32
    before, after = state(ours), state(theirs)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = torch.randint(3, ours.model.config.vocab_size - 5, (2, 60))
    expected = ours.model(input_ids=rows).logits
    torch.testing.assert_close(theirs.model(input_ids=rows).logits, expected, rtol=1e-5, atol=1e-5)
    assert ids(theirs.tokenizer) == ids(ours.tokenizer)


@pytest.mark.parametrize(("shape", "scalar"), [("gemma2", 40), ("gemma3", 100)])
@torch.inference_mode()
def test_a_scale_of_the_queries_that_is_in_the_weights_stays_there(shape: str, scalar: int, tmp_path: Path) -> None:
    ours = random_model(shape)
    ours.model.config.query_pre_attn_scalar = scalar
    for layer in ours.model.model.layers:
        layer.self_attn.scaling = scalar**-0.5
    export(ours, tmp_path / "model.gguf")
    theirs = pretrained(str(tmp_path / "model.gguf"))
    rows = torch.randint(3, 400, (2, 60))
    expected = ours.model(input_ids=rows).logits
    torch.testing.assert_close(theirs.model(input_ids=rows).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_a_type_that_is_not_quantized_stays(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = random_model("qwen3")
    export(ours, tmp_path / "model.gguf", kind)
    theirs = pretrained(str(tmp_path / "model.gguf"))
    assert theirs.model.dtype == dtype
    before = state(ours)
    assert all(torch.equal(before[name].to(dtype), tensor) for name, tensor in state(theirs).items())
    origin = theirs.manifest["origin"]
    assert origin["dtype"] == str(dtype).removeprefix("torch.")
    assert origin["tensor_types"] == {"F32": 9} | {kind: origin["tensor_types"][kind]}


def test_quantized_types_are_what_their_package_makes_of_them(tmp_path: Path) -> None:
    """Every type that can be dequantized, in blocks of random bits; those that make no finite numbers are zero."""
    kinds = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits and kind.name != "BF16"]
    assert {"Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS"} <= {
        kind.name for kind in kinds
    }
    random = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    left = list(kinds)

    def quantized(name: str, data: np.ndarray) -> tuple[np.ndarray, Any]:
        if data.ndim == 1 or not name.startswith("blk."):
            return data, None
        kind = left.pop(0) if left else kinds[0]
        size, bytes_a_block = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (data.size // size, bytes_a_block), dtype=np.uint8)
        with np.errstate(all="ignore"):
            bad = ~(np.abs(gguf.quants.dequantize(blocks, kind)) < 1e3).all(-1)
        blocks[bad] = 0
        packed = blocks.reshape(data.shape[0], -1)
        expected[name] = gguf.quants.dequantize(packed, kind)
        return packed, kind

    export(random_model("llama-3"), tmp_path / "plain.gguf")
    rounds = 0
    while left and rounds < 4:  # a file holds 14 matrices of blocks
        path = rewritten(tmp_path / "plain.gguf", tmp_path / f"{rounds}.gguf", tensor=quantized)
        file = open_gguf(path)
        config = read.read_config(file)
        weights = read.Weights(file, config)
        names = architectures.TensorNames(config)
        seen = 0
        for name in weights.shapes:
            if names[name] in expected:
                found = torch.cat(list(weights[name]))
                again = architectures.to_gguf(names[name], found, config)
                assert np.array_equal(again.numpy(), expected[names[name]], equal_nan=True), names[name]
                assert found.any()
                seen += 1
        assert seen == 14 and read.dtype_of(file) == torch.bfloat16
        rounds += 1
    assert not left


def test_a_quantized_file_is_loaded_as_bfloat16(llama: Path, tmp_path: Path) -> None:
    def q8(name: str, data: np.ndarray) -> tuple[np.ndarray, Any]:
        kind = gguf.GGMLQuantizationType.Q8_0
        return (gguf.quants.quantize(data, kind), kind) if data.ndim > 1 else (data, None)

    lm = pretrained(str(rewritten(llama, tmp_path / "model.gguf", tensor=q8)))
    ours, theirs = state(random_model("llama")), state(lm)
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor.float(), ours[name], rtol=0, atol=float(ours[name].abs().max()) / 100)
    assert lm.model.dtype == torch.bfloat16
    assert lm.manifest["origin"]["rounded_tensors"] == len([t for t in theirs.values() if t.ndim > 1])
    assert 0 < lm.manifest["origin"]["rounding_error"] < 2**-8


def test_full_precision_is_written_and_read_without_llama_cpp(
    tmp_path: Path, run_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match="llama-cpp-python is not installed"):
        GGUF()(trained(), run_in)
    made, notes = GGUF(dense="F32")(trained(), run_in)
    assert "nearest" in notes["pre_tokenizer"] and notes["tokenizer_agreement_with"] == "winnow's reader"
    (file,) = Path(str(made.path)).glob("*.gguf")
    theirs = state(pretrained(str(file)))
    assert all(torch.equal(tensor.float(), theirs[name]) for name, tensor in state(trained()).items())


# --- tokenizers


@pytest.mark.parametrize("name", [*SPLITS, "llama3", "deepseek-r1-qwen"])
def test_byte_level_splits_are_read_by_name(name: str, tmp_path: Path) -> None:
    known = {"llama3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}.get(name, name)
    ours = byte_level(known)
    export(random_model("llama", ours), tmp_path / "model.gguf")
    theirs = read_tokenizer(
        open_gguf(rewritten(tmp_path / "model.gguf", tmp_path / "named.gguf", {"tokenizer.ggml.pre": name}))
    )
    assert ids(theirs) == ids(ours)
    assert [theirs.decode(row) for row in ids(theirs)] == [ours.decode(row) for row in ids(ours)]


@pytest.mark.parametrize("space_first", [True, False])
@pytest.mark.parametrize("merges", [True, False])
def test_sentencepiece_vocabularies_are_read_with_and_without_merges(
    space_first: bool, merges: bool, tmp_path: Path
) -> None:
    ours = sentencepiece_like(space_first)
    export(random_model("llama", ours), tmp_path / "model.gguf")
    path = tmp_path / "model.gguf"
    if merges:
        pairs = json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]
        added = {"tokenizer.ggml.merges": [" ".join(pair) for pair in pairs]}
        path = rewritten(path, tmp_path / "merges.gguf", added, without={"tokenizer.ggml.scores"})
    theirs = read_tokenizer(open_gguf(path))
    assert ids(theirs) == ids(ours)
    assert theirs.tokenize("The quick brown") != list("\u2581The\u2581quick\u2581brown")
    assert theirs.decode(theirs("The quick, 5 \u20ac").input_ids, skip_special_tokens=True) == "The quick, 5 \u20ac"


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path: Path) -> None:
    export(random_model("qwen2", byte_level("smollm")), tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"of a qwen2 as Qwen2Tokenizer, which gives other ids .*pre=smollm"):
        pretrained(str(tmp_path / "model.gguf"))


def test_merges_do_what_sentencepiece_does() -> None:
    """Against its algorithm, plainly: join the neighbours that make the best piece, the leftmost of equals."""
    from tokenizers import Tokenizer, models

    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abc"), random.integers(2, 6))) for _ in range(60)]
    pieces = {piece: index for index, piece in enumerate(dict.fromkeys([*"abc", *words]))}
    scores = [float(score) for score in -random.permutation(len(pieces))]
    read_as = Tokenizer(models.BPE(pieces, merges_of(pieces, scores)))
    for _ in range(200):
        text = "".join(random.choice(list("abc"), 12))
        parts = list(text)
        while True:
            pairs = [
                (scores[pieces[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in pieces
            ]
            if not pairs:
                break
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert read_as.encode(text).tokens == parts


def test_special_tokens_flags_and_the_chat_template_are_read(tmp_path: Path) -> None:
    ours = byte_level(bos=True)
    ours.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    export(random_model("llama", ours), tmp_path / "model.gguf")
    lm = pretrained(str(tmp_path / "model.gguf"))
    theirs = lm.tokenizer
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs("a").input_ids[0] == ours.bos_token_id and theirs("a").input_ids == ours("a").input_ids
    assert theirs.get_vocab() == ours.get_vocab()  # without the rows that only fill up the embedding
    chat = [{"role": "user", "content": "Hello"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "Hello<|im_end|>"
    assert lm.model.generation_config.eos_token_id == [1, 2]  # the end of the text, and of a turn
    assert lm.model.config.eos_token_id == 1 and lm.model.config.pad_token_id == 1
    assert theirs.decode(theirs("a<tool>b").input_ids, skip_special_tokens=True) == "a<tool>b"


# --- what cannot be read

PRE = "tokenizer.ggml.pre"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"keys": {"general.architecture": "mamba"}}, "architecture is mamba, and winnow reads llama, qwen2"),
    "kind": ({"keys": {"general.type": "adapter"}}, r"part of another kind \(general.type=adapter\)"),
    "part": ({"keys": {"split.count": 3}}, "one of 3 parts of a model; join them first"),
    "key": ({"without": {"llama.block_count"}}, "lacks the key llama.block_count"),
    "unknown key": ({"keys": {"llama.expert_count": 8}}, "does not know what llama.expert_count=8 asks for"),
    "scaling": ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type=longrope"),
    "tensor": ({"without": {"blk.1.ffn_up.weight"}}, r"lacks the tensor blk.1.ffn_up.weight \(model.layers.1.mlp.up_proj"),
    "embedding": ({"without": {"token_embd.weight"}}, "lacks the tensor token_embd.weight"),
    "fewer layers": ({"keys": {"llama.block_count": 1}}, "tensors that a llama has no place for: blk.1."),
    "shape": ({"keys": {"llama.feed_forward_length": 256}}, r"blk.0.ffn_gate.weight is \(512, 256\), and .* is \(256, 256\)"),
    "tokenizer": ({"keys": {"tokenizer.ggml.model": "bert"}}, "tokenizer is of the kind bert, and winnow reads gpt2"),
    "split": ({"keys": {PRE: "bloom"}}, "tokenizer.ggml.pre=bloom, and winnow knows gpt-2, smollm, llama-bpe"),
    "no split": ({"without": {PRE}}, "tokenizer.ggml.pre=default"),
    "merges": ({"without": {"tokenizer.ggml.merges"}}, r"lacks the merges of its tokenizer"),
    "scores": ({"keys": {"tokenizer.ggml.model": "llama"}, "without": {"tokenizer.ggml.merges"}}, "neither merges nor a score"),
    "special": ({"keys": {"tokenizer.ggml.eos_token_id": 10**6}}, "eos_token_id=1000000 is none of its"),
    "bos": ({"keys": {"tokenizer.ggml.add_bos_token": True}, "without": {"tokenizer.ggml.bos_token_id"}}, "names no such token"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    case: str, llama: Path, tmp_path: Path, cache: Path
) -> None:
    change, message = REFUSED[case]
    path = rewritten(llama, tmp_path / "changed.gguf", **change)
    with pytest.raises(UserError, match=message) as raised:
        pretrained(str(path))
    assert str(raised.value).startswith(f"model.path={path}") and "\n" not in str(raised.value)
    assert not [folder for folder in cache.glob("*") if folder.is_dir()]


def test_frequencies_that_are_no_scaling_of_llama_3_are_refused(tmp_path: Path) -> None:
    def other(name: str, data: np.ndarray) -> tuple[np.ndarray, Any]:
        return (data**2 if name == "rope_freqs.weight" else data), None

    export(random_model("llama-3"), tmp_path / "model.gguf")
    with pytest.raises(UserError, match="rope_freqs.weight is no scaling of Llama 3's"):
        pretrained(str(rewritten(tmp_path / "model.gguf", tmp_path / "changed.gguf", tensor=other)))


def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path, cache: Path) -> None:
    def broken(name: str, data: np.ndarray) -> tuple[np.ndarray, Any]:
        return (
            np.where(np.arange(data.size) == 7, np.nan, data).astype(np.float32)
            if name == "output_norm.weight"
            else data
        ), None

    with pytest.raises(UserError, match="tensor of model.norm.weight holds NaN"):
        pretrained(str(rewritten(llama, tmp_path / "changed.gguf", tensor=broken)))
    assert not [folder for folder in cache.glob("*") if folder.is_dir() or "partial" in folder.name]


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(share: float, llama: Path, tmp_path: Path, cache: Path) -> None:
    content = llama.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: max(4, int(share * len(content)))])
    with pytest.raises(UserError, match=r"short.gguf is cut short or damaged \([\d,]+ bytes; .*download it again"):
        pretrained(str(tmp_path / "short.gguf"))
    assert not [folder for folder in cache.glob("*") if folder.is_dir()]


@pytest.mark.parametrize("content", [b"", b"GGU", b"{}", b"PK\x03\x04 and more"])
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match="is not a GGUF file"):
        pretrained(str(tmp_path / "model.gguf"))
