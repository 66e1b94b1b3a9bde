"""The conformance suite of methods: every option of `conf/method` that a model can be compressed with, on the embedded
model; one method of each file on random models of other families, and with `--all-shapes` (`make test-all`) every one.

What a method makes is made once for each model and looked at from all sides.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.method.scores import perplexity
from tests.method.shapes import FAMILIES, random_model
from tests.test_conf import class_of, composed
from winnow.core.cli import options
from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.knobs import Stage
from winnow.model import manifest
from winnow.model.adapter import base_model
from winnow.model.layers import linears
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS

TEXT = "Question: Tom has 5 apples. Tom buys 7 more. How many apples does Tom have now?\nAnswer:"
EMBEDDED = "nano"
METHODS = [name for name in options("method") if name != "pretrain"]  # pretrain needs hours to be worth anything
CLASSES = {name: class_of(composed("compress", f"method=[{name}]").method[name]) for name in METHODS}
QUANTIZERS = [name for name in METHODS if CLASSES[name].slot == Slot.QUANTIZE]
# settings at which the suite has time for a method; everything else is at its defaults
QUICK: dict[str, dict[str, Any]] = {
    "autoround": {"iters": 10},
    "awq": {"grid": 5},
    "lora": {"steps": 10, "tokens_per_batch": 512},
    "distill": {"steps": 5, "tokens_per_batch": 512, "student": {"num_hidden_layers": 4}},
    "progressive": {"steps": 5, "tokens_per_batch": 512, "rounds": 2},
    "qlora": {"steps": 5, "tokens_per_batch": 256},
    "soft_prompt": {"steps": 10, "tokens_per_batch": 512},
}
# transformers quantizes caches of full attention only; what kv does for sliding windows is to narrow them
SLIDING = {"gemma3_text", "mistral"}
MOVES_SCALES = {"awq", "smoothquant"}  # into the norms, which are else left as they are
CHANGES_SHAPES = {"depth", "width", "distill", "progressive"}


def one_a_file() -> list[str]:
    """The first method of each source file: what other shapes are tried with."""
    first: dict[str, str] = {}
    for name in METHODS:
        first.setdefault(CLASSES[name].__module__, name)
    return sorted(first.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        others = METHODS if metafunc.config.getoption("--all-shapes") else one_a_file()
        cases = [(EMBEDDED, name) for name in METHODS] + [(family, name) for family in FAMILIES for name in others]
        metafunc.parametrize("case", cases, ids=lambda case: f"{case[1]}-{case[0]}")


def stage_of(name: str, model: str = EMBEDDED) -> Stage:
    knobs = QUICK.get(name, {})
    if name == "kv" and model in SLIDING:
        knobs = {"bits": 16, "window": 32}
    if name == "distill" and model != EMBEDDED:  # of two layers
        knobs = {**knobs, "student": {"num_hidden_layers": 1}}
    return CLASSES[name](**knobs)


@dataclass(frozen=True)
class Made:
    """An artifact, and what was seen while it was made."""

    base: Path
    folder: Path
    manifest: dict[str, Any]
    logits: torch.Tensor | None  # of the model in memory; None where only files were made

    def again(self) -> LM:
        return pretrained(str(self.folder))


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {EMBEDDED: WEIGHTS}

    def base(model: str) -> Path:
        if model not in made:
            made[model] = random_model(model, tmp_path_factory.mktemp("bases") / model)
        return made[model]

    return base


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, base_of: Callable[[str], Path]) -> Callable[..., Made]:
    """Makes the artifact of methods on a model, once for all tests that ask for the same."""
    cache: dict[tuple[Any, ...], Made] = {}

    def maker(model: str, *names: str, repeat: int = 0, dtype: str = "auto", least: bool = False) -> Made:
        if "gguf" in names:
            pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'winnow[gguf]'")
        key = (model, names, repeat, dtype, least)
        if key not in cache:
            folder = tmp_path_factory.mktemp("-".join(("made", model, *names)))
            (folder / "run").mkdir()
            calibration = Calibration(samples=4 if least else 64, max_length=128)
            run = Run(folder / "run", dtype=dtype, calibration=calibration)
            seen: list[torch.Tensor] = []
            lm, stages = pretrained(str(base_of(model))), {name: stage_of(name, model) for name in names}
            if least:
                stages = {k: replace(s, steps=2) if hasattr(s, "steps") else s for k, s in stages.items()}
            with look_before_saving(seen):
                made = pipeline.compress(lm, stages, run, folder / "artifact")
            cache[key] = Made(base_of(model), folder / "artifact", made.manifest, seen[-1] if seen else None)
        return cache[key]

    return maker


def look_before_saving(seen: list[torch.Tensor]) -> Any:
    """Meanwhile the logits of what is about to be saved are appended to `seen`, unless it is a GGUF file."""

    def look(lm: LM, output: Path) -> LM:
        if not (lm.path and list(Path(lm.path).glob("*.gguf"))):
            seen.append(logits(lm))
        return save(lm, output)

    return mock.patch("winnow.model.save.save", look)


@torch.inference_mode()
def logits(lm: LM) -> torch.Tensor:
    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = lm.tokenizer([TEXT], return_tensors="pt").input_ids
    return lm.model(input_ids=ids).logits.float()


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], torch.Tensor]]:
    """Logits of an artifact as computed by a process that knows transformers and not winnow."""
    program = Path(__file__).with_name("stranger.py")
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    output = tmp_path_factory.mktemp("stranger") / "logits.safetensors"

    def ask(folder: Path) -> torch.Tensor:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"path": str(folder), "output": str(output), "text": TEXT}) + "\n")
        process.stdin.flush()
        said = process.stdout.readline().strip()
        assert said == "ok", said
        return load_file(output)["logits"]

    yield ask
    process.kill()
    process.wait()


def test_a_stranger_computes_what_the_model_in_memory_did(case, make, stranger) -> None:
    made = make(*case)
    if made.logits is None:
        pytest.skip("a GGUF file: tests/runtime compares it")
    torch.testing.assert_close(stranger(made.folder), made.logits, rtol=0, atol=0)


def test_bytes_on_disk_are_as_predicted(case, make) -> None:
    made = make(*case)
    plan = stage_of(case[1], case[0]).predict(layout_of(pretrained(str(made.base))))
    assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.03)


def test_the_manifest_is_complete(case, make) -> None:
    made = make(*case)
    stage = stage_of(case[1], case[0])
    written = manifest.read(made.folder)
    record = written["stages"][-1]
    assert record["method"] == case[1] and record["slot"] == stage.slot.name.lower()
    assert record["knobs"] == json.loads(json.dumps(vars(stage)))
    assert record["seconds"] > 0 and record["seed"] == 0
    assert record["energy_source"] in ("counter", "estimated", "none")
    assert written["base"]["sha256"] == manifest.content_hash(made.base)
    assert written["sizes"] == manifest.sizes(made.folder)
    assert written["sha256"] == manifest.content_hash(made.folder)
    assert set(written["versions"]) >= {"torch", "transformers", "winnow"}
    assert written["runtimes"], "no runtime loads it"


def test_what_is_not_compressed_is_untouched(case, make) -> None:
    made = make(*case)
    if made.logits is None or case[1] in CHANGES_SHAPES:
        pytest.skip("compared by tests of its own")
    before, after = pretrained(str(made.base)).model, base_model(made.again().model)
    compressed = {f"{name}." for name in linears(before)}
    parameters = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        if any(name.startswith(prefix) for prefix in compressed) or ("norm" in name and case[1] in MOVES_SCALES):
            continue
        assert torch.equal(parameter, parameters[name].to(parameter.dtype)), name


@pytest.fixture(scope="session")
def base_perplexity() -> float:
    return perplexity(pretrained(str(WEIGHTS)))


@pytest.mark.parametrize("name", METHODS)
def test_perplexity_stays_within_the_stated_bound(name: str, make, base_perplexity: float) -> None:
    made = make(EMBEDDED, name)
    if made.logits is None:
        pytest.skip("a GGUF file: tests/method/test_gguf.py measures it")
    assert perplexity(made.again()) <= CLASSES[name].perplexity_bound * base_perplexity


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_makes_the_same_bytes(name: str, make) -> None:
    # on a small model where that is as telling, since everything is made twice
    first, second = (make("llama", name, repeat=i).manifest["sha256"] for i in range(2))
    assert first == second


@pytest.mark.parametrize("name", one_a_file())
def test_what_is_saved_has_the_types_of_the_base_whatever_is_computed_in(name: str, make) -> None:
    saved = []
    for dtype in ("float32", "bfloat16"):
        made = make("llama", name, dtype=dtype, least=True)  # most processors are slow in bfloat16
        assert made.manifest["stages"][-1]["computed_in"] == dtype
        files = sorted(made.folder.rglob("*.safetensors"))
        saved.append([{k: (t.dtype, t.shape) for k, t in load_file(file).items()} for file in files])
    assert saved[0] == saved[1]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_pruned_weights_stay_zero_and_patterns_exact(name: str, make) -> None:
    made = make("llama", "halved", name)
    if made.logits is None:
        pytest.skip("llama.cpp's types hold no pattern")
    pruned = make("llama", "halved").again().model
    quantized = dense(made.again().model)
    for layer, linear in linears(pruned).items():
        zeros = linear.weight == 0
        assert zeros.unflatten(-1, (-1, 4)).sum(-1).eq(2).all(), layer
        assert (quantized[layer][zeros] == 0).all(), layer


CLASSES["halved"] = lambda: CLASSES["wanda"](pattern="2:4")


@torch.inference_mode()
def dense(model: Any) -> dict[str, torch.Tensor]:
    """The weights [out, in] that each linear layer multiplies with: what it makes of the unit vectors."""
    found = {}
    for name, module in model.named_modules():
        if ".layers." in f".{name}." and hasattr(module, "in_features") and not list(module.children()):
            eye = torch.eye(module.in_features, dtype=model.dtype)
            zero = module(torch.zeros_like(eye[:1]))
            found[name] = (module(eye) - zero).T
    return found


def test_order_and_slots_are_checked() -> None:
    made = {name: stage_of(name) for name in ("wanda", "lora", "rtn", "nf4")}
    pipeline.check_order({k: made[k] for k in ("wanda", "lora", "rtn")})
    with pytest.raises(UserError, match=r"method=\[rtn,wanda\].*write method=\[wanda,rtn\]"):
        pipeline.check_order({k: made[k] for k in ("rtn", "wanda")})
    with pytest.raises(UserError, match="both quantize"):
        pipeline.check_order({k: made[k] for k in ("rtn", "nf4")})
    assert [s.name for s in sorted(Slot)] == ["PRUNE", "RECOVER", "QUANTIZE", "ADAPT", "CACHE", "PROMPT"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantized_artifact_is_not_compressed_again(name: str, make, tmp_path: Path) -> None:
    made = make(EMBEDDED, name)
    run = Run(tmp_path)
    for second in ("magnitude", "rtn"):
        with pytest.raises(UserError, match="start from the model that it was made of"):
            pipeline.compress(made.again(), {second: stage_of(second)}, run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_damaged_weight_is_named(tmp_path: Path, tiny: Path) -> None:
    lm = pretrained(str(tiny))
    lm.model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        pipeline.compress(lm, {"rtn": stage_of("rtn")}, Run(tmp_path), tmp_path / "artifact")
