"""Whether a model works in its runtime: it generates, its logits are finite, and it is not lost on plain text.

A broken artifact often loads without a word: weights that are missed are drawn at random, scales that are misread scramble the
rest. It shows on any text that a model knows. The bound on perplexity says "broken", not "bad": pruned to half and at 2 bits, a
model may lose most of what it knew and still stay far below it. Two texts are shipped, plain English and the small world of the
embedded models; the better one counts, so that a model of one need not know the other.

It costs some 250 tokens of a forward pass, twice at most, and a few of generation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from winnow.core.errors import Unservable, as_unservable
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.runtime import Served

MOST_TOKENS = 256  # of each text
GUESSES = 2.0  # times the vocabulary: a model before its training is a little worse than a uniform guess
SUSPICIOUS = 0.25  # of the vocabulary: such a perplexity is near chance, and worth a look at the base model's
LOST = 0.9  # of what the base model knows of the text, on a logarithmic scale from its perplexity to the vocabulary
RECORD = "plain_text"  # in a manifest
HIGHEST = 10_000.0  # however large the vocabulary: no language model that is of use is that surprised by plain text

ENGLISH = """\
The old bridge over the river was closed in the spring, because the water had risen almost to the road. For two weeks people \
drove the long way around, through the hills, and the bakery on the other side sold half as much bread as usual. When the \
bridge was opened again, the mayor gave a short speech, and the children of the village were the first to walk across.

Water boils at a hundred degrees at sea level, but on a high mountain it boils sooner, since there is less air above it. That \
is why rice takes longer to cook up there. A lid on the pot keeps the heat in and saves energy.

"Are you coming to the meeting tomorrow?" she asked. "I am not sure," he said. "My train leaves at three, and I still have to \
finish the report." She laughed and told him not to worry: nobody had read the last one either.

To add two numbers, a computer turns them into zeros and ones. It can do this billions of times a second, and it never gets \
bored. What it cannot do is know which numbers are worth adding. That part is left to us.

In the evening it began to snow. The streets became quiet, the lights in the windows were yellow, and a dog ran from one end \
of the park to the other as if it had never been so happy in its life."""

SMALL_WORLD = """\
Anna goes to the library to look for a book. There Anna sees a scarf made of wool. Tom takes an axe for chopping. Tom takes a \
cup for drinking. Emma goes to the forest to look for a tree. Emma goes to the lake to look for a fish. There Emma sees a \
basket made of straw. Noah takes a needle for sewing. Noah goes to the bank to look for a coin. Grace takes a clock for timing. \
Grace takes a towel for drying. Rosa goes to the jungle to look for a monkey. There Rosa sees a boot made of leather. Ben goes \
to the vineyard to look for a grape. Ben takes a brush for painting. Olga goes to the bedroom to look for a pillow. There Olga \
sees a snowman made of snow. Paul goes to the cave to look for a miner."""


def check(lm: LM, served: Served) -> float:
    """Its perplexity on the better of the two texts.

    Raises:
        Unservable: it does not work; the message says what is wrong.
    """
    base = lm.manifest.get(RECORD, {}).get("base")
    bound = highest(served.vocab_size, base)
    what = f"{lm.path or lm.name}: in {served.name}"
    with as_unservable(what):
        perplexity = plain_perplexity(lm, served, bound)
        if perplexity > bound:
            known = f" (the base model's is {base:,.0f})" if base else ""
            raise Unservable(
                f"{what} its perplexity on plain text is {perplexity:,.0f}; above {bound:,.0f} it is broken{known}"
            )
        served.request([lm.tokenizer(ENGLISH)["input_ids"][:8]], 4)
    return perplexity


def plain_perplexity(lm: LM, served: Served, enough: float = 0.0) -> float:
    """On the better of the two texts; the second is not read where the first one's is at most `enough`.

    Raises:
        Unservable: the logits are not finite.
    """
    perplexity = math.inf
    for text in (ENGLISH, SMALL_WORLD):
        if perplexity > enough:
            ids = lm.tokenizer(text)["input_ids"][: min(MOST_TOKENS, served.context or MOST_TOKENS)]
            found = served.log_likelihoods(ids)
            if not all(map(math.isfinite, found)):
                raise Unservable(f"{lm.path or lm.name}: in {served.name} its logits are not finite")
            perplexity = min(perplexity, math.exp(min(700.0, -sum(found) / len(found))))
    return perplexity


def highest(vocab_size: int, base: float | None) -> float:
    """The perplexity above which a model is broken; `base`: that of the model that it was made of, if it is known.

    Where the base knows the text, a model that has lost nearly all of that is as good as drawn at random.
    """
    bound = min(GUESSES * vocab_size, HIGHEST)
    if base is None or base >= SUSPICIOUS * vocab_size:
        return bound
    return min(bound, math.exp(math.log(base) + LOST * math.log(vocab_size / base)))


def working_runtimes(lm: LM, device: str, log: Callable[[str], None], base: LM | None = None) -> dict[str, Any]:
    """For a manifest: `runtimes` that read the format of `lm` and are installed here, with their versions, and `plain_text`.

    Each loads the files anew and is checked; where that fails, the version is followed by why. `plain_text` holds the perplexity
    that was found, and the base model's, which is asked only where the first one looks like chance.
    """
    from winnow.core.errors import describe
    from winnow.hardware.device import Hardware
    from winnow.runtime import candidates, serving

    found: dict[str, str] = {}
    record: dict[str, float] = {}
    serves = False
    for name, version in candidates(lm, device).items():
        fresh = LM(lm.path, loading=dataclasses.replace(lm.loading, device=device), name=lm.name)
        try:
            with serving(fresh, Hardware(device, device=device, runtime=name, decode="eager")) as served:
                perplexity = record["perplexity"] = check(fresh, served)
                suspicious = perplexity >= SUSPICIOUS * served.vocab_size
            if suspicious and base is not None and "base" not in record:
                with serving(base, Hardware(device, device=device, decode="eager")) as served:
                    record["base"] = plain_perplexity(base, served)
                base.release()
            if perplexity > (bound := highest(served.vocab_size, record.get("base"))):
                raise Unservable(
                    f"its perplexity on plain text is {perplexity:,.0f}, as that of a model drawn at random; the base "
                    f"model's is {record['base']:,.0f}, and above {bound:,.0f} it is broken"
                )
            found[name], serves = version, True
        except Exception as error:
            found[name] = f"{version} fails: {describe(error).removeprefix(f'{lm.path}: ')}"
    log(f"runtimes: {', '.join(f'{name} {result}' for name, result in found.items()) or 'none is installed here'}")
    if found and not serves:
        log(f"{lm.path}: saved, but no runtime serves it")
    return {"runtimes": found, RECORD: record}
