"""Evaluate a model or artifact: benchmark scores and hardware figures. `python evaluate.py --help` lists the options."""

from __future__ import annotations

from omegaconf import DictConfig

from winnow.core.cli import command


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from winnow import commands
    from winnow.build.command_settings import evaluation
    from winnow.report.metrics import metrics_table

    metrics = commands.evaluate(evaluation(cfg))
    print(metrics_table(metrics))


if __name__ == "__main__":
    main()
