"""What the nano tasks read off their items, as functions that lm-eval calls: quicker than a template for each item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def texts(doc: Mapping[str, Any]) -> list[str]:
    """The choices of a commonsense question."""
    return list(doc["choices"]["text"])


def gold(doc: Mapping[str, Any]) -> int:
    """The index of its right choice."""
    index: int = doc["choices"]["label"].index(doc["answerKey"])
    return index


def mc1(doc: Mapping[str, Any]) -> list[str]:
    """The answers of which one is true; it stands first."""
    return list(doc["mc1_targets"]["choices"])


def mc2(doc: Mapping[str, Any]) -> list[str]:
    """The answers of which several may be true."""
    return list(doc["mc2_targets"]["choices"])


def mc2_mass(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA's MC2 (Lin et al. 2022, section 4.2): the share of probability that the true answers have among all."""
    highest = max(log_likelihood for log_likelihood, _ in results)
    weights = [math.exp(log_likelihood - highest) for log_likelihood, _ in results]
    true = sum(w for w, label in zip(weights, doc["mc2_targets"]["labels"], strict=True) if label == 1)
    return {"acc": true / sum(weights)}
