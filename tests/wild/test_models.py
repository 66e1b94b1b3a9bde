"""Models as people have them: each works in every command, or is refused before the work in one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from tests.wild import edits
from tests.wild.edits import Edit, both, byte_order_mark, removed, setting, tensors, written
from winnow.benchmark.adapters import scorer
from winnow.core.errors import Unservable, UserError
from winnow.hardware.run import Run
from winnow.method import pipeline
from winnow.method.lora import Lora, add_adapters
from winnow.method.qlora import QLoRA
from winnow.method.rtn import RTN
from winnow.method.soft_prompt import SoftPrompt, add_prompt
from winnow.model import adapter
from winnow.model.lm import LM
from winnow.model.pretrained import pretrained
from winnow.runtime import serving
from winnow.search import start

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "run401 safetensors trust_remote_code" / "model"))


def answers(lm: LM) -> list[str]:
    """To two prompts of different lengths at once; choices are scored, too."""
    with serving(lm) as served:
        scoring_model = scorer(served, lm, 2, 4)
        asked = [Instance("loglikelihood", {}, ("", " yes"), 0), Instance("loglikelihood", {}, ("Is it so?", " no"), 1)]
        assert all(torch.tensor([score for score, _ in scoring_model.loglikelihood(asked)]).isfinite())
        prompts = ["Tom", "Anna goes to the market to look for"]
        return list(
            scoring_model.generate_until(
                [Instance("generate_until", {}, (text, {"until": ["\n"]}), n) for n, text in enumerate(prompts)]
            )
        )


WORK: dict[str, Edit] = {
    "sampling settings without sampling": setting("generation_config.json", "do_sample", temperature=0.6, top_p=0.9),
    "pad token -1 in the configuration": both(
        setting("config.json", pad_token_id=-1), removed("generation_config.json")
    ),
    "pad token -1 in the generation settings": setting("generation_config.json", pad_token_id=-1),
    "pad token beyond the generation settings' vocabulary": setting("generation_config.json", pad_token_id=99_999),
    "pad token beyond the embedding": edits.token_beyond_the_model("pad"),
    "end-of-text token beyond the embedding": edits.token_beyond_the_model("eos"),
    "no settings of the tokenizer": removed("tokenizer_config.json"),
    "neither BOS nor EOS in the tokenizer": setting(
        "tokenizer_config.json", bos_token=None, eos_token=None, pad_token=None
    ),
    "an index left beside whole weights": written(
        "model.safetensors.index.json", json.dumps({"weight_map": {UP: "model-00001-of-00002.safetensors"}})
    ),
    "no generation settings": removed("generation_config.json"),
}


@pytest.mark.parametrize("case", WORK)
def test_it_is_compressed_and_served(folder: Path, tmp_path: Path, case: str) -> None:
    WORK[case](folder)
    made = pipeline.compress(pretrained(str(folder)), {"rtn": RTN(8, 32)}, Run(tmp_path), tmp_path / "artifact")
    assert "fails" not in made.manifest["runtimes"]["transformers"]
    assert answers(pretrained(str(folder))) and answers(pretrained(str(tmp_path / "artifact")))


REFUSED: dict[str, tuple[Edit, str]] = {
    "a tensor is missing": (tensors(lambda held: {k: t for k, t in held.items() if k != UP}), f"missing: {UP}"),
    "all names have a prefix": (
        tensors(lambda held: {f"_orig_mod.{k}": t for k, t in held.items()}),
        "missing: .* and .* more; unexpected: .*take `_orig_mod.` off their names",
    ),
    "a tensor too many": (tensors(lambda held: {**held, "model.layers.7.x.weight": torch.zeros(2)}), r"unexpected: model\.layers\.7\.x"),
    "a tensor of another shape": (tensors(lambda held: {**held, UP: torch.zeros(3, 3)}), r"of another shape: .*\(3, 3\) for \(128, 64\)"),
    "a BOM before the configuration": (byte_order_mark("config.json"), r"config\.json is damaged .*BOM"),
    "a type of number in the weights that there is not": (
        edits.replaced("model.safetensors", b'"BF16"', b'"BF1v"'), "its weights are damaged, copy the model again .*BF1v"
    ),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer .*tokenizer files of the model"),
    "damaged generation settings": (written("generation_config.json", '{"eos'), r"generation_config\.json is damaged"),
    "generation settings that contradict": (setting("generation_config.json", num_return_sequences=3), "num_return_sequences"),
    "a damaged tokenizer": (written("tokenizer.json", "{}"), "cannot be loaded"),
    "an unknown architecture": (setting("config.json", model_type="martian"), "martian"),
    "a value of another type in the configuration": (setting("config.json", vocab_size=[]), "'vocab_size' expected int"),
    "a size below zero in the configuration": (setting("config.json", hidden_size=-64), "cannot be loaded"),
    "code of its own": (setting("config.json", auto_map={"AutoModelForCausalLM": "x.Y"}), r"model\.trust_remote_code=true"),
    "only weights of another format": (
        both(lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors")),
        "holds no weights .*does not look at consolidated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused(folder: Path, case: str) -> None:
    edit, message = REFUSED[case]
    edit(folder)
    with pytest.raises(UserError, match=message) as refused:
        lm = pretrained(str(folder))
        assert lm.model and lm.tokenizer
    assert str(refused.value).startswith("model.path=") and "\n" not in str(refused.value)
    if "safetensors" not in message:
        assert "no safetensors weights" not in str(refused.value)
    assert "needs a login" not in str(refused.value)


@pytest.mark.parametrize("method", ["rtn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nf4", "wanda"))])
def test_code_of_its_own_runs_everywhere_once_it_is_trusted(
    folder: Path, tmp_path: Path, command: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits.code_of_its_own(folder)
    model = ["model=local", f"model.path='{folder}'", "model.trust_remote_code=true", f"method=[{method}]"]
    for arguments in (["dry_run=true"], [f"output={tmp_path / 'artifact'}"]):
        done = command("compress", *model, *arguments)
        assert done.returncode == 0, done.stderr
    assert start.model_spec(str(folder), {"trust_remote_code": True})["layers"] == 2
    made = pretrained(str(tmp_path / "artifact"), trust_remote_code=True)
    assert type(made.model).__name__ == "OwnForCausalLM" and answers(made)
    with pytest.raises(UserError, match=r"brings its own code.*model\.trust_remote_code=true"):
        pretrained(str(tmp_path / "artifact"))


def test_a_row_of_zeros_stays_one_and_spoils_nothing(folder: Path, run_in: Run) -> None:
    tensors(lambda held: {**held, UP: held[UP].index_fill(0, torch.tensor([3]), 0)})(folder)
    knobs = {"steps": 3, "tokens_per_batch": 128, "dora": True, "targets": ["up_proj"]}
    for stage in (Lora(**knobs), QLoRA(**knobs, merge=True)):
        made = stage(pretrained(str(folder)), run_in).lm.model.get_parameter(UP)
        assert made.isfinite().all() and not made[3].any() and made[4].any()
    with pytest.raises(UserError, match=r"row of zeros, which model\.layers\.1\.mlp\.up_proj has; .*merge=true"):
        QLoRA(**knobs)(pretrained(str(folder)), run_in)


OTHER_DECODINGS: dict[str, Any] = {
    "repetition_penalty": 2.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(0, 4096, 2)),
    "forced_eos_token_id": 5,
}


@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "soft prompt"])
@pytest.mark.parametrize("name", OTHER_DECODINGS)
def test_decoding_is_plainly_greedy_whatever_the_model_asks_for(
    folder: Path, name: str, prompted: bool, log_lines: list[str]
) -> None:
    value = OTHER_DECODINGS[name]
    if prompted:
        adapter.write(add_prompt(pretrained(str(folder)), SoftPrompt(tokens=4), 0), folder / adapter.NAME)
    expected = answers(pretrained(str(folder)))
    setting("generation_config.json", **{name: value})(folder)
    log_lines.clear()
    lm = pretrained(str(folder))
    with serving(lm):
        assert answers(lm) == expected
    assert [line for line in log_lines if line.startswith("decoding")] == [
        f"decoding is greedy: {name}={value} of the model's settings are not used"
    ]
    assert getattr(lm.model.generation_config, name) == value  # and are saved with it


A_OF_UP = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

ADAPTERS: dict[str, tuple[Edit, str]] = {
    "a tensor is missing": (
        tensors(lambda held: {k: t for k, t in held.items() if k != A_OF_UP}, "adapter/adapter_model.safetensors"),
        f"missing: {A_OF_UP}",
    ),
    "a tensor too many": (
        tensors(lambda held: {**held, "x.lora_A.weight": torch.zeros(4, 4)}, "adapter/adapter_model.safetensors"),
        "unexpected: x.lora_A",
    ),
    "a tensor of another shape": (
        tensors(lambda held: {**held, A_OF_UP: torch.zeros(4, 3)}, "adapter/adapter_model.safetensors"),
        r"of another shape: .*\(4, 3\) for \(4, 64\)",
    ),
}


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_an_adapter_is_whole_or_refused(name: str | None, folder: Path) -> None:
    adapter.write(add_adapters(pretrained(str(folder)).model, Lora(rank=4), 0), folder / adapter.NAME)
    if name is None:
        assert adapter.is_adapted(pretrained(str(folder)).model)
        return
    edit, message = ADAPTERS[name]
    edit(folder)
    with pytest.raises(Unservable, match=f"its adapter's weights are not those of its configuration .*{message}"):
        _ = pretrained(str(folder)).model
