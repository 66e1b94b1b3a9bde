"""transformers, in this process: the reference runtime.

On CUDA, requests are decoded from a CUDA graph where the model and its cache allow it (`graphs`, `hardware.decode`). All others go
through `model.generate` and not through a loop of our own: what a strategy changes may live in the generation settings (a quantized
cache) and would be missed by one. A stopping criterion is the clock: it sees every token, costs microseconds, and, unlike
streamers, works for batches. End-of-text tokens are masked until the last token, in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from winnow.core.errors import Unservable
from winnow.hardware.device import Hardware
from winnow.hardware.footprint import PeakMemory, weights_memory_bytes
from winnow.model.adapter import virtual_tokens
from winnow.model.generation import greedy
from winnow.model.lm import LM
from winnow.model.spec import context_of
from winnow.runtime.latency import Timing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from winnow.runtime.graphs import Decoder


MOST_LOGITS = 1 << 27  # of rows that are computed at once: 0.5 GB in single precision


def version(device: str) -> str | None:
    return metadata.version("transformers")


class Runtime:
    """`lm.model`, in evaluation mode until it is closed."""

    name = "transformers"

    def __init__(
        self, lm: LM, hardware: Hardware | None = None, log: Callable[[str], None] = lambda line: None
    ) -> None:
        if hardware is not None:
            lm.compute_in(hardware.compute_dtype)
        self._lm, self._log = lm, log
        self.model: Any = lm.model
        self._training = self.model.training
        self.model.eval()
        config = self.model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self._settings = self.model.generation_config
        self.model.generation_config, ignored = greedy(self._settings, self.vocab_size)
        if ignored:
            log(
                f"decoding is greedy: {', '.join(f'{k}={v}' for k, v in ignored.items())} of the model's settings are not used"
            )
        self.batch_logits = (
            0 if self.model.device.type == "cpu" else MOST_LOGITS
        )  # a processor gains nothing by filling up
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
            found: list[float] = (logits_tv.gather(-1, targets_t1)[:, 0] - logits_tv.logsumexp(-1)).tolist()
        return found

    def next_tokens(self, ids: Sequence[int], wanted: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            logits_tv = self._logits(ids)
            if isinstance(wanted, int):
                tokens_tk = logits_tv.topk(min(wanted, logits_tv.shape[-1]), -1).indices
            else:
                tokens_tk = torch.as_tensor(wanted, dtype=torch.int64, device=logits_tv.device)
            found = logits_tv.gather(-1, tokens_tk) - logits_tv.logsumexp(-1, keepdim=True)
        return tokens_tk.cpu().numpy(), found.cpu().numpy()

    def next_tokens_of(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[np.ndarray] | int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """On a GPU rows of like lengths at once: starting the kernels of a short row takes longer than computing them."""
        import torch

        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for places in batches([len(ids) for ids in rows], self.batch_logits // self.vocab_size):
            longest = max(len(rows[place]) for place in places)
            # no token sees a later one, so that what fills a row up changes nothing before it; its last token is as good as any
            filled = [[*rows[place], *[rows[place][-1]] * (longest - len(rows[place]))] for place in places]
            with torch.inference_mode():
                ids_bt = torch.tensor(filled, device=self.model.device)
                logits_btv = self.model(input_ids=ids_bt, use_cache=False).logits[:, -longest:-1].float()
                if isinstance(wanted, int):
                    tokens_btk = logits_btv.topk(min(wanted, logits_btv.shape[-1]), -1).indices
                else:
                    columns = [torch.as_tensor(wanted[place], dtype=torch.int64) for place in places]
                    tokens_btk = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True).to(logits_btv.device)
                values_btk = logits_btv.gather(-1, tokens_btk) - logits_btv.logsumexp(-1, keepdim=True)
            tokens, values = (
                tokens_btk.cpu().numpy(),
                values_btk.cpu().numpy(),
            )  # once a batch: each waits for the device
            for at, place in enumerate(places):
                length = len(rows[place]) - 1
                found[place] = tokens[at, :length], values[at, :length]
        return [found[place] for place in range(len(rows))]

    def _logits(self, ids: Sequence[int]) -> Tensor:
        """Those after each token but the last [T-1, vocabulary], in single precision."""
        import torch

        ids_t = torch.tensor(ids, device=self.model.device)
        # a soft prompt, if there is one, has logits before those of the text
        logits: Tensor = self.model(input_ids=ids_t[None], use_cache=False).logits[0, -len(ids) : -1]
        return logits.float()

    def _choose_mode(self, decode: str) -> None:
        """Decides between graph and eager by what is known of the model; a capture that fails may still change it."""
        from winnow.runtime import graph_support, graphs

        self._required = decode == "graph"
        if decode == "eager" or (decode == "auto" and not graphs.has_graphs(self.model)):
            self.runtime_mode = "eager"
        elif not graphs.has_graphs(self.model):
            self._fall_back("it is not on a CUDA device")
        elif (because := graph_support.unsupported(self.model)) is not None:
            self._fall_back(because)

    def _fall_back(self, because: str) -> None:
        """Goes on without graphs.

        Raises:
            Unservable: they were asked for.
        """
        name = self._lm.path or self._lm.name
        if self._required:
            raise Unservable(
                f"hardware.decode=graph: {name} cannot be decoded from a CUDA graph: {because}; latencies that were measured "
                f"in different ways cannot be compared: set hardware.decode=eager (for a search: with another study=NAME)"
            )
        self.runtime_mode = "eager"
        self._log(f"latency is measured without CUDA graphs: {name}: {because}")

    def request(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> Timing:
        """See `Served.request`.

        Raises:
            RuntimeError: another number of tokens came out: the model's own `generate` does not keep to its arguments.
            Unservable: graphs were asked for, and the model's decode step cannot be captured.
        """
        import torch

        prompt_bt = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            decoder = self._prepared(prompt_bt, output_tokens)
            if decoder is None:
                return self._generate(prompt_bt, output_tokens)
            clock = _Clock(prompt_bt.is_cuda)
            started = clock.now()
            decoder.first(prompt_bt)
            first = clock.now()
            decoder.rest()
            return Timing(first_s=first - started, total_s=clock.now() - started)

    def _prepared(self, prompt_bt: Tensor, output_tokens: int) -> Decoder | None:
        """The decoder of requests of this shape, captured at the first of them; None where `generate` is to answer."""
        import torch

        from winnow.runtime import graphs

        if self.runtime_mode != "graph":
            return None
        if self._decoder is not None and self._decoder.shape == (*prompt_bt.shape, output_tokens):
            return self._decoder
        self._release()  # one at a time: a cache is large
        try:
            self._decoder = graphs.Decoder(self.model, prompt_bt, output_tokens)
        except torch.OutOfMemoryError:
            raise  # says something of the memory, and nothing of graphs
        except Exception as error:
            because = graphs.failure(error)
        else:
            return self._decoder
        graphs.free(prompt_bt.device)
        self._fall_back(because)
        return None

    def _release(self) -> None:
        from winnow.runtime import graphs

        if self._decoder is not None:
            self._decoder = None
            graphs.free(self.model.device)

    def _generate(self, prompt_bt: Tensor, output_tokens: int) -> Timing:
        """A request through the model's own `generate`."""
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
            pad_token_id=0,  # never used: all end together
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        ended = clock.now()
        made = output_bt.shape[1] - prompt_bt.shape[1]
        if made != output_tokens or clock.first is None:
            raise RuntimeError(f"asked for {output_tokens} tokens, {type(self.model).__name__}.generate made {made}")
        return Timing(first_s=clock.first - started, total_s=ended - started)

    def weights_memory_bytes(self) -> int:
        return weights_memory_bytes(self.model)

    def peak_memory(self) -> PeakMemory:
        return PeakMemory(self.model.device.type)

    def close(self) -> None:
        self._release()
        self.model.generation_config = self._settings
        self.model.train(self._training)


def batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Places of rows that are computed at once: the longest first, filled up to `most_tokens` or one row by itself."""
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= most_tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found


class _Clock:
    """A stopping criterion that stops nothing and notes when the first token was there."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.first: float | None = None
        self._never: Tensor | None = None

    def now(self) -> float:
        """Seconds, once all work that the device was given is done."""
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
