"""Computes figures from item outcomes: scores with their standard errors, and perplexity."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from winnow.benchmark.samples import Sample
from winnow.core.types import Figures
from winnow.data.task_spec import PERPLEXITY, Spec


def mean_and_error(values: Mapping[str, Sequence[float]], by: str = "items") -> tuple[float, float]:
    """Returns the mean of scores grouped by subtask, and its standard error.

    Args:
        values: scores in [0, 1] by subtask.
        by: `items` gives each score the same weight, `subtasks` each subtask, whatever its number of items.

    The standard error is s / sqrt(n) for `items`, and that of a stratified mean (Cochran 1977, Sampling Techniques, 5.4) for
    `subtasks`; a subtask of one item takes the variance of all items.
    """
    pooled = [value for group in values.values() for value in group]
    overall = _variance(pooled)
    if by == "items":
        return sum(pooled) / len(pooled), math.sqrt(overall / len(pooled))
    means = [sum(group) / len(group) for group in values.values()]
    errors = [(_variance(group) if len(group) > 1 else overall) / len(group) for group in values.values()]
    return sum(means) / len(means), math.sqrt(sum(errors)) / len(means)


def _variance(values: Sequence[float]) -> float:
    """Returns the unbiased sample variance; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def scores_of(spec: Spec, samples: Sequence[Sample]) -> dict[str, float]:
    """Returns `<name>`, `<name>_stderr`, and for each further metric or task `<name>_<suffix>` and its standard error.

    A further `perplexity` is exp of the mean negative log-likelihood of an item's answer, and has no standard error.
    """
    scores = {}
    for suffix in ("", *(metric for metric in spec.further if metric != PERPLEXITY), *spec.also):
        groups: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            groups[sample.subtask].append(float(sample.extra[suffix]) if suffix else sample.score)
        name = f"{spec.name}_{suffix}" if suffix else spec.name
        scores[name], scores[f"{name}_stderr"] = mean_and_error(groups, spec.mean)
    if PERPLEXITY in spec.further:
        nats = -sum(float(sample.extra[PERPLEXITY]) for sample in samples)
        scores[f"{spec.name}_{PERPLEXITY}"] = _exp(nats / len(samples))
    return scores


def perplexity_of(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns `perplexity`, exp of the mean negative log-likelihood of a token, and `bits_per_byte`.

    `word_perplexity` is added where the task counts words. It and `bits_per_byte` are comparable across tokenizers.
    """
    nats = -sum(sample.score for sample in samples)
    tokens = sum(int(sample.extra["tokens"]) for sample in samples)
    size = sum(int(sample.extra["bytes"]) for sample in samples)
    values = {"perplexity": _exp(nats / tokens), "bits_per_byte": nats / size / math.log(2)}
    if all("words" in sample.extra for sample in samples):
        values["word_perplexity"] = _exp(nats / sum(int(sample.extra["words"]) for sample in samples))
    return values


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # a broken model: the infinite figure makes the trial fail
        return math.inf


def figures(scored: Sequence[tuple[Spec, Sequence[Sample]]]) -> Figures:
    """Returns all figures of a run: those of each benchmark, and `accuracy`, the unweighted mean of their scores."""
    values: dict[str, float] = {}
    names = []
    texts: list[Sample] = []
    for spec, samples in scored:
        if spec.metric is None:
            texts += samples
        else:
            values |= scores_of(spec, samples)
            names.append(spec.name)
    if names:
        values["accuracy"] = sum(values[name] for name in names) / len(names)
        values["accuracy_stderr"] = math.sqrt(sum(values[f"{name}_stderr"] ** 2 for name in names)) / len(names)
    if texts:
        values |= perplexity_of(texts)
    values["items"] = float(sum(len(samples) for _, samples in scored))
    return Figures(values)
