"""How far a compressed model's predictions are from the base model's, in a second or two: before any benchmark is paid for.

The Kullback-Leibler divergence KL(base || model) of the next token, in nats, averaged over a few thousand tokens of the calibration
source. It orders models well over the full range of damage and badly among those with next to none (arXiv:2606.19558), so
it says who is hopeless and not who is best.

What the base model expects is computed once and kept: its `TOP` likeliest tokens at each position. All others count
as one, so the figure is at most the full divergence (the data processing inequality), and in practice all but equal to it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from winnow.core.files import whole
from winnow.core.types import Figures
from winnow.hardware.run import Run
from winnow.model.lm import LM
from winnow.model.spec import context_of

if TYPE_CHECKING:
    from winnow.runtime import Served

TOKENS = 4096
TOP = 256
FOLDER = "divergence"
_SEED = 982_451_653  # added to the run's: other documents than methods calibrate on, where the source has more
_LEAST_LOG = -80.0  # nats; below it a probability is as good as none
_ROUNDING = 1e-5  # of a sum of probabilities in single precision


@dataclass(frozen=True)
class Reference:
    """What the base model expects over some documents.

    Attributes:
        rows: token ids of the documents.
        tokens: ids [positions, K] of its likeliest next tokens, over all documents in order.
        log_probabilities: theirs [positions, K], in nats.
    """

    rows: tuple[tuple[int, ...], ...]
    tokens: np.ndarray
    log_probabilities: np.ndarray


def reference(base: LM, served: Served | None, run: Run, device: str) -> Reference:
    """The base model's, as kept in `run.cache`, else computed and kept there; `served`: the base model, if it is open.

    Raises:
        UserError: the calibration source is missing or empty.
        NotImplementedError: the runtime cannot tell.
    """
    from winnow.data.corpus import content

    how = [base.loading.dtype, base.loading.attention, device]
    key = [base.sha256(), run.seed, asdict(run.calibration), content(run.calibration), TOKENS, TOP, how]
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = (run.cache or run.folder) / FOLDER / f"{name}.npz"
    if path.is_file():
        with np.load(path) as held:
            ends = np.cumsum(held["lengths"])[:-1]
            rows = tuple(tuple(map(int, row)) for row in np.split(held["ids"], ends))
            return Reference(rows, held["tokens"], held["log_probabilities"].astype(np.float32))
    made = _computed(base, served, run, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as scratch:
        np.savez_compressed(
            scratch,
            ids=np.concatenate([np.array(row, np.int32) for row in made.rows]),
            lengths=np.array([len(row) for row in made.rows], np.int32),
            tokens=made.tokens.astype(np.int32),
            log_probabilities=made.log_probabilities.astype(np.float32),
        )
    return made


def _computed(base: LM, served: Served | None, run: Run, device: str) -> Reference:
    from winnow.hardware.device import Hardware
    from winnow.runtime import serving

    rows = _rows(base, run)
    if served is None:
        with serving(base, Hardware(device, device=device, decode="eager"), run.log) as opened:
            found = opened.next_tokens_of(rows, TOP)
        base.release()
    else:
        found = served.next_tokens_of(rows, TOP)
    return Reference(
        tuple(map(tuple, rows)), np.concatenate([t for t, _ in found]), np.concatenate([p for _, p in found])
    )


def _rows(base: LM, run: Run) -> list[list[int]]:
    """Documents of the calibration source, as token ids, up to `TOKENS` of them together."""
    from winnow.data.corpus import documents
    from winnow.data.encoding import encode

    context = context_of(base.model.config)
    # a soft prompt takes some positions of a model that is compared
    length = min(run.calibration.max_length, context * 7 // 8) if context else run.calibration.max_length
    rows: list[list[int]] = []
    for row in encode(documents(run.calibration, TOKENS // 16, run.seed + _SEED), base.tokenizer, length):
        room = TOKENS - sum(map(len, rows))
        if room < 2:
            break
        if len(row.ids) > 1:
            rows.append(list(row.ids[:room]))
    return rows


def divergence(served: Served, wanted: Reference) -> Figures:
    """`kl_to_base` in nats a token, and `top1_agreement`: the share of positions with the same likeliest of these tokens.

    Documents that are longer than the model's context are left out.

    Raises:
        NotImplementedError: the runtime cannot tell, or no document fits.
    """
    ends = np.cumsum([len(row) - 1 for row in wanted.rows])[:-1]
    parts = zip(wanted.rows, np.split(wanted.tokens, ends), np.split(wanted.log_probabilities, ends), strict=True)
    fitting = [part for part in parts if served.context is None or len(part[0]) <= served.context]
    if not fitting:
        raise NotImplementedError("every text of the calibration source is longer than what the model can read")
    found = served.next_tokens_of([row for row, _, _ in fitting], [tokens for _, tokens, _ in fitting])
    log_p, log_q = [expected for _, _, expected in fitting], [values for _, values in found]
    p, q = (np.concatenate(part).astype(np.float64) for part in (log_p, log_q))
    same = q.argmax(-1) == p.argmax(-1)
    return Figures({"kl_to_base": float(kl_of_top(p, q).mean()), "top1_agreement": float(same.mean())})


def kl_of_top(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) [positions] in nats of distributions over K tokens [positions, K] and the rest taken as one."""
    p, q = np.exp(log_p), np.exp(np.maximum(log_q, _LEAST_LOG))
    rest_p, rest_q = (np.clip(1.0 - probabilities.sum(-1), _ROUNDING, 1.0) for probabilities in (p, q))
    inside = (p * (log_p - np.maximum(log_q, _LEAST_LOG))).sum(-1)
    found: np.ndarray = np.maximum(inside + rest_p * np.log(rest_p / rest_q), 0.0)
    return found
