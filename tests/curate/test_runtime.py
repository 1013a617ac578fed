from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
import torch

from curate import progress
from curate.runtime import resolve_device, rng, row_keys


def test_streams_are_named() -> None:
    assert rng(0, "a").integers(1 << 60) == rng(0, "a").integers(1 << 60)
    drawn = {int(rng(*path).integers(1 << 60)) for path in [(0, "a"), (1, "a"), (0, "b"), (0, 1)]}
    assert len(drawn) == 4


def test_row_keys_belong_to_rows() -> None:
    uids = [f"uid-{i}" for i in range(1000)]
    keys = row_keys(uids, 0, "prune")
    assert keys.dtype == np.uint64
    assert np.array_equal(row_keys(uids[::-1], 0, "prune"), keys[::-1])
    assert not (row_keys(uids, 1, "prune") == keys).any()
    assert not (row_keys(uids, 0, "dedup") == keys).any()
    salt = hashlib.sha256(b"0\x1fprune").digest()
    expected = hashlib.blake2b(b"uid-7", key=salt, digest_size=8).digest()
    assert int(keys[7]) == int.from_bytes(expected, "little")


def test_devices() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device(torch.device("cpu")).type == "cpu"
    with pytest.raises(ValueError, match="not a torch device"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"torch sees \d+ CUDA"):
        resolve_device("cuda:99")


def test_progress_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    progress.show("log")
    try:
        with caplog.at_level(logging.INFO), progress.task("embed", total=10, done=4) as advance:
            advance(3)
            advance(3)
    finally:
        progress.show("silent")
    first, last = caplog.records[0], caplog.records[-1]
    assert (first.done, first.total) == (7, 10)
    assert "left" in first.getMessage()
    assert (last.done, last.seconds_left) == (10, 0.0)
    assert last.getMessage().startswith("embed: 10 rows in")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    progress.show("bar")
    try:
        with progress.task("embed", total=10) as advance:
            advance(10)
    finally:
        progress.show("silent")
    assert "10/10" in capsys.readouterr().err


def test_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("embed", total=10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
