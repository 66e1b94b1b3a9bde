"""Train a model: recover a compressed one, or pretrain one. `python train.py --help` lists the options."""

from __future__ import annotations

from omegaconf import DictConfig

from winnow.core.cli import command, say


@command("train")
def main(cfg: DictConfig) -> None:
    from winnow import commands

    artifact = commands.compress(cfg, log=say, command="train")
    print(f"artifact: {artifact}")


if __name__ == "__main__":
    main()
