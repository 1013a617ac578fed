"""The worker's batches: how many rows go together is for speed only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from curate.embeddings import Embeddings
from curate.encoder import TorchEncoder
from pipelines import embed_workers
from tests.conftest import MakePool, image_table


def embedded(pool: Path, out: Path, tiny_clip: Path, precision: str = "auto") -> Embeddings:
    return pipelines.embed(
        pool, out=out, encoder=str(tiny_clip), pretrained="none", precision=precision
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_bytes_whatever_goes_together(
    make_pool: MakePool,
    tmp_path: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    pool = make_pool(image_table(90))
    one = embedded(pool, tmp_path / "one", tiny_clip, precision)
    monkeypatch.setattr(embed_workers, "_TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(TorchEncoder, "rows_at_once", 21)
    torch.set_num_threads(2)
    two = embedded(pool, tmp_path / "two", tiny_clip, precision)
    assert np.array_equal(one.image[0:90], two.image[0:90])
    assert one.text is not None
    assert two.text is not None
    assert np.array_equal(one.text[0:90], two.text[0:90])
    assert np.abs(one.text[0:90]).sum() > 0


def test_images_go_in_full_batches(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken images leave no hole: the next ones fill the batch."""
    seen: list[int] = []
    encode = TorchEncoder.encode_images

    def watched(self: TorchEncoder, batch: torch.Tensor) -> np.ndarray:
        seen.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(TorchEncoder, "rows_at_once", 20)
    monkeypatch.setattr(TorchEncoder, "encode_images", watched)
    found = embedded(make_pool(image_table(90)), tmp_path / "out", tiny_clip)
    good = found.metadata()["status"].to_pylist().count("ok")
    assert good < 90
    assert seen == [20] * (good // 20) + [good % 20]


def test_the_manifest_says_which_precision_auto_was(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(image_table(20))
    for bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("curate.encoder.cpu_multiplies_bf16", lambda fast=bf16: fast)
        embedded(pool, tmp_path / expected, tiny_clip)
        manifest = (tmp_path / expected / "manifest.json").read_text()
        assert f'"precision": "{expected}"' in manifest
