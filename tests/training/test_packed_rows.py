"""Documents in rows: the loss is where it should be, every document comes once an epoch, and a training goes on with the next one."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.core.errors import UserError
from winnow.core.types import Chat, Document
from winnow.data.encoding import IGNORED, Encoded, collate, collate_padded, encode
from winnow.model.pretrained import pretrained
from winnow.training.packed_rows import Documents, pack

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# thoughts are left out of all answers but the last, as Qwen3's template does
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
CHAT = Chat(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many eggs?"},
        {"role": "assistant", "content": "Three eggs."},
        {"role": "user", "content": "And apples?"},
        {"role": "assistant", "content": "Five."},
    )
)


def tokenizer_of(tiny: Path, template: str | None = None) -> Any:
    tokenizer = pretrained(str(tiny)).tokenizer
    tokenizer.chat_template = template
    if template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def rows(count: int, seed: int = 0) -> list[Encoded]:
    """Of skewed lengths, each document known by its ids."""
    rng = random.Random(seed)
    lengths = [max(3, int(rng.lognormvariate(3, 0.8))) for _ in range(count)]
    return [Encoded([number] * length, ((2, length),)) for number, length in enumerate(lengths)]


def learned(rows: list[Encoded], tokenizer: Any) -> list[str]:
    """The text that the loss counts, of each document."""
    return [tokenizer.decode([t for a, b in row.answers for t in row.ids[a:b]]) for row in rows]


def test_the_loss_is_on_the_completion_and_on_all_of_a_document_without_a_prompt(tiny: Path) -> None:
    tokenizer = tokenizer_of(tiny)
    made = encode([Document("Question: 1 + 1?\nAnswer:", " 2"), Document("", "Tom has 3 eggs.")], tokenizer, 64)
    assert learned(made, tokenizer) == [" 2<eos>", "Tom has 3 eggs.<eos>"]
    batch = collate(made)
    ids, targets = batch["input_ids"][0], batch["targets"][0]
    counted = targets != IGNORED
    assert tokenizer.decode(targets[counted]) == " 2<eos>Tom has 3 eggs.<eos>"
    assert torch.equal(targets[counted], ids.roll(-1)[counted])  # a target is the token that follows
    assert int(counted.sum()) == sum(row.target_count for row in made)
    assert not counted[[bound - 1 for bound in batch["cu_seqlens"].tolist()[1:]]].any()  # nothing follows a last token
    assert batch["position_ids"][0].tolist() == [i for row in made for i in range(len(row.ids))]


def test_a_padded_batch_has_the_same_targets(tiny: Path) -> None:
    made = encode([Document("a b", " c"), Document("", "Tom has 3 eggs and a hen.")], tokenizer_of(tiny), 64)
    packed, padded = collate(made), collate_padded(made, 0)
    mask = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][mask], packed["input_ids"][0])
    assert torch.equal(padded["targets"][mask], packed["targets"][0])
    assert (padded["targets"][~mask] == IGNORED).all()


def test_longer_documents_are_cut_and_counted(tiny: Path) -> None:
    tokenizer = tokenizer_of(tiny)
    document = Document("Question: 1 + 1?\nAnswer:", " 2")
    (whole,) = encode([document], tokenizer, 64)
    short, none = (encode([document], tokenizer, n)[0] for n in (len(whole.ids) - 1, 4))
    assert whole.cut == 0 and short.cut == 1 and none.cut == len(whole.ids) - 4
    assert learned([short], tokenizer) == [" 2"]
    assert none.target_count == 0  # its completion was cut away: nothing to learn


def test_of_a_chat_the_answers_are_learned(tiny: Path) -> None:
    tokenizer = tokenizer_of(tiny, CHATML)
    (row,) = encode([CHAT], tokenizer, 256)
    answers = [tokenizer.decode(row.ids[a:b]) for a, b in row.answers]
    assert [answer.strip() for answer in answers] == ["Three eggs.<|im_end|>", "Five.<|im_end|>"]
    assert tokenizer.decode(row.ids).count("<|im_start|>") == 5


def test_answers_that_a_template_rewords_later_are_not_learned(tiny: Path) -> None:
    tokenizer = tokenizer_of(tiny, FORGETFUL)
    (row,) = encode([CHAT], tokenizer, 256)
    (span,) = row.answers
    assert tokenizer.decode(row.ids[slice(*span)]).strip() == "<think>\n\n</think>\n\nFive.<|im_end|>"


def test_chats_need_a_template_that_takes_them(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template; give rows with prompt and completion"):
        encode([CHAT], tokenizer_of(tiny), 64)
    with pytest.raises(
        UserError, match=r"\(system, user, assistant, user, assistant\).*refuses \(roles must alternate\)"
    ):
        encode([CHAT], tokenizer_of(tiny, STRICT), 64)


def test_an_epoch_has_every_document_once_in_nearly_full_rows() -> None:
    lengths = [len(row.ids) for row in rows(10_000)]
    made = list(pack(lengths, 512, seed=1, epoch=0))
    assert sorted(i for bin_ in made for i in bin_) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in bin_) for bin_ in made) <= 512
    assert sum(lengths) / (512 * len(made)) > 0.99
    assert made == list(pack(lengths, 512, seed=1, epoch=0))
    others = [list(pack(lengths, 512, seed, epoch)) for seed, epoch in ((1, 1), (2, 0))]
    assert made != others[0] != others[1] != made
    # the order stays random: long documents do not come first
    means = [sum(lengths[i] for i in bin_) / len(bin_) for bin_ in made]
    half = len(means) // 2
    assert sum(means[:half]) / half == pytest.approx(sum(means[half:]) / (len(means) - half), rel=0.1)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_a_steps_rows_are_the_same_on_any_devices(devices: int, accumulate: int) -> None:
    data = Documents(rows(60), 100, seed=3)
    expected = list(itertools.islice(data.bins(), 40))  # over two epochs
    streams = [data.steps(devices, accumulate, rank) for rank in range(devices)]
    for step in range(10):
        batches = [next(streams[rank]) for _ in range(accumulate) for rank in range(devices)]
        assert [batch["documents"] for batch in batches] == expected[4 * step : 4 * step + 4]
        targets = sum(int((batch["targets"] != IGNORED).sum()) for batch in batches)
        assert {batch["step_targets"] for batch in batches} == {targets}


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    whole = Documents(rows(60), 100, seed=3)
    expected = [batch["documents"] for batch in itertools.islice(whole.steps(1, 2, 0), 30)]
    again = Documents(rows(60), 100, seed=3)
    again.load_state_dict({"steps": 4})
    assert [batch["documents"] for batch in itertools.islice(again.steps(1, 2, 0), 22)] == expected[8:]


def test_held_out_documents_are_not_trained_on() -> None:
    some = rows(60)
    data = Documents(some, 100, seed=3, held_out=13)
    held = [i for batch in data.held_out() for i in batch["documents"]]
    spread = [i for rank in range(2) for batch in data.held_out(2, rank) for i in batch["documents"]]
    assert len(held) == 13 and sorted(held) == sorted(spread) == data.validation
    assert not set(held) & set(data.training)
    with pytest.raises(UserError, match="gives 60 documents with something to learn, of which 60"):
        Documents(some, 100, seed=3, held_out=60)


def test_documents_with_nothing_to_learn_are_left_out() -> None:
    some = [*rows(5), Encoded([1, 2, 3], ()), Encoded([7], ((1, 1),))]
    assert Documents(some, 100, 0).training == [0, 1, 2, 3, 4]


def test_a_long_document_widens_the_rows() -> None:
    some = [*rows(5), Encoded([1] * 300, ((1, 300),))]
    data = Documents(some, 50, 0)
    assert data.capacity == 300


def test_the_digest_is_of_the_documents() -> None:
    first = Documents(rows(20), 100, 0).digest()
    assert first == Documents(rows(20), 50, 0).digest()
    assert first != Documents([*rows(19), Encoded([1, 2, 3], ((1, 3),))], 100, 0).digest()
