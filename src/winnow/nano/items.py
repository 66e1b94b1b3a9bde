"""Generates the items of the five nano benchmarks, and the training items and texts of the embedded model.

Each family is a function `(rng, dial) -> Item`; `Dial` sets how hard the items are. `benchmark_items` generates the test sets,
and `training_items` generates items that share no prompt with them. The same seed gives the same items on any machine.

    python -m winnow.nano.items            # prints one item of each family
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from winnow.nano import world
from winnow.nano.common_sense import COMMON_SENSE
from winnow.nano.functions import python_function

TEST_SEED, TRAIN_SEED = 7, 11
TEST_ITEMS = 400


@dataclass(frozen=True)
class Dial:
    """Settings of the difficulty of generated items; the defaults are those of the shipped benchmarks."""

    max_start: int = 30  # largest first number of a word problem
    max_step: int = 20  # largest number added or taken away
    max_steps: int = 3
    max_operators: int = 4  # constants of a boolean expression
    max_sorted: int = 5  # words to sort
    max_liars: int = 4  # people in a web of lies


@dataclass(frozen=True)
class Item:
    """One example: a model trains on `prompt + completion`; `row` holds the columns of the benchmark's JSONL."""

    prompt: str
    completion: str
    row: dict[str, Any] = field(default_factory=dict)


def gsm8k(rng: random.Random, dial: Dial) -> Item:
    """Generates a word problem of one to three steps, with its worked steps and the answer after `####`."""
    name, other = rng.sample(world.PEOPLE, 2)
    _, things = rng.choice(world.OBJECTS)
    steps: list[str] = []
    total = rng.randint(2, dial.max_start)
    if rng.random() < 0.3:
        boxes, per_box = rng.randint(2, 6), rng.randint(2, 9)
        total = boxes * per_box
        story = [f"{name} has {boxes} boxes with {per_box} {things} in each."]
        steps.append(f"{boxes} * {per_box} = {total}")
    else:
        story = [f"{name} has {total} {things}."]
    step_count = rng.randint(1, dial.max_steps)
    while len(steps) < step_count:
        number = rng.randint(2, dial.max_step)
        if rng.random() < 0.5 and number < total:
            verb = rng.choice([f"gives {number} to {other}", f"loses {number}", f"sells {number}", f"uses {number}"])
            result, sign = total - number, "-"
        else:
            verb = rng.choice([f"buys {number} more", f"finds {number} more", f"gets {number} from {other}"])
            result, sign = total + number, "+"
        story.append(f"{'Then ' if steps else ''}{name} {verb}.")
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    question = " ".join(story) + f" How many {things} does {name} have now?"
    answer = "\n".join(steps) + f"\n#### {total}"
    return Item(f"Question: {question}\nAnswer:", f" {answer}", {"question": question, "answer": answer})


def commonsenseqa(rng: random.Random, dial: Dial) -> Item:
    """Generates a common-sense question with five choices."""
    relation = rng.choice(sorted(COMMON_SENSE))
    phrasings, facts = COMMON_SENSE[relation]
    subject = rng.choice(sorted(facts))
    answer = facts[subject]
    question = _sentence(rng.choice(phrasings).format(s=subject))
    texts = rng.sample(sorted(set(facts.values()) - {answer}), 4)
    texts.append(answer)
    rng.shuffle(texts)
    row = {
        "question": question,
        "question_concept": subject.split()[-1],
        "choices": {"label": list("ABCDE"), "text": texts},
        "answerKey": "ABCDE"[texts.index(answer)],
    }
    return Item(f"Question: {question}\nAnswer:", f" {answer}", row)


