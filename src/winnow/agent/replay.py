"""Proposes the strategies of a recorded study again, in their order and with their reasons; it calls no endpoint.

python search.py agent=replay agent.study=nano-nano-cpu study=again
python search.py agent=replay agent.study=/somewhere/outputs/nano-nano-cpu
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from winnow.agent.llm.critic import strategy_of
from winnow.agent.llm.schema import as_proposal
from winnow.core.errors import UserError
from winnow.study.history import History
from winnow.study.policy import Exhausted, Forecaster, Suggestion
from winnow.study.space import Space

logger = logging.getLogger(__name__)


@dataclass
class Replay:
    """Proposes the strategies that another study has tried.

    Attributes:
        study: name or folder of the study.
        storage: Optuna storage URL of the study; None means `study.db` in its folder.
        outputs: the folder that contains studies given by name.
    """

    study: str | None = None
    storage: str | None = None
    outputs: str = "outputs"
    _recorded: list[tuple[int, Suggestion]] = field(default_factory=list, init=False, repr=False)
    _skipped: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        """Reads the study.

        Raises:
            UserError: there is no study of that name, or it holds no strategy.
        """
        from winnow.study import storage as storages
        from winnow.study.trial_store import recorded_suggestions

        if not self.study:
            raise UserError("agent.study is not set: agent=replay needs the name or the folder of a study to replay")
        folder = Path(self.study)
        if not folder.is_dir():
            folder = Path(self.outputs) / self.study
        storage = self.storage
        if storage is None:
            file = folder / "study.db"
            if not file.is_file():
                raise UserError(f"agent.study={self.study}: there is no {file}; give the name or the folder of a study")
            storage = storages.sqlite_url(file)
        name = folder.name if self.storage is None else self.study
        self._recorded = recorded_suggestions(storages.load_study(name, storage))
        if not self._recorded:
            raise UserError(f"agent.study={self.study} holds no strategy to replay")

    def ask(self, history: History, space: Space, forecaster: Forecaster) -> Suggestion:
        """Returns the next strategy of the recorded study.

        Raises:
            Exhausted: all of them were proposed.
        """
        for number, suggestion in self._recorded:
            if number in self._skipped:
                continue
            strategy, objections = strategy_of(as_proposal(suggestion.strategy)["methods"], space)
            if strategy is None:
                self._skipped.add(number)
                logger.info(
                    f"search: trial {number} of {self.study} is skipped: it is not in this space: {objections[0]}"
                )
                continue
            if strategy.overrides in history.proposed:
                continue
            record = {"agent": "replay", "study": str(self.study), "trial": number, "recorded": dict(suggestion.record)}
            why = str(suggestion.record.get("why") or "")
            return Suggestion(strategy, suggestion.by, why, suggestion.expected_gain, record)
        raise Exhausted(f"all that {self.study} holds was replayed")
