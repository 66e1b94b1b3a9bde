"""Loads a model and its tokenizer through transformers, after checks that end in one clear message.

Weights are read from safetensors only, unless the user allows pickle; code that comes with a model runs only if the user
trusts it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.model import manifest
from winnow.model.hub import offline_if_unreachable
from winnow.types import LM, Loading, MissingExtra, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUANTIZED_WITH = {"bitsandbytes": ("bitsandbytes", "bnb"), "compressed-tensors": ("compressed_tensors", "packed")}


def pretrained(
    path: str | None,
    name: str | None = None,
    dtype: str = "auto",
    attention: str = "sdpa",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LM:
    """A model by folder or hub id, not in memory yet; a folder is checked at once.

    Raises:
        UserError: no path, or a folder that holds no complete model (see `check_folder`).
    """
    if not path:
        raise UserError("model.path is not set; give a folder or a hub id: model=local model.path=...")
    loading = Loading(dtype, attention, device, trust_remote_code, allow_pickle)
    folder = Path(path)
    if folder.is_dir():
        check_folder(folder, loading)
        return LM(folder, manifest=manifest.read(folder), loading=loading, name=name or folder.resolve().name)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise UserError(f"model.path={path}: no such folder")
    return LM(path, loading=loading, name=name or path.split("/")[-1])


def check_folder(folder: Path, loading: Loading) -> None:
    """Refuses a folder that transformers could not load, or that would run code from elsewhere.

    Raises:
        UserError: no configuration, no weights, weights cut short, pickle weights, or a model with its own code.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model.path={folder} is not a model folder: it has no config.json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path={folder}: its config.json is damaged ({error}); copy the model again") from error
    if settings.get("auto_map") and not loading.trust_remote_code:
        raise UserError(
            f"model.path={folder} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
        )
    method = (settings.get("quantization_config") or {}).get("quant_method")
    if method in _QUANTIZED_WITH:
        _require(*_QUANTIZED_WITH[method])
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(wanted - {p.name for p in weights})
        if missing:
            raise UserError(f"model.path={folder} is incomplete: {', '.join(missing)} is missing; copy the model again")
    for file in weights:
        if _cut_short(file):
            raise UserError(f"model.path={folder} is half-written: {file.name} is cut short; copy or make it again")
    if not weights:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickled and not loading.allow_pickle:
            raise UserError(
                f"model.path={folder} holds pickle weights ({', '.join(pickled)}), which can run code when loaded; "
                f"convert them to safetensors, or set model.allow_pickle=true if you trust them"
            )
        if not pickled:
            raise UserError(f"model.path={folder} is incomplete: it holds no weights (*.safetensors)")


def _require(module: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise MissingExtra(module.replace("_", "-"), extra)


def _cut_short(file: Path) -> bool:
    """Whether a safetensors file is shorter than its header says (format: 8 bytes of length, JSON header, data)."""
    size = file.stat().st_size
    if size < 8:
        return True
    with file.open("rb") as data:
        (header_bytes,) = struct.unpack("<Q", data.read(8))
        if header_bytes > size:
            return True
        try:
            header = json.loads(data.read(header_bytes))
        except ValueError:
            return True
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return bool(8 + header_bytes + max(ends, default=0) > size)


def load_model(path: str, loading: Loading) -> PreTrainedModel:
    """The model in memory, in evaluation mode, on its device."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)
    with quiet(), _plain_errors(path):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=loading.attention,
            device_map=loading.device if loading.device != "cpu" else None,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=None if loading.allow_pickle else True,
        )
        if (Path(path) / "config.json").is_file():
            _decompress(model)
    return model.eval()  # type: ignore[no-any-return]


def _decompress(model: PreTrainedModel) -> None:
    """Packed weights of compressed-tensors are unpacked at the first forward: make that part of loading, in silence."""
    if (getattr(model.config, "quantization_config", None) is None) or not hasattr(model, "device"):
        return
    if getattr(getattr(model, "hf_quantizer", None), "quantization_config", None) is None:
        return
    if "compressed" in str(getattr(model.config.quantization_config, "quant_method", "")):
        import torch

        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))


def identity(path: str) -> str:
    """What a model is known by: the hash of a folder's content, or the commit of a hub model (its id, if that is unknown)."""
    if Path(path).is_dir():
        return manifest.content_hash(Path(path))
    from transformers import AutoConfig

    with quiet(), _plain_errors(path):
        return str(getattr(AutoConfig.from_pretrained(path), "_commit_hash", None) or path)


def load_tokenizer(path: str, loading: Loading) -> PreTrainedTokenizerBase:
    """The tokenizer; one without a pad token pads with its end-of-text token (the mask hides it)."""
    from transformers import AutoTokenizer

    with quiet(), _plain_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer  # type: ignore[no-any-return]


@contextlib.contextmanager
def _plain_errors(path: str) -> Iterator[None]:
    """Turns the hub's and the loader's errors into messages that name `model.path` and a way out."""
    from huggingface_hub import errors

    try:
        with contextlib.nullcontext() if Path(path).is_dir() else offline_if_unreachable():
            yield
    except errors.GatedRepoError as error:
        raise UserError(f"model.path={path} needs a login: accept its licence on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model.path={path}: no such model on the hub, or it is private and needs HF_TOKEN; "
            f"for a folder, check that it exists"
        ) from error
    except ImportError as error:
        raise UserError(f"model.path={path} needs a library that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        text = str(error)
        if "gated repo" in text or "401" in text:
            raise UserError(f"model.path={path} needs a login: accept its licence and set HF_TOKEN") from error
        if "trust_remote_code" in text:
            raise UserError(
                f"model.path={path} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
            ) from error
        if "safetensors" in text and not isinstance(error, FileNotFoundError):
            raise UserError(
                f"model.path={path} has no safetensors weights; convert them, or set model.allow_pickle=true if you trust it"
            ) from error
        if isinstance(error, OSError) and ("connect" in text or "offline" in text.lower() or "cached" in text):
            raise UserError(
                f"model.path={path} is neither a folder nor in the cache, and the hub cannot be reached "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}); give a folder, or download it first"
            ) from error
        raise UserError(f"model.path={path} cannot be loaded: {text.splitlines()[0]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and remarks of the loading libraries."""
    import transformers.utils.logging as tl
    from transformers.utils import logging as hf_logging

    bars, level = tl.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
