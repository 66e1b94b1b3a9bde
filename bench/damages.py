"""Ways to damage the folder of a model, for `bench/fuzz.py`: a byte, a key, a name, an encoding."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def damages() -> dict[str, Callable[[Path, random.Random], None]]:
    from tests.wild import edits

    def settled(edit: Callable[[Path], None]) -> Callable[[Path, random.Random], None]:
        return lambda folder, rng: edit(folder)

    def weights(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[Path, random.Random], None]:
        def apply(folder: Path, rng: random.Random) -> None:
            edits.tensors(lambda held: change(held, rng))(folder)

        return apply

    def drop(held: dict[str, Any], rng: random.Random) -> None:
        del held[rng.choice(sorted(held))]

    def rename(held: dict[str, Any], rng: random.Random) -> None:
        name = rng.choice(sorted(held))
        held[name + "_"] = held.pop(name)

    def prefix(held: dict[str, Any], rng: random.Random) -> None:
        for name in list(held):
            held[f"_orig_mod.{name}"] = held.pop(name)

    def nan(held: dict[str, Any], rng: random.Random) -> None:
        tensor = held[rng.choice(sorted(held))]
        tensor.view(-1)[rng.randrange(tensor.numel())] = float("nan")

    def bytes_of(name: str) -> Callable[[Path, random.Random], None]:
        def apply(folder: Path, rng: random.Random) -> None:
            file = folder / name
            held = bytearray(file.read_bytes())
            held[rng.randrange(min(len(held), 2000))] ^= 1 << rng.randrange(8)
            file.write_bytes(held)

        return apply

    def cut(name: str) -> Callable[[Path, random.Random], None]:
        def apply(folder: Path, rng: random.Random) -> None:
            held = (folder / name).read_bytes()
            (folder / name).write_bytes(held[: rng.randrange(len(held))])

        return apply

    def key_of(name: str) -> Callable[[Path, random.Random], None]:
        def apply(folder: Path, rng: random.Random) -> None:
            held = json.loads((folder / name).read_text(encoding="utf-8"))
            key = rng.choice(sorted(held))
            held[key] = rng.choice((None, -1, 10**6, "x", [], 0.5))
            (folder / name).write_text(json.dumps(held), encoding="utf-8")

        return apply

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
    return {
        "a tensor dropped": weights(drop),
        "a tensor renamed": weights(rename),
        "all names prefixed": weights(prefix),
        "a NaN": weights(nan),
        **{f"a bit of {name}": bytes_of(name) for name in names},
        **{f"{name} cut": cut(name) for name in names},
        **{f"{name} removed": settled(edits.removed(name)) for name in names},
        **{f"a BOM before {name}": settled(edits.byte_order_mark(name)) for name in names if name.endswith("json")},
        **{f"a value of {name}": key_of(name) for name in names if name.endswith("config.json")},
        "an index left over": settled(edits.written("model.safetensors.index.json", '{"weight_map": {"a": "b"}}')),
        "other files beside": settled(edits.written("checkpoint-5/optimizer.pt", b"\0" * 10_000)),
        "Latin-1 in the chat template": settled(edits.written("chat_template.jinja", "caf\xe9".encode("latin-1"))),
    }
