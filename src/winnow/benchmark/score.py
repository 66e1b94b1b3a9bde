"""Puts the items of one benchmark to a model through lm-eval's task objects, and takes their scores item by item.

Prompts, answer extraction and metrics are lm-eval's. Two things are ours, so that runs can be compared item by item
whatever their size: which items a limit keeps, and which exemplars an item gets, depend on the item and the seed alone
(lm-eval's depend on the order and on the number of processes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from winnow.benchmark.samples import Sample
from winnow.core.errors import UserError
from winnow.data.task_spec import Spec
from winnow.data.tasks import Loaded


@dataclass(frozen=True)
class Question:
    """An item: `doc` as lm-eval has it, of which subtask, and its hash."""

    loaded: Loaded
    doc: dict[str, Any]
    doc_hash: str

    @property
    def subtask(self) -> str:
        return str(self.doc.get("subtask") or self.loaded.subtask)


@dataclass
class Asked:
    """The requests of one item, and what the task made of the answers."""

    question: Question
    instances: list[Any]
    metrics: dict[str, Any] = field(default_factory=dict)


def digest(*parts: Any) -> str:
    """SHA-256 of values as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def questions(
    tasks: Sequence[Loaded], limit: int | None, seed: int, held_back: float = 0.0, confirming: bool = False
) -> list[Question]:
    """The items to ask, in the benchmark's order; with a limit those whose hash with the seed is lowest.

    So the items of a lower limit are among those of a higher one. `held_back` is a share of the items that is left out, and that
    is asked instead when `confirming`: which ones depends on their hashes and the seed alone.
    """
    seen: Counter[str] = Counter()
    found = []
    for loaded in tasks:
        for doc in loaded.task.eval_docs:
            key = digest(loaded.subtask, doc)
            found.append(Question(loaded, doc, digest(key, seen[key])))  # an item that is there twice is two items
            seen[key] += 1
    if held_back:
        bound = int(held_back * 16**12)
        found = [q for q in found if (int(digest(seed, "held back", q.doc_hash)[:12], 16) < bound) == confirming]
    if limit is None or limit >= len(found):
        return found
    kept = set(sorted((digest(seed, q.doc_hash), q.doc_hash) for q in found)[:limit])
    return [q for q in found if (digest(seed, q.doc_hash), q.doc_hash) in kept]


def requests(task: Any, number: int, question: Question, seed: int) -> list[Any]:
    """lm-eval's requests for an item, its exemplars drawn by its own hash.

    Raises:
        UserError: the task has too few exemplars.
    """
    shots = task.get_config("num_fewshot") or 0
    task.set_fewshot_seed(int(digest(seed, question.doc_hash)[:16], 16))
    try:
        context = task.fewshot_context(question.doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(question.doc))
    except (AssertionError, ValueError) as error:
        raise UserError(f"benchmark.num_fewshot={shots} does not suit {task.task_name}: {error}") from None
    repeats = task.get_config("repeats") or 1
    made = task.construct_requests(question.doc, context, metadata=(task.task_name, number, repeats))
    return made if isinstance(made, list) else [made]


def _asked(spec: Spec, task: Any, number: int, question: Question, seed: int) -> Asked:
    """An item with its requests; of text only as much as the benchmark takes."""
    if spec.words is not None:
        doc = {key: first_words(v, spec.words) if isinstance(v, str) else v for key, v in question.doc.items()}
        question = replace(question, doc=doc)
    made = requests(task, number, question, seed)
    if spec.window is not None:
        for instance in made:
            instance.arguments = (*instance.args, spec.window)
    return Asked(question, made)


def first_words(text: str, count: int) -> str:
    """The text up to the word after its first `count` ones; all of it where there are no more."""
    following = next(itertools.islice(re.finditer(r"\S+", text), count, None), None)
    return text if following is None else text[: following.start()]


def ask(adapter: Any, asked: Sequence[Asked]) -> None:
    """Has the model answer all requests, those of one kind together."""
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for one in asked:
        for instance in one.instances:
            by_kind[instance.request_type] += [instance] * instance.repeats
    for kind, instances in by_kind.items():
        for instance, answer in zip(instances, getattr(adapter, kind)(instances), strict=True):
            instance.resps.append(answer)


def judge(task: Any, asked: Sequence[Asked], filter_name: str | None) -> None:
    """Extracts the answers and scores them, both by the task itself."""
    task._instances = [instance for one in asked for instance in one.instances]
    task.apply_filters()
    for one in asked:
        name = filter_name or next(iter(one.instances[0].filtered_resps))
        if name not in one.instances[0].filtered_resps:
            known = ", ".join(one.instances[0].filtered_resps)
            raise UserError(f"filter={name} is not one of {task.task_name}; it has {known}")
        answers = [instance.filtered_resps[name] for instance in one.instances]
        one.metrics = task.process_results(one.question.doc, answers)


