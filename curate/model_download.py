"""Downloads of models that fail in seconds, say what to do, and run no code from the weights."""

from __future__ import annotations

import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from curate.errors import ModelError

_PROBE_SECONDS = 5.0
_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def building() -> Iterator[None]:
    """Run open_clip or timm with no code from weights and no messages to the root logger."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def not_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    # Without a handler there, open_clip's first message would install one for the whole process.
    root.addHandler(handler)
    root.addFilter(not_open_clip)
    # timm's loader asks for full unpickling of some files; torch lets the environment forbid it.
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE_WEIGHTS_ONLY)
        if before is not None:
            os.environ[_FORCE_WEIGHTS_ONLY] = before
        root.removeFilter(not_open_clip)
        root.removeHandler(handler)


@contextmanager
def downloading(what: str, *, repository: str = "", use_model: str = "") -> Iterator[None]:
    """Run open_clip's or timm's loader with a hub that answers, or with the cache alone.

    The hub's client repeats each failed request for 23 s (46 s for one model, measured), also for
    weights that lie in the cache; a machine without network is asked once, here.

    Parameters
    ----------
    what : str
        What is loaded, for the error.
    repository : str
        Where it lies on the Hugging Face Hub, for the error.
    use_model : str
        The ``--model`` that fits the weights as a file, where it is not the one asked for.

    Raises
    ------
    ModelError
        If the loader fails.
    """
    from huggingface_hub import constants

    unreachable = None if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        unreachable = "HF_HUB_OFFLINE is set"
    saved = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = unreachable is not None
    try:
        with building():
            yield
    except ImportError as error:
        raise ModelError(f"{what} needs a package that is not installed: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _load_error(what, error, unreachable, repository, use_model) from error
    finally:
        constants.HF_HUB_OFFLINE = saved


def _load_error(
    what: str, error: Exception, unreachable: str | None, repository: str, use_model: str
) -> ModelError:
    if "pip install transformers" in str(error):
        return ModelError(f"{what} needs transformers: pip install transformers sentencepiece")
    reason = f"not in the cache, and {unreachable}" if unreachable else _short(error)
    where = f" ({repository.rstrip('/')} on the Hugging Face Hub)" if repository else ""
    if what.startswith("hf-hub:"):
        remedy = "Copy the repository where there is access and pass --model FOLDER"
    else:
        model = f"--model {use_model} " if use_model else ""
        remedy = (
            "Download the weights where there is access and pass "
            f"{model}--pretrained FILE.safetensors"
        )
    return ModelError(
        f"the download of {what}{where} failed: {reason}.\n{remedy}, or set HF_HOME to a cache "
        "that holds them (HF_HUB_OFFLINE=1), or bring ready vectors with --embeddings DIR"
    )


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def _unreachable(endpoint: str) -> str | None:
    """Return why the hub does not answer, or None; proxies of the environment are used."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        # The hub's client has certificates of its own, so only it can tell.
        if not isinstance(reason, ssl.SSLError):
            return f"{endpoint} cannot be reached ({reason})"
    except (ValueError, http.client.HTTPException):
        return None
    return None
