"""What becomes of the errors of the hub and of the libraries that load a model: one message, with a way out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from winnow.core.errors import Unservable, UserError, behind, raised_below
from winnow.model.hub import offline_if_unreachable

PACKAGE = Path(__file__).resolve().parents[1]  # what is raised in winnow's own code is a defect


@contextlib.contextmanager
def plain_errors(path: str) -> Iterator[None]:
    """Turns the hub's and the loader's errors into messages that name `model.path` and a way out."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    local = Path(path).is_dir()
    try:
        with contextlib.nullcontext() if local else offline_if_unreachable():
            yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"model.path={path} needs a library that is not installed: {error}") from error
    except SafetensorError as error:  # of a header that is whole, and says what cannot be
        raise _unloadable(path, f"its weights are damaged, copy the model again ({error})") from error
    except errors.StrictDataclassError as error:  # a value that a configuration does not take
        raise _unloadable(path, str(error)) from error
    except (OSError, ValueError) as error:
        causes = list(behind(error))
        status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
        gated = any(isinstance(cause, errors.GatedRepoError) for cause in causes)
        unknown = not gated and any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes)
        if gated or (status & {401, 403} and not unknown):
            raise UserError(
                f"model.path={path} needs a login: accept its licence on the hub and set HF_TOKEN"
            ) from error
        if unknown:
            raise UserError(
                f"model.path={path}: no such model on the hub, or it is private and needs HF_TOKEN; "
                f"for a folder, check that it exists"
            ) from error
        text = str(error).replace(path, "it")  # a path may hold any word
        if "trust_remote_code" in text:
            raise UserError(
                f"model.path={path} brings its own code; if you have read it and trust it, set model.trust_remote_code=true"
            ) from error
        if not local and "safetensors" in text and not isinstance(error, FileNotFoundError):
            raise UserError(
                f"model.path={path} has no safetensors weights; convert them, or set model.allow_pickle=true if you trust it"
            ) from error
        unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
        if not local and (
            any(isinstance(cause, unreachable) for cause in causes) or "connect" in text or "cached" in text
        ):
            raise UserError(
                f"model.path={path} is neither a folder nor in the cache, and the hub cannot be reached "
                f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}); give a folder, or download it first"
            ) from error
        raise _unloadable(path, str(error)) from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if (
            raised_below(error, PACKAGE) or type(error).__name__ == "OutOfMemoryError"
        ):  # torch's, which is not imported here
            raise
        raise _unloadable(path, f"{type(error).__name__}: {error}") from error


def _unloadable(path: str, why: str) -> UserError:
    kind = Unservable if Path(path).is_dir() else UserError
    return kind(f"model.path={path} cannot be loaded: {' '.join(why.split())[:300]}")
