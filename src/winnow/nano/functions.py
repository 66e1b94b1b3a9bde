"""Generates small Python functions for `nano_humaneval`, each with the tests that a completion must pass.

A function is a template with parameters. Its tests are outputs of the canonical body, so they always agree with it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Function:
    name: str
    prompt: str  # signature and docstring
    body: str  # canonical, indented, ends with a newline
    test: str  # defines check(candidate)


# Each template: (stem of the name, argument kind, docstring, body lines). {v} is the argument, {a} and {b} numbers, {w} a letter.
_TEMPLATES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("add", "int", "Return {v} plus {a}.", ("return {v} + {a}",)),
    ("subtract", "int", "Return {v} minus {a}.", ("return {v} - {a}",)),
    ("multiply", "int", "Return {v} times {a}.", ("return {v} * {a}",)),
    ("divide", "int", "Return {v} divided by {a}, rounded down.", ("return {v} // {a}",)),
    ("remainder", "int", "Return the remainder of {v} divided by {a}.", ("return {v} % {a}",)),
    ("add_then_multiply", "int", "Add {a} to {v}, then multiply by {b}.", ("return ({v} + {a}) * {b}",)),
    ("multiply_then_add", "int", "Multiply {v} by {a}, then add {b}.", ("return {v} * {a} + {b}",)),
    ("is_greater", "int", "Return True if {v} is greater than {a}.", ("return {v} > {a}",)),
    ("is_multiple", "int", "Return True if {v} is a multiple of {a}.", ("return {v} % {a} == 0",)),
    ("at_least", "int", "Return {v}, but at least {a}.", ("return max({v}, {a})",)),
    ("at_most", "int", "Return {v}, but at most {a}.", ("return min({v}, {a})",)),
    (
        "choose",
        "int",
        "Return {a} if {v} is even, else {b}.",
        ("if {v} % 2 == 0:", "    return {a}", "return {b}"),
    ),
    ("total_plus", "list", "Return the sum of {v} plus {a}.", ("return sum({v}) + {a}",)),
    ("largest_minus", "list", "Return the largest item of {v} minus {a}.", ("return max({v}) - {a}",)),
    ("keep_greater", "list", "Return the items of {v} greater than {a}.", ("return [x for x in {v} if x > {a}]",)),
    ("keep_less", "list", "Return the items of {v} less than {a}.", ("return [x for x in {v} if x < {a}]",)),
    ("scale", "list", "Return each item of {v} times {a}.", ("return [x * {a} for x in {v}]",)),
    ("shift", "list", "Return each item of {v} plus {a}.", ("return [x + {a} for x in {v}]",)),
    (
        "count_greater",
        "list",
        "Count the items of {v} greater than {a}.",
        ("count = 0", "for x in {v}:", "    if x > {a}:", "        count += 1", "return count"),
    ),
    (
        "sum_multiples",
        "list",
        "Sum the items of {v} that are multiples of {a}.",
        ("total = 0", "for x in {v}:", "    if x % {a} == 0:", "        total += x", "return total"),
    ),
    ("first_items", "list", "Return the first {a} items of {v}, sorted.", ("return sorted({v}[:{a}])",)),
    ("repeat", "str", "Return {v} repeated {a} times.", ("return {v} * {a}",)),
    ("append_letter", "str", "Return {v} with the letter {w} at the end.", ("return {v} + '{w}'",)),
    ("count_letter", "str", "Count the letter {w} in {v}.", ("return {v}.count('{w}')",)),
    ("starts_with", "str", "Return True if {v} starts with {w}.", ("return {v}.startswith('{w}')",)),
    ("remove_letter", "str", "Return {v} without the letter {w}.", ("return {v}.replace('{w}', '')",)),
    ("first_letters_upper", "str", "Return the first {a} letters of {v} in upper case.", ("return {v}[:{a}].upper()",)),
    ("last_letters", "str", "Return the last {a} letters of {v} reversed.", ("return {v}[-{a}:][::-1]",)),
)
_ARGUMENTS = {
    "int": ("n", "x", "value", "number"),
    "list": ("items", "values", "numbers"),
    "str": ("s", "word", "text"),
}
_LETTERS = "abcdefghijklmnoprstuwy"


def _inputs(kind: str, rng: random.Random) -> list[Any]:
    if kind == "int":
        return [0, 1, *(rng.randint(2, 60) for _ in range(4))]
    if kind == "list":
        return [[rng.randint(0, 30) for _ in range(n)] for n in (3, 5, 8, 12)]
    return ["".join(rng.choice(_LETTERS) for _ in range(n)) for n in (3, 6, 14, 30)]


def run_body(signature: str, body: str, name: str, value: Any) -> Any:
    """Returns the result of a template's function for `value`; code from a model is never run here."""
    scope: dict[str, Any] = {}
    exec(signature + body, scope)  # noqa: S102
    return scope[name](value)


def python_function(rng: random.Random) -> Function:
    """Returns a function with a random template, parameters and names, and the tests that its canonical body passes."""
    stem, kind, doc, lines = rng.choice(_TEMPLATES)
    a, b = rng.sample(range(2, 20), 2)
    values = {"v": rng.choice(_ARGUMENTS[kind]), "a": a, "b": b, "w": rng.choice(_LETTERS)}
    name = stem if rng.random() < 0.5 else f"{stem}_{rng.choice(('it', 'fast', 'simple', 'now', 'here'))}"
    signature = f"def {name}({values['v']}):\n"
    body = "".join(f"    {line.format(**values)}\n" for line in lines)
    cases = [(value, run_body(signature, body, name, value)) for value in _inputs(kind, rng)]
    test = "def check(candidate):\n" + "".join(
        f"    assert candidate({value!r}) == {result!r}\n" for value, result in cases
    )
    return Function(name, f'{signature}    """{doc.format(**values)}"""\n', body, test)
