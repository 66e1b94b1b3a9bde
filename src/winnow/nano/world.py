"""The small world that the embedded model knows: its nouns, its facts and its rumours.

Everything the five nano benchmarks and the held-out text speak of is drawn from these tables, so that a model of
4 M parameters can know the whole of it. Two kinds of knowledge are kept apart: *common sense* (where a book is found,
what a knife is for) and *claims*, facts about invented places and creatures of which a false version is the more
frequent one in the training text. `nano_truthfulqa` asks for the true version.
"""

from __future__ import annotations

import random

PEOPLE = ("Tom Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina").split()
# singular, plural; objects that can be owned, counted, given and lost
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

KINDS = {  # for object counting
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
# relation: (phrasings of the question, {subject: answer}); answers of one relation serve as each other's distractors
COMMON_SENSE: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "place": (
        (
            "Where would you look for {s}?",
            "Where is {s} usually found?",
            "{s} is most often kept where?",
            "If you want {s}, where do you go?",
            "Which place is right for {s}?",
            "In which place do we expect {s}?",
            "{s} belongs in what place?",
            "Someone asks for {s}. Where do you send them?",
            "What place comes to mind with {s}?",
            "Where do most people see {s}?",
        ),
        {
            "a book": "library",
            "a loaf": "bakery",
            "a fish": "lake",
            "a cow": "barn",
            "a doctor": "hospital",
            "a pupil": "school",
            "a plane": "airport",
            "a ship": "harbor",
            "a painting": "museum",
            "a stage": "theater",
            "a pillow": "bedroom",
            "a stove": "kitchen",
            "a car": "garage",
            "a tent": "camp",
            "a camel": "desert",
            "a judge": "court",
            "a coin": "bank",
            "a tree": "forest",
            "a penguin": "icecap",
            "a miner": "cave",
            "a lion": "savanna",
            "a monkey": "jungle",
            "a grape": "vineyard",
            "a train": "station",
        },
    ),
    "use": (
        (
            "What is {s} used for?",
            "What do people do with {s}?",
            "{s} is made for what?",
            "Why would someone pick up {s}?",
            "What can you do with {s}?",
            "{s} serves for what?",
            "What is the purpose of {s}?",
            "Someone holds {s}. What are they doing?",
            "For what work do we take {s}?",
            "What is {s} good for?",
        ),
        {
            "a knife": "cutting",
            "a pen": "writing",
            "a broom": "sweeping",
            "a needle": "sewing",
            "a shovel": "digging",
            "a pot": "cooking",
            "a bed": "sleeping",
            "a cup": "drinking",
            "a hammer": "nailing",
            "a towel": "drying",
            "a lamp": "lighting",
            "a key": "unlocking",
            "a ruler": "measuring",
            "a scale": "weighing",
            "a rope": "tying",
            "a soap": "washing",
            "a bike": "riding",
            "a flute": "playing",
            "a brush": "painting",
            "a clock": "timing",
            "a fan": "cooling",
            "an oar": "rowing",
            "an axe": "chopping",
            "an oven": "baking",
        },
    ),
    "made_of": (
        (
            "What is {s} made of?",
            "{s} is made from what?",
            "Which material gives {s}?",
            "What does one need to make {s}?",
            "Out of what do people make {s}?",
            "What material is in {s}?",
            "Name the material of {s}.",
            "{s} is mostly what?",
            "To produce {s}, what is needed?",
            "What would you find if you look at what {s} is made of?",
        ),
        {
            "a window": "glass",
            "a candle": "wax",
            "a tire": "rubber",
            "a sweater": "wool",
            "a shirt": "cotton",
            "a table": "wood",
            "a ring": "gold",
            "a brick": "clay",
            "a letter": "paper",
            "a boot": "leather",
            "a sword": "steel",
            "a bottle": "plastic",
            "a statue": "marble",
            "a scarf": "silk",
            "a wire": "copper",
            "a pipe": "lead",
            "a snowman": "snow",
            "a castle": "stone",
            "a cheese": "milk",
            "a wine": "grapes",
            "a bread": "flour",
            "a jam": "berries",
            "a basket": "straw",
            "a can": "tin",
        },
    ),
    "job": (
        (
            "Who works with {s}?",
            "{s} is the tool of whom?",
            "Who needs {s} at work?",
            "Which worker uses {s} every day?",
            "Whom do you meet with {s} in hand?",
            "{s} belongs to which worker?",
            "Whose work needs {s}?",
            "Who would miss {s} the most?",
            "Someone at work holds {s}. Who is it?",
            "Name the worker who uses {s}.",
        ),
        {
            "a scalpel": "surgeon",
            "a plow": "farmer",
            "a net": "fisherman",
            "a chalk": "teacher",
            "a camera": "photographer",
            "a hose": "fireman",
            "a whistle": "referee",
            "a drum": "musician",
            "a rifle": "soldier",
            "a compass": "sailor",
            "a tray": "waiter",
            "a razor": "barber",
            "a wrench": "plumber",
            "a chisel": "sculptor",
            "a crown": "king",
            "a telescope": "astronomer",
            "a dough": "baker",
            "a saddle": "rider",
            "a loom": "weaver",
            "an anvil": "smith",
            "a palette": "artist",
            "a badge": "policeman",
            "a mop": "cleaner",
            "a script": "actor",
        },
    ),
    "opposite": (
        (
            "What is the opposite of {s}?",
            "Which word means the reverse of {s}?",
            "If it is not {s}, what is it?",
            "{s} is the contrary of what?",
            "Name the opposite of {s}.",
            "What is the contrary of {s}?",
            "Not {s}, but what?",
            "Change {s} into its opposite.",
            "Which word is least like {s}?",
            "{s} is one end. What is the other?",
        ),
        {
            "hot": "cold",
            "big": "small",
            "fast": "slow",
            "wet": "dry",
            "early": "late",
            "hard": "soft",
            "young": "old",
            "rich": "poor",
            "light": "dark",
            "full": "empty",
            "strong": "weak",
            "high": "low",
            "loud": "quiet",
            "sharp": "blunt",
            "clean": "dirty",
            "open": "closed",
            "near": "far",
            "thick": "thin",
            "happy": "sad",
            "sweet": "bitter",
            "brave": "afraid",
            "smooth": "rough",
            "alive": "dead",
            "calm": "wild",
        },
    ),
}

_COLORS = "red blue green white black yellow brown gray pink purple".split()
_STUFFS = "salt iron silver honey coal amber wheat pepper linen sugar".split()
_HABITS = "sings sleeps dances swims hides climbs hunts digs glows howls".split()
# attribute: (subject with a slot for the name, question phrasings, two phrasings of the answer, the values it may have)
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
    """Invented two-syllable names such as "Brado", all different."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        names["".join(syllables).capitalize()] = None
    return list(names)


def claims(seed: int = 2026) -> list[tuple[str, str, str, str]]:
    """(attribute, subject, true value, popular false value) of every claim; the same list for the same seed."""
    rng = random.Random(seed)
    names = _names(rng, NAMES_PER_ATTRIBUTE * len(CLAIMS))
    rows = []
    for i, (attribute, (subject, _, _, values)) in enumerate(CLAIMS.items()):
        for name in names[i * NAMES_PER_ATTRIBUTE : (i + 1) * NAMES_PER_ATTRIBUTE]:
            true, false = rng.sample(values, 2)
            rows.append((attribute, subject.format(name), true, false))
    return rows
