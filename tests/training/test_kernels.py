"""Liger's kernels serve the model that is trained, while it is trained; afterwards nothing of them is left in the process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from tests.logged import logged
from tests.training.test_training import lora
from winnow.core.types import Calibration
from winnow.data.corpus import documents
from winnow.data.encoding import encode
from winnow.hardware.run import Run
from winnow.model.pretrained import pretrained
from winnow.training import kernels
from winnow.training.fit import Batching, fit
from winnow.training.module import Schedule

# The library replaces things in the same places. Its kernels compute the same, and refuse tensors of the processor as Triton does.
# While `device_is_there` the tensors pass for a GPU's, since a training has to run on this machine.
LIBRARY = """
import torch
from types import MethodType
from transformers.models.llama import modeling_llama

device_is_there = True
calls = []
rotate = modeling_llama.apply_rotary_pos_emb

def launch(name):
    if not device_is_there:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
    calls.append(name)

def rotary(q, k, cos, sin, unsqueeze_dim=1):
    launch("rotary")
    return rotate(q, k, cos, sin, unsqueeze_dim)

class RMSNorm(torch.nn.Module):
    def forward(self, hidden):
        launch("norm")
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

class MLP(torch.nn.Module):
    def forward(self, x):
        launch("mlp")
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

class Activation(torch.nn.Module):
    def forward(self, x):
        launch("activation")
        return torch.nn.functional.silu(x)

class LayerNorm(torch.nn.LayerNorm):
    def forward(self, x):
        launch("layer norm")
        return super().forward(x)

def forward_of_attention(self, *args, **kwargs):
    launch("attention")
    return attention(self, *args, **kwargs)

attention = modeling_llama.LlamaAttention.forward
fails_at_layer = None

def _apply_liger_kernel_to_instance(model, cross_entropy, fused_linear_cross_entropy):
    assert not cross_entropy and not fused_linear_cross_entropy
    modeling_llama.apply_rotary_pos_emb = rotary
    modeling_llama.LlamaRMSNorm = RMSNorm
    modeling_llama.LlamaMLP = MLP
    modeling_llama.LlamaAttention.forward = forward_of_attention
    modeling_llama.LlamaAttention.liger = True
    modeling_llama.nn.LayerNorm = LayerNorm
    for index, layer in enumerate(model.model.layers):
        if index == fails_at_layer:
            raise RuntimeError("no kernel for this layer")
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.offset, norm.in_place, norm.variance_epsilon = 0.0, True, float(norm.variance_epsilon)
            norm.forward = MethodType(RMSNorm.forward, norm)
        layer.mlp.forward = MethodType(MLP.forward, layer.mlp)
        layer.mlp.act_fn = Activation()
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, found as an installed liger-kernel is; what it replaced is put back for the tests that follow."""
    import transformers.utils.import_utils as available

    folder = tmp_path / "site-packages"
    (folder / "liger_kernel" / "transformers").mkdir(parents=True)
    (folder / "liger_kernel-0.8.0.dist-info").mkdir()
    (folder / "liger_kernel-0.8.0.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 0.8.0\n")
    (folder / "liger_kernel" / "__init__.py").write_text("")
    (folder / "liger_kernel" / "transformers" / "__init__.py").write_text(LIBRARY)
    for name in [x for x in sys.modules if x.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    available.is_liger_kernel_available.cache_clear()
    for owner, name in ((modeling_llama, "apply_rotary_pos_emb"), (modeling_llama, "LlamaRMSNorm")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(modeling_llama, "LlamaMLP", modeling_llama.LlamaMLP)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", modeling_llama.LlamaAttention.forward)
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.LayerNorm)
    import liger_kernel.transformers

    fused = kernels.fused
    monkeypatch.setattr(kernels, "fused", lambda model, device: fused(model, "cuda"))
    yield liger_kernel.transformers
    for name in [x for x in sys.modules if x.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    available.is_liger_kernel_available.cache_clear()


class Stopped(Exception):
    """The training was cut off."""


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    return found


def fresh() -> Any:
    """A model of the architecture that is made only now."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes)).eval()


def attributes(model: Any) -> list[Any]:
    """What the library may replace: of layers, of their architecture's classes, of its module, and of torch's."""
    classes = [x for x in vars(modeling_llama).values() if isinstance(x, type)]
    layers = [
        (name, sorted(vars(layer)), type(layer), *layer._modules.items()) for name, layer in model.named_modules()
    ]
    owners: list[Any] = [modeling_llama, torch.nn, *classes]
    return [*layers, *([(x, id(v)) for x, v in vars(owner).items() if x != "__dict__"] for owner in owners)]


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["bare", "peft"])
@pytest.mark.parametrize("cut", [False, True], ids=["to the end", "cut off"])
def test_after_a_training_the_architecture_runs_without_the_kernels(
    tiny: Path, tmp_path: Path, library: Any, wrap: Callable[[Any], Any], cut: bool
) -> None:
    lm = pretrained(str(tiny), dtype="float32")
    other = pretrained(str(tiny), dtype="float32").model.eval()
    expected, made = logits(other), logits(fresh())
    model = wrap(lm.model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    before = attributes(model)

    def stop(line: str) -> None:
        if cut and line.startswith("step 2/"):
            raise Stopped

    (tmp_path / "run").mkdir()
    rows = encode(documents(Calibration(), 40, seed=0), lm.tokenizer, 64)
    run = Run(tmp_path / "run")
    try:
        with logged(stop) as lines:
            fit(model, rows, Schedule(1e-2, 4), Batching(512, 256), run, log_seconds=0)
        assert not cut
    except Stopped:
        assert cut
    assert "training with Liger's kernels" in lines
    assert {"rotary", "norm", "mlp", "attention"} <= set(library.calls)
    trained = [name for name, x in model.state_dict().items() if not torch.equal(x, weights[name])]
    assert trained

    library.device_is_there = False
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(fresh()), made)
    model.load_state_dict(weights)
    assert torch.equal(logits(model.eval()), expected)
    assert attributes(model) == before


def test_kernels_that_fit_half_of_a_model_are_taken_out_again(tiny: Path, library: Any) -> None:
    model = pretrained(str(tiny), dtype="float32").model.eval()
    expected, before = logits(model), attributes(model)
    library.fails_at_layer = 1
    with pytest.raises(RuntimeError, match="no kernel for this layer"), kernels.fused(model, "cuda"):
        pass
    library.device_is_there = False
    assert torch.equal(logits(model), expected)
    assert attributes(model) == before


def test_what_a_training_itself_changes_stays(tiny: Path, library: Any) -> None:
    model = pretrained(str(tiny), dtype="float32").model.eval()
    with kernels.fused(model, "cuda"):
        model.train()
        model.model.layers[0].mlp.gate_proj = torch.nn.Identity()
    assert model.training and model.model.layers[1].mlp.training
    assert isinstance(model.model.layers[0].mlp.gate_proj, torch.nn.Identity)
