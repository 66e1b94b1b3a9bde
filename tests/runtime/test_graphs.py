"""Decoding from a graph: the same tokens as `generate`, for every kind of attention; and where there is none, eager and why.

The capture itself needs a GPU (`tests/gpu/test_graphs.py`); here the step is recorded and repeated on the processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.method.shapes import FAMILIES, config_of
from tests.runtime import recorded
from winnow.core.errors import Reason, Unservable, classify
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.runtime import graphs, serving
from winnow.runtime.graph_support import few_layers, try_capture, unsupported_base_reason, unsupported_reason
from winnow.runtime.graphs import Decoder
from winnow.runtime.transformers import Runtime

VOCABULARY = 128
GPU = Hardware("gpu", device="cuda")


def model_of(family: str, **changes: Any) -> Any:
    """A random model in single precision, half of whose tokens would end a text; its windows are 64 tokens."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64, **changes}
    ends = list(range(0, VOCABULARY, 2))
    config = config_of(family, dtype="float32", eos_token_id=ends, pad_token_id=0, bos_token_id=1, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompts(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def generated(model: Any, prompt_bt: torch.Tensor, output_tokens: int) -> Any:
    return model.generate(
        prompt_bt,
        attention_mask=torch.ones_like(prompt_bt),
        do_sample=False,
        min_new_tokens=output_tokens,
        max_new_tokens=output_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has graphs."""
    monkeypatch.setattr(graphs, "has_graphs", lambda model: True)
    monkeypatch.setattr(graphs, "capture", recorded.capture)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("prompt_tokens", "output_tokens"), [(5, 8), (58, 12), (80, 6), (1, 3)], ids=["short", "crossing", "beyond", "one"]
)
@pytest.mark.parametrize("family", [*FAMILIES, "mistral_full", "gpt2", "mixtral"])
@torch.inference_mode()
def test_tokens_and_logits_are_those_of_generate(
    family: str, prompt_tokens: int, output_tokens: int, batch: int, on_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts within the window of 64, that grow beyond it, and that are beyond it from the beginning."""
    model = model_of(family.removesuffix("_full"), **({"sliding_window": None} if family == "mistral_full" else {}))
    seen: list[torch.Tensor] = []
    choose = Decoder._choose

    def note(self: Decoder, logits_b1v: torch.Tensor) -> torch.Tensor:
        seen.append(logits_b1v)
        return choose(self, logits_b1v)

    monkeypatch.setattr(Decoder, "_choose", note)
    assert unsupported_reason(model) is None
    decoder = Decoder(model, prompts(batch, prompt_tokens, seed=1), output_tokens)
    recorded_logits_b1v = seen[-1]
    for seed in (2, 3):  # nothing is left of the request before
        prompt_bt = prompts(batch, prompt_tokens, seed)
        expected = generated(model, prompt_bt, output_tokens)
        decoder.first(prompt_bt)
        assert decoder.tokens_bn[:, 0].tolist() == expected.sequences[:, prompt_tokens].tolist()
        for logits_bv in expected.logits[1:]:
            decoder._replay()
            torch.testing.assert_close(recorded_logits_b1v[:, -1], logits_bv, rtol=1e-4, atol=1e-4)
        assert decoder.tokens_bn.tolist() == expected.sequences[:, prompt_tokens:].tolist()
        assert (decoder.tokens_bn % 2 == 1).all()


@torch.inference_mode()
def test_eager_attention_has_masks_of_its_own_kind(on_processor: None) -> None:
    model = model_of("gemma3_text", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    prompt_bt = prompts(2, 60)
    decoder = Decoder(model, prompt_bt, 10)
    decoder.first(prompt_bt)
    decoder.rest()
    assert decoder.tokens_bn.tolist() == generated(model, prompt_bt, 10).sequences[:, 60:].tolist()


def test_what_prevents_a_capture_is_named(tmp_path: Path) -> None:
    def because(family: str = "llama", **changes: Any) -> str:
        return unsupported_reason(model_of(family, **changes)) or ""

    assert because() == ""
    assert "does not say of LongT5" in (unsupported_reason(_other("LongT5ForConditionalGeneration")) or "")
    assert "BloomForCausalLM takes its positions from the attention mask" in because("bloom")
    assert "on how long the text is" in because(rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert "layers of kind linear_attention" in because(
        "qwen2", layer_types=["linear_attention", "full_attention"], use_sliding_window=True
    )
    assert "8-bit layers look for outliers" in because(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    group = {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}}
    packed = {"quant_method": "compressed-tensors", "config_groups": group}
    assert "scales of its activations" in because(quantization_config=packed)
    packed["config_groups"] = {"group_0": {"targets": ["Linear"], "input_activations": None}}
    assert because(quantization_config=packed) == ""

    model = model_of("llama")
    model.generation_config.cache_implementation = "quantized"
    assert "cache of their own (cache_implementation=quantized)" in (unsupported_reason(model) or "")
    model.generation_config.cache_implementation = "hybrid"  # the hub's Gemma-3: what `generate` would take anyway
    assert unsupported_reason(model) is None
    model.config._attn_implementation = "flash_attention_2"
    assert "its attention is flash_attention_2" in (unsupported_reason(model) or "")


def _other(name: str) -> Any:
    """Something with as much of a model as is looked at."""
    model = model_of("llama")
    model.__class__ = type(name, (type(model),), {"_can_compile_fullgraph": False})
    return model


@torch.inference_mode()
def test_adapters(on_processor: None) -> None:
    """One of LoRA is decoded from a graph, layers and all; a soft prompt is not."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model_of("llama"), lora).eval()
    assert unsupported_reason(model) is None
    prompt_bt = prompts(2, 9)
    decoder = Decoder(model, prompt_bt, 6)
    decoder.first(prompt_bt)
    decoder.rest()
    assert decoder.tokens_bn.tolist() == generated(model, prompt_bt, 6).sequences[:, 9:].tolist()
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert "soft prompt" in (unsupported_reason(peft.get_peft_model(model_of("llama"), soft)) or "")


def runtime_of(model: Any, decode: str = "auto") -> Runtime:
    return Runtime(LM(model=model, name="m"), Hardware("gpu", device="cuda", decode=decode))


def test_requests_are_answered_from_one_graph_a_shape(
    on_processor: None, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    captured = []
    monkeypatch.setattr(graphs, "capture", lambda *step: captured.append(step) or recorded.capture(*step))
    model = model_of("llama")
    served = runtime_of(model)
    model.generate = None  # nothing asks it
    for prompt_bt in (prompts(2, 6), prompts(2, 6, seed=1)):
        timing = served.request(prompt_bt.tolist(), 5)
        assert 0 < timing.first_s < timing.total_s
    assert (len(captured), served.runtime_mode, log_lines) == (1, "graph", [])
    del model.generate
    assert served._decoder is not None
    assert served._decoder.tokens_bn.tolist() == generated(model, prompt_bt, 5).sequences[:, 6:].tolist()
    served.request(prompts(1, 6).tolist(), 5)
    assert len(captured) == 2
    served.close()
    assert served._decoder is None


@pytest.mark.parametrize("decode", ["auto", "graph"])
def test_what_cannot_be_captured_is_said(decode: str, on_processor: None, log_lines: list[str]) -> None:
    """`auto` goes on eagerly and logs why; `graph` refuses, and names the way out."""
    model = model_of("llama")
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * min(1, abs(x.sum().item()) + 1)  # waits for the device
    served = runtime_of(model, decode)
    assert served.runtime_mode == "graph"
    why = r"m.*: capturing its decode step failed \(RuntimeError: operation not permitted when stream is capturing"
    if decode == "graph":
        with pytest.raises(Unservable, match=rf"hardware\.decode=graph: {why}.*set hardware\.decode=eager") as refused:
            served.request([[1, 2, 3]], 4)
        assert classify(refused.value) is Reason.UNSERVABLE  # what a trial of a study of the other way fails with
        return
    for _ in range(2):
        assert served.request([[1, 2, 3]], 4).total_s > 0
    assert served.runtime_mode == "eager" and served._decoder is None
    (line,) = log_lines
    assert line.startswith("latency is measured without CUDA graphs: m: capturing its decode step failed")


def test_what_is_known_beforehand_is_not_tried(
    on_processor: None, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(graphs, "capture", None)
    model = model_of("llama")
    model.generation_config.cache_implementation = "quantized"
    served = runtime_of(model)
    assert served.runtime_mode == "eager" and "cache_implementation=quantized" in log_lines[0]
    with pytest.raises(Unservable, match="cache_implementation=quantized"):
        runtime_of(model, "graph")
    log_lines.clear()
    served = runtime_of(model_of("llama"), "eager")
    served.request([[1, 2, 3]], 4)
    assert (served.runtime_mode, log_lines) == ("eager", [])


def test_too_little_memory_for_the_cache_says_nothing_of_graphs(
    on_processor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*step: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "capture", full)
    served = runtime_of(model_of("llama"))
    with pytest.raises(torch.OutOfMemoryError):
        served.request([[1, 2, 3]], 4)


def test_a_processor_has_none(tiny: Path, log_lines: list[str]) -> None:
    with serving(pretrained(str(tiny)), Hardware("cpu")) as served:
        served.request([[1, 2, 3]], 4)
        assert (served.runtime_mode, log_lines) == ("eager", [])
    with (
        pytest.raises(Unservable, match="not on a CUDA device"),
        serving(pretrained(str(tiny)), Hardware("gpu", device="cuda", decode="graph")),
    ):
        pass


def test_a_base_model_is_judged_by_its_files(tiny: Path, tmp_path: Path) -> None:
    def because(folder: Path, attention: str = "sdpa") -> str | None:
        return unsupported_base_reason(str(folder), attention, False, None)["because"]

    assert because(tiny) is None
    assert because(tiny, "eager") is None
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (folder / "model.safetensors").unlink()  # not looked at
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"cache_implementation": "quantized"}))
    assert "cache_implementation=quantized" in str(because(folder))
    settings.unlink()
    assert because(folder) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_layers_of_a_base_model_are_tried(
    family: str, tmp_path: Path, on_processor: None, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    kinds = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2} if family == "gemma3_text" else {}
    model = model_of(family, num_hidden_layers=4, **kinds)
    few = few_layers(model.config)
    assert few.num_hidden_layers == (3 if kinds else 1) and model.config.num_hidden_layers == 4
    model.config.save_pretrained(tmp_path)  # and no weights
    assert unsupported_base_reason(str(tmp_path), "sdpa", False, "cpu") == {"because": None}
    assert log_lines == []
    forward = type(model).forward

    def waiting(self: Any, position_ids: torch.Tensor, **settings: Any) -> Any:
        assert position_ids.max().item() >= 0
        return forward(self, position_ids=position_ids, **settings)

    monkeypatch.setattr(type(model), "forward", waiting)
    assert "capturing its decode step failed" in str(try_capture(model))


class _Device:
    """A stand-in for torch's CUDA that notes what a capture asks of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ending: Exception | None = None) -> None:
        self.mode: Any = 0
        self.said: list[str] = []
        self.ending = ending
        self.before = self.now = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
        cuda = {
            "current_stream": lambda: self.now,
            "set_stream": lambda given: setattr(self, "now", given),
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self._within,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.said.append("replay")),
            "graph_pool_handle": lambda: (0, 7),
            "graph": self._graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._leave, raising=False)

    def _leave(self, device: int, pool: Any) -> None:
        self.said.append(f"pool {pool} of device {device} is left")

    @contextmanager
    def _within(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def _graph(self, graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.said.append("begin")
        self.now = SimpleNamespace()  # torch leaves its own stream current if the capture cannot be ended
        yield
        if self.ending is not None:
            raise self.ending
        self.now = self.before


def test_a_capture_warms_up_rehearses_and_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch)
    replay = graphs.capture(
        lambda: device.said.append("rehearse" if device.mode == "error" else "step"), lambda: device.said.append("back")
    )
    assert device.said == ["back", "step", "back", "step", "back", "rehearse", "back", "begin", "step"]
    assert device.mode == 0 and device.now is device.before
    replay()
    assert device.said[-1] == "replay"


def test_what_waits_is_found_before_the_capture_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch)

    def step() -> None:
        if device.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="called a synchronizing"):
        graphs.capture(step, lambda: None)
    assert device.said == [] and device.mode == 0 and device.now is device.before


def test_a_capture_that_fails_leaves_its_stream_and_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, ending=RuntimeError("operation failed due to a previous error during capture"))
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.capture(lambda: None, lambda: None)
    assert device.said == ["begin", "pool (0, 7) of device 0 is left"]
    assert device.now is device.before
