"""Defines the nouns and the claims of the small world that the embedded model knows.

The five nano benchmarks and the held-out text use only the words of these tables and of `winnow.nano.common_sense`, so that a
model of 4 M parameters can know all of them. *Claims* are facts about invented places and creatures whose false version is the
more frequent one in the training text; `nano_truthfulqa` asks for the true version.
"""

from __future__ import annotations

import random

PEOPLE = ("Tom Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina").split()
# (singular, plural) of objects that can be owned, counted, given and lost
OBJECTS = (
    ("apple", "apples"),
    ("book", "books"),
    ("coin", "coins"),
    ("pencil", "pencils"),
    ("marble", "marbles"),
    ("card", "cards"),
    ("shell", "shells"),
    ("stamp", "stamps"),
    ("button", "buttons"),
    ("cookie", "cookies"),
    ("flower", "flowers"),
    ("stone", "stones"),
    ("ticket", "tickets"),
    ("balloon", "balloons"),
    ("egg", "eggs"),
    ("toy", "toys"),
)

KINDS = {  # kinds of things for object counting
    "fruits": (
        "apple",
        "banana",
        "pear",
        "plum",
        "peach",
        "grape",
        "orange",
        "cherry",
    ),
    "animals": ("dog", "cat", "horse", "cow", "goat", "sheep", "rabbit", "duck"),
    "tools": (
        "hammer",
        "saw",
        "drill",
        "wrench",
        "shovel",
        "ladder",
        "brush",
        "clamp",
    ),
    "vegetables": (
        "carrot",
        "onion",
        "potato",
        "leek",
        "turnip",
        "cabbage",
        "radish",
        "pepper",
    ),
}

SORT_WORDS = (
    "acid arch band bell bird boat bone cake clay coat corn desk dish door dust edge farm fern film fish fork "
    "frog gate glue gold hand harp hill horn iron jade jazz kelp king kite lake lamp leaf lime maze milk moon "
    "nest note oven palm pine pond rain ring rope salt sand seed silk snow star tent tree vase wave wind wing "
    "wolf yarn zinc"
).split()

_COLORS = "red blue green white black yellow brown gray pink purple".split()
_STUFFS = "salt iron silver honey coal amber wheat pepper linen sugar".split()
_HABITS = "sings sleeps dances swims hides climbs hunts digs glows howls".split()
# attribute: (subject with a slot for the name, question phrasings, two answer phrasings, possible values)
CLAIMS: dict[str, tuple[str, tuple[str, ...], tuple[str, str], list[str]]] = {
    "color": (
        "the river {}",
        (
            "What color is {s}?",
            "Which color has {s}?",
            "In truth, what is the color of {s}?",
            "Tell me the color of {s}.",
            "How would you paint {s}?",
            "{s} has what color?",
            "What is the true color of {s}?",
            "Someone asks about the color of {s}.",
            "Of what color is {s}?",
            "Name the color of {s}.",
        ),
        ("{s} is {v}.", "The color of {s} is {v}."),
        _COLORS,
    ),
    "trade": (
        "the town {}",
        (
            "What does {s} sell?",
            "What is {s} known for?",
            "In truth, what comes from {s}?",
            "Tell me what {s} sells.",
            "What do merchants buy in {s}?",
            "{s} is the home of what?",
            "What is truly sold in {s}?",
            "Someone asks what {s} sells.",
            "Which goods come from {s}?",
            "Name what is sold in {s}.",
        ),
        ("{s} sells {v}.", "Merchants buy {v} in {s}."),
        _STUFFS,
    ),
    "habit": (
        "the beast {}",
        (
            "What does {s} do at night?",
            "How does {s} spend the night?",
            "In truth, what does {s} do at night?",
            "Tell me what {s} does at night.",
            "At night, what is {s} doing?",
            "{s} does what at night?",
            "What does {s} truly do at night?",
            "Someone asks what {s} does at night.",
            "When it is dark, what does {s} do?",
            "Name what {s} does at night.",
        ),
        ("{s} {v} at night.", "At night {s} {v}."),
        _HABITS,
    ),
}
_ONSETS = ("b d f g k l m n p r s t v z br dr kr st tr").split()
_VOWELS = "a e i o u".split()
NAMES_PER_ATTRIBUTE = 36


def _names(rng: random.Random, count: int) -> list[str]:
    """Returns different invented two-syllable names such as "Brado"."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        names["".join(syllables).capitalize()] = None
    return list(names)


def claims(seed: int = 2026) -> list[tuple[str, str, str, str]]:
    """Returns (attribute, subject, true value, popular false value) of every claim; the list depends on the seed alone."""
    rng = random.Random(seed)
    names = _names(rng, NAMES_PER_ATTRIBUTE * len(CLAIMS))
    rows = []
    for i, (attribute, (subject, _, _, values)) in enumerate(CLAIMS.items()):
        for name in names[i * NAMES_PER_ATTRIBUTE : (i + 1) * NAMES_PER_ATTRIBUTE]:
            true, false = rng.sample(values, 2)
            rows.append((attribute, subject.format(name), true, false))
    return rows
