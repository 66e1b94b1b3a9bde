"""What a model makes of the embedded model's held-out text, in single precision, which every processor computes quickly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from winnow.model.lm import LM
from winnow.model.packing import compute_in_dtype
from winnow.nano.items import held_out_text


def texts(lm: LM, count: int) -> Iterator[torch.Tensor]:
    """Token ids [1, T] of so many held-out texts."""
    for item in held_out_text(count):
        yield lm.tokenizer([item.completion], return_tensors="pt").input_ids


@torch.inference_mode()
def perplexity(lm: LM, count: int = 100) -> float:
    """Over all tokens of so many held-out texts."""
    loss, tokens = 0.0, 0
    with compute_in_dtype(lm.model.requires_grad_(False), torch.float32):
        for ids in texts(lm, count):
            scores = lm.model(input_ids=ids).logits[0, -ids.shape[1] : -1].float()  # a soft prompt's come before
            loss += F.cross_entropy(scores, ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


@torch.inference_mode()
def divergence(student: LM, teacher: LM, count: int = 30) -> float:
    """KL a token, in nats, of the student's distributions from the teacher's."""
    total, tokens = 0.0, 0
    models = [lm.model.requires_grad_(False) for lm in (student, teacher)]
    with compute_in_dtype(models[0], torch.float32), compute_in_dtype(models[1], torch.float32):
        for ids in texts(teacher, count):
            q, p = (model(input_ids=ids).logits.float().log_softmax(-1) for model in models)
            total += F.kl_div(q, p, log_target=True, reduction="sum").item()
            tokens += ids.shape[1]
    return total / tokens
