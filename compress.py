"""Compress a model: apply the stages of `method` in order and save an artifact. `--help` lists the options."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from winnow.cli import command


@command("compress")
def main(cfg: DictConfig) -> None:
    from winnow import build
    from winnow.method.pipeline import compress

    stages = build.stages(cfg)
    lm = build.model(cfg)
    output = build.output(cfg, "compress", lm, stages)
    run = build.run(cfg, folder=Path(cfg.outputs) / "scratch" / output.name)
    artifact = compress(lm, stages, run, output)
    print(f"artifact: {artifact.path}")


if __name__ == "__main__":
    main()
