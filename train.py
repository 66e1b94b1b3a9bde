"""Train a model: recover a compressed one, or pretrain one. `python train.py --help` lists the options."""

from __future__ import annotations

from omegaconf import DictConfig

from winnow.core.cli import command


@command("train")
def main(cfg: DictConfig) -> None:
    from winnow import commands
    from winnow.build.command_settings import compression

    artifact = commands.compress(compression(cfg, "train"))
    print(f"artifact: {artifact}")


if __name__ == "__main__":
    main()
