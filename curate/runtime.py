"""Where the code runs and where its randomness comes from.

No global seeds: a stream of random numbers has a name (`rng(seed, "kmeans")`), and the randomness
of a row is a hash of the seed and the row's uid (`row_keys`), so that it does not depend on the
order of rows nor on the number of shards or workers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


# Set in a worker process to its number: with several GPUs, "auto" gives each worker its own.
WORKER_VARIABLE = "CURATE_WORKER"


def rng(seed: int, *path: str | int) -> np.random.Generator:
    """Return the random stream of that name.

    Parameters
    ----------
    seed : int
        The run's seed.
    *path : str or int
        The stream's name; streams of different names are independent.

    Returns
    -------
    numpy.random.Generator

    Examples
    --------
    >>> bool(rng(0, "kmeans").integers(100) == rng(0, "kmeans").integers(100))
    True
    """
    words = hashlib.sha256("\x1f".join([str(seed), *map(str, path)]).encode()).digest()
    return np.random.default_rng(np.frombuffer(words, dtype=np.uint32))


def row_keys(uids: Iterable[str], seed: int, *path: str | int) -> NDArray[np.uint64]:
    """Return one 64-bit hash per row: the row's own randomness, wherever the row lies.

    Parameters
    ----------
    uids : iterable of str
        The rows' uids.
    seed : int
        The run's seed.
    *path : str or int
        What the numbers are for; other names give independent numbers.

    Returns
    -------
    (n,) uint64

    Examples
    --------
    >>> a, b = row_keys(["cat", "dog"], 0, "random"), row_keys(["dog", "cat"], 0, "random")
    >>> bool((a == b[::-1]).all())
    True
    """
    salt = hashlib.sha256("\x1f".join([str(seed), *map(str, path)]).encode()).digest()
    keyed = hashlib.blake2b(key=salt, digest_size=8)

    def digest(uid: str) -> bytes:
        state = keyed.copy()
        state.update(uid.encode())
        return state.digest()

    return np.frombuffer(b"".join(map(digest, uids)), dtype="<u8").astype(np.uint64)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the torch device to run on.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"`` takes CUDA where there is a device, otherwise the CPU. Anything else is taken
        at its word: asking for CUDA where there is none is an error, never a silent CPU.

    Raises
    ------
    ValueError
        If the device is not known, or not there.
    """
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        worker = int(os.environ.get(WORKER_VARIABLE, "0"))
        return torch.device("cuda", worker % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device {device!r} is not a torch device; use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} asked for, but torch sees {torch.cuda.device_count()} CUDA "
            "device(s); use --device cpu, or 'auto' to take what is there"
        )
    if resolved.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=resolved).cpu()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {device!r} cannot compute here; use --device cpu, or 'auto'"
            ) from error
    return resolved


def resolve_devices(device: str | torch.device = "auto") -> list[torch.device]:
    """Return the devices to share work between: ``"auto"`` is all GPUs, or the CPU.

    In a worker process, and for any other name, it is the one of `resolve_device`.
    """
    import torch

    first = resolve_device(device)
    if device != "auto" or first.type != "cuda" or WORKER_VARIABLE in os.environ:
        return [first]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def cpu_multiplies_bf16() -> bool:
    """Tell whether bf16 is faster than float32 on this CPU: without AVX512-BF16 or AMX it is not.

    Returns
    -------
    bool
    """
    import torch

    tests = (
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    )
    return any(test is not None and test() for test in tests)
