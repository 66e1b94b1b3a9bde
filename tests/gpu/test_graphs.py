"""Decoding from CUDA graphs on a CUDA device: the tokens of `generate`, sooner, with the memory given back, and falls that do no harm."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gpu.test_methods import made, on_device
from tests.method.shapes import FAMILIES, config_of
from tests.method.test_conformance import CLASSES, METHODS, stage_of
from tests.runtime.test_graphs import generated, model_of, prompts
from winnow.core.errors import Unservable
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.runtime import graphs, serving
from winnow.runtime.graphs import Decoder
from winnow.runtime.transformers import Runtime

DEVICE = "cuda"


def hardware_of(decode: str) -> Hardware:
    return Hardware("gpu", device=DEVICE, decode=decode)


def works_on(device: str = DEVICE) -> None:
    """Fails where an error has left the device, the stream or the allocator unusable."""
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    x = torch.randn(512, 512, device=device)
    assert torch.isfinite(x @ x).all()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(5, 8), (58, 12), (80, 6)])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "mixtral"])
@torch.inference_mode()
def test_tokens_are_those_of_generate(family: str, prompt_tokens: int, output_tokens: int, batch: int) -> None:
    model = model_of(family).to(DEVICE)
    decoder = Decoder(model, prompts(batch, prompt_tokens, seed=1).to(DEVICE), output_tokens)
    for seed in (2, 3):
        prompt_bt = prompts(batch, prompt_tokens, seed).to(DEVICE)
        decoder.first(prompt_bt)
        decoder.rest()
        expected = generated(model, prompt_bt, output_tokens)
        assert decoder.tokens_bn.tolist() == expected.sequences[:, prompt_tokens:].tolist()


def test_it_is_faster_and_gives_its_memory_back() -> None:
    """Of thirty narrow layers, whose kernels are short, so that Python is most of what an eager step takes."""
    torch.manual_seed(0)
    config = config_of("llama", num_hidden_layers=30)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE).eval()
    asked = torch.randint(1024, (1, 128)).tolist()
    totals: dict[str, float] = {}
    for decode in ("eager", "graph"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        served = Runtime(LM(model=model, name="m"), hardware_of(decode))
        timings = [served.request(asked, 64) for _ in range(7)][2:]
        assert served.runtime_mode == decode
        assert all(0 < t.first_s < t.total_s for t in timings)
        totals[decode] = statistics.median(t.total_s - t.first_s for t in timings)
        served.close()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # libraries keep their workspaces, a few MB
        assert torch.cuda.memory_allocated() - allocated < 64 << 20
        assert torch.cuda.memory_reserved() - reserved < 128 << 20
    assert totals["graph"] < 0.7 * totals["eager"], totals


@pytest.mark.parametrize("failure", ["waits", "raises while capturing"])
def test_a_capture_that_fails_does_no_harm(failure: str, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    model: Any = model_of("llama").to(DEVICE)
    forward = model.model.norm.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        if failure == "waits":
            return forward(x) * min(1, abs(x.sum().item()) + 1)
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()  # what the rehearsal would have found, had it done so before
        return forward(x)

    model.model.norm.forward = broken
    served = Runtime(LM(model=model, name="m"), hardware_of("auto"))
    for _ in range(2):
        assert served.request([[1, 2, 3]], 4).total_s > 0
    assert served.runtime_mode == "eager" and "capturing its decode step failed" in log_lines[0]
    works_on()
    with pytest.raises(Unservable, match=r"set hardware\.decode=eager"):
        Runtime(LM(model=model, name="m"), hardware_of("graph")).request([[1, 2, 3]], 4)
    works_on()
    model.model.norm.forward = forward  # and the same process captures what can be
    served = Runtime(LM(model=model, name="m"), hardware_of("graph"))
    assert served.request([[1, 2, 3]], 4).total_s > 0
    assert served.runtime_mode == "graph"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gguf"])
def test_artifacts_are_decoded_as_their_methods_say(name: str, tmp_path: Path, log_lines: list[str]) -> None:
    """From a graph, with the tokens of `generate`, or eagerly with the reason; a method that says nothing must be capturable."""
    made(tmp_path, **{name: stage_of(name)})
    lm = on_device(tmp_path / "artifact")
    log_lines.clear()
    prompt_bt = torch.tensor([lm.tokenizer("Anna goes to the forest to look for a tree.")["input_ids"]], device=DEVICE)
    with serving(lm, hardware_of("auto")) as served:
        served.request(prompt_bt.tolist(), 12)
        eager = CLASSES[name].eager_reason is not None
        assert (served.runtime_mode == "eager") == eager == bool(log_lines), (served.runtime_mode, log_lines)
        if not eager:
            assert isinstance(served, Runtime) and served._decoder is not None
            expected = generated(lm.model, prompt_bt, 12).sequences[0, prompt_bt.shape[1] :].tolist()
            ours = served._decoder.tokens_bn[0].tolist()
            # in half precision a near tie may go the other way, after which the texts differ
            assert ours[:4] == expected[:4], (ours, expected)
    works_on()


def test_a_capture_leaves_the_random_numbers_alone() -> None:
    model = model_of("llama").to(DEVICE)
    torch.cuda.manual_seed(5)
    expected = torch.rand(3, device=DEVICE)
    torch.cuda.manual_seed(5)
    served = Runtime(LM(model=model, name="m"), hardware_of("graph"))
    served.request([[1, 2, 3]], 4)
    served.close()
    assert torch.equal(torch.rand(3, device=DEVICE), expected)
    assert graphs.has_graphs(model)
