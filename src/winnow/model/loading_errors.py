"""Turns errors of the hub and of the loading libraries into one message that says what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from winnow.core.errors import Unservable, UserError, cause_chain, raised_below
from winnow.model.hub import offline_if_unreachable

PACKAGE = Path(__file__).resolve().parents[1]  # errors raised in winnow's own code are defects


@contextlib.contextmanager
def plain_errors(path: str) -> Iterator[None]:
    """Turns errors of the hub and the loaders into messages that name `model.path` and what to do."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    is_folder = Path(path).is_dir()
    try:
        with contextlib.nullcontext() if is_folder else offline_if_unreachable():
            yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"model.path={path} needs a library that is not installed: {error}") from error
    except SafetensorError as error:  # the header is complete but inconsistent
        raise _loading_error(path, f"its weights are damaged, copy the model again ({error})") from error
    except errors.StrictDataclassError as error:  # the configuration rejects a value
        raise _loading_error(path, str(error)) from error
    except (OSError, ValueError) as error:
        causes = list(cause_chain(error))
        status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
        gated = any(isinstance(cause, errors.GatedRepoError) for cause in causes)
        not_found = not gated and any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes)
        if gated or (status & {401, 403} and not not_found):
            raise UserError(
                f"model.path={path} needs a login: accept its licence on the hub and set HF_TOKEN"
            ) from error
        if not_found:
            raise UserError(
                f"model.path={path}: no such model on the hub, or it is private and needs HF_TOKEN; "
                f"for a folder, check that it exists"
            ) from error
        text = str(error).replace(path, "it")  # the path may contain the phrases looked for
        if "trust_remote_code" in text:
            raise UserError(
                f"model.path={path} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
            ) from error
        if not is_folder and "safetensors" in text and not isinstance(error, FileNotFoundError):
            raise UserError(
                f"model.path={path} has no safetensors weights; convert them, or set model.allow_pickle=true if you trust it"
            ) from error
        unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
        if not is_folder and (
            any(isinstance(cause, unreachable) for cause in causes) or "connect" in text or "cached" in text
        ):
            raise UserError(
                f"model.path={path} is neither a folder nor in the cache, and the hub cannot be reached "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}); give a folder, or download it first"
            ) from error
        raise _loading_error(path, str(error)) from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        # OutOfMemoryError is an error of torch, which is not imported here
        if raised_below(error, PACKAGE) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise _loading_error(path, f"{type(error).__name__}: {error}") from error


def _loading_error(path: str, why: str) -> UserError:
    kind = Unservable if Path(path).is_dir() else UserError
    return kind(f"model.path={path} cannot be loaded: {' '.join(why.split())[:300]}")
