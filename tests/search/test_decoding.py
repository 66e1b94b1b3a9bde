"""A study holds one way of decoding: it is settled before the first trial, and every trial is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tests.logged import logged
from winnow.core.errors import Reason, UserError
from winnow.core.types import Strategy
from winnow.hardware.device import Hardware
from winnow.model.lm import LM
from winnow.search import child, decoding, overrides

GPU = Hardware("h200", device="cuda")
METHODS = {
    "rtn": {"_target_": "winnow.method.rtn.RTN"},
    "gguf": {"_target_": "winnow.method.gguf.GGUF"},
    "kv": {"_target_": "winnow.method.kv.KV"},
    "int8": {"_target_": "winnow.method.bnb.Int8"},
}


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the child says of the base model, to be changed."""
    answer: dict[str, Any] = {"because": None}

    def call(function: str, arguments: dict[str, Any], *rest: Any) -> dict[str, Any]:
        assert function == "winnow.runtime.graph_support:unsupported_base_reason"
        assert arguments == {"path": "there", "attention": "auto", "trust_remote_code": False, "device": "cuda"}
        return answer

    monkeypatch.setattr(child, "call", call)
    return answer


def settled(hardware: Hardware, *names: str) -> tuple[str, list[str]]:
    methods = {name: METHODS[name] for name in names}
    with logged() as lines:
        return decoding.resolve_decode(hardware, True, methods, LM("there", name="m")).decode, lines


def test_graphs_are_taken_where_all_allow_them(base: dict[str, Any]) -> None:
    assert settled(GPU, "rtn", "gguf") == ("graph", [])
    assert settled(dataclasses.replace(GPU, decode="graph"), "rtn") == ("graph", [])


def test_one_method_that_does_not_is_named_once(base: dict[str, Any]) -> None:
    mode, said = settled(GPU, "rtn", "kv")
    assert mode == "eager"
    assert said == [
        "latency is measured without CUDA graphs: method kv keeps its own cache; leave it out of method=[...] for graphs"
    ]
    _, (line,) = settled(GPU, "kv", "int8")
    assert "method kv keeps its own cache and method int8 " in line and "leave kv, int8 out of method=[...]" in line
    with pytest.raises(UserError, match=r"decode=graph: method kv .*leave it out .*or set hardware\.decode=eager"):
        settled(dataclasses.replace(GPU, decode="graph"), "rtn", "kv")


def test_a_base_model_that_does_not_is_named(base: dict[str, Any]) -> None:
    base["because"] = "it has layers of kind mamba"
    mode, (line,) = settled(GPU, "rtn")
    assert mode == "eager" and "m: it has layers of kind mamba" in line
    with pytest.raises(UserError, match=r"hardware\.decode=graph: m: it has layers of kind mamba"):
        settled(dataclasses.replace(GPU, decode="graph"), "rtn")


def test_a_crash_while_the_base_model_is_tried_means_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [child.Failed(Reason.CRASHED, "killed by SIGSEGV"), child.Failed(Reason.INVALID, "no config.json")]

    def call(*arguments: Any) -> None:
        raise failed.pop(0)

    monkeypatch.setattr(child, "call", call)
    mode, (line,) = settled(GPU, "rtn")
    assert mode == "eager" and "failed (killed by SIGSEGV)" in line
    with pytest.raises(UserError, match=r"model\.path=there cannot be read: no config\.json"):
        settled(GPU, "rtn")


def test_where_there_is_nothing_to_settle_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "call", None)
    for hardware in (
        Hardware("cpu"),
        dataclasses.replace(GPU, runtime="vllm"),
        dataclasses.replace(GPU, decode="eager"),
    ):
        assert settled(hardware, "rtn", "kv") == (hardware.decode, [])


def test_every_trial_is_told_and_its_command_lines_repeat_it(repository: Path) -> None:
    typed = overrides.parse(["hardware=h200", "hardware.decode=auto", "seed=4"])
    graph = dataclasses.replace(GPU, decode="graph")
    told = decoding.add_decode(typed, graph, in_config=True)
    assert told.of_trial(Strategy()) == ["hardware=h200", "seed=4", "hardware.decode=graph", "method=[]"]
    lines = overrides.command_lines(told.shared, Strategy(), Path("t"))
    assert all(" hardware.decode=graph" in line for line in lines)
    with initialize_config_dir(str(repository / "conf"), version_base="1.3"):
        for known in (True, False):  # a user's own option may lack the key
            trial = decoding.add_decode(typed, graph, known).of_trial(Strategy())
            assert compose("compress", trial).hardware.decode == "graph"
    assert decoding.add_decode(typed, Hardware("cpu"), in_config=True) == typed


def test_fingerprints_of_the_two_ways_differ() -> None:
    prints = {
        decode: dataclasses.replace(GPU, decode=decode).fingerprint()["decode"] for decode in ("auto", "graph", "eager")
    }
    assert prints == {"auto": "auto", "graph": "graph", "eager": "eager"}
    assert Hardware("cpu").fingerprint()["decode"] == Hardware("cpu", decode="eager").fingerprint()["decode"] == "eager"


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"device": "cuda", "runtime": "vllm"}])
def test_graphs_where_there_are_none_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"hardware\.decode=graph is for .*use hardware\.decode=eager"):
        Hardware("x", decode="graph", **changes)  # type: ignore[arg-type]
