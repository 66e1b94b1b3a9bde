"""The walk over the decoder blocks on the shapes of four families, and walks that go on after they died."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.method.shapes import FAMILIES, config_of
from winnow.core.types import Calibration
from winnow.hardware.run import Run
from winnow.method import checkpoint as checkpoints
from winnow.method.blocks import input_sums, iterate_blocks
from winnow.method.checkpoint import Checkpoint, checkpoint_of
from winnow.method.prune import Wanda
from winnow.method.sparsegpt import SparseGPT
from winnow.model.layers import decoder_blocks
from winnow.model.pretrained import pretrained

SINGLE = Run(Path(), dtype="float32")


def random_model(family: str, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32).eval()


def batches_of(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 1000, shape, generator=generator) for shape in shapes]


@torch.no_grad()
def final_hidden(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """What the last block puts out in a plain forward pass."""
    seen: list[torch.Tensor] = []
    handle = decoder_blocks(model)[-1].register_forward_hook(lambda m, args, output: seen.append(output))
    model(input_ids=batch)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_is_the_models_own_forward_pass(family: str, attention: str) -> None:
    # longer than the sliding window of 64, so that the masks of Gemma's two layers differ; shorter; a single token
    model, batches = random_model(family), batches_of((2, 100), (3, 40), (1, 1))
    model.set_attn_implementation(attention)
    outputs: dict[int, torch.Tensor] = {}
    seen = [
        index
        for index, _, run_calibration in iterate_blocks(model, batches, SINGLE)
        if run_calibration(outputs.__setitem__) is None
    ]
    assert seen == [0, 1]
    for number, batch in enumerate(batches):
        torch.testing.assert_close(outputs[number], final_hidden(model, batch), rtol=0, atol=0)


def test_a_model_that_is_its_own_base_model_is_walked_without_its_head() -> None:
    model, batches = random_model("llama"), batches_of((1, 10))
    type(model).base_model_prefix, prefix = "", type(model).base_model_prefix
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head is of no use to a walk"))
    try:
        assert model.base_model is model
        assert [index for index, _, _ in iterate_blocks(model, batches, SINGLE)] == [0, 1]
    finally:
        type(model).base_model_prefix = prefix


def test_shared_keys_and_values_reach_the_blocks_that_read_them() -> None:
    """Gemma-3n: later blocks take the keys and values of earlier ones."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=1024,
        vocab_size_per_layer_input=1024,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=4,
    )
    model, batch = Gemma3nForCausalLM(config).eval(), batches_of((2, 20))[0]
    outputs: dict[int, torch.Tensor] = {}
    for _, _, run_calibration in iterate_blocks(model, [batch], SINGLE):
        outputs.clear()
        run_calibration(outputs.__setitem__)
    torch.testing.assert_close(outputs[0], final_hidden(model, batch), rtol=0, atol=0)


def test_a_block_sees_what_the_changed_blocks_before_it_put_out() -> None:
    model, batches = random_model("qwen2"), batches_of((2, 30))
    outputs: dict[int, torch.Tensor] = {}
    for _, block, run_calibration in iterate_blocks(model, batches, SINGLE):
        for parameter in block.mlp.parameters():
            parameter.data.mul_(1.5)
        run_calibration(outputs.__setitem__)
    torch.testing.assert_close(outputs[0], final_hidden(model, batches[0]), rtol=0, atol=0)


def test_one_block_at_a_time_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = random_model("llama", num_hidden_layers=3), []
    blocks = list(decoder_blocks(model))
    original = nn.Module.to

    def to(module: nn.Module, device: Any) -> nn.Module:
        moved.append((blocks.index(module), "home" if isinstance(device, torch.device) else device))
        return original(module, "cpu")

    monkeypatch.setattr(nn.Module, "to", to)
    for index, _, run_calibration in iterate_blocks(model, batches_of((1, 5)), SINGLE):
        run_calibration()
        if index == 2:
            break  # a method that stops, or fails, leaves no block behind
    assert moved == [(0, "cpu"), (0, "home"), (1, "cpu"), (1, "home"), (2, "cpu"), (2, "home")]


def test_calibration_runs_keep_no_graph() -> None:
    model = random_model("llama")
    for _, _, run_calibration in iterate_blocks(model, batches_of((1, 5)), SINGLE):
        run_calibration(lambda number, output: [][int(output.requires_grad) :])
        with torch.enable_grad():
            kept: list[torch.Tensor] = []
            run_calibration(lambda number, output, kept=kept: kept.append(output))
        assert not kept[0].requires_grad


