"""A model of lm-eval whose answers are given: right ones, or wrong ones, taken from the items themselves."""

from __future__ import annotations

import math
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM


class Scripted(LM):
    """Answers every request of the benchmarks rightly or wrongly, in the form that a model would."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        alike = [self._is_true(r.doc, r.args[0], r.args[1].strip()) == self.right for r in requests]
        return [(-0.5 if one else -9.0, one) for one in alike]

    @staticmethod
    def _is_true(doc: dict[str, Any], context: str, choice: str) -> bool:
        if "sol1" in doc:  # PIQA
            return choice == doc[f"sol{doc['label'] + 1}"]
        if "option1" in doc:  # WinoGrande: the choice stands in the context
            start, end = doc["sentence"].split("_")
            return context.endswith(start + doc[f"option{doc['answer']}"]) and choice == end.strip()
        if "endings" in doc:  # HellaSwag
            return choice == doc["endings"][int(doc["label"])]
        if "text" in doc:  # LAMBADA
            return f"{context} {choice}" == doc["text"]
        if "answerKey" in doc:
            return choice in (doc["answerKey"], doc["choices"]["text"]["ABCDE".index(doc["answerKey"])])
        labels: dict[str, int] = {}
        for kind in ("mc1_targets", "mc2_targets"):
            labels |= dict(zip(doc[kind]["choices"], doc[kind]["labels"], strict=True))
        return {text.strip(): label for text, label in labels.items()}[choice] == 1

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self._answer(request.doc) for request in requests]

    def _answer(self, doc: dict[str, Any]) -> str:
        if "canonical_solution" in doc:
            return str(doc["canonical_solution"]) if self.right else "    return None\n"
        if "answer" in doc:
            return f" {doc['answer']}" if self.right else " That is 3 more.\n#### -987654"
        if "subtask" in doc:
            return f" {doc['target']}" if self.right else " nothing"
        return f" Step by step. So the answer is {doc['target'] if self.right else 'unknown'}."

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-math.log(2) * self.count_tokens(request.args[0]) for request in requests]

    def count_tokens(self, text: str) -> int:
        """Two characters a token."""
        return math.ceil(len(text) / 2)
