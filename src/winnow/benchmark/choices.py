"""Reads choices and answers from items of the nano tasks; lm-eval calls these functions, which are faster than templates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def texts(doc: Mapping[str, Any]) -> list[str]:
    """Returns the choices of a commonsense question."""
    return list(doc["choices"]["text"])


def gold(doc: Mapping[str, Any]) -> int:
    """Returns the index of the right choice of a commonsense question."""
    index: int = doc["choices"]["label"].index(doc["answerKey"])
    return index


def mc1(doc: Mapping[str, Any]) -> list[str]:
    """Returns the answers of which only the first is true."""
    return list(doc["mc1_targets"]["choices"])


def mc2(doc: Mapping[str, Any]) -> list[str]:
    """Returns the answers of which several may be true."""
    return list(doc["mc2_targets"]["choices"])


def mc2_mass(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Returns TruthfulQA's MC2 (Lin et al. 2022, section 4.2): the true answers' share of the probability of all answers."""
    highest = max(log_likelihood for log_likelihood, _ in results)
    weights = [math.exp(log_likelihood - highest) for log_likelihood, _ in results]
    true = sum(w for w, label in zip(weights, doc["mc2_targets"]["labels"], strict=True) if label == 1)
    return {"acc": true / sum(weights)}
