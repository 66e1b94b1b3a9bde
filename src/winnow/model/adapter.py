"""Loads, writes and checks adapters, which lie in the folder `adapter/` of an artifact in PEFT's own format.

The base model keeps its own files, quantized or not. transformers and PEFT load both in two lines:

    model = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(model, folder + "/adapter")
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.core.errors import UserError
from winnow.core.libraries import require
from winnow.model.folder import ADAPTER, ADAPTER_FILES
from winnow.model.keys import check_adapter

if TYPE_CHECKING:
    import torch

NAME = ADAPTER
CONFIG, WEIGHTS, _ = ADAPTER_FILES
CONFIG_BYTES = 1300  # size of the adapter's configuration without layer names


def folder_of(path: str | Path | None) -> Path | None:
    """Returns the adapter folder of an artifact; None if it has none or `path` is not a folder."""
    folder = Path(path) / NAME if path is not None else None
    return folder if folder is not None and folder.is_dir() else None


def require_peft() -> None:
    """Raises MissingExtra if PEFT is not installed."""
    require("peft")
    # PEFT imports bitsandbytes, which warns about optional kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_adapted(model: Any) -> bool:
    """Returns whether a model is wrapped by PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: Any) -> Any:
    """Returns the model without PEFT's wrapper; the adapter's layers stay in it."""
    return model.get_base_model() if is_adapted(model) else model


def virtual_tokens(model: Any) -> int:
    """Returns the number of soft prompt tokens, which take up part of the context."""
    if not is_adapted(model) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def load(model: Any, folder: Path) -> Any:
    """Returns `model` with the adapter in `folder`, in evaluation mode.

    Raises:
        Unservable: the tensors do not match the adapter's configuration; PEFT itself only warns.
    """
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    adapted: Any = PeftModel.from_pretrained(model, str(folder), ignore_mismatched_sizes=True)
    check_adapter(folder / WEIGHTS, get_peft_model_state_dict(adapted), str(folder.parent))
    return support_padded_prompts(adapted.eval())


def support_padded_prompts(model: Any) -> Any:
    """Patches `generate` of a model with a soft prompt so that padded prompts get the same answers as unpadded ones.

    PEFT drops the position ids that `generate` computes, so that padding would move the text away from the soft prompt.
    """
    import types

    if virtual_tokens(model):
        model.generate = types.MethodType(_generate_after_soft_prompt, model)
    return model


def _generate_after_soft_prompt(
    self: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_length: int | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Calls `generate` of the base model with the soft prompt before `input_ids` [B, T]; returns `input_ids` and the answers."""
    import torch

    rows = input_ids.shape[0]
    words_bth = self.get_input_embeddings()(input_ids)
    prompt_bph = self.get_prompt(batch_size=rows).to(words_bth)
    mask_bt = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ones_bp = mask_bt.new_ones(rows, prompt_bph.shape[1])
    if max_length is not None:
        settings["max_new_tokens"] = max_length - input_ids.shape[1]
    answers: torch.Tensor = self.get_base_model().generate(
        input_ids,
        inputs_embeds=torch.cat([prompt_bph, words_bth], 1),
        attention_mask=torch.cat([ones_bp, mask_bt], 1),
        **settings,
    )
    return answers


def round_matrices(model: Any, dtype: torch.dtype) -> None:
    """Rounds an adapter's matrices to the values that `write` stores; they stay in single precision, as PEFT loads them."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def write(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the adapter of `model`, with LoRA's matrices in `dtype` and without paths of this machine."""
    if model.active_peft_config.is_prompt_learning:
        tensors = None
    else:
        tensors = {
            name: p.detach().to(dtype if p.ndim == 2 else None)
            for name, p in model.named_parameters()
            if "lora_" in name
        }
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = ".."
    if isinstance(settings.get("target_modules"), list):  # PEFT holds a set, whose order differs between processes
        settings["target_modules"].sort()
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_adapter(model: Any) -> Any:
    """Returns the base model without the adapter's layers, which are discarded."""
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def check(folder: Path) -> None:
    """Raises an error if an artifact's adapter is incomplete.

    Raises:
        UserError: a file is missing.
        MissingExtra: PEFT is not installed.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model.path={folder.parent} is incomplete: {NAME}/{missing[0]} is missing; copy the model again"
        )
    require_peft()


def check_gradients(model: Any, method: str) -> None:
    """Runs a forward and a backward pass over a few tokens, because kernels without a gradient would silently train nothing.

    Raises:
        UserError: a part of the adapter gets no gradient.
    """
    import torch

    base = base_model(model)
    ids = torch.arange(5, 21, device=base.device)[None] % base.config.get_text_config().vocab_size
    # the gradient of A is 0 while B is 0
    trained_parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n}
    error = ""
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] : -1].float()
        torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
    except (RuntimeError, NotImplementedError) as failure:
        error = str(failure).splitlines()[0]
    untrained = [name for name, p in trained_parameters.items() if p.grad is None or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    if error or untrained:
        quantized = getattr(getattr(base.config, "quantization_config", None), "quant_method", None)
        raise UserError(
            f"method=[...,{method}]: no gradient reaches {untrained[0] if untrained else 'the adapter'} through the layers of "
            f"this model{f' (quantized by {quantized})' if quantized else ''}{f': {error}' if error else ''}; "
            f"take method=[nf4,{method}]"
        )


def check_no_adapter(model: Any, name: str, method: str) -> None:
    """Raises UserError if the model already has an adapter: PEFT's format stores one adapter per base model."""
    if is_adapted(model):
        raise UserError(
            f"method=[...,{method}]: {name} has an adapter already; merge it (method.qlora.merge=true when it is "
            f"made), or start from the model without it"
        )
