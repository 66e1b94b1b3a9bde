"""A whole search that a scripted endpoint steers, faults included; what is kept of it; and its replay without the endpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.agent.endpoint import Cut, Endpoint, Fault, Say, Words, propose
from tests.agent.histories import OBJECTIVES, outlook, rtn, space_of
from tests.agent.steered import KEY, in_space
from tests.logged import logged
from winnow import build
from winnow.agent.llm.steering import LLM
from winnow.agent.portfolio import Portfolio
from winnow.agent.replay import Replay
from winnow.agent.samplers import Grid, Random
from winnow.core.errors import UserError
from winnow.core.types import Strategy
from winnow.search.folders import MESSAGES
from winnow.search.loop import Search
from winnow.search.views import Views
from winnow.study.budget import Budget
from winnow.study.history import History
from winnow.study.opening import open_study
from winnow.study.study import Proposal, Study

pytest.importorskip("langchain_openai", reason="pip install 'winnow[agent]'")
pytest.importorskip("langgraph", reason="pip install 'winnow[agent]'")

STEERED = propose({"rtn": {"bits": 3, "group_size": 32}})
SCRIPT = [
    STEERED,
    Fault(500),
    Fault(500),
    Cut(),
    Fault(429, headers={"Retry-After": "2"}),
    propose({"wanda": {"pattern": "2:4"}, "rtn": {"bits": 2, "group_size": 32}}),
    Words("no idea"),
    Words("none"),
    Words(""),
    propose({"nf4": {}}, **{"hydra.mode": "RUN"}),
    propose({"nf4": {}}),
    Say({"proposals": [{"reason": "x", "methods": [{"name": "nf4", "_target_": "os.system"}], "confidence": 1}]}),
    STEERED,
    propose({"kv": {"bits": 4, "group_size": 64}}),
    Fault(401),
]


def run(folder: Path, policy: Any, trials: int = 10, launch: Any = None) -> Study:
    study = open_study(folder.name, f"sqlite:///{folder / 'study.db'}", OBJECTIVES, {"model": {"name": "m"}})

    def made(proposal: Proposal, worker: int) -> dict[str, Any]:
        value = sum(map(ord, "".join(proposal.strategy.overrides)))
        figures = {"accuracy": value % 97 / 97, "size_bytes": float(value % 89)}
        return {"figures": figures, "sources": {}, "reason": None, "message": "", "seconds": {}}

    Search(
        study=study,
        space=space_of(),
        policy=policy,
        forecaster=outlook(),
        launch=launch or made,
        budget=Budget(trials=trials),
        folder=folder,
        shared=[],
        views=Views(folder),
    ).run()
    return study


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study, list[str]]:
    from langchain_openai import ChatOpenAI

    folder = tmp_path_factory.mktemp("studies") / "steered"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch, Endpoint(*SCRIPT) as endpoint, logged() as lines:
        patch.setenv("OPENAI_API_KEY", KEY)
        llm = functools.partial(ChatOpenAI, model="scripted", base_url=endpoint.url)
        policy = LLM(llm=llm, optimizer=Grid(), attempts=2, timeout_s=30.0)
        policy.chat.sleep = lambda seconds: None
        study = run(folder, policy)
    return folder, study, lines


def test_the_search_goes_on_through_every_fault(steered: tuple[Path, Study, list[str]]) -> None:
    _, study, lines = steered
    assert len(study.trials) == 10 and all(trial.complete for trial in study.trials)
    by = [trial.proposed_by for trial in study.trials]
    assert by == ["base", "llm", "grid", "grid", "llm", "grid", "llm", "llm", "grid", "grid"]
    assert [t.strategy for t in study.trials if t.proposed_by == "llm"] == [
        rtn(3, 32),
        Strategy(("wanda", "rtn"), {"method.wanda.pattern": "2:4", "method.rtn.bits": 2, "method.rtn.group_size": 32}),
        Strategy(("nf4",)),
        Strategy(("kv",), {"method.kv.bits": 4, "method.kv.group_size": 64}),
    ]
    assert all(in_space(trial.strategy, space_of()) for trial in study.trials)
    assert sum("not asked any more" in line for line in lines) == 1


def test_every_decision_is_kept_and_no_key(steered: tuple[Path, Study, list[str]]) -> None:
    folder, study, lines = steered
    for trial in study.trials[1:]:
        path = folder / "trials" / str(trial.number) / MESSAGES
        if trial.number == study.trials[-1].number:  # the model's part had ended
            assert not path.exists() and "the key is refused" in trial.decision["fallback"]
            continue
        messages = json.loads(path.read_text())
        assert messages["brief_sha256"] == trial.decision["brief_sha256"]
        assert messages["brief"] in messages["calls"][0]["messages"][1]["content"]
        assert trial.decision["instead"]
        assert ("fallback" in trial.decision) == (trial.proposed_by == "grid")
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY.encode() not in kept + "".join(lines).encode()


def test_what_it_took_is_still_known_after_a_restart(steered: tuple[Path, Study, list[str]]) -> None:
    folder, study, _ = steered
    again = open_study(folder.name, f"sqlite:///{folder / 'study.db'}", OBJECTIVES, {"model": {"name": "m"}})
    used = sum(
        sum(t.decision["tokens"][s] for s in ("input", "output")) for t in study.trials if "tokens" in t.decision
    )
    assert again.tokens == study.tokens == used > 0


def test_a_replay_runs_the_same_without_an_endpoint(
    steered: tuple[Path, Study, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, study, _ = steered
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    again = tmp_path / "again"
    again.mkdir()
    replayed = run(again, Replay(study="steered", outputs=str(folder.parent)), trials=100)
    assert [t.strategy for t in replayed.trials] == [t.strategy for t in study.trials]
    assert [t.figures for t in replayed.trials] == [t.figures for t in study.trials]
    assert [t.proposed_by for t in replayed.trials] == [t.proposed_by for t in study.trials]
    assert [t.decision["why"] for t in replayed.trials] == [t.decision["why"] for t in study.trials]
    assert replayed.trials[1].decision["recorded"]["model"] == "scripted"
    assert replayed.tokens == 0


def test_a_replay_skips_what_is_not_in_this_space(steered: tuple[Path, Study, list[str]], log_lines: list[str]) -> None:
    from tests.agent.histories import started
    from winnow.study.policy import Exhausted

    replay, history = Replay(study=str(steered[0])), started()
    found = []
    with pytest.raises(Exhausted, match="was replayed"):
        while True:
            found.append(replay.ask(history, space_of("rtn"), outlook()).strategy)
            history.begin(len(found), found[-1])
    assert found and all(s.methods == ("rtn",) for s in found)
    skipped = {t.strategy.overrides for t in steered[1].trials} - {s.overrides for s in found} - {Strategy().overrides}
    assert len(log_lines) == len(skipped) and "it is not in this space" in log_lines[0]


@pytest.mark.parametrize(("settings", "words"), [({}, "agent.study is not set"), ({"study": "none"}, "there is no")])
def test_a_replay_of_nothing_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        Replay(**settings, outputs=str(tmp_path))


def test_messages_of_a_trial_that_was_cut_off_stay_and_count_once(tmp_path: Path) -> None:
    from winnow.study.policy import Suggestion

    class Spends(Random):
        def ask(self, *arguments: Any) -> Suggestion:
            found = super().ask(*arguments)
            record, messages = {"tokens": {"input": 70, "output": 30}, "usd": 0.5}, {"brief": "b"}
            return Suggestion(found.strategy, "llm", "a reason", record=record, messages=messages)

    def killed(proposal: Proposal, worker: int) -> Any:
        if proposal.strategy.methods:
            raise KeyboardInterrupt
        return {
            "figures": {"accuracy": 1.0, "size_bytes": 9.0},
            "sources": {},
            "reason": None,
            "message": "",
            "seconds": {},
        }

    folder = tmp_path / "cut"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(folder, Spends(), launch=killed)
    study = run(folder, Spends(), trials=2)
    again = study.trials[1]
    assert again.decision["again"] == 1 and again.decision["why"] == "a reason"
    assert (study.tokens, study.usd) == (100, 0.5)
    assert json.loads((folder / "trials" / "1" / MESSAGES).read_text()) == {"brief": "b"}


TARGETS = "langchain_openai.ChatOpenAI"


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("agent.llm", "langchain_openai.OpenAIEmbeddings"),
        ("agent.llm", "langchain_openai.chat_models.base.os.system"),
        ("agent.llm", "langchain_core.load.load"),
        ("agent.optimizer", TARGETS),
        ("model", TARGETS),
        ("model.llm", TARGETS),
        ("agent", TARGETS),
    ],
)
def test_chat_models_are_allowed_by_name_and_for_the_agent_only(key: str, target: str) -> None:
    with pytest.raises(UserError, match="not allowed"):
        build.instantiate(OmegaConf.create({"_target_": target}), key)


def test_the_yaml_builds_the_policy_and_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_conf import composed

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    policy = build.policy(composed("search", "agent=gpt4o", "agent.fallback=nsga2", "seed=7", "budget.usd=3"))
    assert isinstance(policy, LLM)
    assert (policy.chat.name, type(policy.fallback).__name__, policy.fallback.seed) == ("gpt-4o", "NSGA2", 7)
    assert type(policy.optimizer).__name__ == "GP"
    other = build.policy(composed("search", "agent=local_llm", "agent@agent.optimizer=tpe"))
    assert type(other.optimizer).__name__ == "TPE"
    for name, words in (("gpt", "did you mean gp or gpt4o"), ("gpt4o", "give an optimizer")):
        with pytest.raises(UserError, match=words):
            build.policy(composed("search", "agent=gpt4o", f"agent.fallback={name}"))


def test_a_language_model_that_is_configured_joins_the_portfolio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.test_conf import composed

    monkeypatch.delenv("WINNOW_LLM", raising=False)
    assert composed("search").agent._target_.endswith(".GP")
    monkeypatch.setenv("WINNOW_LLM", "local_llm")
    sizes = iter(range(1000))

    def proposal(body: dict[str, Any]) -> Say:
        """Sparsities that were not proposed before."""
        return propose({"wanda": {"pattern": "unstructured", "sparsity": 0.3 + next(sizes) / 2000}})

    with Endpoint(proposal) as endpoint:
        cfg = composed("search", f"agent.agents.llm.llm.base_url={endpoint.url}")
        policy = build.policy(cfg)
        assert isinstance(policy, Portfolio) and policy.current(History(OBJECTIVES))["llm"] == pytest.approx(0.3)
        study = run(tmp_path, policy, trials=16)
    asked = {trial.decision.get("agent") for trial in study.trials[1:]}
    assert asked <= {"llm", "gp", "bandit"} and "gp" in asked
    llms = [t for t in study.trials if t.decision.get("agent") == "llm" or "vetoed" in t.decision]
    assert llms and endpoint.proposals >= len(llms)


def test_a_language_model_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_conf import composed
    from winnow.core.cli import explain

    monkeypatch.setenv("WINNOW_LLM", "gtp4o")
    with pytest.raises(Exception, match="interpolation") as caught:
        composed("search")
    assert explain(caught.value).startswith("WINNOW_LLM=gtp4o: there is no such option; did you mean gpt4o")
