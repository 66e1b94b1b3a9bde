"""Defines a student with a soft prompt: every document of a packed row begins with the same trained embeddings.

It computes the same result for a document as PEFT's prompt tuning does for that document alone: the prompt has the first
positions, and the text follows.
"""

from __future__ import annotations

from typing import Any

import torch

from winnow.model.packed_attention import packed
from winnow.training.student import Student


class PromptedStudent(Student):
    """A student whose `model` is wrapped by PEFT's prompt tuning. Its hidden states are those of the text, without the prompt."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        words_rth = self.base.get_input_embeddings()(batch["input_ids"])
        prompt_ph = self.model.get_prompt(batch_size=1)[0].to(words_rth.dtype)
        if "cu_seqlens" not in batch:
            return self._padded(words_rth, prompt_ph, batch["attention_mask"])
        size, bounds = len(prompt_ph), batch["cu_seqlens"].long()
        lengths = bounds.diff()
        count, total = len(lengths), int(bounds[-1])
        device = words_rth.device
        document_t = torch.repeat_interleave(torch.arange(count, device=device), lengths)
        row_position_t = torch.arange(total, device=device) + size * (
            document_t + 1
        )  # of each text token, prompts included
        start_d = bounds[:-1] + size * torch.arange(count, device=device)
        positions = torch.arange(total + count * size, device=device) - start_d.repeat_interleave(lengths + size)
        source = positions.clamp(max=size - 1)  # index into [prompt, words] for each position
        source[row_position_t] = size + torch.arange(total, device=device)
        with packed(self.base):
            hidden = self.decoder(
                inputs_embeds=torch.cat([prompt_ph, words_rth[0]])[source][None],
                position_ids=positions[None],
                cu_seqlens=(bounds + size * torch.arange(count + 1, device=device)).int(),
                longest=batch["longest"] + size,
                use_cache=False,
            ).last_hidden_state
        text_hidden: torch.Tensor = hidden[:, row_position_t]
        return text_hidden

    def _padded(self, words_rth: torch.Tensor, prompt_ph: torch.Tensor, mask_rt: torch.Tensor) -> torch.Tensor:
        rows, size = len(words_rth), len(prompt_ph)
        hidden: torch.Tensor = self.decoder(
            inputs_embeds=torch.cat([prompt_ph.expand(rows, -1, -1), words_rth], 1),
            attention_mask=torch.cat([mask_rt.new_ones(rows, size), mask_rt], 1),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, size:]

    def model_logits(self, ids_rt: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids_rt, use_cache=False).logits
        return logits[:, -ids_rt.shape[1] :]
