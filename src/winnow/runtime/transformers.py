"""Serves models by transformers in this process; it is the reference runtime.

On CUDA, requests are decoded from a CUDA graph where the model and its cache allow it (`graphs`, `hardware.decode`). All other
requests go through `model.generate` rather than through a separate loop, because a strategy may change the generation settings (a
quantized cache), which such a loop would miss. A stopping criterion serves as the clock: it sees every token, costs microseconds,
and, unlike streamers, works for batches. Both ways mask end-of-text tokens until the last token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from winnow.core.errors import Unservable
from winnow.hardware.device import Hardware
from winnow.hardware.footprint import PeakMemory, weights_memory_bytes
from winnow.model.adapter import base_model, virtual_tokens
from winnow.model.generation import greedy
from winnow.model.lm import LM
from winnow.model.spec import context_of
from winnow.runtime.latency import Timing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from winnow.runtime.graphs import Decoder

logger = logging.getLogger(__name__)

MAX_LOGITS = 1 << 27  # logits of the rows that are computed at once: 0.5 GB in single precision


def version(device: str) -> str | None:
    return metadata.version("transformers")


class Runtime:
    """A runtime for `lm.model`, which is in evaluation mode until the runtime is closed."""

    name = "transformers"

    def __init__(self, lm: LM, hardware: Hardware | None = None) -> None:
        if hardware is not None:
            lm.set_default_dtype(hardware.compute_dtype)
        self._lm = lm
        self.model: Any = lm.model
        self._training = self.model.training
        self.model.eval()
        config = self.model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self._base = base_model(self.model)  # an adapter's wrapper has no generation settings of its own
        self._settings = self._base.generation_config
        self._base.generation_config, ignored = greedy(self._settings, self.vocab_size)
        if ignored:
            logger.info(
                f"decoding is greedy: {', '.join(f'{k}={v}' for k, v in ignored.items())} of the model's settings are not used"
            )
        # a processor gains nothing from batching
        self.batch_logits = 0 if self.model.device.type == "cpu" else MAX_LOGITS
        context = context_of(config)
        self.context: int | None = context - virtual_tokens(self.model) if context else None
        self.runtime_mode: str | None = "graph"
        self._decoder: Decoder | None = None
        self._choose_mode(hardware.decode if hardware is not None else "auto")

    def log_likelihoods(self, ids: Sequence[int]) -> list[float]:
        import torch

        with torch.inference_mode():
            logits_tv = self._logits(ids)
            targets_t1 = torch.tensor(ids[1:], device=logits_tv.device)[:, None]
            log_probs: list[float] = (logits_tv.gather(-1, targets_t1)[:, 0] - logits_tv.logsumexp(-1)).tolist()
        return log_probs

    def next_tokens(self, ids: Sequence[int], targets: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            logits_tv = self._logits(ids)
            if isinstance(targets, int):
                tokens_tk = logits_tv.topk(min(targets, logits_tv.shape[-1]), -1).indices
            else:
                tokens_tk = torch.as_tensor(targets, dtype=torch.int64, device=logits_tv.device)
            log_probs = logits_tv.gather(-1, tokens_tk) - logits_tv.logsumexp(-1, keepdim=True)
        return tokens_tk.cpu().numpy(), log_probs.cpu().numpy()

    def next_tokens_batch(
        self, rows: Sequence[Sequence[int]], targets: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Batches rows of similar lengths on a GPU, where launching the kernels of a short row costs more than running them."""
        import torch

        predictions: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row_indices in batches([len(ids) for ids in rows], self.batch_logits // self.vocab_size):
            longest = max(len(rows[row_index]) for row_index in row_indices)
            # Attention is causal, so padding changes nothing before it; any token, here the last one, can serve as padding.
            padded = [
                [*rows[row_index], *[rows[row_index][-1]] * (longest - len(rows[row_index]))]
                for row_index in row_indices
            ]
            with torch.inference_mode():
                ids_bt = torch.tensor(padded, device=self.model.device)
                logits_btv = self.model(input_ids=ids_bt, use_cache=False).logits[:, -longest:-1].float()
                if isinstance(targets, int):
                    tokens_btk = logits_btv.topk(min(targets, logits_btv.shape[-1]), -1).indices
                else:
                    columns = [torch.as_tensor(targets[row_index], dtype=torch.int64) for row_index in row_indices]
                    tokens_btk = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True).to(logits_btv.device)
                values_btk = logits_btv.gather(-1, tokens_btk) - logits_btv.logsumexp(-1, keepdim=True)
            # copied once a batch, since each copy waits for the device
            tokens, values = tokens_btk.cpu().numpy(), values_btk.cpu().numpy()
            for batch_index, row_index in enumerate(row_indices):
                length = len(rows[row_index]) - 1
                predictions[row_index] = tokens[batch_index, :length], values[batch_index, :length]
        return [predictions[row_index] for row_index in range(len(rows))]

    def _logits(self, ids: Sequence[int]) -> Tensor:
        """Returns the logits after each token but the last [T-1, vocabulary], in single precision."""
        import torch

        ids_t = torch.tensor(ids, device=self.model.device)
        # the logits of a soft prompt, if any, precede those of the text
        logits: Tensor = self.model(input_ids=ids_t[None], use_cache=False).logits[0, -len(ids) : -1]
        return logits.float()

    def _choose_mode(self, decode: str) -> None:
        """Chooses graph or eager decoding from what is known of the model; a failed capture may change the choice later."""
        from winnow.runtime import graph_support, graphs

        self._required = decode == "graph"
        if decode == "eager" or (decode == "auto" and not graphs.has_graphs(self.model)):
            self.runtime_mode = "eager"
        elif not graphs.has_graphs(self.model):
            self._fall_back("it is not on a CUDA device")
        elif (reason := graph_support.unsupported_reason(self.model)) is not None:
            self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        """Switches to decoding without graphs.

        Raises:
            Unservable: graphs are required.
        """
        name = self._lm.path or self._lm.name
        if self._required:
            raise Unservable(
                f"hardware.decode=graph: {name} cannot be decoded from a CUDA graph: {reason}; latencies that were measured "
                f"in different ways cannot be compared: set hardware.decode=eager (for a search: with another study=NAME)"
            )
        self.runtime_mode = "eager"
        logger.info(f"latency is measured without CUDA graphs: {name}: {reason}")

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        """Answers a request; see `Served.request`.

        Raises:
            RuntimeError: the number of tokens is wrong, because the model's own `generate` ignores its arguments.
            Unservable: graphs are required, and the model's decode step cannot be captured.
        """
        import torch

        prompt_bt = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            decoder = self._decoder_for(prompt_bt, output_tokens)
            if decoder is None:
                return self._generate(prompt_bt, output_tokens)
            clock = _Clock(prompt_bt.is_cuda)
            started = clock.now()
            decoder.first(prompt_bt)
            first = clock.now()
            decoder.rest()
            return Timing(first_s=first - started, total_s=clock.now() - started)

    def _decoder_for(self, prompt_bt: Tensor, output_tokens: int) -> Decoder | None:
        """Returns the decoder for requests of this shape, captured at the first of them; None if `generate` must answer."""
        import torch

        from winnow.runtime import graphs

        if self.runtime_mode != "graph":
            return None
        if self._decoder is not None and self._decoder.shape == (*prompt_bt.shape, output_tokens):
            return self._decoder
        self._release()  # only one decoder at a time, because its cache is large
        try:
            self._decoder = graphs.Decoder(self.model, prompt_bt, output_tokens)
        except torch.OutOfMemoryError:
            raise  # about memory, not about graphs
        except Exception as error:
            reason = graphs.failure(error)
        else:
            return self._decoder
        graphs.free(prompt_bt.device)
        self._fall_back(reason)
        return None

    def _release(self) -> None:
        from winnow.runtime import graphs

        if self._decoder is not None:
            self._decoder = None
            graphs.free(self.model.device)

    def _generate(self, prompt_bt: Tensor, output_tokens: int) -> Timing:
        """Answers a request by the model's own `generate`."""
        import torch
        from transformers import StoppingCriteriaList

        clock = _Clock(prompt_bt.is_cuda)
        started = clock.now()
        output_bt = self.model.generate(
            input_ids=prompt_bt,
            attention_mask=torch.ones_like(prompt_bt),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            pad_token_id=0,  # never used, because all rows end together
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        ended = clock.now()
        generated = output_bt.shape[1] - prompt_bt.shape[1]
        if generated != output_tokens or clock.first is None:
            raise RuntimeError(
                f"asked for {output_tokens} tokens, {type(self.model).__name__}.generate made {generated}"
            )
        return Timing(first_s=clock.first - started, total_s=ended - started)

    def weights_memory_bytes(self) -> int:
        return weights_memory_bytes(self.model)

    def peak_memory(self) -> PeakMemory:
        return PeakMemory(self.model.device.type)

    def close(self) -> None:
        self._release()
        self._base.generation_config = self._settings
        self.model.train(self._training)


def batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns batches of row indices, longest rows first: each has at most `max_tokens` padded tokens, or is a single row."""
    groups: list[list[int]] = []
    for row_index in sorted(range(len(lengths)), key=lambda row_index: -lengths[row_index]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(row_index)
        else:
            groups.append([row_index])
    return groups


class _Clock:
    """A stopping criterion that never stops and records the time of the first token."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.first: float | None = None
        self._never: Tensor | None = None

    def now(self) -> float:
        """Returns the time in seconds, after all work of the device is done."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        import torch

        if self.first is None:
            self.first = self.now()
            self._never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        assert self._never is not None
        return self._never
