"""Every YAML composes, says what its class says, and names only what may be built."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from winnow.build import instantiate, model, stages
from winnow.core.cli import CONF, options
from winnow.core.errors import UserError
from winnow.core.targets import MOVED, target_of
from winnow.core.types import Slot
from winnow.method.knobs import Stage, knobs_of

COMMANDS = ("train", "compress", "evaluate", "search")
GROUPS = {"model": "evaluate", "method": "compress", "benchmark": "evaluate", "hardware": "evaluate", "agent": "search"}
OPTIONS = [(group, name) for group in GROUPS for name in options(group)]
METHODS = options("method")
DERIVED = sorted(path for path in CONF.rglob("*.yaml") if "@_here_" in path.read_text(encoding="utf-8"))


def composed(command: str, *overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides), return_hydra_config=hydra)


def settings_of(path: Path) -> dict[str, Any]:
    """What a YAML itself sets."""
    settings = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items() if key != "defaults"}


def bases_of(path: Path) -> list[str]:
    """The bases of a YAML: `NAME@_here_` in its defaults."""
    entries = OmegaConf.load(path).get("defaults", [])
    return [str(entry).removesuffix("@_here_") for entry in entries if str(entry).endswith("@_here_")]


def inherited(path: Path) -> dict[str, Any]:
    """What a YAML takes from its bases."""
    settings: dict[str, Any] = {}
    for name in bases_of(path):
        base = (CONF if name.startswith("/") else path.parent) / f"{name.strip('/')}.yaml"
        settings |= inherited(base) | settings_of(base)
    return settings


def class_of(node: Any) -> Any:
    module, _, name = str(node["_target_"]).rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_composes_and_resolves(command: str) -> None:
    cfg = composed(command)
    OmegaConf.resolve(cfg)
    assert cfg.model._target_.startswith("winnow.")


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_each_option_composes_and_resolves(group: str, name: str) -> None:
    value = f"[{name}]" if group == "method" else name
    cfg = composed(GROUPS[group], f"{group}={value}")
    OmegaConf.resolve(cfg)
    if group == "method":
        assert list(cfg.method) == [name]


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_experiment_composes(path: Path) -> None:
    OmegaConf.resolve(composed("train", f"experiment={path.stem}"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", sorted((CONF / "debug").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_debug_option_composes_with_each_command(path: Path, command: str) -> None:
    OmegaConf.resolve(composed(command, f"debug={path.stem}"))


def test_no_yaml_is_left_out() -> None:
    """A YAML in a folder that nothing above composes would rot unseen, and so would a base that no option takes."""
    known = {*GROUPS, "experiment", "debug", "hydra"}
    assert {p.name for p in CONF.iterdir() if p.is_dir()} <= known
    bases = {p.stem for p in CONF.glob("*.yaml")} - {*COMMANDS, "base"}
    assert bases == {name.strip("/") for path in DERIVED for name in bases_of(path) if name.startswith("/")}


def test_the_help_lists_options_and_no_bases() -> None:
    """Hydra lists each folder below a group as a group of its own."""
    assert not [p for group in (*GROUPS, "experiment", "debug") for p in (CONF / group).iterdir() if p.is_dir()]
    assert not [(group, name) for group, name in OPTIONS if "base" in name]


@pytest.mark.parametrize("path", DERIVED, ids=lambda p: p.stem)
def test_an_option_says_only_what_its_base_does_not(path: Path) -> None:
    base = inherited(path)
    assert not [key for key, value in settings_of(path).items() if key in base and value == base[key]]


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_yaml_agrees_with_its_class(name: str) -> None:
    node = OmegaConf.to_container(composed("compress", f"method=[{name}]").method[name])
    assert isinstance(node, dict)
    stage = class_of(node)
    fields = {f.name: f.default for f in dataclasses.fields(stage)}
    assert {k: v for k, v in node.items() if k != "_target_"} == fields
    made = instantiate(OmegaConf.create(node), f"method.{name}")
    assert isinstance(made, Stage)
    assert made.slot in Slot


@pytest.mark.parametrize("name", METHODS)
def test_a_knob_out_of_range_is_refused_and_named(name: str) -> None:
    stage = class_of(composed("compress", f"method=[{name}]").method[name])
    for field, knob in knobs_of(stage).items():
        bad = "nonsense" if knob.choices else (knob.high or 0) + 1
        with pytest.raises(UserError, match=field):
            stage(**{field: bad})


@pytest.mark.parametrize(
    "target", ["os.system", "winnow.core.cli.os.system", "subprocess.run", "winnow.model.load.json.loads"]
)
def test_only_winnows_own_targets_are_built(target: str) -> None:
    with pytest.raises(UserError, match="not allowed"):
        instantiate(OmegaConf.create({"_target_": target}), "model")
    with pytest.raises(UserError, match="not allowed"):
        instantiate(OmegaConf.create({"_target_": "winnow.agent.samplers.Grid", "x": {"_target_": target}}), "agent")


@pytest.mark.parametrize(("earlier", "present"), MOVED.items())
def test_a_target_is_found_where_it_was_before(earlier: str, present: str) -> None:
    assert target_of(earlier) is class_of({"_target_": present})


def test_a_configuration_that_an_earlier_version_wrote_is_built(tmp_path: Path) -> None:
    """Hydra writes `.hydra/config.yaml` into the folder of each trial, and `--config-path` composes from it."""
    present = composed("compress", "method=[smoothquant]")
    text = OmegaConf.to_yaml(present)
    for earlier, now in MOVED.items():
        text = text.replace(now, earlier)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config")
    targets = cfg.method.smoothquant._target_, cfg.model._target_
    assert targets == ("winnow.method.oneshot.SmoothQuant", "winnow.nano.model.trained")
    assert stages(cfg) == stages(present)
    assert model(cfg).sha256() == model(present).sha256()


def loaded_by(imports: str, *heavy: str) -> list[str]:
    """Which of the heavy modules a fresh process has loaded after it imported others."""
    code = f"import json, sys, {imports}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return list(json.loads(printed))


def test_the_searchs_own_modules_import_nothing_heavy() -> None:
    """`--help` and `--cfg job` must not pay for torch; neither must the process that only steers."""
    imports = (
        "winnow.core.cli, winnow.core.types, winnow.search.start, winnow.search.loop, winnow.agent.samplers, winnow.method.rtn, "
        "winnow.method.prune, winnow.method.bnb, winnow.method.lora, hydra_plugins.winnow_sweeper.sweeper"
    )
    assert loaded_by(imports, "torch", "transformers", "lm_eval", "lightning", "optuna") == []


def test_calibrating_and_comparing_models_import_no_lightning() -> None:
    """Each child process of a search would pay for it, those of spaces without any training, too."""
    imports = "winnow.data.calibration, winnow.data.encoding, winnow.data.corpus, winnow.benchmark.divergence"
    assert loaded_by(imports, "torch", "lightning") == ["torch"]


@pytest.mark.parametrize("name", options("method"))
def test_messages_name_the_key_that_a_method_is_configured_under(name: str) -> None:
    assert class_of(composed("compress", f"method=[{name}]").method[name])().option == f"method.{name}"
