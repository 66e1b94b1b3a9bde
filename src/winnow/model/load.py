"""Loads a model and its tokenizer through transformers, after checks that end in one clear message.

Weights are read from safetensors only, unless the user allows pickle; code that comes with a model runs only if the user
trusts it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from winnow.libraries import require
from winnow.model import adapter, generation, lowrank, manifest
from winnow.model.folder import INDEX, WEIGHTS, header_of, weight_files
from winnow.model.keys import check_keys
from winnow.model.loading_errors import plain_errors
from winnow.scalars import check_scalars
from winnow.types import LM, Loading, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_QUANTIZED_WITH = {
    "auto-round": "auto_round",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
}
_LOG = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto_round reads it when it is imported
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it asks for an optional kernel when it is imported


def pretrained(
    path: str | None,
    name: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    dequantize: bool = True,
) -> LM:
    """A model by folder, hub id or GGUF file, not in memory yet; a folder is checked at once.

    A GGUF file, or a folder that holds one and no configuration, is read into a folder of the cache, and that is loaded
    (`winnow.model.gguf.cached`); without `dequantize` it stays as it is, for llama.cpp to serve. Without `weights` only the
    configuration will be read, and a folder need not hold more.

    Raises:
        UserError: no path, or a folder that holds no complete model (see `check_folder`), or a file that cannot be read.
    """
    if not path:
        raise UserError("model.path is not set; give a folder, a hub id or a GGUF file: model=local model.path=...")
    loading = Loading(dtype, attention, device, trust_remote_code, allow_pickle)
    check_scalars(Loading, dataclasses.asdict(loading), "model")
    folder = Path(path)
    file = folder if folder.is_file() else None if (folder / "config.json").is_file() else gguf_file(folder)
    if file is not None:
        from winnow.model.gguf import cached

        name = name or file.stem
        folder = cached.folder_of(file, dequantize and weights)
    if folder.is_dir():
        check_folder(folder, loading, weights)
        return LM(folder, manifest=manifest.checked(folder), loading=loading, name=name or folder.resolve().name)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise UserError(f"model.path={path}: no such folder or file")
    return LM(path, loading=loading, name=name or path.split("/")[-1])


def check_folder(folder: Path, loading: Loading, need_weights: bool = True) -> None:
    """Refuses a folder that transformers could not load, or that would run code from elsewhere.

    Raises:
        UserError: no configuration, no weights, weights cut short, pickle weights, or a model with its own code.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model.path={folder} is not a model folder: it has no config.json and no .gguf file")
    settings = check_json(config)
    own = (
        settings.get("model_type") in lowrank.MODEL_TYPES
    )  # loaded by the classes of this package, not by the folder's
    if settings.get("auto_map") and not own and not loading.trust_remote_code:
        raise UserError(
            f"model.path={folder} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
        )
    if not need_weights:
        return
    for name in (generation.FILE, "tokenizer_config.json"):
        check_json(folder / name)
    _require_libraries(folder, settings)
    beside = adapter.folder_of(folder)
    if beside is not None:
        adapter.check(beside)
    weights = weight_files(folder)
    missing = [file.name for file in weights if not file.is_file()]
    if missing:
        raise UserError(f"model.path={folder} is incomplete: {', '.join(missing)} is missing; copy the model again")
    if not weights:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".pkl"))
        beside_it = f", and transformers does not look at {', '.join(others[:3])}" if others else ""
        raise UserError(f"model.path={folder} is incomplete: it holds no weights ({WEIGHTS} or {INDEX}){beside_it}")
    if weights[0].suffix == ".bin" and not loading.allow_pickle:
        raise UserError(
            f"model.path={folder} holds pickle weights ({', '.join(file.name for file in weights)}), which can run code when "
            f"loaded; convert them to safetensors, or set model.allow_pickle=true if you trust them"
        )
    for file in [*weights, *(beside.glob("*.safetensors") if beside else ())]:
        try:
            if file.suffix == ".safetensors":
                header_of(file)
        except ValueError as error:
            raise UserError(
                f"model.path={folder} is half-written: {file.name} is cut short ({error}); copy or make it again"
            ) from error
    if not has_tokenizer(folder):
        raise UserError(no_tokenizer(folder))


def check_json(file: Path) -> dict[str, Any]:
    """What a file of settings holds; nothing where there is none.

    Raises:
        UserError: it is damaged; transformers goes on without some of them, and says nothing.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(
            f"model.path={file.parent}: its {file.name} is damaged ({error}); copy the model again"
        ) from error
    return settings


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that is the weights of a folder, which llama.cpp serves and transformers does not load.

    Raises:
        UserError: there are several.
    """
    found = [file for file in weight_files(folder) if file.suffix == ".gguf"]
    if len(found) > 1:
        raise UserError(
            f"model.path={folder} holds {len(found)} GGUF files ({found[0].name}, {found[1].name}, ...); "
            f"leave the one that is to be used"
        )
    return found[0] if found else None


