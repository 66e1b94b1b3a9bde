"""Soft prompts: training sees what PEFT computes, no weight is touched, and evaluation goes through the whole chain."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.method.shapes import random_model
from winnow.benchmark.adapters import scorer
from winnow.core.errors import UserError
from winnow.core.types import Calibration
from winnow.data.encoding import IGNORED, Encoded, collate, collate_padded
from winnow.estimate.layout import layout_of
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.bnb import NF4, Int8
from winnow.method.rtn import RTN
from winnow.method.soft_prompt import SoftPrompt, add_prompt, initial_ids
from winnow.model import adapter
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS
from winnow.runtime import serving
from winnow.runtime.check import ENGLISH
from winnow.training.losses import cross_entropy
from winnow.training.objective import CrossEntropy
from winnow.training.prompted import PromptedStudent

peft = pytest.importorskip("peft")
QUICK: dict[str, Any] = {"tokens": 8, "steps": 3, "tokens_per_batch": 128, "max_length": 64}


def a_prompt(folder: Path, **knobs: Any) -> LM:
    """A model in single precision behind a prompt that says something."""
    lm = pretrained(str(folder), dtype="float32")
    model = add_prompt(lm, SoftPrompt(**{**QUICK, **knobs}), 0)
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.add_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return lm.with_model(model.eval())


def rows_of(lengths: list[int], vocabulary: int = 900) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    return [Encoded(torch.randint(5, vocabulary, (n,), generator=generator).tolist(), ((n // 3, n),)) for n in lengths]


@pytest.mark.parametrize("family", ["nano", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("padded", [False, True])
def test_training_sees_what_peft_computes(family: str, padded: bool, tmp_path: Path) -> None:
    """Of documents in one row, longer and shorter than the prompt and than Gemma's window, the loss and its gradient."""
    base = WEIGHTS if family == "nano" else random_model(family, tmp_path / "base")
    model: Any = a_prompt(base).model
    weight = model.prompt_encoder["default"].embedding.weight
    rows = rows_of([5, 90, 1 + 8, 33])
    plain = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.ids)[None]
        logits = model(input_ids=ids).logits[0, 8:].float()
        (start, end), *_ = row.answers
        plain = plain + cross_entropy(logits[start - 1 : end - 1], ids[0, start:end])
    (expected,) = torch.autograd.grad(plain, weight)
    student = PromptedStudent(model)
    assert student.packs
    batch = collate_padded(rows, 0) if padded else collate(rows)
    loss = CrossEntropy()(student, batch)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert F.cosine_similarity(weight.grad.flatten(), expected.flatten(), dim=0) > 0.99999
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_no_weight_is_touched_and_the_loss_falls(tmp_path: Path, run_in: Run) -> None:
    lm = RTN(3, 64)(pretrained(str(WEIGHTS)), run_in).lm
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    knobs = {**QUICK, "max_length": 256, "held_out": 8}
    made, notes = SoftPrompt(**{**knobs, "steps": 12, "tokens_per_batch": 512})(lm, run_in)
    base = adapter.base_model(made.model)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    training = notes["training"]
    assert training["held_out_loss"] < training["held_out_loss_before"] - 0.05


@pytest.mark.parametrize("quantizer", [None, NF4, Int8, lambda: RTN(4, 64)], ids=["dense", "nf4", "int8", "rtn"])
def test_an_artifact_on_disk_gets_a_prompt(quantizer: Any, tiny: Path, tmp_path: Path, run_in: Run) -> None:
    source = tiny
    if quantizer is not None:
        source = tmp_path / "quantized"
        save(quantizer()(pretrained(str(tiny)), run_in).lm, source)
    stage = SoftPrompt(**QUICK)
    made = pipeline.compress(pretrained(str(source)), {"soft_prompt": stage}, run_in, tmp_path / "artifact")
    folder = tmp_path / "artifact"
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["num_virtual_tokens"]) == ("PROMPT_TUNING", 8)
    assert str(tmp_path) not in json.dumps(settings) and str(WEIGHTS) not in json.dumps(settings)
    assert "with peft" in made.manifest["runtimes"]["transformers"]
    if quantizer is None:
        plan = stage.predict(layout_of(pretrained(str(source))))
        assert plan.disk_bytes == pytest.approx(made.manifest["sizes"]["size_bytes"], rel=0.01)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompted")
    save(a_prompt(WEIGHTS), folder / "artifact")
    return folder / "artifact"


