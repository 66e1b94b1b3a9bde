"""Changes to a saved model, as people's folders have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]


def setting(file: str, *without: str, **changes: Any) -> Edit:
    """A JSON file with some values changed, and some left out."""

    def change(folder: Path) -> None:
        path = folder / file
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
        path.write_text(json.dumps({**content, **changes}))

    return change


def removed(*names: str) -> Edit:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def written(name: str, content: str | bytes) -> Edit:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def replaced(name: str, old: bytes, new: bytes) -> Edit:
    """The first of some bytes of a file."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return edit


def byte_order_mark(name: str) -> Edit:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return change


def tensors(change: Callable[[Tensors], Tensors | None], name: str = "model.safetensors") -> Edit:
    """Other weights: those that `change` returns, or those that it has changed in place."""

    def changed(folder: Path) -> None:
        file = folder / name
        held = load_file(file)
        save_file({k: t.contiguous() for k, t in (change(held) or held).items()}, file, {"format": "pt"})

    return changed


def both(*edits: Edit) -> Edit:
    def change(folder: Path) -> None:
        for edit in edits:
            edit(folder)

    return change


def token_beyond_the_model(name: str) -> Edit:
    """A special token (`pad`, `eos`) that somebody added to the tokenizer alone."""

    def edit(folder: Path) -> None:
        path, text = folder / "tokenizer.json", f"[{name.upper()}]"
        content = json.loads(path.read_text())
        content["added_tokens"].append(
            {
                "id": 50 + max(content["model"]["vocab"].values()),
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
        path.write_text(json.dumps(content))
        setting("tokenizer_config.json", **{f"{name}_token": text})(folder)

    return edit


OWN_CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def code_of_its_own(folder: Path) -> None:
    """As models have it whose architecture transformers does not know."""
    (folder / "configuration_own.py").write_text(OWN_CONFIGURATION)
    (folder / "modeling_own.py").write_text(OWN_MODEL)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    setting("config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=classes)(folder)