def score(
    adapter: Any,
    spec: Spec,
    asking: Sequence[Question],
    also: dict[str, Any] | None = None,
    seed: int = 1234,
) -> list[Sample]:
    """Every item's outcome.

    Args:
        adapter: an `lm_eval.api.model.LM`, which for text counts tokens, too (`count_tokens`).
        asking: the items, from `questions`.
        also: further tasks over the same items, by suffix.
        seed: of the choice of exemplars.

    Raises:
        UserError: the task has no such metric or filter.
    """
    grouped: dict[int, list[Question]] = defaultdict(list)
    for question in asking:
        grouped[id(question.loaded)].append(question)
    jobs: list[tuple[str, Any, list[Asked]]] = []
    for mine in grouped.values():
        loaded = mine[0].loaded
        for suffix, task in ({"": loaded.task} | (also or {})).items():
            made = [_asked(spec, task, n, q, seed) for n, q in enumerate(mine)]
            if made:
                jobs.append((suffix, task, made))
    ask(adapter, [one for _, _, made in jobs for one in made])
    extras: dict[str, dict[str, float]] = defaultdict(dict)
    for suffix, task, made in jobs:
        judge(task, made, spec.filter)
        for one in made if suffix else ():
            extras[one.question.doc_hash][suffix] = float(one.metrics[str(spec.metric)])
    return [
        sample for suffix, task, made in jobs if not suffix for sample in _samples(adapter, spec, task, made, extras)
    ]


def _samples(
    adapter: Any, spec: Spec, task: Any, asked: Sequence[Asked], extras: dict[str, dict[str, float]]
) -> Iterator[Sample]:
    outcome_of = OUTCOMES.get(task.OUTPUT_TYPE, _generated)
    for one in asked:
        extra: dict[str, Any] = dict(extras.get(one.question.doc_hash, {}))
        if spec.metric is None:
            outcome = _text(adapter, one)
            value, correct = outcome.log_likelihoods[0], None
        else:
            _check_metrics(spec, task, one.metrics)
            outcome = outcome_of(spec, task, one)
            value, correct = one.metrics[spec.metric], bool(one.metrics[spec.metric] == 1)
            extra |= {metric: float(one.metrics[metric]) for metric in spec.further}
        prompt_hash = digest([list(instance.args) for instance in one.instances])
        yield Sample(
            spec.name, one.question.subtask, one.question.doc_hash, prompt_hash, outcome.prediction, outcome.target,
            correct, float(value), outcome.log_likelihoods, extra | outcome.extra,
        )  # fmt: skip


def _check_metrics(spec: Spec, task: Any, found: Mapping[str, Any]) -> None:
    for key, wanted in ((f"metric={spec.metric}", [spec.metric]), (f"further={list(spec.further)}", spec.further)):
        if not set(wanted) <= set(found):
            raise UserError(f"benchmark.tasks.{spec.name}.{key}: {task.task_name} has {', '.join(found)}")


class Outcome(NamedTuple):
    """What a sample says of an answer, whatever its score."""

    prediction: str
    target: str
    log_likelihoods: tuple[float, ...] = ()
    extra: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _text(adapter: Any, one: Asked) -> Outcome:
    first = one.instances[0]
    sizes = {"tokens": adapter.count_tokens(first.args[0]), "bytes": one.metrics["bits_per_byte"][1]}
    if "word_perplexity" in one.metrics:
        sizes["words"] = one.metrics["word_perplexity"][1]
    return Outcome("", "", (first.resps[0],), sizes)


def _chosen(spec: Spec, task: Any, one: Asked) -> Outcome:
    """The choice that the metric takes for the answer: the likeliest, for `acc_norm` by the character."""
    doc = one.question.doc
    choices = task.doc_to_choice(doc)
    log_likelihoods = tuple(instance.resps[0][0] for instance in one.instances)
    length = LENGTHS.get(str(spec.metric), lambda _: 1)
    weighed = [value / max(length(choice), 1) for value, choice in zip(log_likelihoods, choices, strict=True)]
    # of a task whose choices come before the same continuation, it is `doc_to_text` that tells the right one
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return Outcome(choices[weighed.index(max(weighed))].strip(), _choice(gold, choices), log_likelihoods)


def _greedy(spec: Spec, task: Any, one: Asked) -> Outcome:
    """Whether greedy decoding gives the right answer; what it gives otherwise is not known."""
    log_likelihood, is_greedy = one.instances[0].resps[0]
    target = str(task.doc_to_target(one.question.doc))
    return Outcome(target if is_greedy else "", target, (log_likelihood,))


def _generated(spec: Spec, task: Any, one: Asked) -> Outcome:
    first, target = one.instances[0], str(task.doc_to_target(one.question.doc))
    extracted = first.filtered_resps[spec.filter] if spec.filter else next(iter(first.filtered_resps.values()))
    if isinstance(extracted, str):
        return Outcome(extracted, target, (), {"response": first.resps[0]})
    return Outcome(first.resps[0], target, (), {"response": first.resps[0], "outcome": extracted[0]})


OUTCOMES = {"multiple_choice": _chosen, "loglikelihood": _greedy}  # by a task's output type
LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


def _choice(gold: Any, choices: list[str]) -> str:
    if isinstance(gold, list):
        return " | ".join(str(_choice(one, choices)) for one in gold)
    return choices[gold] if isinstance(gold, int) else str(gold)
