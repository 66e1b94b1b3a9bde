"""The cache of an artifact: what `generate` really holds, after memory and after files, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.method.shapes import config_of, random_model
from winnow.core.errors import MissingExtra, UserError
from winnow.estimate.layout import ModelLayout, layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.kv import KV
from winnow.method.rtn import RTN
from winnow.model import manifest
from winnow.model.lm import LM, FileLM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

needs_hqq = pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="needs the extra [kv]: hqq")
SETTINGS = {
    "backend": "hqq",
    "nbits": 4,
    "axis_key": 1,
    "axis_value": 1,
    "q_group_size": 64,
    "residual_length": 128,
}


def made(stage: KV, base: Path, run: Run, output: Path, before: dict | None = None) -> LM:
    return pipeline.compress(pretrained(str(base)), {**(before or {}), "kv": stage}, run, output)


def strangers(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.inference_mode()
def generate(model, rows: int = 1, tokens: int = 24, new: int = 8):
    ids = torch.randint(5, 900, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
        return_dict_in_generate=True,
    )


def held_bytes(cache) -> int:
    """Of all tensors that a cache refers to, each once."""
    found = {}
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        for packed, meta in (layer._quantized_keys, layer._quantized_values):
            tensors += [packed, *(v for v in meta.values() if isinstance(v, torch.Tensor))]
        found |= {id(t): t.numel() * t.element_size() for t in tensors}
    return sum(found.values())


@needs_hqq
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (2, 16)])
def test_generate_of_plain_transformers_holds_a_quantized_cache(
    bits: int, group_size: int, tmp_path: Path, run_in: Run
) -> None:
    stage = KV(bits, group_size, residual=16)
    made(stage, WEIGHTS, run_in, tmp_path / "artifact")
    weights = "model.safetensors"
    assert (tmp_path / "artifact" / weights).read_bytes() == (WEIGHTS / weights).read_bytes()
    model = strangers(tmp_path / "artifact")
    for _ in range(2):  # the settings survive their use
        cache = generate(model, tokens=64, new=2).past_key_values
        assert {type(layer).__name__ for layer in cache.layers} == {"HQQQuantizedLayer"}
        assert {layer.nbits for layer in cache.layers} == {bits}
    plan = stage.predict(layout_of(pretrained(str(WEIGHTS))))
    recent = plan.spec.kv_cache_bytes(1)  # the one token that came after the prompt is not quantized yet
    assert held_bytes(cache) == plan.spec.kv_cache_bytes(64, bits=plan.cache_bits) + recent
    assert plan.disk_bytes == pytest.approx(manifest.read(tmp_path / "artifact")["sizes"]["size_bytes"], rel=0.005)


@needs_hqq
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_answers_are_those_of_a_rounded_cache(bits: int, tmp_path: Path, run_in: Run) -> None:
    """Left-padded prompts of different lengths: at 8 bits the answers of the base, and fewer bits move the logits more."""
    made(KV(bits, 32), WEIGHTS, run_in, tmp_path / "artifact")
    base, model = pretrained(str(WEIGHTS)), strangers(tmp_path / "artifact")
    tokenizer = base.tokenizer
    tokenizer.padding_side = "left"
    texts = ["Question: Tom has 5 apples. Tom buys 7 more. How many apples does Tom have now?\nAnswer:", "Tom has 5"]
    ids = tokenizer(texts, return_tensors="pt", padding=True)

    @torch.inference_mode()
    def answers(of) -> torch.Tensor:
        return of.generate(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )

    ours, theirs = answers(model), answers(base.model)
    assert ours.shape[0] == 2
    if bits == 8:
        assert torch.equal(ours, theirs)

    @torch.inference_mode()
    def second_step(of, quantized: bool) -> torch.Tensor:
        """Logits of a token that reads the prompt from the cache."""
        from transformers import DynamicCache
        from transformers.cache_utils import QuantizedCache

        settings = dict(of.generation_config.cache_config or {})
        cache = QuantizedCache(settings.pop("backend"), of.config, **settings) if quantized else DynamicCache()
        prompt = ids.input_ids[:1]
        of(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
        return of(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True).logits.float()

    moved = (second_step(model, True) - second_step(model, False)).abs().max()
    assert 0 < moved < {8: 0.5, 4: 3, 2: 20}[bits]


@needs_hqq
def test_the_repositorys_own_generation_uses_it(tmp_path: Path, run_in: Run) -> None:
    """Answers are scored through lm-eval's model: its calls must leave the cache to the artifact."""
    from lm_eval.api.instance import Instance

    from winnow.benchmark.transformers_adapter import Adapter

    made(KV(2, 64), WEIGHTS, run_in, tmp_path / "artifact")
    lm = pretrained(str(tmp_path / "artifact"))
    seen: set[str] = set()

    def look(module, args, kwargs) -> None:
        seen.update(type(layer).__name__ for layer in kwargs["past_key_values"].layers)

    lm.model.model.register_forward_pre_hook(look, with_kwargs=True)
    request = Instance("generate_until", {}, ("Tom has", {"until": ["\n"], "max_gen_toks": 4}), 0)
    Adapter(lm.model, lm.tokenizer, batch_size=1).generate_until([request])
    assert seen == {"HQQQuantizedLayer"}


