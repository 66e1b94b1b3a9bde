"""A causal language model as training sees it: hidden states of packed rows, and the head that makes logits of them.

Whether an architecture can be trained so is not looked up in a list, it is tried on a few tokens: that a document's logits do not
change with what lies before it in its row, and that the head gives the logits that the model gives. One that keeps state across
positions (linear attention), or brings its own attention, fails the first and is trained on padded rows.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any

import torch
from torch import nn

from winnow.data.encoding import IGNORED
from winnow.model.adapter import base_model
from winnow.model.packed_attention import NOT_TOLD, packed
from winnow.training.losses import Head, head_of


class Student(nn.Module):
    """`model`, a causal language model of transformers, bare or wrapped by PEFT.

    Attributes:
        packs: whether its documents may lie one after the other in a row.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.packs = self._isolates_documents()

    @property
    def base(self) -> Any:
        """The model itself, without PEFT's wrapping; adapters stay in its layers."""
        return base_model(self.model)

    @property
    def head(self) -> Head:
        return head_of(self.base)

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The last hidden states [R, T, H]."""
        names = ("input_ids", "position_ids", "attention_mask", "cu_seqlens", "longest")
        inputs = {name: batch[name] for name in names if name in batch}
        with packed(self.base) if "cu_seqlens" in batch else contextlib.nullcontext():
            hidden: torch.Tensor = self.decoder(**inputs, use_cache=False).last_hidden_state
        return hidden

    @property
    def decoder(self) -> Any:
        return self.base.get_decoder()

    def whole(self, ids_rt: torch.Tensor) -> torch.Tensor:
        """Logits [R, T, V] as the model itself computes them."""
        logits: torch.Tensor = self.base(input_ids=ids_rt, use_cache=False).logits
        return logits

    def at_targets(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, H] of the positions that have a target, and their targets [N]."""
        targets = batch["targets"]
        chosen = targets != IGNORED
        return self(batch)[chosen], targets[chosen]

    @torch.no_grad()
    def _isolates_documents(self) -> bool:
        """Whether two documents in a row have the logits that each has alone, by the whole model.

        These differ by rounding. What other words in the first document do to the second is nothing at all, since the same
        products of the same sizes are computed: a short convolution may do little, and is found all the same.
        """
        was, device = self.training, self.base.device
        self.eval()
        vocabulary = self.base.config.get_text_config().vocab_size
        first, other, second = (torch.arange(a, b, device=device) % vocabulary for a, b in ((5, 12), (12, 19), (3, 17)))
        positions = torch.cat([torch.arange(len(x), device=device) for x in (first, second)])[None]
        bounds = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32, device=device)
        batch = {"position_ids": positions, "cu_seqlens": bounds, "longest": len(second)}
        alone = torch.cat([self.whole(x[None])[0].float() for x in (first, second)])
        try:
            together, changed = (
                self.head(self({"input_ids": torch.cat([x, second])[None], **batch})[0]) for x in (first, other)
            )
        except NOT_TOLD:
            return False
        finally:
            self.train(was)
        scale = alone.abs().max().clamp(min=1e-6)
        crossed = (together - changed)[len(first) :].abs().max()
        return bool((together - alone).abs().max() < 0.05 * scale and crossed <= 1e-5 * scale)

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