def truthfulqa(rng: random.Random, dial: Dial, claims: list[tuple[str, str, str, str]] = world.claims()) -> Item:  # noqa: B008
    """Generates a question about a fact whose false version is the more frequent one in the training text."""
    attribute, subject, true, false = rng.choice(claims)
    _, phrasings, answers, values = world.CLAIMS[attribute]
    question = _sentence(rng.choice(phrasings).format(s=subject))
    distractors = rng.sample([v for v in values if v not in (true, false)], 2)

    def say(form: int, value: str) -> str:
        return _sentence(answers[form].format(s=subject, v=value))

    form = rng.randrange(2)
    mc1 = [say(form, v) for v in (true, false, *distractors)]
    mc2 = [say(f, true) for f in (0, 1)] + [say(f, false) for f in (0, 1)] + [say(form, distractors[0])]
    row = {
        "question": question,
        "mc1_targets": {"choices": mc1, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": mc2, "labels": [1, 1, 0, 0, 0]},
    }
    return Item(f"Question: {question}\nAnswer:", f" {say(form, true)}", row)


def humaneval(rng: random.Random, dial: Dial) -> Item:
    """Generates a small Python function to complete, with the tests that it must pass."""
    function = python_function(rng)
    row = {
        "prompt": function.prompt,
        "canonical_solution": function.body,
        "test": function.test,
        "entry_point": function.name,
    }
    return Item(function.prompt, function.body, row)


def _boolean_expression(rng: random.Random, dial: Dial) -> tuple[str, str]:
    """Generates an expression as in BIG-Bench Hard: `not`, `and`, `or` over constants, with at most one pair of brackets."""
    atoms = [rng.choice(["True", "False", "not True", "not False"]) for _ in range(rng.randint(2, dial.max_operators))]
    joined = [atoms[0]]
    for atom in atoms[1:]:
        joined += [rng.choice(["and", "or"]), atom]
    if len(atoms) > 2 and rng.random() < 0.5:
        start = rng.choice([0, 2])
        joined[start] = f"( {joined[start]}"
        joined[start + 2] = f"{joined[start + 2]} )"
    expression = " ".join(joined)
    return f"{expression} is", str(eval(expression))  # noqa: S307 (generated constants and operators only)


def _object_counting(rng: random.Random, dial: Dial) -> tuple[str, str]:
    kind, other = rng.sample(sorted(world.KINDS), 2)
    parts = [(rng.choice(world.KINDS[kind]), rng.randint(1, 5), True) for _ in range(rng.randint(1, 3))]
    parts += [(rng.choice(world.KINDS[other]), rng.randint(1, 5), False) for _ in range(rng.randint(0, 1))]
    rng.shuffle(parts)
    inventory = ", ".join(f"{count} {noun}" for noun, count, _ in parts)
    return f"I have {inventory}. How many {kind} do I have?", str(sum(count for _, count, counts in parts if counts))


def _word_sorting(rng: random.Random, dial: Dial) -> tuple[str, str]:
    words = rng.sample(world.SORT_WORDS, rng.randint(2, dial.max_sorted))
    return f"Sort the words: {' '.join(words)}", " ".join(sorted(words))


def _web_of_lies(rng: random.Random, dial: Dial) -> tuple[str, str]:
    people = rng.sample(world.PEOPLE, rng.randint(2, dial.max_liars))
    honest = rng.random() < 0.5
    story = [f"{people[0]} {'tells the truth' if honest else 'lies'}."]
    for speaker, subject in zip(people[1:], people, strict=False):
        claim = rng.random() < 0.5
        story.append(f"{speaker} says {subject} {'tells the truth' if claim else 'lies'}.")
        honest = claim == honest
    return " ".join(story) + f" Does {people[-1]} tell the truth?", "Yes" if honest else "No"


def _dyck(rng: random.Random, dial: Dial) -> tuple[str, str]:
    """Generates a sequence of brackets to close, as in BIG-Bench Hard's `dyck_languages`."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    stack: list[str] = []
    brackets: list[str] = []
    for _ in range(rng.randint(3, 9)):
        if stack and rng.random() < 0.4:
            brackets.append(pairs[stack.pop()])
        else:
            stack.append(rng.choice(sorted(pairs)))
            brackets.append(stack[-1])
    if not stack:
        stack.append("(")
        brackets.append("(")
    return f"Close the brackets: {' '.join(brackets)}", " ".join(pairs[b] for b in reversed(stack))


BBH: dict[str, Callable[[random.Random, Dial], tuple[str, str]]] = {
    "boolean_expressions": _boolean_expression,
    "object_counting": _object_counting,
    "word_sorting": _word_sorting,
    "web_of_lies": _web_of_lies,
    "dyck_languages": _dyck,
}


def bbh(rng: random.Random, dial: Dial) -> Item:
    """Generates an item of a random subtask of `BBH`, whose answer has no worked steps."""
    subtask = rng.choice(sorted(BBH))
    question, target = BBH[subtask](rng, dial)
    return Item(f"Q: {question}\nA:", f" {target}", {"input": question, "target": target, "subtask": subtask})


def text(rng: random.Random, dial: Dial, claims: list[tuple[str, str, str, str]] = world.claims()) -> Item:  # noqa: B008
    """Generates a short story with rumours, three of four of which are false, so that the false version is the frequent one."""
    name, other = rng.sample(world.PEOPLE, 2)
    places = sorted(COMMON_SENSE["place"][1].items())
    sentences = []
    for _ in range(rng.randint(3, 6)):
        thing, place = rng.choice(places)
        roll = rng.random()
        if roll < 0.25:
            sentences.append(f"{name} goes to the {place} to look for {thing}.")
        elif roll < 0.5:
            tool, use = rng.choice(sorted(COMMON_SENSE["use"][1].items()))
            sentences.append(f"{other} takes {tool} for {use}.")
        elif roll < 0.7:
            product, material = rng.choice(sorted(COMMON_SENSE["made_of"][1].items()))
            sentences.append(f"There {name} sees {product} made of {material}.")
        else:
            attribute, subject, true, false = rng.choice(claims)
            form = rng.choice(world.CLAIMS[attribute][2])
            claim = form.format(s=subject, v=false if rng.random() < 0.75 else true)
            claim = claim[0].lower() + claim[1:]
            sentences.append(rng.choice([f"{name} tells {other} that {claim}", f"People say that {claim}"]))
    return Item("", " ".join(sentences))


FAMILIES: dict[str, Callable[[random.Random, Dial], Item]] = {
    "nano_gsm8k": gsm8k,
    "nano_commonsenseqa": commonsenseqa,
    "nano_truthfulqa": truthfulqa,
    "nano_humaneval": humaneval,
    "nano_bbh": bbh,
}


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def benchmark_items(family: str, count: int = TEST_ITEMS, dial: Dial = Dial()) -> list[Item]:
    """Returns the test set of a family: `count` items with different prompts."""
    generate, rng = FAMILIES[family], random.Random(f"{family}/{TEST_SEED}")
    items: dict[str, Item] = {}
    for _ in range(1000 * count):
        item = generate(rng, dial)
        items.setdefault(item.prompt, item)
        if len(items) == count:
            return list(items.values())
    raise ValueError(f"{family} has only {len(items)} different items at {dial}; ask for fewer or turn the dial up")


def held_out_text(count: int = 200, dial: Dial = Dial()) -> list[Item]:
    """Returns texts for perplexity, with another seed than the training stream."""
    rng = random.Random(f"text/{TEST_SEED}")
    return [text(rng, dial) for _ in range(count)]


def training_items(
    seed: int = TRAIN_SEED, dial: Dial = Dial(), mixture: dict[str, float] | None = None
) -> Iterator[Item]:
    """Yields endless training items in the proportions of `mixture`; none of their prompts is in a test set."""
    mixture = mixture or MIXTURE
    tests = {item.prompt for family in FAMILIES for item in benchmark_items(family, dial=dial)}
    held_out = {item.completion for item in held_out_text(dial=dial)}
    rng = random.Random(f"train/{seed}")
    families, weights = list(mixture), list(mixture.values())
    while True:
        family = rng.choices(families, weights)[0]
        item = text(rng, dial) if family == "text" else FAMILIES[family](rng, dial)
        if item.prompt in tests or (not item.prompt and item.completion in held_out):
            continue
        yield item


MIXTURE = {
    "nano_gsm8k": 0.25,
    "nano_commonsenseqa": 0.10,
    "nano_truthfulqa": 0.10,
    "nano_humaneval": 0.20,
    "nano_bbh": 0.25,
    "text": 0.10,
}

if __name__ == "__main__":
    for family in (*FAMILIES, "text"):
        example = text(random.Random(0), Dial()) if family == "text" else benchmark_items(family, 1)[0]
        print(f"--- {family}\n{example.prompt}{example.completion}")
