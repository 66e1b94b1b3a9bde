"""llama.cpp in this process: what it computes is what transformers computes, and what it takes is measured."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from winnow.core.errors import Unservable, UserError
from winnow.hardware.device import Hardware
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.nano.embedded import trained
from winnow.runtime import installed_runtimes, llama_cpp, serving
from winnow.runtime.check import check
from winnow.runtime.llama_cpp import Token
from winnow.runtime.meters import Meters

TEXT = "Anna goes to the forest to look for a tree. Tom takes an axe for chopping. The end."


@pytest.fixture
def lm(nano_f32: Path) -> LM:
    return pretrained(str(nano_f32))


def test_log_likelihoods_are_those_of_transformers(lm: LM) -> None:
    reference = trained(dtype="float32")
    ids = lm.tokenizer(TEXT)["input_ids"]
    assert ids == reference.tokenizer(TEXT)["input_ids"]
    with serving(lm) as served, serving(reference) as expected:
        assert served.name == "llama_cpp" and (served.vocab_size, served.context) == (1024, 1024)
        assert served.log_likelihoods(ids) == pytest.approx(expected.log_likelihoods(ids), abs=1e-3)
        assert served.weights_memory_bytes() == pytest.approx(expected.weights_memory_bytes(), rel=0.01)
        assert check(lm, served) == pytest.approx(check(reference, expected), rel=1e-4)
        assert (list(installed_runtimes(lm, "cpu"))) == ["llama_cpp"]


def test_parts_of_a_call_and_shared_tokens_change_nothing(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts with one beginning: apart, together with the beginning shared, and in parts of a few tokens."""
    start, ends = [1, 20, 30, 40, 50], ([60, 61, 62], [70, 71])
    with serving(lm) as served:
        assert isinstance(served, llama_cpp.Runtime)
        apart = []
        for end in ends:
            tokens = [Token(t, i, (0,), needs_logits=i >= 4) for i, t in enumerate(start + end)]
            apart.append(np.concatenate([x.copy() for x in served.cache(1, 64).compute(tokens)]))
        tokens = [Token(t, i, (0, 1), needs_logits=i == 4) for i, t in enumerate(start)]
        for n, end in enumerate(ends):
            tokens += [Token(t, 5 + i, (n,), needs_logits=True) for i, t in enumerate(end)]
        shared = np.concatenate([x.copy() for x in served.cache(2, 64, shared=True).compute(tokens)])
        monkeypatch.setattr(llama_cpp, "BATCH_TOKENS", 4)
        monkeypatch.setattr(llama_cpp, "MAX_LOGITS", 2 * served.vocab_size)
        served.drop_cache()
        parts = [x.copy() for x in served.cache(2, 64, shared=True).compute(tokens)]
    expected = np.concatenate([apart[0], apart[1][1:]])
    assert np.abs(shared - expected).max() < 1e-3
    assert np.abs(np.concatenate(parts) - expected).max() < 1e-3
    assert [len(part) for part in parts] == [0, 2, 2, 2]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_request_has_its_exact_length(lm: LM, batch: int) -> None:
    with serving(lm) as served:
        assert isinstance(served, llama_cpp.Runtime)
        seen = []
        cache = served.cache(batch, 5 + 7)
        original = cache._decode
        cache._decode = lambda tokens, wanted: (seen.append((len(tokens), wanted)), original(tokens, wanted))[1]  # type: ignore[method-assign]
        timing = served.request([[1, 7, 8, 9, 10]] * batch, 7)
        assert 0 < timing.first_s < timing.total_s
    assert seen == [(5 * batch, batch)] + [(batch, batch)] * 6


def test_the_meters_measure_it(lm: LM, tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    hardware = Hardware("cpu", prompt_tokens=8, output_tokens=4, warmup=1, repeats=3, seconds=0, energy_tokens=8)
    figures = Meters(hardware)(lm, Run(tmp_path))
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert figures["size_bytes"] > figures["weights_memory_bytes"] > 4 * 4_500_000
    assert figures["peak_memory_bytes"] > figures["weights_memory_bytes"]


def test_what_llama_cpp_does_not_load_is_unservable(nano_f32: Path, tmp_path: Path, capfd) -> None:
    folder = Path(shutil.copytree(nano_f32, tmp_path / "broken"))
    file = folder / "model-F32.gguf"
    file.write_bytes(file.read_bytes()[: 2**20])
    with pytest.raises(Unservable, match=r"llama\.cpp cannot load model-F32\.gguf: "), serving(pretrained(str(folder))):
        pass
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_cuda_needs_a_build_with_cuda(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp as library

    monkeypatch.setattr(library, "llama_supports_gpu_offload", lambda: False)
    with (
        pytest.raises(UserError, match="llama-cpp-python is built without it; .*hardware=cpu"),
        serving(lm, Hardware("h200", device="cuda")),
    ):
        pass