def test_layers_that_read_the_same_tensor_share_a_sum() -> None:
    model, batches = random_model("llama"), batches_of((2, 7), (1, 9))
    _, block, run_calibration = next(iterate_blocks(model, batches, SINGLE))
    inputs: dict[nn.Module, list[torch.Tensor]] = {m: [] for m in block.modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].flatten(0, -2))) for m in inputs]
    run_calibration()
    for handle in handles:
        handle.remove()

    def add(total: torch.Tensor, x: torch.Tensor) -> None:
        total += x.sum(0)

    groups = input_sums(block, run_calibration, lambda linear: torch.zeros(linear.in_features), add)
    attention, mlp = block.self_attn, block.mlp
    assert [members for members, _ in groups] == [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    for members, total in groups:
        for linear in members:
            torch.testing.assert_close(total, torch.cat(inputs[linear]).sum(0), rtol=1e-4, atol=1e-4)


# --- going on after an interruption


STAGES = {
    "wanda": Wanda(0.6, allocation="owl"),
    "sparsegpt": SparseGPT(0.6, allocation="global"),
}


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.method.shapes import random_model as saved

    return saved("gemma3_text", tmp_path_factory.mktemp("models") / "four", **FOUR)


FOUR = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def run_of(folder: Path, **calibration: Any) -> Run:
    folder.mkdir(exist_ok=True)
    return Run(folder, calibration=Calibration(**{"samples": 16, "max_length": 128} | calibration))


class Killed(Exception):
    pass


def die_at(model: Any, index: int) -> None:
    def die(*args: Any) -> None:
        raise Killed

    decoder_blocks(model)[index].mlp.register_forward_hook(die)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_walk_that_died_goes_on_and_ends_the_same(
    name: str, four_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0)
    stage = STAGES[name]
    whole = stage(pretrained(str(four_blocks)), run_of(tmp_path / "whole"))

    died = pretrained(str(four_blocks))
    monkeypatch.setattr(type(stage), "sparsities", (sparsities := type(stage).sparsities))
    run = run_of(tmp_path / "died")
    # allocation passes through all blocks first: the walk dies at the third block after that
    monkeypatch.setattr(type(stage), "sparsities", lambda *a: (sparsities(*a), die_at(died.model, 2))[0])
    with pytest.raises(Killed):
        stage(died, run)
    assert list((tmp_path / "died").rglob("*.ckpt"))  # what `compress` keeps a failed run's folder for
    assert not list((tmp_path / "died").rglob("*.partial*"))

    monkeypatch.setattr(type(stage), "sparsities", lambda *a: pytest.fail("kept in the checkpoint"))
    log_lines.clear()
    again = pretrained(str(four_blocks))
    for index in (0, 1):
        decoder_blocks(again.model)[index].mlp.register_forward_hook(lambda *args: pytest.fail("walked again"))
    finished = stage(again, run_of(tmp_path / "died"))
    assert log_lines == [f"{name}: going on at block 3 of 4", f"{name}: block 3 of 4", f"{name}: block 4 of 4"]
    assert finished.notes == whole.notes
    for key, tensor in weights(whole.lm.model).items():
        assert torch.equal(tensor, weights(finished.lm.model)[key]), key


@pytest.mark.parametrize("other", ["knob", "seed", "calibration", "weights", "damaged", "cut short"])
def test_another_run_starts_anew(
    other: str, four_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0)
    stage, run, lm = Wanda(0.5), run_of(tmp_path / "run"), pretrained(str(four_blocks))
    die_at(lm.model, 2)
    with pytest.raises(Killed):
        stage(lm, run)
    lm = pretrained(str(four_blocks))
    log_lines.clear()
    settings: dict[str, Any] = {"samples": 12} if other == "calibration" else {}
    run = run_of(tmp_path / "run", **settings)
    if other == "knob":
        stage = Wanda(0.4)
    if other == "seed":
        run = Run(run.folder, seed=1, calibration=run.calibration)
    if other == "weights":  # an earlier stage did something else
        decoder_blocks(lm.model)[3].mlp.up_proj.weight.data[0, 0] += 1
    folder = run.folder / "walk" / "wanda"
    if other == "damaged":
        (folder / "walk.ckpt").write_bytes(b"nonsense")
    if other == "cut short":
        block = folder / "block-1.ckpt"
        block.write_bytes(block.read_bytes()[:-10])
    stage(lm, run)
    assert log_lines[0] == "wanda: block 1 of 4"


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    four_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0)
    save, calls = checkpoints.save_file, []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoints, "save_file", full)
    Wanda(0.5)(pretrained(str(four_blocks)), run_of(tmp_path / "run"))
    assert [line for line in log_lines if "checkpoint" in line] == [
        "wanda: no checkpoint could be written ([Errno 28] No space left on device); going on without"
    ]
    assert log_lines[-1] == "wanda: block 4 of 4"
    assert not list((tmp_path / "run").rglob("*.*"))
    assert len(calls) == 3


def test_a_quick_walk_writes_nothing(four_blocks: Path, tmp_path: Path) -> None:
    Wanda(0.5)(pretrained(str(four_blocks)), run_of(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_finished_block_is_written_once(four_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_EVERY_S", 0)
    lm, run, written = pretrained(str(four_blocks)), run_of(tmp_path / "run"), []
    write = Checkpoint._write
    monkeypatch.setattr(Checkpoint, "_write", staticmethod(lambda p, *rest: (written.append(p.name), write(p, *rest))))
    for _ in iterate_blocks(lm.model, batches_of((1, 5)), run, checkpoint_of(Wanda(), lm, run, "sha")):
        pass
    walk = "walk.ckpt"
    assert written == ["block-0.ckpt", walk, "block-1.ckpt", walk, "block-2.ckpt", walk]