def test_scores_are_those_behind_the_prompt(artifact: Path) -> None:
    """lm-eval's log-likelihoods in a padded batch, and the runtime's, against the plain sum over PEFT's logits."""
    from lm_eval.api.instance import Instance

    lm = pretrained(str(artifact))
    pairs = [
        ("Question: Tom has 5 apples.\nAnswer:", " 5"),
        ("Tom", " goes to the lake to look for a fish."),
        ("A", " B"),
    ]
    with serving(lm) as served:
        found = scorer(served, lm, 3).loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
        ids = lm.tokenizer(ENGLISH)["input_ids"][:40]
        in_runtime = served.log_likelihoods(ids)
        assert served.context == lm.model.config.max_position_embeddings - 8
        assert scorer(served, lm, 3).max_length == served.context
        assert served.request([ids, ids], 4).total_s > 0

    @torch.inference_mode()
    def plain(ids: list[int]) -> torch.Tensor:
        logits = lm.model(input_ids=torch.tensor([ids])).logits[0, 8:-1].float()
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    assert in_runtime == pytest.approx(plain(ids).tolist(), abs=1e-3)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        whole, start = lm.tokenizer(context + continuation)["input_ids"], lm.tokenizer(context)["input_ids"]
        assert score == pytest.approx(plain(whole)[len(start) - 1 :].sum().item(), abs=1e-2), context


def test_answers_do_not_depend_on_padding(artifact: Path) -> None:
    """Greedy answers of a left-padded batch are those of each prompt alone, and those of PEFT's own `generate` alone."""
    lm = pretrained(str(artifact))
    tokenizer: Any = lm.tokenizer
    tokenizer.padding_side = "left"
    texts = [
        "Question: Tom has 5 apples. Tom buys 7 more. How many apples does Tom have now?\nAnswer:",
        "Tom has",
        "Anna",
    ]
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id}

    @torch.inference_mode()
    def answers(texts: list[str], generate: Any) -> list[str]:
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        out = generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **settings)
        return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :])  # type: ignore[no-any-return]

    together = answers(texts, lm.model.generate)
    own = peft.PeftModelForCausalLM.generate
    for text, answer in zip(texts, together, strict=True):
        (alone,) = answers([text], lm.model.generate)
        (theirs,) = answers([text], lambda **kwargs: own(lm.model, **kwargs))
        ended = answer.split("<eos>")[0]
        assert ended == alone.split("<eos>")[0] == theirs.split("<eos>")[0]


def test_lm_eval_generates_behind_the_prompt(artifact: Path) -> None:
    from lm_eval.api.instance import Instance

    lm = pretrained(str(artifact))
    with serving(lm) as served:
        pair = scorer(served, lm, 2)
        texts = ["Tom goes to the lake to look for a", "Anna"]
        requests = [Instance("generate_until", {}, (t, {"until": ["."], "max_gen_toks": 6}), 0) for t in texts]
        together = pair.generate_until(requests)
        assert together[0] and all(pair.count_tokens(answer) <= 6 and "." not in answer for answer in together)
        with_one = scorer(served, lm, 1)
        assert together == with_one.generate_until([dataclasses.replace(r) for r in requests])


@pytest.mark.parametrize("init", ["text", "random"])
def test_the_prompt_starts_from_tokens(init: str, tiny: Path) -> None:
    lm = pretrained(str(tiny))
    settings = SoftPrompt(tokens=32, init=init)
    ids = initial_ids(lm, settings, 3)
    assert len(ids) == 32 and torch.equal(ids, initial_ids(lm, settings, 3))
    weight = add_prompt(lm, settings, 3).prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, adapter.base_model(lm.model).get_input_embeddings()(ids).float())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"tokens": 128}, "no room for text in a context of 128"), ({"text": ""}, "text is empty")],
)
def test_what_cannot_be_done_is_said(knobs: dict, message: str, tmp_path: Path, run_in: Run) -> None:
    base = random_model("llama", tmp_path / "base", max_position_embeddings=128)
    with pytest.raises(UserError, match=message):
        SoftPrompt(**{**QUICK, **knobs})(pretrained(str(base)), run_in)


def test_documents_leave_room_for_the_prompt(tmp_path: Path, log_lines: list[str]) -> None:
    base = random_model("llama", tmp_path / "base", max_position_embeddings=32)
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", calibration=Calibration(samples=16, max_length=64))
    SoftPrompt(**{**QUICK, "steps": 1})(pretrained(str(base)), run)
    assert any("longer than 24 tokens and were cut" in line for line in log_lines)


def test_layers_without_a_gradient_are_refused(tiny: Path, run_in: Run) -> None:
    lm = pretrained(str(tiny))
    for layer in lm.model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match=r"no gradient reaches .*method=\[nf4,soft_prompt\]"):
        SoftPrompt(**QUICK)(lm, run_in)


def test_masks_of_padding_are_ignored() -> None:
    assert (collate_padded(rows_of([3, 6]), 0)["targets"][0, 3:] == IGNORED).all()
