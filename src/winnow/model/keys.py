"""Checks that a file's tensors match the model, because transformers and PEFT initialise missing tensors at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.core.errors import Unservable
from winnow.model.folder import header_of


def check_keys(problems: Mapping[str, Any], path: str, description: str = "weights") -> None:
    """Raises an error if loaded weights do not match the model.

    Args:
        problems: `missing_keys` and `unexpected_keys`, names of tensors, and `mismatched_keys`: the name of each tensor with its
            shape in the file and in the model.
        description: what the weights are called in the message.

    Raises:
        Unservable: tensors are missing, unexpected, or of another shape.
    """
    missing, unexpected = (sorted(map(str, problems.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected"))
    mismatched = sorted(
        f"{name} {tuple(file_shape)} for {tuple(model_shape)}"
        for name, file_shape, model_shape in problems.get("mismatched_keys") or ()
    )
    differences = [
        f"{problem}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if not differences:
        return
    prefix = _common_prefix(unexpected, missing)
    way_out = f"take `{prefix}` off their names" if prefix else "copy the model again, or correct its configuration"
    raise Unservable(
        f"model.path={path}: its {description} are not those of its configuration ({'; '.join(differences)}); {way_out}"
    )


def check_adapter(file: Path, expected: Mapping[str, Any], path: str) -> None:
    """Raises an error if an adapter's file does not hold the `expected` tensors, given by name.

    Raises:
        Unservable: see `check_keys`.
    """
    file_shapes = {name: tuple(entry["shape"]) for name, entry in header_of(file).items()}
    common_names = file_shapes.keys() & expected.keys()
    problems = {
        "missing_keys": expected.keys() - file_shapes.keys(),
        "unexpected_keys": file_shapes.keys() - expected.keys(),
        "mismatched_keys": [
            (n, file_shapes[n], expected[n].shape) for n in common_names if file_shapes[n] != tuple(expected[n].shape)
        ],
    }
    check_keys(problems, path, "adapter's weights")


def _common_prefix(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """Returns the prefix that a wrapper added to all tensor names, such as `_orig_mod.` of a compiled model; else ""."""
    for name in missing:
        for unexpected_name in unexpected[:1]:
            prefix = unexpected_name.removesuffix(name)
            if prefix and unexpected_name.endswith(name) and all(key.startswith(prefix) for key in unexpected):
                return prefix
    return ""
