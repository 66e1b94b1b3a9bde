"""Measures how far a compressed model's predictions are from the base model's, in a second or two, before any benchmark.

The figure is the Kullback-Leibler divergence KL(base || model) of the next token, in nats, averaged over a few thousand tokens of
the calibration source. It ranks models well over the full range of damage and badly among models with almost no damage
(arXiv:2606.19558), so it tells which models are hopeless and not which model is best.

The base model's `TOP` likeliest tokens at each position are computed once and cached. All other tokens count as one, so the
figure is at most the full divergence (the data processing inequality), and in practice almost equal to it.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from winnow.core.cache import Cache
from winnow.core.types import Figures
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.model.spec import context_of

if TYPE_CHECKING:
    from winnow.runtime import Served

TOKENS = 4096
TOP = 256
FOLDER = "divergence"
_SEED = 982_451_653  # added to the run's seed, so that the documents differ from the calibration samples if the source has more
_MIN_LOG = -80.0  # nats; smaller log-probabilities are raised to it
_ROUNDING = 1e-5  # rounding error of a sum of probabilities in single precision


@dataclass(frozen=True)
class Reference:
    """The base model's predictions over some documents.

    Attributes:
        rows: token ids of the documents.
        tokens: ids [positions, K] of the likeliest next tokens, over all documents in order.
        log_probabilities: their log-probabilities [positions, K], in nats.
    """

    rows: tuple[tuple[int, ...], ...]
    tokens: np.ndarray
    log_probabilities: np.ndarray


def reference(base: LM, served: Served | None, run: Run, device: str) -> Reference:
    """Returns the base model's predictions, from `run.cache` or else computed and cached there.

    Args:
        served: the base model as a runtime has it open; None opens it.

    Raises:
        UserError: the calibration source is missing or empty.
        NotImplementedError: the runtime gives no log-probabilities.
    """
    from winnow.data.corpus import content

    loading = [base.loading.dtype, base.loading.attention, device]
    key = [base.sha256(), run.seed, asdict(run.calibration), content(run.calibration), TOKENS, TOP, loading]
    folder = (run.cache or run.folder) / FOLDER
    cache = Cache(folder, suffix=".npz", damage=(zipfile.BadZipFile, zlib.error))
    entry = cache.entry(key)
    cached = cache.read(entry, _load)
    if cached is not None:
        return cached
    predictions = _compute_reference(base, served, run, device)
    with cache.writing(entry) as scratch:
        np.savez_compressed(
            scratch,
            ids=np.concatenate([np.array(row, np.int32) for row in predictions.rows]),
            lengths=np.array([len(row) for row in predictions.rows], np.int32),
            tokens=predictions.tokens.astype(np.int32),
            log_probabilities=predictions.log_probabilities.astype(np.float32),
        )
    return predictions


def _load(path: Path) -> Reference:
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths"])[:-1]
        rows = tuple(tuple(map(int, row)) for row in np.split(arrays["ids"], ends))
        return Reference(rows, arrays["tokens"], arrays["log_probabilities"].astype(np.float32))


def _compute_reference(base: LM, served: Served | None, run: Run, device: str) -> Reference:
    from winnow.hardware.device import Hardware
    from winnow.runtime import serving

    rows = _rows(base, run)
    if served is None:
        with serving(base, Hardware(device, device=device, decode="eager")) as opened:
            top = opened.next_tokens_batch(rows, TOP)
        base.release()
    else:
        top = served.next_tokens_batch(rows, TOP)
    return Reference(tuple(map(tuple, rows)), np.concatenate([t for t, _ in top]), np.concatenate([p for _, p in top]))


def _rows(base: LM, run: Run) -> list[list[int]]:
    """Returns documents of the calibration source as token ids, at most `TOKENS` tokens in total."""
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode

    context = context_of(base.model.config)
    # an eighth of the context is left for the soft prompt that a compared model may have
    length = min(run.calibration.max_length, context * 7 // 8) if context else run.calibration.max_length
    rows: list[list[int]] = []
    for row in encode(documents(run.calibration, TOKENS // 16, run.seed + _SEED), base.tokenizer, length):
        room = TOKENS - sum(map(len, rows))
        if room < 2:
            break
        if len(row.ids) > 1:
            rows.append(list(row.ids[:room]))
    return rows


def divergence(served: Served, reference: Reference) -> Figures:
    """Returns `kl_to_base` in nats per token, and `top1_agreement`.

    `top1_agreement` is the share of positions at which both models prefer the same one of the reference's tokens. Documents that
    are longer than the model's context are left out.

    Raises:
        NotImplementedError: the runtime gives no log-probabilities, or no document fits.
    """
    ends = np.cumsum([len(row) - 1 for row in reference.rows])[:-1]
    parts = zip(
        reference.rows, np.split(reference.tokens, ends), np.split(reference.log_probabilities, ends), strict=True
    )
    fitting = [part for part in parts if served.context is None or len(part[0]) <= served.context]
    if not fitting:
        raise NotImplementedError("every text of the calibration source is longer than what the model can read")
    predictions = served.next_tokens_batch([row for row, _, _ in fitting], [tokens for _, tokens, _ in fitting])
    log_p, log_q = [expected for _, _, expected in fitting], [values for _, values in predictions]
    p, q = (np.concatenate(part).astype(np.float64) for part in (log_p, log_q))
    agreement = q.argmax(-1) == p.argmax(-1)
    return Figures({"kl_to_base": float(kl_of_top(p, q).mean()), "top1_agreement": float(agreement.mean())})


def kl_of_top(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Returns KL(p || q) [positions] in nats, from log-probabilities [positions, K]; all other tokens count as one."""
    p, q = np.exp(log_p), np.exp(np.maximum(log_q, _MIN_LOG))
    rest_p, rest_q = (np.clip(1.0 - probabilities.sum(-1), _ROUNDING, 1.0) for probabilities in (p, q))
    inside = (p * (log_p - np.maximum(log_q, _MIN_LOG))).sum(-1)
    kl: np.ndarray = np.maximum(inside + rest_p * np.log(rest_p / rest_q), 0.0)
    return kl
