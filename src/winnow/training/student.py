"""Wraps a causal language model for training: it gives the hidden states of packed rows and the head that computes logits.

Whether an architecture supports packed rows is tested on a few tokens, not looked up in a list: a document's logits must not change
with the text before it in its row, and the head must give the logits of the model. An architecture with state across positions
(linear attention), or with its own attention code, fails the first test and is trained on padded rows.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any

import torch
from torch import nn

from winnow.data.encoding import IGNORED
from winnow.model.adapter import base_model
from winnow.model.packed_attention import INTERFACE_ERRORS, packed
from winnow.training.losses import Head, head_of


class Student(nn.Module):
    """A trainable view of `model`, a causal language model of transformers with or without a PEFT wrapper.

    Attributes:
        packs: whether documents may be packed one after the other into a row.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packs = self._isolates_documents()

    @property
    def base(self) -> Any:
        """The model without PEFT's wrapper; adapters stay in its layers."""
        return base_model(self.model)

    @property
    def head(self) -> Head:
        return head_of(self.base)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the last hidden states [R, T, H]."""
        names = ("input_ids", "position_ids", "attention_mask", "cu_seqlens", "longest")
        inputs = {name: batch[name] for name in names if name in batch}
        with packed(self.base) if "cu_seqlens" in batch else contextlib.nullcontext():
            hidden: torch.Tensor = self.decoder(**inputs, use_cache=False).last_hidden_state
        return hidden

    @property
    def decoder(self) -> Any:
        return self.base.get_decoder()

    def model_logits(self, ids_rt: torch.Tensor) -> torch.Tensor:
        """Returns logits [R, T, V] as the model itself computes them."""
        logits: torch.Tensor = self.base(input_ids=ids_rt, use_cache=False).logits
        return logits

    def at_targets(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the hidden states [N, H] of the positions that have a target, and their targets [N]."""
        targets = batch["targets"]
        has_target = targets != IGNORED
        return self(batch)[has_target], targets[has_target]

    @torch.no_grad()
    def _isolates_documents(self) -> bool:
        """Returns whether two documents in a row have the same logits as each has alone in the whole model.

        Those logits may differ by rounding. In contrast, the second document's logits must stay equal when the first document's
        words change, because the same products of the same sizes are computed. This detects even a short convolution, whose
        effect may be small.
        """
        was_training, device = self.training, self.base.device
        self.eval()
        vocabulary = self.base.config.get_text_config().vocab_size
        first, other, second = (torch.arange(a, b, device=device) % vocabulary for a, b in ((5, 12), (12, 19), (3, 17)))
        positions = torch.cat([torch.arange(len(x), device=device) for x in (first, second)])[None]
        bounds = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32, device=device)
        batch = {"position_ids": positions, "cu_seqlens": bounds, "longest": len(second)}
        alone = torch.cat([self.model_logits(x[None])[0].float() for x in (first, second)])
        try:
            together, changed = (
                self.head(self({"input_ids": torch.cat([x, second])[None], **batch})[0]) for x in (first, other)
            )
        except INTERFACE_ERRORS:
            return False
        finally:
            self.train(was_training)
        scale = alone.abs().max().clamp(min=1e-6)
        leakage = (together - changed)[len(first) :].abs().max()
        return bool((together - alone).abs().max() < 0.05 * scale and leakage <= 1e-5 * scale)

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that need a gradient, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
