"""Calibration: seeded token batches from a training split, the same for every method of a study."""

from __future__ import annotations

import hashlib
import itertools

import torch

from winnow.types import LM, Run, UserError

BATCH_TOKENS = 4096


def calibration_batches(lm: LM, run: Run) -> tuple[list[torch.Tensor], str]:
    """Token ids [rows, T] of `run.calibration.samples` documents, equal lengths together so that nothing is padded.

    Returns the batches and a SHA-256 over all ids, which the manifest keeps.
    """
    from winnow.recovery.corpus import training_documents
    from winnow.recovery.data import encode

    wanted = run.calibration.samples
    documents = list(itertools.islice(training_documents(run.calibration.source), wanted))
    if not documents:
        raise UserError(f"calibration.source={run.calibration.source} is empty")
    rows = sorted((row.ids for row in encode(documents, lm.tokenizer, run.calibration.max_length)), key=len)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    batches = []
    for length, group in itertools.groupby(rows, key=len):
        size = max(1, BATCH_TOKENS // length)
        same = list(group)
        batches += [torch.tensor(same[i : i + size], device=run.device) for i in range(0, len(same), size)]
    return batches, digest
