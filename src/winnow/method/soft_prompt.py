"""Trains a soft prompt: a few embeddings before every text that recover accuracy without changing a weight.

python compress.py method=[rtn,soft_prompt]
python compress.py method=[soft_prompt] model=local model.path=QUANTIZED_ARTIFACT method.soft_prompt.tokens=32
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.errors import UserError
from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import StageResult, knob
from winnow.method.trainable import Training
from winnow.model.lm import LM
from winnow.model.spec import context_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout


@dataclass(frozen=True)
class SoftPrompt(Training):
    """Prompt tuning: `tokens` embeddings that stand before every text are trained, through the model as it is. It takes dense
    and quantized models, all whose layers have a gradient for their inputs.

    The prompt takes part of the context, and its keys and values part of the cache.

    Attributes:
        tokens: of the prompt.
        init: what it is at first: the embeddings of `text`, again and again until all are filled, or of `random` tokens.

    Source: Lester et al. 2021, arXiv:2104.08691, section 2; initialisation: section 3.2.
    Calibration: documents of the same source, as many as the steps need; the loss is on completions.
    Cost: 4 N operations a token and step, those of the prompt included; on the device the model as it is stored, and a batch's
        activations (derived from the code). Later, `tokens` more to read with every request.
    Writes: `adapter/` in PEFT's format; the model's own files as they were.
    Loaded by: transformers with PEFT, and what the model's own format needs.
    """

    slot: ClassVar[Slot] = Slot.PROMPT
    matrices: ClassVar[tuple[str, ...] | None] = None
    option_name: ClassVar[str] = "soft_prompt"
    preload: ClassVar[tuple[str, ...]] = ("peft", "winnow.training.fit")
    perplexity_bound: ClassVar[float] = 1.5
    leaves_adapter: ClassVar[bool] = True
    eager_reason: ClassVar[str | None] = "puts its prompt before the text in Python"

    tokens: int = knob(16, choices=(4, 8, 16, 32, 64, 128), searched=(8, 16, 32))
    learning_rate: float = knob(3e-2, low=1e-6, high=1.0, log=True, search_range=(3e-3, 3e-1))
    init: str = knob("text", choices=("text", "random"), search=False)
    text: str = "Read the question with care, then give the right answer and nothing else."

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("peft",)

    def predict(self, plan: ModelLayout) -> ModelLayout:
        self._longest(plan.config)
        if not plan.passes_gradients:
            raise UserError(
                "method=[...,soft_prompt]: no gradient reaches the prompt through layers whose activations are rounded (fp8, "
                "smoothquant); take method=[nf4,soft_prompt]"
            )
        from winnow.estimate.layout import TensorLayout
        from winnow.model.adapter import CONFIG_BYTES

        numbers = self.tokens * plan.spec.hidden_size
        prompt = TensorLayout((self.tokens, plan.spec.hidden_size), 4 * numbers, 4 * numbers)
        tensors = {**plan.tensors, "adapter.prompt_embeddings": prompt}
        return dataclasses.replace(plan, tensors=tensors, other_bytes=plan.other_bytes + CONFIG_BYTES)

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import count_tokens

        data = count_tokens(calibration)
        length = max(1.0, data.tokens / max(1, data.samples))
        tokens_read = round(self.tokens_per_batch * (1 + self.tokens / length))  # a prompt with every document
        numbers = self.tokens * plan.spec.hidden_size
        return self.cost(plan, calibration, numbers, tokens_per_batch=tokens_read, frozen=True)

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.method.bnb import keep_packing
        from winnow.model import adapter
        from winnow.model.save import attach_adapter
        from winnow.training.dist_env import local_device
        from winnow.training.prompted import PromptedStudent

        adapter.check_no_adapter(lm.model, lm.path or lm.name, "soft_prompt")
        rows = dataclasses.replace(self, max_length=self._longest(lm.model.config)).encode_documents(lm, run)
        keep_packing(lm.model)
        model = add_prompt(lm, self, run.seed).to(local_device(run))
        with self.cast_frozen(model, run):
            adapter.check_gradients(model, "soft_prompt")
            fitted = self.train(model, rows, run, learning_rate=self.learning_rate, student=PromptedStudent(model))
        return StageResult(attach_adapter(lm, model), {"training": fitted.record()})

    def _longest(self, config: PretrainedConfig) -> int:
        """Returns the number of tokens of a text that fit behind the prompt.

        Raises:
            UserError: fewer than 8 tokens fit.
        """
        context = context_of(config)
        longest = min(self.max_length, (context or self.max_length + self.tokens) - self.tokens)
        if longest < 8:
            raise UserError(
                f"method.soft_prompt.tokens={self.tokens} leaves no room for text in a context of {context} tokens; take fewer"
            )
        return longest


def add_prompt(lm: LM, settings: SoftPrompt, seed: int) -> Any:
    """Returns the model with a new prompt; only the prompt needs a gradient."""
    import peft
    import torch

    from winnow.model.adapter import support_padded_prompts

    base: Any = lm.model
    embedding, text = base.get_input_embeddings(), base.config.get_text_config()
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.tokens,
        token_dim=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_attention_heads=getattr(text, "num_attention_heads", None) or 1,
        num_transformer_submodules=1,
        prompt_tuning_init="RANDOM",  # replaced below; "TEXT" would make PEFT save the tokenizer's local path
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        # calls the layer instead of indexing its weight, as some layers scale their output (Gemma)
        start_ph = embedding(initial_ids(lm, settings, seed).to(embedding.weight.device)).float()
        model.prompt_encoder["default"].embedding.weight.copy_(start_ph)
    return support_padded_prompts(model)


def initial_ids(lm: LM, settings: SoftPrompt, seed: int) -> torch.Tensor:
    """Returns the tokens whose embeddings initialise the prompt.

    Raises:
        UserError: the text has no tokens.
    """
    import torch

    if settings.init == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(lm.tokenizer), (settings.tokens,), generator=generator)
    ids = lm.tokenizer(settings.text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("method.soft_prompt.text is empty; give one, or set method.soft_prompt.init=random")
    return torch.tensor((ids * (settings.tokens // len(ids) + 1))[: settings.tokens])
