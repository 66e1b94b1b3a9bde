"""Which runtime serves what, that one opening is shared, and that transformers keeps to the model's generation settings."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from winnow.benchmark.adapters import scorer
from winnow.core.errors import UserError
from winnow.hardware.device import RUNTIMES, Hardware
from winnow.model.folder_checks import gguf_file
from winnow.model.lm import LM
from winnow.model.load import load_model
from winnow.model.loading import Loading
from winnow.model.pretrained import pretrained
from winnow.runtime import choose_runtime, installed_runtimes, serving
from winnow.runtime.transformers import Runtime


@pytest.fixture
def gguf_folder(tiny: Path, tmp_path: Path) -> Path:
    """A folder as `method=[gguf]` leaves it; its file is empty, since nothing here opens it."""
    folder = Path(shutil.copytree(tiny, tmp_path / "gguf"))
    (folder / "model.safetensors").unlink()
    (folder / "model-Q8_0.gguf").write_bytes(b"GGUF")
    return folder


def test_a_runtime_serves_the_formats_that_it_reads(tiny: Path, gguf_folder: Path) -> None:
    plain, gguf = pretrained(str(tiny)), pretrained(str(gguf_folder))
    assert choose_runtime(plain, Hardware("cpu")) == "transformers"
    assert choose_runtime(plain, Hardware("gpu", device="cuda", runtime="vllm")) == "vllm"
    assert (
        choose_runtime(gguf, Hardware("cpu"))
        == choose_runtime(gguf, Hardware("cpu", runtime="llama_cpp"))
        == "llama_cpp"
    )
    with pytest.raises(UserError, match=r"hardware\.runtime=llama_cpp .* method=\[\.\.\.,gguf\]"):
        choose_runtime(plain, Hardware("cpu", runtime="llama_cpp"))
    with pytest.raises(UserError, match=r"hardware\.runtime=vllm does not serve GGUF"):
        choose_runtime(gguf, Hardware("cpu", runtime="vllm"))
    assert list(installed_runtimes(plain, "cpu")) == ["transformers"]
    assert set(installed_runtimes(gguf, "cpu")) <= {"llama_cpp"}


def test_a_gguf_folder_is_no_model_for_methods(gguf_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a GGUF file, .* start from the model that it was made of"):
        load_model(str(gguf_folder), Loading())
    (gguf_folder / "model-Q2_K.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(model-Q2_K\.gguf, model-Q8_0\.gguf"):
        gguf_file(gguf_folder)


def test_vllm_says_what_it_needs(tiny: Path) -> None:
    with (
        pytest.raises(UserError, match=r"needs vLLM and a CUDA device .*pip install vllm"),
        serving(pretrained(str(tiny)), Hardware("cpu", runtime="vllm")),
    ):
        pass


def test_the_runtime_is_checked_and_part_of_the_fingerprint() -> None:
    with pytest.raises(UserError, match=r"hardware\.runtime=ollama is not known; it is one of transformers"):
        Hardware("cpu", runtime="ollama")
    prints = [Hardware("cpu", runtime=runtime).fingerprint() for runtime in RUNTIMES]
    assert [one["runtime"] for one in prints] == list(RUNTIMES)


def test_all_probes_share_one_opening(tiny: Path) -> None:
    lm = pretrained(str(tiny))
    lm.model.train()
    with serving(lm) as outer:
        assert not lm.model.training
        with serving(lm, served=outer) as inner:
            assert inner is outer
        assert not lm.model.training
    assert lm.model.training


def test_log_likelihoods_are_the_models(tiny: Path) -> None:
    lm = pretrained(str(tiny), dtype="float32")
    ids = lm.tokenizer("Anna goes home and reads.")["input_ids"]
    with serving(lm) as served:
        found = served.log_likelihoods(ids)
    with torch.inference_mode():
        expected = lm.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx([expected[i, token].item() for i, token in enumerate(ids[1:])], abs=1e-5)
    assert -sum(found) / len(found) == pytest.approx(math.log(lm.model.config.vocab_size), rel=0.05)


def test_a_quantized_cache_of_the_generation_settings_is_used(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In timed requests and in generated answers: what lm-eval passes to `generate` does not override it."""
    pytest.importorskip("hqq")
    from lm_eval.api.instance import Instance
    from transformers import cache_utils

    folder = Path(shutil.copytree(tiny, tmp_path / "kv"))
    settings = folder / "generation_config.json"
    cache = {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 32, "residual_length": 4}
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"cache_implementation": "quantized", "cache_config": cache})
    )
    made: list[Any] = []
    original = cache_utils.QuantizedCache.__init__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(cache_utils.QuantizedCache, "__init__", note)
    lm = pretrained(str(folder))
    with serving(lm) as served:
        served.request([[5, 6, 7, 8]], 6)
        assert len(made) == 1
        asked = Instance("generate_until", {}, ("Anna goes", {"until": ["\n"], "max_gen_toks": 6}), 0)
        scorer(served, lm, 2).generate_until([asked])
        assert len(made) == 2


def test_a_model_that_makes_another_number_of_tokens_is_refused(tiny: Path) -> None:
    served = Runtime(LM(model=pretrained(str(tiny)).model))
    served.model.generate = lambda **settings: settings["input_ids"]
    with pytest.raises(RuntimeError, match=r"asked for 3 tokens, LlamaForCausalLM\.generate made 0"):
        served.request([[1, 2]], 3)


def test_vllm_is_asked_as_its_engine_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the engine's interface, since vLLM itself needs a GPU."""
    from winnow.runtime import vllm

    class Engine:
        waiting: ClassVar[dict[str, int]] = {}

        def add_request(self, number: str, prompt: dict[str, list[int]], settings: Any) -> None:
            assert prompt["prompt_token_ids"] and settings.ignore_eos and settings.temperature == 0
            self.waiting[number] = settings.max_tokens

        def has_unfinished_requests(self) -> bool:
            return bool(self.waiting)

        def step(self) -> list[Any]:
            """One request a step, so that the first tokens of two requests come in two steps."""
            number, left = min(self.waiting.items(), key=lambda item: -item[1])
            self.waiting[number] -= 1
            done = left == 1
            if done:
                del self.waiting[number]
            output = types.SimpleNamespace(token_ids=[1] * (4 - left))
            return [types.SimpleNamespace(request_id=number, finished=done, outputs=[output])]

    class Engined:
        llm_engine = Engine()

        def generate(self, prompts: list[Any], settings: Any, use_tqdm: bool) -> list[Any]:
            (ids,) = (prompt["prompt_token_ids"] for prompt in prompts)
            logprobs = [None, *({token: types.SimpleNamespace(logprob=-1.0)} for token in ids[1:])]
            return [types.SimpleNamespace(prompt_logprobs=logprobs)]

    class SamplingParams(types.SimpleNamespace):
        pass

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=SamplingParams))
    runtime = object.__new__(vllm.Runtime)
    runtime._llm, runtime._numbers = Engined(), iter(range(9))
    timing = runtime.request([[1, 2], [3, 4]], 3)
    assert 0 < timing.first_s < timing.total_s
    assert runtime.log_likelihoods([5, 6, 7]) == [-1.0, -1.0]
