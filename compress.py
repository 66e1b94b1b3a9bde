"""Compress a model: apply the stages of `method` in order and save an artifact. `python compress.py --help` lists the options."""

from __future__ import annotations

from omegaconf import DictConfig

from winnow.core.cli import command


@command("compress")
def main(cfg: DictConfig) -> None:
    from winnow.build import command_settings

    if cfg.dry_run:
        from winnow.report.dry_run import compress_table

        print(compress_table(command_settings.dry_run(cfg)))
        return

    from winnow import commands

    artifact = commands.compress(command_settings.compression(cfg))
    print(f"artifact: {artifact}")


if __name__ == "__main__":
    main()
