"""A cached teacher beside one that is asked at every step: optimizer steps a second, and the gradient. For `bench/recovery.py`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import Encoded, encode
from winnow.model.lm import LM
from winnow.model.load import load_tokenizer
from winnow.model.loading import Loading
from winnow.model.pretrained import pretrained
from winnow.model.save import save
from winnow.nano.embedded import WEIGHTS
from winnow.training.losses import forward_kl
from winnow.training.objective import Distillation, Objective, SampledDistillation
from winnow.training.packed_rows import Documents
from winnow.training.student import Student
from winnow.training.teacher import load_frozen
from winnow.training.teacher_targets import Sampling, Targets, load_or_compute_targets

VOCABULARY = 8192
STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
TEACHER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8}
TOKENS_PER_STEP = 2048
REPEATS = 7


def measure_cached_vs_online() -> tuple[float, float]:
    """Steps a second with a cached teacher over those with an online one, and the cosine of the two gradients.

    Speed: random Llamas, the teacher of 8 times the student's parameters; a step is forward, backward and AdamW, the reading of
    the cached targets included, their computation not (it is paid once for all epochs and students). Gradient: the embedded
    model taught itself without two of its five layers, on one batch of a few thousand tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _speed_ratio(Path(folder)), _gradient_cosine(Path(folder))


def _speed_ratio(folder: Path) -> float:
    student = random_llama(folder / "student", STUDENT)
    teacher = random_llama(folder / "teacher", TEACHER)
    times_larger = _parameters(teacher) / _parameters(student)
    assert 7.5 <= times_larger <= 8.5, times_larger
    rows = _rows(student, 200)
    targets = _targets(teacher, rows, folder, VOCABULARY)
    steps = [
        _stepper(Student(pretrained(str(folder / "student"), dtype="float32").model), objective, rows)
        for objective in (SampledDistillation(targets), Distillation(load_frozen(teacher, "cpu"), forward_kl))
    ]
    seconds: list[list[float]] = [[], []]
    for repeat in range(REPEATS + 1):
        for step, found in zip(steps, seconds, strict=True):  # alternating
            started = time.perf_counter()
            step()
            if repeat:  # the first warms up
                found.append(time.perf_counter() - started)
    cached, online = (statistics.median(found) for found in seconds)
    return online / cached


def _stepper(student: Student, objective: Objective, rows: list[Encoded]) -> Callable[[], None]:
    """Makes one optimizer step on the next batch."""
    batches = Documents(rows, TOKENS_PER_STEP, seed=0).steps(devices=1, accumulate=1, rank=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    student.train()

    def step() -> None:
        batch: dict[str, Any] = next(batches)
        (objective(student, batch) / batch["step_targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gradient_cosine(folder: Path) -> float:
    teacher = pretrained(str(WEIGHTS), dtype="float32")
    model: Any = pretrained(str(WEIGHTS), dtype="float32").model
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 3, 4))
    student, rows = Student(model), _rows(teacher, 100)
    batch = Documents(rows, 4096, seed=0).batch(list(range(len(rows))), 0)
    targets = _targets(teacher, rows, folder, model.config.vocab_size)
    gradients = []
    for objective in (SampledDistillation(targets), Distillation(load_frozen(teacher, "cpu"), forward_kl)):
        student.zero_grad()
        objective(student, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return F.cosine_similarity(*(g.double() for g in gradients), dim=0).item()


def random_llama(folder: Path, shape: dict[str, int]) -> LM:
    """A saved Llama of this shape with random weights, in single precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, dtype="float32", **shape))
    return save(LM(model=model, tokenizer=load_tokenizer(str(WEIGHTS), Loading())), folder)


def _parameters(lm: LM) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def _rows(lm: LM, count: int) -> list[Encoded]:
    return encode(documents(Calibration(), count, seed=0), lm.tokenizer, 256)


def _targets(teacher: LM, rows: list[Encoded], folder: Path, vocabulary: int) -> Targets:
    return load_or_compute_targets(teacher, rows, Sampling(), folder, vocabulary, lambda: load_frozen(teacher, "cpu"))


if __name__ == "__main__":
    print("steps/s cached over online, gradient cosine:", *(f"{x:.4f}" for x in measure_cached_vs_online()))
