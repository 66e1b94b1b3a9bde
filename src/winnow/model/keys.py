"""Whether the tensors of a file are those that the model asks for: transformers and PEFT draw at random what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.errors import Unservable
from winnow.model.folder import header_of


def check_keys(found: Mapping[str, Any], path: str, what: str = "weights") -> None:
    """Refuses weights that are not those of the model.

    Args:
        found: `missing_keys` and `unexpected_keys`, names of tensors, and `mismatched_keys`: the name of each tensor with its
            shape in the file and in the model.
        what: they are, for the message.

    Raises:
        Unservable: some are missing, too many, or of another shape.
    """
    missing, unexpected = (sorted(map(str, found.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected"))
    mismatched = sorted(
        f"{name} {tuple(there)} for {tuple(wanted)}" for name, there, wanted in found.get("mismatched_keys") or ()
    )
    wrong = [
        f"{problem}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if not wrong:
        return
    prefix = _common_prefix(unexpected, missing)
    way_out = f"take `{prefix}` off their names" if prefix else "copy the model again, or correct its configuration"
    raise Unservable(
        f"model.path={path}: its {what} are not those of its configuration ({'; '.join(wrong)}); {way_out}"
    )


def check_adapter(file: Path, wanted: Mapping[str, Any], path: str) -> None:
    """Refuses a file of an adapter that does not hold the tensors `wanted`, by name.

    Raises:
        Unservable: see `check_keys`.
    """
    held = {name: tuple(entry["shape"]) for name, entry in header_of(file).items()}
    both = held.keys() & wanted.keys()
    found = {
        "missing_keys": wanted.keys() - held.keys(),
        "unexpected_keys": held.keys() - wanted.keys(),
        "mismatched_keys": [(n, held[n], wanted[n].shape) for n in both if held[n] != tuple(wanted[n].shape)],
    }
    check_keys(found, path, "adapter's weights")


def _common_prefix(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """What stands before all names of tensors: a wrapper's, such as `_orig_mod.` of a compiled model."""
    for name in missing:
        for other in unexpected[:1]:
            prefix = other.removesuffix(name)
            if prefix and other.endswith(name) and all(key.startswith(prefix) for key in unexpected):
                return prefix
    return ""
