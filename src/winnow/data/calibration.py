"""Builds seeded calibration batches of training documents, the same for every method of a study.

python compress.py method=[gptq] calibration.source=gsm8k calibration.data_dir=FOLDER calibration.samples=256
"""

from __future__ import annotations

import hashlib
import itertools

import torch

from winnow.core.errors import UserError
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.model.spec import context_of

BATCH_TOKENS = 4096
# the last batches of this process, which the methods of a pipeline share
_latest: dict[tuple[object, ...], tuple[list[torch.Tensor], str]] = {}


def calibration_batches(lm: LM, run: Run) -> tuple[list[torch.Tensor], str]:
    """Returns token ids [rows, T] of `run.calibration.samples` documents, and a SHA-256 over all ids for the manifest.

    A batch holds documents of equal length, so that it needs no padding. The batches are in main memory.

    Raises:
        UserError: the source is missing or empty, or it has rows without text or test items of a benchmark.
    """
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode

    tokenizer = lm.tokenizer
    key = (run.calibration, run.seed, tokenizer.name_or_path, len(tokenizer))
    if key not in _latest:
        samples = documents(run.calibration, run.calibration.samples, run.seed)
        context = context_of(lm.config())
        longest = min(run.calibration.max_length, context or run.calibration.max_length)
        rows = sorted((row.ids for row in encode(samples, tokenizer, longest)), key=len)
        if not rows:
            raise UserError(f"calibration.source={run.calibration.source}: its rows hold no text; give another source")
        batches = []
        for length, group in itertools.groupby(rows, key=len):
            group_rows, size = list(group), max(1, BATCH_TOKENS // length)
            batches += [torch.tensor(group_rows[i : i + size]) for i in range(0, len(group_rows), size)]
        _latest.clear()
        _latest[key] = batches, hashlib.sha256(repr(rows).encode()).hexdigest()
    batches, sha256 = _latest[key]
    return list(batches), sha256
