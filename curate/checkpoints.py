"""Weights in a file, read without running anything that the file says.

`.safetensors` holds numbers only. The torch formats are pickles, which can carry code, so they are
read with ``weights_only=True`` and refused when that is not enough.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from curate.errors import ModelError

# What training scripts wrap around the parameters and write before their names.
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_NAMED_KEYS = 3


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a model's parameters from a file, on the CPU and in the file's own types.

    Parameters
    ----------
    path : str or pathlib.Path
        A ``.safetensors`` file, or a torch file (``.pt``, ``.pth``, ``.bin``): the parameters
        alone, or a training checkpoint that has them under ``state_dict``. The ``module.`` that
        distributed training writes before each name is taken off.

    Returns
    -------
    dict of str to torch.Tensor

    Raises
    ------
    ModelError
        If the file is missing or damaged, holds anything but tensors, or is a pickle with code.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"the weights {path} are not a file; give a .safetensors or .pt file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds no parameters: its content is a {type(content).__name__}")
    strange = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ModelError(
            f"{path} is not a model's parameters: {_some(strange)} "
            "is not a tensor; save `model.state_dict()` to a .safetensors file"
        )
    state = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_strictly(
    module: torch.nn.Module, state: Mapping[str, torch.Tensor], *, source: str
) -> None:
    """Copy parameters into a module; every name and shape must agree.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place; keeps its device and type, so float16 weights enter a float32 model.
    state : mapping of str to torch.Tensor
        The parameters.
    source : str
        Where they come from, for the error.

    Raises
    ------
    ModelError
        If names are missing, left over, or of another shape; it names a few of each.
    """
    own = module.state_dict()
    faults = {
        "missing in the file": sorted(own.keys() - state.keys()),
        "not in the model": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, the model's is {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise ModelError(
            f"{source} holds another model's parameters ({'; '.join(found)}); "
            "give the --model that the weights were trained with"
        )
    module.load_state_dict(dict(state))


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    convert = (
        "convert it to safetensors where it is trusted: safetensors.torch.save_file"
        "({k: v.contiguous() for k, v in model.state_dict().items()}, 'weights.safetensors')"
    )
    try:
        with warnings.catch_warnings():
            # A TorchScript archive is announced by a warning before the error that matters.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickle with more than weights in it, which can run code, or is damaged; "
            f"it was not opened. If it is a checkpoint, {convert}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise ModelError(f"{path} is a TorchScript program, not weights; {convert}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is not a readable torch file: {reason}") from error


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED_KEYS
    return ", ".join(names[:_NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")
