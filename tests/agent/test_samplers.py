"""Optuna's samplers as agents: what they draw in vain does not pile up."""

from __future__ import annotations

import pytest

from tests.agent import world
from winnow.agent.samplers import DRAWS, MOST_DRAFTS, NSGA2, TPE, Sampler


@pytest.mark.parametrize("sampler", [TPE, NSGA2])
def test_drafts_are_swept_out(sampler: type[Sampler]) -> None:
    policy, space = sampler(), world.narrow()
    history = world.searched(policy, space, 29)  # of 30: the last ones are drawn many times in vain
    drawn = 0
    for _ in range(40):
        policy.ask(history, space, world.Known())
        drawn += len(policy._mirror.trials)
        assert len(policy._mirror.trials) <= 1.1 * len(history.trials) + MOST_DRAFTS + DRAWS
    assert drawn > 40 * len(history.trials)  # there were drafts