@needs_hqq
def test_it_follows_a_quantized_model_in_memory(tmp_path: Path, run_in: Run) -> None:
    made(KV(4), WEIGHTS, run_in, tmp_path / "both", {"rtn": RTN(4, 64)})
    pipeline.compress(pretrained(str(WEIGHTS)), {"rtn": RTN(4, 64)}, run_in, tmp_path / "alone")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "alone"))
    assert first == second
    written = json.loads((tmp_path / "both" / "generation_config.json").read_text())
    assert written["cache_implementation"] == "quantized" and written["cache_config"] == SETTINGS
    cache = generate(pretrained(str(tmp_path / "both")).model).past_key_values
    assert type(cache.layers[0]).__name__ == "HQQQuantizedLayer"


@needs_hqq
@pytest.mark.parametrize("has_own", [True, False])
def test_it_edits_final_files(has_own: bool, tmp_path: Path, tiny: Path, run_in: Run) -> None:
    folder = run_in.folder / "files"
    shutil.copytree(tiny, folder)
    if not has_own:
        (folder / "generation_config.json").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    lm = KV(4, 32)(pretrained(str(tiny)).with_files(folder), run_in).lm
    assert isinstance(lm, FileLM)
    assert {n for n, data in before.items() if (folder / n).read_bytes() != data} <= {"generation_config.json"}
    assert json.loads((folder / "generation_config.json").read_text())["cache_config"]["nbits"] == 4
    cache = generate(lm.model).past_key_values
    assert type(cache.layers[0]).__name__ == "HQQQuantizedLayer"


def test_a_gguf_file_is_refused(tmp_path: Path, tiny: Path, run_in: Run) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF"):
        KV(4)(pretrained(str(tiny)).with_files(folder), run_in)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("gemma3_text", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("files", [False, True])
def test_a_shorter_window_is_kept_and_acts(
    family: str, changes: dict, files: bool, tmp_path: Path, run_in: Run
) -> None:
    base = random_model(family, tmp_path / "base", **changes)
    weights = (base / "model.safetensors").read_bytes()
    stage = KV(bits=16, window=16)
    lm = pretrained(str(base))
    text = torch.randint(5, 900, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        unchanged = lm.model(input_ids=text).logits.float()
    if files:
        shutil.copytree(base, run_in.folder / "files")
        done = stage(lm.with_files(run_in.folder / "files"), run_in).lm
    else:
        done = stage(lm, run_in).lm
    with torch.inference_mode():
        before = done.model(input_ids=text).logits.float()
    save(done, tmp_path / "artifact")
    model = strangers(tmp_path / "artifact")
    with torch.inference_mode():
        after = model(input_ids=text).logits.float()
    assert torch.equal(after, before)
    assert torch.equal(after[:, :16], unchanged[:, :16])  # within the window nothing changes
    assert not torch.equal(after[:, -1], unchanged[:, -1])
    assert (tmp_path / "artifact" / "model.safetensors").read_bytes() == weights
    cache = generate(model, tokens=60).past_key_values
    kept = {layer.keys.shape[-2] for layer in cache.layers if layer.is_sliding}
    assert kept == {15}  # and the token that is being read
    windows = stage.predict(layout_of(pretrained(str(base)))).spec.cache_windows
    assert 16 in windows and 64 not in windows


@pytest.mark.parametrize(
    ("family", "stage", "message"),
    [
        ("llama", KV(16), "changes nothing"),
        ("llama", KV(4, window=16), "no sliding window; set method.kv.window=0"),
        ("qwen2", KV(16, window=16), "no sliding window"),
        ("mistral", KV(4), "layers of sliding_attention; set method.kv.bits=16"),
        ("gemma3_text", KV(2), "layers of sliding_attention"),
        ("mistral", KV(16, window=64), "not smaller than the model's own window of 64"),
        ("llama", KV(4, 128), "caches 2 x 64.*: set method.kv.group_size=64"),
        ("llama", KV(2, 64), "set method.kv.group_size=32"),  # two groups a token do not fill bytes of four
    ],
)
def test_what_a_model_cannot_do_is_said_from_its_configuration(
    family: str, stage: KV, message: str, tmp_path: Path, run_in: Run
) -> None:
    with pytest.raises(UserError, match=message):
        stage.predict(ModelLayout(config_of(family), {}))
    base = random_model(family, tmp_path / "base")
    with pytest.raises(UserError, match=message):
        pipeline.compress(pretrained(str(base)), {"kv": stage}, run_in, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


@needs_hqq
def test_groups_that_fill_no_bytes_fail_in_hqq() -> None:
    """Why they are refused: with one group a token, hqq packs no odd number of tokens."""
    from transformers import LlamaConfig
    from transformers.cache_utils import QuantizedCache

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=64, hidden_size=64)
    states = torch.randn(1, 1, 5, 64)
    with pytest.raises(RuntimeError):
        QuantizedCache("hqq", config, 4, 1, 1, 64).update(states, states, 0)
    QuantizedCache("hqq", config, 4, 1, 1, 32).update(states, states, 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rwkv", "rwkv keeps no keys and values"),
        ("mamba", "layers of linear_attention"),
        ("qwen3_next", "layers of linear_attention"),
    ],
)
def test_models_without_a_cache_of_keys_and_values_are_refused(kind: str, message: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(UserError, match=message):
        KV(4).predict(ModelLayout(AutoConfig.for_model(kind), {}))


def test_a_missing_library_names_its_extra(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"cache_config": SETTINGS}))
    monkeypatch.setitem(sys.modules, "hqq", None)
    with pytest.raises(MissingExtra, match=r"winnow\[kv\]"):  # not at the first answer, an hour later
        pretrained(str(folder))
