"""Checks that a model works in its runtime: it generates, its logits are finite, and it can predict plain text.

A broken artifact often loads without an error: missing weights are initialised at random, and misread scales scramble the others.
This shows on any text that the model knows. The bound on perplexity detects broken models, not bad ones: pruned to half or at 2
bits, a model may lose most of its knowledge and still stay far below the bound. Two texts are included, plain English and the
small world of the embedded models; the better one counts, so that a model of one need not know the other.

A check costs a forward pass of some 250 tokens, at most twice, and the generation of a few tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

from winnow.core.errors import Unservable, as_unservable
from winnow.core.muted import muted
from winnow.model.lm import LM

if TYPE_CHECKING:
    from winnow.runtime import Served

logger = logging.getLogger(__name__)

MAX_TOKENS = 256  # of each text
# largest ratio of perplexity to vocabulary size; an untrained model is slightly worse than a uniform guess
MAX_VOCABULARY_RATIO = 2.0
# ratio of perplexity to vocabulary size that is close to chance, so that the base model is checked for comparison
SUSPICIOUS_RATIO = 0.25
# largest share of the base model's knowledge that may be lost, on a log scale from its perplexity to the vocabulary size
MAX_LOST_SHARE = 0.9
MAX_PERPLEXITY = 10_000.0  # for any vocabulary size; no useful language model exceeds it on plain text
RECORD = "plain_text"  # key in a manifest

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
    """Returns the model's perplexity on the better of the two texts.

    Raises:
        Unservable: the model does not work; the message says why.
    """
    base = lm.manifest.get(RECORD, {}).get("base")
    bound = perplexity_bound(served.vocab_size, base)
    subject = f"{lm.path or lm.name}: in {served.name}"
    with as_unservable(subject):
        perplexity = plain_perplexity(lm, served, bound)
        if perplexity > bound:
            base_note = f" (the base model's is {base:,.0f})" if base else ""
            raise Unservable(
                f"{subject} its perplexity on plain text is {perplexity:,.0f}; above {bound:,.0f} it is broken{base_note}"
            )
        served.request([lm.tokenizer(ENGLISH)["input_ids"][:8]], 4)
    return perplexity


def plain_perplexity(lm: LM, served: Served, enough: float = 0.0) -> float:
    """Returns the perplexity on the better of the two texts; skips the second text if the first one's is at most `enough`.

    Raises:
        Unservable: the logits are not finite.
    """
    perplexity = math.inf
    for text in (ENGLISH, SMALL_WORLD):
        if perplexity > enough:
            ids = lm.tokenizer(text)["input_ids"][: min(MAX_TOKENS, served.context or MAX_TOKENS)]
            log_likelihoods = served.log_likelihoods(ids)
            if not all(map(math.isfinite, log_likelihoods)):
                raise Unservable(f"{lm.path or lm.name}: in {served.name} its logits are not finite")
            perplexity = min(perplexity, math.exp(min(700.0, -sum(log_likelihoods) / len(log_likelihoods))))
    return perplexity


def perplexity_bound(vocab_size: int, base: float | None) -> float:
    """Returns the perplexity above which a model is broken; `base` is the base model's perplexity, if it is known.

    Where the base model knows the text, a model that has lost nearly all of that knowledge is no better than random weights.
    """
    bound = min(MAX_VOCABULARY_RATIO * vocab_size, MAX_PERPLEXITY)
    if base is None or base >= SUSPICIOUS_RATIO * vocab_size:
        return bound
    return min(bound, math.exp(math.log(base) + MAX_LOST_SHARE * math.log(vocab_size / base)))


def working_runtimes(lm: LM, device: str, base: LM | None = None) -> dict[str, Any]:
    """Checks the artifact in every installed runtime and returns the manifest entries `runtimes` and `plain_text`.

    `runtimes` has the version of each installed runtime that reads the format of `lm`. Each runtime loads the files anew and is
    checked; after a failure, the reason follows the version. `plain_text` has the perplexity, and that of the base model, which is
    computed only if the first one looks like chance.
    """
    from winnow.core.errors import describe
    from winnow.hardware.device import Hardware
    from winnow.runtime import installed_runtimes, serving

    results: dict[str, str] = {}
    record: dict[str, float] = {}
    is_servable = False
    for name, version in installed_runtimes(lm, device).items():
        reloaded = LM(lm.path, loading=dataclasses.replace(lm.loading, device=device), name=lm.name)
        try:
            with muted(), serving(reloaded, Hardware(device, device=device, runtime=name, decode="eager")) as served:
                perplexity = record["perplexity"] = check(reloaded, served)
                suspicious = perplexity >= SUSPICIOUS_RATIO * served.vocab_size
            if suspicious and base is not None and "base" not in record:
                with muted(), serving(base, Hardware(device, device=device, decode="eager")) as served:
                    record["base"] = plain_perplexity(base, served)
                base.release()
            if perplexity > (bound := perplexity_bound(served.vocab_size, record.get("base"))):
                raise Unservable(
                    f"its perplexity on plain text is {perplexity:,.0f}, as that of a model drawn at random; the base "
                    f"model's is {record['base']:,.0f}, and above {bound:,.0f} it is broken"
                )
            results[name], is_servable = version, True
        except Exception as error:
            results[name] = f"{version} fails: {describe(error).removeprefix(f'{lm.path}: ')}"
    logger.info(
        f"runtimes: {', '.join(f'{name} {result}' for name, result in results.items()) or 'none is installed here'}"
    )
    if results and not is_servable:
        logger.info(f"{lm.path}: saved, but no runtime serves it")
    return {"runtimes": results, RECORD: record}