def _require_libraries(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises MissingExtra for what unpacks the weights, or the cache while the model generates, and is not installed."""
    method = (settings.get("quantization_config") or {}).get("quant_method")
    if method in _QUANTIZED_WITH:
        require(_QUANTIZED_WITH[method])
    generation = folder / "generation_config.json"
    if generation.is_file() and '"hqq"' in generation.read_text(encoding="utf-8"):  # the cache's backend
        require("hqq")


def _import_quickly() -> None:
    """Imports transformers, if nothing has, without the optional packages that it would import."""
    importlib.import_module("winnow.model.preload")


def load_model(path: str, loading: Loading) -> PreTrainedModel:
    """The model in memory, in evaluation mode, on its device.

    Raises:
        UserError: it cannot be loaded; the message says why.
    """
    if gguf_file(Path(path)) is not None:
        raise UserError(
            f"model.path={path} is a GGUF file, which llama.cpp serves but no method works on; "
            f"start from the model that it was made of"
        )
    _import_quickly()
    import torch
    from transformers import AutoModelForCausalLM

    from winnow.model.packing import set_product_dtype

    lowrank.register()
    dtype: Any = loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)
    with quiet(), plain_errors(path):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=loading.attn_implementation,
            device_map=loading.device if loading.device != "cpu" else None,
            trust_remote_code=loading.trust_remote_code,
            use_safetensors=None if loading.allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused with the rest
        )
        check_keys(found, path)
        generation.mend(model, path)
        if (Path(path) / "config.json").is_file():
            _decompress(model)
        if loading.dtype != "auto":
            set_product_dtype(model, dtype)
        elif model.device.type == "cpu":
            _avoid_float16(model)
        beside = adapter.folder_of(path)
        if beside is not None:
            model = adapter.load(model, beside)
    return model.eval()  # type: ignore[no-any-return]


def _decompress(model: PreTrainedModel) -> None:
    """Packed weights of compressed-tensors are unpacked at the first forward: make that part of loading, in silence."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    if model.config.quantization_config.quant_method == "compressed-tensors":
        import torch

        with torch.no_grad():  # not inference mode: what it makes could not be trained through
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))


def _avoid_float16(model: PreTrainedModel) -> None:
    """AutoRound's packed layers are tens of times slower in float16 than in bfloat16 on processors; their scales stay."""
    import torch

    from winnow.model.packing import cast_weights

    settings = getattr(model.config, "quantization_config", None)
    if model.dtype == torch.float16 and getattr(settings, "quant_method", None) == "auto-round":
        cast_weights(model, torch.bfloat16)


def identity(path: str, loading: Loading) -> str:
    """What a model is known by: the hash of a folder's content, or the commit of a hub model (its id, if that is unknown)."""
    if Path(path).is_dir():
        return manifest.content_hash(Path(path))
    _import_quickly()
    from transformers import AutoConfig

    with quiet(), plain_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        return str(getattr(config, "_commit_hash", None) or path)


def load_config(lm: LM) -> PretrainedConfig:
    """The configuration of a model, its own to change: of the one in memory, else from its folder or the hub."""
    _import_quickly()
    from transformers import AutoConfig

    if lm.path is None:
        return copy.deepcopy(lm.model.config)
    lowrank.register()
    with quiet(), plain_errors(lm.path):
        config: PretrainedConfig = AutoConfig.from_pretrained(lm.path, trust_remote_code=lm.loading.trust_remote_code)
    return config


def load_tokenizer(path: str, loading: Loading) -> PreTrainedTokenizerBase:
    """The tokenizer; without a pad token that the model has, it pads with its end-of-text token (the mask hides it).

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    _import_quickly()
    from transformers import AutoConfig, AutoTokenizer

    lowrank.register()
    with quiet(), plain_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        except (ValueError, OSError) as error:
            if Path(path).is_dir() and not has_tokenizer(Path(path)):
                raise UserError(no_tokenizer(Path(path))) from error
            raise
    _complete(tokenizer, config, path)
    return tokenizer  # type: ignore[no-any-return]


def _complete(tokenizer: Any, config: PretrainedConfig, path: str) -> None:
    """Gives a tokenizer the special tokens that it lacks and its model's configuration names, and one to pad with."""
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None) or len(tokenizer)
    for name in ("bos", "eos"):
        ids = getattr(text, f"{name}_token_id", None)
        known = ids[0] if isinstance(ids, list) and ids else ids
        token, number = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if token is not None and number < rows:
            continue
        there = isinstance(known, int) and 0 <= known < min(rows, len(tokenizer))
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(known) if there else None)
        if token is not None:
            _LOG.warning(
                f"{path}: its {name} token {token} is number {number:,} of {rows:,} tokens that the model has; "
                f"{getattr(tokenizer, f'{name}_token') or 'none'} takes its place"
            )
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        _LOG.warning(
            f"{path}: its pad token {tokenizer.pad_token} is number {pad:,} of {rows:,} tokens that the model has; "
            f"the end-of-text token takes its place"
        )
    if pad is None or pad >= rows:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS) or any(folder.glob("*.tiktoken"))


def no_tokenizer(folder: Path) -> str:
    return (
        f"model.path={folder} holds no tokenizer ({', '.join(TOKENIZERS[:3])}, ...); "
        f"copy the tokenizer files of the model that it was made of into it"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars and remarks of the loading libraries."""
    import tqdm.std
    import transformers.utils.logging as tl
    from transformers.utils import logging as hf_logging

    bars, level = tl.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    noisy = logging.getLogger("bitsandbytes.autograd._functions")
    noisy.setLevel(logging.ERROR)
    bar = tqdm.std.tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:  # compressed-tensors has no switch for its bars
        bar(self, *args, **{**kwargs, "disable": True})

    try:
        with warnings.catch_warnings(), mock.patch.object(tqdm.std.tqdm, "__init__", hidden):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
