"""Scores a model on the items of one benchmark through lm-eval's task objects, item by item.

Prompts, answer extraction and metrics are lm-eval's. Two things differ, so that runs of any size can be compared item by
item: the items that a limit keeps and the few-shot exemplars of an item depend on the item and the seed alone (lm-eval's
depend on the order and on the number of processes).
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
from winnow.data.tasks import LoadedTask


@dataclass(frozen=True)
class Question:
    """An item of a benchmark: its task, its `doc` as lm-eval has it, and its hash."""

    loaded: LoadedTask
    doc: dict[str, Any]
    doc_hash: str

    @property
    def subtask(self) -> str:
        return str(self.doc.get("subtask") or self.loaded.subtask)


@dataclass
class ItemRequests:
    """The lm-eval requests of one item, and the metrics of its responses once they are scored."""

    question: Question
    instances: list[Any]
    metrics: dict[str, Any] = field(default_factory=dict)


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of values as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def questions(
    tasks: Sequence[LoadedTask], limit: int | None, seed: int, holdout_share: float = 0.0, score_holdout: bool = False
) -> list[Question]:
    """Returns the items to score, in the benchmark's order.

    A limit keeps the items with the lowest hashes (of the seed and the item), so the items of a lower limit are among those of
    a higher one. The share `holdout_share` of the items is left out; with `score_holdout` only that share is returned. Which
    items it holds depends on their hashes and the seed alone.
    """
    occurrences: Counter[str] = Counter()
    items = []
    for loaded in tasks:
        for doc in loaded.task.eval_docs:
            key = digest(loaded.subtask, doc)
            items.append(Question(loaded, doc, digest(key, occurrences[key])))  # a duplicate counts as another item
            occurrences[key] += 1
    if holdout_share:
        bound = int(holdout_share * 16**12)
        items = [q for q in items if (int(digest(seed, "held back", q.doc_hash)[:12], 16) < bound) == score_holdout]
    if limit is None or limit >= len(items):
        return items
    lowest = set(sorted((digest(seed, q.doc_hash), q.doc_hash) for q in items)[:limit])
    return [q for q in items if (digest(seed, q.doc_hash), q.doc_hash) in lowest]


def requests(task: Any, number: int, question: Question, seed: int) -> list[Any]:
    """Returns lm-eval's requests for an item, whose few-shot exemplars are sampled with a seed from the item's hash.

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
    instances = task.construct_requests(question.doc, context, metadata=(task.task_name, number, repeats))
    return instances if isinstance(instances, list) else [instances]


def _item_requests(spec: Spec, task: Any, number: int, question: Question, seed: int) -> ItemRequests:
    """Builds the requests of an item, with its texts cut to `spec.words` words and the benchmark's window added."""
    if spec.words is not None:
        doc = {key: first_words(v, spec.words) if isinstance(v, str) else v for key, v in question.doc.items()}
        question = replace(question, doc=doc)
    instances = requests(task, number, question, seed)
    if spec.window is not None:
        for instance in instances:
            instance.arguments = (*instance.args, spec.window)
    return ItemRequests(question, instances)


def first_words(text: str, count: int) -> str:
    """Returns the text up to the start of word number `count + 1`; all of it if it has no more than `count` words."""
    next_word = next(itertools.islice(re.finditer(r"\S+", text), count, None), None)
    return text if next_word is None else text[: next_word.start()]


def collect_responses(adapter: Any, items: Sequence[ItemRequests]) -> None:
    """Runs all requests through the model, one batch for each request type, and stores the responses."""
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        for instance in item.instances:
            by_kind[instance.request_type] += [instance] * instance.repeats
    for kind, instances in by_kind.items():
        for instance, answer in zip(instances, getattr(adapter, kind)(instances), strict=True):
            instance.resps.append(answer)


def score_responses(task: Any, items: Sequence[ItemRequests], filter_name: str | None) -> None:
    """Extracts the answers and computes the metrics of each item with the task's own functions.

    Raises:
        UserError: the task has no such filter.
    """
    task._instances = [instance for item in items for instance in item.instances]
    task.apply_filters()
    for item in items:
        name = filter_name or next(iter(item.instances[0].filtered_resps))
        if name not in item.instances[0].filtered_resps:
            filters = ", ".join(item.instances[0].filtered_resps)
            raise UserError(f"filter={name} is not one of {task.task_name}; it has {filters}")
        answers = [instance.filtered_resps[name] for instance in item.instances]
        item.metrics = task.process_results(item.question.doc, answers)


