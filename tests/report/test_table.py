"""What the terminal and the JSON files say of a study."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from winnow.core.formats import axes_of, digits, duration, human, label_of, unit_of
from winnow.core.types import Summary
from winnow.report.facts import base_of, best_within_points
from winnow.report.table import front_json, front_table, results_json, trial_line


def test_front_table(summary: Summary) -> None:
    lines = front_table(summary).splitlines()
    rows = lines[-3:]
    assert [row.split()[0] for row in rows] == ["2", "1", "0"]  # smallest first
    assert "rtn(bits=4, group_size=64)" in rows[1]
    assert rows[1].split()[-9:] == ["0.936", "-1.4", "pts", "2.88", "MB", "0.32x", "3.10", "ms", "0.78x"]
    assert "base" in rows[2]
    assert "2 failed" in lines[0]
    assert lines[1] == "accuracy: higher is better; size, latency: lower is better"
    assert len({len(line) for line in lines[-3:-1]}) == 1  # aligned


def test_trial_line(summary: Summary) -> None:
    assert trial_line(summary.trials[1], summary.objectives, summary.front) == (
        "trial 1  rtn(bits=4, group_size=64)  accuracy 0.936  size 2.88 MB  latency 3.10 ms  12.3 s  front"
    )
    assert not trial_line(summary.trials[3], summary.objectives, summary.front).endswith("front")
    assert trial_line(summary.trials[5], summary.objectives, summary.front).endswith(
        "failed (timeout): longer than 60 s"
    )


def test_disturbed_figures_are_marked_and_lead_no_list(summary: Summary) -> None:
    assert "~" not in front_table(summary)
    disturbed = replace(summary.trials[1], sources={"latency_ms": "measured, disturbed"})
    study = replace(summary, trials=(summary.trials[0], disturbed, *summary.trials[2:]))
    table = front_table(study)
    assert "3.10 ms ~" in table and "3.30 ms ~" not in table
    assert table.splitlines()[-1].startswith("~ measured beside other work")
    assert "latency 3.10 ms ~" in trial_line(disturbed, study.objectives, study.front)
    kept = replace(study.trials[2], figures={**study.trials[2].figures, "accuracy": 0.94})
    best = best_within_points(replace(study, trials=(*study.trials[:2], kept)), "latency_ms")
    assert best is not None and best.number == 2  # the other is faster, and was disturbed


def test_the_base_model_is_the_one_that_was_measured_again(summary: Summary) -> None:
    first = replace(summary.trials[0], sources={"latency_ms": "measured, disturbed"})
    second = replace(summary.trials[0], number=6)
    assert base_of(replace(summary, trials=(first, *summary.trials[1:], second))) is second


def test_a_message_cannot_drive_the_terminal(summary: Summary) -> None:
    line = trial_line(summary.trials[4], summary.objectives, summary.front)
    assert "ValueError" in line
    assert all(c.isprintable() for c in line)


def test_front_json(summary: Summary) -> None:
    front = json.loads(json.dumps(front_json(summary), allow_nan=False))
    assert [point["trial"] for point in front["points"]] == [2, 1, 0]
    point = front["points"][1]
    assert point["overrides"] == ["method=[rtn]", "method.rtn.bits=4", "method.rtn.group_size=64"]
    assert point["commands"] == list(summary.trials[1].commands)
    assert point["sources"]["energy_wh"] == "estimated"
    assert point["relative_to_base"]["size_bytes"] == pytest.approx(0.32)
    assert front["objectives"][0] == {"name": "accuracy", "direction": "maximize", "unit": ""}
    assert front["base"]["trial"] == 0
    assert front["fingerprint"]["model"]["sha256"] == "6f1c"


def test_results_json(summary: Summary) -> None:
    results = json.loads(json.dumps(results_json(summary), allow_nan=False))
    assert results["front"] == [2, 1, 0]
    assert [t["trial"] for t in results["trials"]] == list(range(6))
    assert results["trials"][5]["reason"] == "timeout"
    assert results["trials"][5]["message"] == "longer than 60 s"
    assert results["hypervolume"][-1] is None
    assert results["counts"]["failed_by_reason"] == {"error": 1, "timeout": 1}
    assert results["counts"]["complete"] == 4


def test_without_a_base_model_nothing_is_relative(summary: Summary) -> None:
    alone = replace(summary, trials=summary.trials[1:], front=(1, 2))
    assert "x" not in front_table(alone).splitlines()[-1].replace("gptq", "")
    assert front_json(alone)["base"] is None


def test_a_figure_that_is_not_finite(summary: Summary) -> None:
    broken = replace(summary.trials[1], figures={"accuracy": math.nan, "size_bytes": math.inf})
    study = replace(summary, trials=(summary.trials[0], broken), front=(0, 1))
    assert "–" in front_table(study)
    assert json.dumps(front_json(study), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("size_bytes", 2_880_000, "2.88 MB"),
        ("size_bytes", 512, "512 B"),
        ("size_bytes", 7.25e9, "7.25 GB"),
        ("latency_ms", 3.1, "3.10 ms"),
        ("latency_ms", 0.04, "40.0 µs"),
        ("latency_ms", 1500, "1.50 s"),
        ("energy_wh", 0.00042, "420 µWh"),
        ("co2_g", 1200, "1.20 kg"),
        ("accuracy", 0.9364, "0.936"),
        ("accuracy", 1.0, "1.000"),
        ("accuracy", 0.0, "0"),
        ("layers", 8.0, "8"),
        ("perplexity", 3.3512, "3.35"),
        ("tokens_per_s", 9261.4, "9,261"),
        ("divergence", 0.00049, "0.000490"),
        ("accuracy", math.nan, "–"),
    ],
)
def test_figures_as_people_read_them(name: str, value: float, shown: str) -> None:
    assert human(name, value) == shown


def test_names_and_durations() -> None:
    assert [label_of(n) for n in ("size_bytes", "co2_g", "tokens_per_s", "kl")] == ["size", "CO2", "tokens per s", "KL"]
    assert [unit_of(n) for n in ("size_bytes", "tokens_per_s", "accuracy")] == ["B", "", ""]
    assert unit_of("size", "bytes") == "B"
    assert [duration(s) for s in (0.85, 12.3, 245, 7800)] == ["850 ms", "12.3 s", "4 min 05 s", "2 h 10 min"]
    assert digits(9.999) == "10.0"


def test_labels_that_would_be_the_same_keep_their_units(summary: Summary) -> None:
    trial = replace(summary.trials[0], figures=summary.trials[0].figures | {"latency_s": 0.004})
    labels = [axis.label for axis in axes_of(replace(summary, trials=(trial,)))]
    assert {"latency_ms", "latency_s"} <= set(labels)
