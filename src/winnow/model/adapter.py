"""Adapters beside a model's files: the folder `adapter/` of an artifact, in PEFT's own format.

The base keeps its own files, quantized or not. Whoever has transformers and PEFT loads both in two lines:

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
CONFIG_BYTES = 1300  # of its configuration, without the names of layers


def folder_of(path: str | Path | None) -> Path | None:
    """The adapter's folder of an artifact; None where it has none, and for what is no folder."""
    folder = Path(path) / NAME if path is not None else None
    return folder if folder is not None and folder.is_dir() else None


def require_peft() -> None:
    """Raises MissingExtra if PEFT is not installed."""
    require("peft")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it remarks on optional kernels


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_model(model: Any) -> Any:
    """The model itself, without PEFT's wrapping; the layers of an adapter stay in it."""
    return model.get_base_model() if is_adapted(model) else model


def virtual_tokens(model: Any) -> int:
    """Tokens of a soft prompt, which take part of the context."""
    if not is_adapted(model) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def load(model: Any, folder: Path) -> Any:
    """`model` with the adapter that lies in `folder`, in evaluation mode.

    Raises:
        Unservable: its tensors are not those that its configuration asks for; PEFT itself only warns.
    """
    require_peft()
    from peft import PeftModel, get_peft_model_state_dict

    adapted: Any = PeftModel.from_pretrained(model, str(folder), ignore_mismatched_sizes=True)
    check_adapter(folder / WEIGHTS, get_peft_model_state_dict(adapted), str(folder.parent))
    return served(adapted.eval())


def served(model: Any) -> Any:
    """`model`, answering padded prompts as it answers each alone.

    PEFT drops the positions that `generate` has counted, so that behind a soft prompt the padding would push text away from it.
    """
    import types

    if virtual_tokens(model):
        model.generate = types.MethodType(_generate, model)
    return model


def _generate(
    self: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    max_length: int | None = None,
    **settings: Any,
) -> torch.Tensor:
    """`generate` of the base with the soft prompt before `input_ids` [B, T]; returns these and the answers, as ever."""
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
    """Rounds the matrices of an adapter to what `write` stores; they stay in single precision, as PEFT loads them."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def write(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the adapter of `model`, the matrices of LoRA in `dtype`, without a word about this machine."""
    if model.active_peft_config.is_prompt_learning:
        tensors = None
    else:
        tensors = {
            name: p.detach().to(dtype if p.ndim == 2 else None)
            for name, p in model.named_parameters()
            if "lora_" in name
        }
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = ".."
    if isinstance(settings.get("target_modules"), list):  # a set in memory, whose order changes with the process
        settings["target_modules"].sort()
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_adapter(model: Any) -> Any:
    """The base model without the layers of its adapter, which are spent."""
    return model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()


def check(folder: Path) -> None:
    """Refuses an artifact whose adapter is not whole.

    Raises:
        UserError: a file is missing.
        MissingExtra: PEFT is not installed.
    """
    lost = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lost:
        raise UserError(f"model.path={folder.parent} is incomplete: {NAME}/{lost[0]} is missing; copy the model again")
    require_peft()


def check_gradients(model: Any, method: str) -> None:
    """A forward and a backward pass over a few tokens: kernels without a gradient would train nothing, in silence.

    Raises:
        UserError: a part of the adapter that gets none.
    """
    import torch

    base = base_model(model)
    ids = torch.arange(5, 21, device=base.device)[None] % base.config.get_text_config().vocab_size
    trained = {
        name: p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name
    }  # A's is 0 while B is 0
    error = ""
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] : -1].float()
        torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).backward()
    except (RuntimeError, NotImplementedError) as found:
        error = str(found).splitlines()[0]
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    if error or without:
        quantized = getattr(getattr(base.config, "quantization_config", None), "quant_method", None)
        raise UserError(
            f"method=[...,{method}]: no gradient reaches {without[0] if without else 'the adapter'} through the layers of "
            f"this model{f' (quantized by {quantized})' if quantized else ''}{f': {error}' if error else ''}; "
            f"take method=[nf4,{method}]"
        )


def check_alone(model: Any, name: str, method: str) -> None:
    """Raises UserError if the model has an adapter already: PEFT's formats hold one kind beside a base."""
    if is_adapted(model):
        raise UserError(
            f"method=[...,{method}]: {name} has an adapter already; merge it (method.qlora.merge=true when it is "
            f"made), or start from the model without it"
        )