def score(
    adapter: Any,
    spec: Spec,
    items: Sequence[Question],
    extra_tasks: dict[str, Any] | None = None,
    seed: int = 1234,
) -> list[Sample]:
    """Returns the outcome of every item.

    Args:
        adapter: an `lm_eval.api.model.LM`; for text it also counts tokens (`count_tokens`).
        items: the items, from `questions`.
        extra_tasks: further tasks over the same items, by suffix.
        seed: the seed that chooses the exemplars.

    Raises:
        UserError: the task has no such metric or filter.
    """
    by_task: dict[int, list[Question]] = defaultdict(list)
    for question in items:
        by_task[id(question.loaded)].append(question)
    jobs: list[tuple[str, Any, list[ItemRequests]]] = []
    for task_items in by_task.values():
        loaded = task_items[0].loaded
        for suffix, task in ({"": loaded.task} | (extra_tasks or {})).items():
            batch = [_item_requests(spec, task, n, q, seed) for n, q in enumerate(task_items)]
            if batch:
                jobs.append((suffix, task, batch))
    collect_responses(adapter, [item for _, _, batch in jobs for item in batch])
    extras: dict[str, dict[str, float]] = defaultdict(dict)
    for suffix, task, batch in jobs:
        score_responses(task, batch, spec.filter)
        for item in batch if suffix else ():
            extras[item.question.doc_hash][suffix] = float(item.metrics[str(spec.metric)])
    return [
        sample for suffix, task, batch in jobs if not suffix for sample in _samples(adapter, spec, task, batch, extras)
    ]


def _samples(
    adapter: Any, spec: Spec, task: Any, items: Sequence[ItemRequests], extras: dict[str, dict[str, float]]
) -> Iterator[Sample]:
    outcome_of = OUTCOMES.get(task.OUTPUT_TYPE, _generation_outcome)
    for item in items:
        extra: dict[str, Any] = dict(extras.get(item.question.doc_hash, {}))
        if spec.metric is None:
            outcome = _text_outcome(adapter, item)
            value, correct = outcome.log_likelihoods[0], None
        else:
            _check_metrics(spec, task, item.metrics)
            outcome = outcome_of(spec, task, item)
            value, correct = item.metrics[spec.metric], bool(item.metrics[spec.metric] == 1)
            extra |= {metric: float(item.metrics[metric]) for metric in spec.further}
        prompt_hash = digest([list(instance.args) for instance in item.instances])
        yield Sample(
            spec.name, item.question.subtask, item.question.doc_hash, prompt_hash, outcome.prediction, outcome.target,
            correct, float(value), outcome.log_likelihoods, extra | outcome.extra,
        )  # fmt: skip


def _check_metrics(spec: Spec, task: Any, metrics: Mapping[str, Any]) -> None:
    for key, names in ((f"metric={spec.metric}", [spec.metric]), (f"further={list(spec.further)}", spec.further)):
        if not set(names) <= set(metrics):
            raise UserError(f"benchmark.tasks.{spec.name}.{key}: {task.task_name} has {', '.join(metrics)}")


class Outcome(NamedTuple):
    """The fields of a sample that do not depend on its score."""

    prediction: str
    target: str
    log_likelihoods: tuple[float, ...] = ()
    extra: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _text_outcome(adapter: Any, item: ItemRequests) -> Outcome:
    first = item.instances[0]
    sizes = {"tokens": adapter.count_tokens(first.args[0]), "bytes": item.metrics["bits_per_byte"][1]}
    if "word_perplexity" in item.metrics:
        sizes["words"] = item.metrics["word_perplexity"][1]
    return Outcome("", "", (first.resps[0],), sizes)


def _choice_outcome(spec: Spec, task: Any, item: ItemRequests) -> Outcome:
    """Predicts the choice that the metric counts: the likeliest one, for `acc_norm` the likeliest per character."""
    doc = item.question.doc
    choices = task.doc_to_choice(doc)
    log_likelihoods = tuple(instance.resps[0][0] for instance in item.instances)
    length = LENGTHS.get(str(spec.metric), lambda _: 1)
    normalized = [value / max(length(choice), 1) for value, choice in zip(log_likelihoods, choices, strict=True)]
    # where the choices are contexts of one shared continuation, `doc_to_text` gives the index of the right choice
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return Outcome(choices[normalized.index(max(normalized))].strip(), _choice_text(gold, choices), log_likelihoods)


def _greedy_outcome(spec: Spec, task: Any, item: ItemRequests) -> Outcome:
    """Predicts the target if greedy decoding gives it; any other greedy output is unknown and left empty."""
    log_likelihood, is_greedy = item.instances[0].resps[0]
    target = str(task.doc_to_target(item.question.doc))
    return Outcome(target if is_greedy else "", target, (log_likelihood,))


def _generation_outcome(spec: Spec, task: Any, item: ItemRequests) -> Outcome:
    first, target = item.instances[0], str(task.doc_to_target(item.question.doc))
    extracted = first.filtered_resps[spec.filter] if spec.filter else next(iter(first.filtered_resps.values()))
    if isinstance(extracted, str):
        return Outcome(extracted, target, (), {"response": first.resps[0]})
    return Outcome(first.resps[0], target, (), {"response": first.resps[0], "outcome": extracted[0]})


OUTCOMES = {"multiple_choice": _choice_outcome, "loglikelihood": _greedy_outcome}  # by a task's output type
LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


def _choice_text(gold: Any, choices: list[str]) -> str:
    if isinstance(gold, list):
        return " | ".join(str(_choice_text(index, choices)) for index in gold)
    return choices[gold] if isinstance(gold, int) else str(gold)
