"""What the four commands share: Hydra's entry point, with errors that a person can act on.

`UserError` and Hydra's own complaints become one message and exit code 2; anything else is a defect and keeps its
traceback (exit code 1). `HYDRA_FULL_ERROR=1` shows every traceback, as Hydra's users expect.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import omegaconf
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from winnow.core.errors import MissingExtra, RankLost, UserError, behind, is_disk_full, raised_below
from winnow.core.libraries import is_installed

CONF = Path(__file__).resolve().parents[3] / "conf"
OmegaConf.register_new_resolver(
    "basename", lambda path: Path(str(path or "none")).name.removesuffix(".gguf"), replace=True
)


def wandb_mode() -> str:
    """`${wandb_mode:}`: what W&B's users expect of their environment; `disabled` for everybody else."""
    legacy = {"dryrun": "offline", "run": "online", "shared": "online"}
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "disabled")
    return legacy.get(mode, mode) if is_installed("wandb") else "disabled"


def llm_agent() -> str:
    """`${llm_agent:}`: the agent, by name, that brings a language model into a portfolio; `none` without one.

    Raises:
        UserError: WINNOW_LLM names no agent.
    """
    name = os.environ.get("WINNOW_LLM") or "none"
    if name != "none" and name not in options("agent"):
        raise UserError(unknown_option("agent", name).replace("agent=", "WINNOW_LLM=", 1))
    return name


def default_agent() -> str:
    """`${default_agent:}`: who proposes if nobody is named; several, where a language model is to take part."""
    return "gp" if llm_agent() == "none" else "portfolio"


OmegaConf.register_new_resolver("wandb_mode", wandb_mode, replace=True)
OmegaConf.register_new_resolver("llm_agent", llm_agent, replace=True)
OmegaConf.register_new_resolver("default_agent", default_agent, replace=True)
LAUNCHERS = {"joblib": "joblib", "ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm"}  # and their extras
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def command(name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorates the function of a command: composes `conf/<name>.yaml` and calls it with the result."""

    full_error = os.environ.get("HYDRA_FULL_ERROR")

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def guarded(cfg: Any) -> Any:
            try:
                return task(cfg)
            except UserError as error:  # ended here, before Hydra adds a message of its own
                if full_error == "1":
                    raise
                _end(name, error)
            except RankLost as error:
                _end(name, error, code=1)

        wrapped = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(guarded)

        @functools.wraps(task)
        def entry() -> None:
            if name == "search" and not any(argument.startswith("-") for argument in sys.argv[1:]):
                # it always is one; unless it is told so, Hydra takes the sweep for the mistake when another option is wrong
                sys.argv.insert(1, "--multirun")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting with 1
            if {"--help", "-h", "--hydra-help"} & set(sys.argv[1:]):
                _list_groups_from_one_copy()
            try:
                wrapped()
            except KeyboardInterrupt:
                print(f"{name}.py: interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)
            except Exception as error:
                if full_error == "1" or not is_mistake(error):
                    raise
                _end(name, error)

        return entry

    return decorate


def _list_groups_from_one_copy() -> None:
    """Hydra copies everything that it and its plugins can be configured with for each group that its help names (84 times)."""
    original = ConfigLoaderImpl._parse_overrides_and_create_caching_repo

    @functools.cache
    def once(loader: ConfigLoaderImpl, config_name: str | None, overrides: tuple[str, ...]) -> Any:
        return original(loader, config_name, list(overrides))

    def remembered(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        return once(self, config_name, tuple(overrides))

    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = remembered  # type: ignore[method-assign]


def _end(name: str, error: BaseException, code: int = 2) -> NoReturn:
    print(f"{name}.py: {explain(error)}", file=sys.stderr)
    sys.exit(code)


def is_mistake(error: Exception) -> bool:
    """Whether the command line is to blame: our own errors, Hydra's, and whatever Hydra lets slip while it reads it."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException) or is_disk_full(error):
        return True
    return any(raised_below(error, Path(str(package.__file__)).parent) for package in (hydra, omegaconf))


def explain(error: BaseException) -> str:
    """One message for a person: what is wrong, which option it is about, and a way out."""
    ours = next(
        (e for e in behind(error) if isinstance(e, UserError)), None
    )  # one that came up while a value was worked out
    if ours is not None:
        return str(ours)
    if is_disk_full(error):
        return f"the disk is full ({error}); free some space, or choose another place with outputs=; nothing finished is lost"
    text = str(error)
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text.rstrip()} ({str(cause).splitlines()[0]})"
    missing = re.search(r"Could not (?:find|load) '(hydra/launcher|\w+)/([^']*)'", text)
    if missing:
        group, name = missing.groups()
        return unknown_launcher(name) if group == "hydra/launcher" else unknown_option(group, name)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type"))]
    key = re.search(r"full_key: (\S+)", text)
    message = " ".join(lines)
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException) and "not in struct" in text:
        return unknown_key(text)
    return message + (f" (at {key.group(1)})" if key and key.group(1) not in message else "")


def options(group: str) -> list[str]:
    """The options of a config group: the names of its YAML files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def unknown_option(group: str, name: str) -> str:
    """The message for `group=name` when there is no such option, with the names it may have meant."""
    known = options(group)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{group}={name}: there is no such option; {hint}{group} has: {', '.join(known)}"


def unknown_launcher(name: str) -> str:
    """The message for `hydra/launcher=name` when no plugin brings it."""
    if name in LAUNCHERS:
        return str(MissingExtra(f"hydra/launcher={name}", LAUNCHERS[name]))
    return f"hydra/launcher={name}: there is no such launcher; there are basic, {', '.join(LAUNCHERS)}"


def unknown_key(text: str) -> str:
    """The message for `key=value` when the configuration has no such key."""
    found = re.search(r"Could not override '([^']*)'", text)
    key = found.group(1) if found else "a key"
    group, _, name = key.partition(".")
    method = name.partition(".")[0]
    if group == "method" and f"Key '{method}' is not in struct" in text and method in options("method"):
        return f"{key}: {method} is not among the methods; name it in method=[...,{method}], or leave this out"
    return f"{key}: the configuration has no such key; --cfg job shows those it has (+{key}=... adds a new one)"


def say(line: str) -> None:
    """A line of progress, on standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)
