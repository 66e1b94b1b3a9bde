"""Figures from item outcomes: scores with their standard errors, and perplexity."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from winnow.benchmark.samples import Sample
from winnow.core.types import Figures
from winnow.data.task_spec import PERPLEXITY, Spec


def mean_and_error(values: Mapping[str, Sequence[float]], by: str = "items") -> tuple[float, float]:
    """The mean of scores grouped by subtask, and its standard error.

    Args:
        values: scores in [0, 1] by subtask.
        by: `items` weighs each score alike; `subtasks` each subtask, whatever number of items it has.

    The standard error is that of a stratified mean (Cochran 1977, Sampling Techniques, 5.4) for `subtasks`, and
    s / sqrt(n) for `items`; a subtask of one item takes the variance of all.
    """
    pooled = [value for group in values.values() for value in group]
    overall = _variance(pooled)
    if by == "items":
        return sum(pooled) / len(pooled), math.sqrt(overall / len(pooled))
    means = [sum(group) / len(group) for group in values.values()]
    errors = [(_variance(group) if len(group) > 1 else overall) / len(group) for group in values.values()]
    return sum(means) / len(means), math.sqrt(sum(errors)) / len(means)


def _variance(values: Sequence[float]) -> float:
    """The unbiased sample variance; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def scores_of(spec: Spec, samples: Sequence[Sample]) -> dict[str, float]:
    """`<name>`, `<name>_stderr`, and for each further metric or task `<name>_<suffix>` and its standard error.

    A further `perplexity` is exp of the mean negative log-likelihood of an item's answer, and has no standard error.
    """
    found = {}
    for suffix in ("", *(metric for metric in spec.further if metric != PERPLEXITY), *spec.also):
        groups: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            groups[sample.subtask].append(float(sample.extra[suffix]) if suffix else sample.score)
        name = f"{spec.name}_{suffix}" if suffix else spec.name
        found[name], found[f"{name}_stderr"] = mean_and_error(groups, spec.mean)
    if PERPLEXITY in spec.further:
        nats = -sum(float(sample.extra[PERPLEXITY]) for sample in samples)
        found[f"{spec.name}_{PERPLEXITY}"] = _exp(nats / len(samples))
    return found


def perplexity_of(samples: Sequence[Sample]) -> dict[str, float]:
    """`perplexity`, exp of the mean negative log-likelihood of a token, and `bits_per_byte`, which tokenizers can share.

    Where the task counts words, `word_perplexity`, too, which tokenizers can share as well.
    """
    nats = -sum(sample.score for sample in samples)
    tokens = sum(int(sample.extra["tokens"]) for sample in samples)
    size = sum(int(sample.extra["bytes"]) for sample in samples)
    found = {"perplexity": _exp(nats / tokens), "bits_per_byte": nats / size / math.log(2)}
    if all("words" in sample.extra for sample in samples):
        found["word_perplexity"] = _exp(nats / sum(int(sample.extra["words"]) for sample in samples))
    return found


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a broken model: the trial fails for a figure that is not finite
        return math.inf


def figures(scored: Sequence[tuple[Spec, Sequence[Sample]]]) -> Figures:
    """All figures of a run: each benchmark's, and `accuracy`, the unweighted mean of their scores."""
    found: dict[str, float] = {}
    names = []
    texts: list[Sample] = []
    for spec, samples in scored:
        if spec.metric is None:
            texts += samples
        else:
            found |= scores_of(spec, samples)
            names.append(spec.name)
    if names:
        found["accuracy"] = sum(found[name] for name in names) / len(names)
        found["accuracy_stderr"] = math.sqrt(sum(found[f"{name}_stderr"] ** 2 for name in names)) / len(names)
    if texts:
        found |= perplexity_of(texts)
    found["items"] = float(sum(len(samples) for _, samples in scored))
    return Figures(found)
