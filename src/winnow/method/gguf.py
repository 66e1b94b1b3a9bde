"""Writes GGUF files for llama.cpp, quantized by llama.cpp itself.

python compress.py method=[gguf] method.gguf.type=Q4_K_M
python compress.py method=[gguf] method.gguf.dense=F16            # converted only
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from winnow.core.types import Calibration, Slot
from winnow.hardware.run import Run
from winnow.method.knobs import BaseStage, StageResult, knob
from winnow.model.lm import LM

if TYPE_CHECKING:
    from pathlib import Path

    from winnow.estimate.cost import StageCost
    from winnow.estimate.layout import ModelLayout

logger = logging.getLogger(__name__)

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class GGUF(BaseStage):
    """Writes `model-<type>.gguf`, with each tensor in the type that llama.cpp's mix of that name gives it.

    Quantized are the matrices of the blocks, the embedding and the head; vectors stay in single precision. A row that is no
    multiple of 256 wide gets a type of 32 weights a block instead of a k-quant (Q6_K becomes Q8_0, Q5_K Q5_1, Q4_K Q5_0, Q3_K
    and Q2_K Q4_0), which is larger; one that is no multiple of 32 wide is refused. Q5_K, Q4_K
    and Q2_K store a minimum a block, so pruned zeros do not stay zero. transformers does not load the file.

    Source: llama.cpp, pull requests 1684 (k-quants) and 4861 (importance matrix); no paper. The quantizer that runs is the one
        inside llama-cpp-python.
    Calibration: with `imatrix`, the mean square of each input of each linear layer, collected block by block; it weighs the
        rounding errors. Q8_0 and dense files take none.
    Cost: the model in main memory, one block and its inputs on the device; scratch on disk of 2N bytes for N parameters (4N for
        a model in single precision). Two passes over the calibration tokens with `imatrix`; then a search for the scales of
        each block of weights on the processor, O(N): measured on one core of an AMD EPYC, without and with `imatrix`, 62 and
        102 ns a weight for Q4_K_M, 56 and 105 for Q5_K_M, 41 and 93 for Q2_K, 34 and 67 for Q3_K_M, 33 for Q6_K, 5 for Q8_0.
    Writes: one GGUF file, with config.json and the tokenizer's files beside it.
    Loaded by: llama.cpp (llama-cpp-python).
    """

    slot: ClassVar[Slot] = Slot.QUANTIZE
    matrices: ClassVar[tuple[str, ...] | None] = None
    ends_pipeline: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = ("gguf", "llama_cpp")
    perplexity_bound: ClassVar[float] = 1.01  # measured: 1.0003
    aggressive: ClassVar[Mapping[str, Any]] = {"type": "Q2_K"}

    type: str = knob("Q4_K_M", choices=TYPES)
    imatrix: bool = knob(True, choices=(True, False))
    dense: str | None = knob(None, choices=(None, "F16", "BF16", "F32"), search=False)  # instead of `type`

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("gguf",) if self.dense else ("gguf", "llama_cpp")

    def predict(self, plan: ModelLayout) -> ModelLayout:
        from winnow.model.gguf.architectures import family_of
        from winnow.model.gguf.mix import ModelShape, tensor_bytes, tensor_type

        family, model = family_of(plan.config), ModelShape.of(plan.config, plan.tensors)
        tensors = {}
        for name, t in plan.tensors.items():
            size = tensor_bytes(tensor_type(self._file_type, name, t.shape, model), t.shape)
            # in memory as on disk: the file is memory-mapped
            tensors[name] = dataclasses.replace(t, disk_bytes=size, memory_bytes=size, entries=1)
        vocabulary = family.token_bytes * plan.config.vocab_size
        return dataclasses.replace(plan, tensors=tensors, other_bytes=plan.other_bytes + vocabulary, kind="gguf")

    def work(self, plan: ModelLayout, calibration: Calibration) -> StageCost:
        from winnow.estimate.cost import StageCost

        largest = max(t.numel for t in plan.tensors.values())
        # main memory has one tensor in single precision twice
        writing = StageCost(traffic_bytes=4 * plan.memory_bytes, host_bytes=8 * largest)
        return StageCost.calibrated(plan, calibration).then(writing) if self._uses_calibration else writing

    def __call__(self, lm: LM, run: Run) -> StageResult:
        from winnow.method.imatrix import collect
        from winnow.model.gguf import architectures, mix
        from winnow.model.gguf.quantize import tensor_types

        architectures.family_of(lm.model.config)
        weights = dict(lm.model.named_parameters())
        for name, weight in weights.items():
            mix.tensor_type(self._file_type, name, tuple(weight.shape), mix.ModelShape.of(lm.model.config, weights))

        folder = run.folder / "gguf"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        target = folder / f"model-{self._file_type}.gguf"
        notes: dict[str, Any] = {}
        importance = None
        if self._uses_calibration:
            importance, notes["calibration_sha256"] = collect(lm, run)
        notes |= self._write(lm, run, target, importance)
        notes["tensor_types"] = tensor_types(target)
        config = copy.deepcopy(lm.model.config)
        config.architectures = [type(lm.model).__name__]
        config.save_pretrained(folder)
        if lm.model.can_generate():
            lm.model.generation_config.save_pretrained(folder)
        agreement = notes.get("tokenizer_agreement", 0)
        if agreement < 1:
            logger.info(
                f"gguf: llama.cpp's own tokenizer gives the same ids for {agreement:.0%} of some sample texts; "
                f"winnow feeds it those of transformers"
            )
        return StageResult(lm.with_files(folder), notes)

    @property
    def _uses_calibration(self) -> bool:
        return self.imatrix and not self.dense and self.type != "Q8_0"  # Q8_0 rounds to nearest

    @property
    def _file_type(self) -> str:
        return self.dense or self.type

    def _write(self, lm: LM, run: Run, target: Path, importance: dict[str, Any] | None) -> dict[str, Any]:
        """Writes the file at `target` and returns notes about its vocabulary for the manifest."""
        import torch

        from winnow.model.gguf.export import exact_type, export
        from winnow.model.gguf.quantize import quantize

        if self.dense:
            logger.info(f"gguf: writing {target.name}")
            return export(lm, target, self.dense)
        exact = exact_type(lm)
        scratch = run.folder / f"exact-{exact}.gguf"
        try:
            logger.info(f"gguf: writing the model as {exact}")
            notes = export(lm, scratch, exact)
            logger.info(f"gguf: quantizing to {self.type}")
            quantize(scratch, target, self.type, importance, torch.get_num_threads())
        finally:
            scratch.unlink(missing_ok=True)
        return notes
