"""Wraps the four commands in Hydra's entry point and turns errors into messages that a person can act on.

`UserError` and Hydra's own errors become one message and exit code 2. Every other error is a defect and keeps its
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

from winnow.core.errors import MissingExtra, RankLost, UserError, cause_chain, is_disk_full, raised_below
from winnow.core.libraries import is_installed

CONF = Path(__file__).resolve().parents[3] / "conf"
OmegaConf.register_new_resolver(
    "basename", lambda path: Path(str(path or "none")).name.removesuffix(".gguf"), replace=True
)


def wandb_mode() -> str:
    """Returns the mode of W&B that the environment variables ask for, else `disabled`; the resolver `${wandb_mode:}`."""
    legacy = {"dryrun": "offline", "run": "online", "shared": "online"}
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "disabled")
    return legacy.get(mode, mode) if is_installed("wandb") else "disabled"


def llm_agent() -> str:
    """Returns the name of the agent that adds a language model to a portfolio, else `none`; the resolver `${llm_agent:}`.

    Raises:
        UserError: WINNOW_LLM does not name an agent.
    """
    name = os.environ.get("WINNOW_LLM") or "none"
    if name != "none" and name not in options("agent"):
        raise UserError(unknown_option("agent", name).replace("agent=", "WINNOW_LLM=", 1))
    return name


def default_agent() -> str:
    """Returns the default agent, `portfolio` with a language model and else `gp`; the resolver `${default_agent:}`."""
    return "gp" if llm_agent() == "none" else "portfolio"


OmegaConf.register_new_resolver("wandb_mode", wandb_mode, replace=True)
OmegaConf.register_new_resolver("llm_agent", llm_agent, replace=True)
OmegaConf.register_new_resolver("default_agent", default_agent, replace=True)
# launcher -> extra that installs it
LAUNCHERS = {"joblib": "joblib", "ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm"}
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def command(name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Returns a decorator that composes `conf/<name>.yaml` and calls the function of a command with the result."""

    full_error = os.environ.get("HYDRA_FULL_ERROR")

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def task_with_messages(cfg: Any) -> Any:
            try:
                return task(cfg)
            except UserError as error:  # exit here, before Hydra adds its own message
                if full_error == "1":
                    raise
                _exit_with_message(name, error)
            except RankLost as error:
                _exit_with_message(name, error, code=1)

        wrapped = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task_with_messages)

        @functools.wraps(task)
        def entry_point() -> None:
            if name == "search" and not any(argument.startswith("-") for argument in sys.argv[1:]):
                # a search is always a multirun; without the flag, Hydra blames the sweep when another option is wrong
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
                if full_error == "1" or not is_user_mistake(error):
                    raise
                _exit_with_message(name, error)

        return entry_point

    return decorate


def _list_groups_from_one_copy() -> None:
    """Makes Hydra's help read its config groups from one cached copy; Hydra itself copies all groups for each of 84 groups."""
    original = ConfigLoaderImpl._parse_overrides_and_create_caching_repo

    @functools.cache
    def cached_repository(loader: ConfigLoaderImpl, config_name: str | None, overrides: tuple[str, ...]) -> Any:
        return original(loader, config_name, list(overrides))

    def create_from_cache(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        return cached_repository(self, config_name, tuple(overrides))

    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = create_from_cache  # type: ignore[method-assign]


def _exit_with_message(name: str, error: BaseException, code: int = 2) -> NoReturn:
    print(f"{name}.py: {explain(error)}", file=sys.stderr)
    sys.exit(code)


def is_user_mistake(error: Exception) -> bool:
    """Returns whether the command line caused the error: winnow's own errors, Hydra's, and errors raised inside Hydra."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException) or is_disk_full(error):
        return True
    return any(raised_below(error, Path(str(package.__file__)).parent) for package in (hydra, omegaconf))


def explain(error: BaseException) -> str:
    """Returns one message for a person: what is wrong, which option it concerns, and what to do."""
    user_error = next((e for e in cause_chain(error) if isinstance(e, UserError)), None)  # a resolver raised it
    if user_error is not None:
        return str(user_error)
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
    """Returns the options of a config group: the names of its YAML files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def unknown_option(group: str, name: str) -> str:
    """Returns the message for an unknown option `group=name`, with the names closest to it."""
    names = options(group)
    suggestions = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(suggestions)}? " if suggestions else ""
    return f"{group}={name}: there is no such option; {hint}{group} has: {', '.join(names)}"


def unknown_launcher(name: str) -> str:
    """Returns the message for a launcher `hydra/launcher=name` that no installed plugin provides."""
    if name in LAUNCHERS:
        return str(MissingExtra(f"hydra/launcher={name}", LAUNCHERS[name]))
    return f"hydra/launcher={name}: there is no such launcher; there are basic, {', '.join(LAUNCHERS)}"


def unknown_key(text: str) -> str:
    """Returns the message for an override `key=value` of a key that the configuration lacks."""
    match = re.search(r"Could not override '([^']*)'", text)
    key = match.group(1) if match else "a key"
    group, _, name = key.partition(".")
    method = name.partition(".")[0]
    if group == "method" and f"Key '{method}' is not in struct" in text and method in options("method"):
        return f"{key}: {method} is not among the methods; name it in method=[...,{method}], or leave this out"
    return f"{key}: the configuration has no such key; --cfg job shows those it has (+{key}=... adds a new one)"
