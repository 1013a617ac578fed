from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import pipelines
from curate.embeddings import Embeddings
from curate.encoder import load_encoder
from curate.errors import FingerprintError, ModelError
from curate.images import decode
from curate.pool import Pool
from tests.conftest import MakePool, embedded_table, image_table, tree, unit_rows


@pytest.fixture
def options(tiny_clip: Path) -> dict[str, object]:
    return {"encoder": str(tiny_clip), "pretrained": "none", "batch_size": 16}


def test_every_row_has_its_own_vector_or_a_status(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path, options: dict[str, object]
) -> None:
    """Against the encoder called by hand, one image and one caption at a time."""
    table = image_table(45)
    found = pipelines.embed(make_pool(table, shards=2), out=tmp_path / "emb", **options)
    metadata = found.metadata()
    encoder = load_encoder(str(tiny_clip), "none", batch_size=16)
    image = found.image[0:45]
    assert found.text is not None
    text = found.text[0:45]
    for row, record in enumerate(table.to_pylist()):
        decoded = decode(record["image"]["bytes"])
        status = metadata["status"][row].as_py()
        if decoded.image is None:
            assert status == decoded.status
            assert metadata["detail"][row].as_py()
            assert not image[row].any()
        else:
            assert status == "ok"
            expected = encoder.encode_images(encoder.preprocess(decoded.image)[None])[0]
            assert np.array_equal(image[row], expected.astype(np.float16))
        if record["caption"]:
            expected = encoder.encode_texts([record["caption"]])[0]
            assert np.array_equal(text[row], expected.astype(np.float16))
        else:
            assert metadata["text_status"][row].as_py() == "missing"
            assert not text[row].any()
    assert {"decode_failed", "missing"} <= set(metadata["status"].to_pylist())


def test_agrees_with_open_clip_itself(make_pool: MakePool, tmp_path: Path, tiny_clip: Path) -> None:
    table = image_table(5)
    open_clip.add_model_config(tiny_clip)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, _, preprocess = open_clip.create_model_and_transforms("tiny")
    model.eval()
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    found = pipelines.embed(
        make_pool(table),
        out=tmp_path / "emb",
        encoder=str(tiny_clip),
        pretrained=str(weights),
        precision="fp32",
    )
    picture = decode(table["image"][0].as_py()["bytes"]).image
    tokens = open_clip.get_tokenizer("tiny")(["picture 0 of cat"])
    with torch.inference_mode():
        image = model.encode_image(preprocess(picture)[None], normalize=True)[0].numpy()
        text = model.encode_text(tokens, normalize=True)[0].numpy()
    np.testing.assert_allclose(found.image[0:1][0], image, atol=5e-4)
    assert found.text is not None
    np.testing.assert_allclose(found.text[0:1][0], text, atol=5e-4)


def test_same_vectors_for_any_shards_workers_and_order(
    make_pool: MakePool, tmp_path: Path, options: dict[str, object]
) -> None:
    table = image_table(90)
    order = np.random.default_rng(0).permutation(90)
    one = pipelines.embed(make_pool(table, "one"), out=tmp_path / "a", **options)
    two = pipelines.embed(
        make_pool(table, "two", shards=4), out=tmp_path / "b", workers=2, **options
    )
    three = pipelines.embed(make_pool(table.take(order), "three"), out=tmp_path / "c", **options)
    assert np.array_equal(one.image[0:90], two.image[0:90])
    assert np.array_equal(one.image[order], three.image[0:90])
    assert one.text is not None
    assert three.text is not None
    assert np.array_equal(one.text[order], three.text[0:90])


def test_same_kept_rows_for_any_shards_and_order(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path
) -> None:
    table = image_table(140)
    order = np.random.default_rng(0).permutation(140)
    pools = [
        make_pool(table, "one"),
        make_pool(table, "seven", shards=7),
        make_pool(table.take(order), "shuffled", shards=2),
    ]
    kept = [
        set(
            pipelines.prune(
                pool,
                keep=0.3,
                out=tmp_path / f"{pool.name}-run",
                model=str(tiny_clip),
                pretrained="none",
                epsilon=1e-5,
            ).kept_uids
        )
        for pool in pools
    ]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 42


def test_brought_embeddings_are_normalised(make_pool: MakePool, tmp_path: Path) -> None:
    table = embedded_table(50)
    x = np.stack(table["embedding"].to_pylist()).astype(np.float32) * 7
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    scaled = table.set_column(table.column_names.index("embedding"), "embedding", column)
    found = pipelines.embed(make_pool(scaled), out=tmp_path / "emb")
    np.testing.assert_allclose(np.linalg.norm(found.image[0:50], axis=1), 1, atol=1e-3)


def test_clip_retrieval_folder(tmp_path: Path) -> None:
    """Read as a pool, and as the embeddings of a pool that has other shards."""
    folder = tmp_path / "laion"
    x, y = unit_rows(60, seed=1), unit_rows(60, seed=2)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part in range(2):
        span = slice(part * 30, part * 30 + 30)
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", x[span])
        np.save(folder / "text_emb" / f"text_emb_{part}.npy", y[span])
        rows = pa.table({"image_path": [f"{i}" for i in range(60)][span], "caption": ["c"] * 30})
        pq.write_table(rows, folder / "metadata" / f"metadata_{part}.parquet")
    found = pipelines.prune(folder, keep=0.4, out=tmp_path / "run", dedup_mode="none")
    assert found.counts["kept"] == 24
    expected = (x.astype(float) * y).sum(1)
    expected /= np.linalg.norm(x.astype(float), axis=1) * np.linalg.norm(y.astype(float), axis=1)
    np.testing.assert_allclose(found.table["clip_score"].to_numpy(), expected, atol=1e-6)
    other = embedded_table(60).drop_columns(["embedding"])
    pq.write_table(other, tmp_path / "pool.parquet")
    again = pipelines.prune(
        tmp_path / "pool.parquet",
        keep=0.4,
        out=tmp_path / "other",
        embeddings=folder,
        dedup_mode="none",
        score_col="",
    )
    assert again.table["clip_score"].equals(found.table["clip_score"])


def test_embeddings_of_the_same_folder_are_used_in_place(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(embedded_table(50))
    made = pipelines.embed(pool, out=tmp_path / "emb")
    before = tree(tmp_path / "emb")
    pipelines.prune(pool, keep=0.3, out=tmp_path / "run", embeddings=tmp_path / "emb")
    assert tree(tmp_path / "emb") == before
    assert not (tmp_path / "run" / "embeddings").exists()
    assert isinstance(made, Embeddings)


def test_real_photographs(shared_data: Path, tmp_path: Path, tiny_clip: Path) -> None:
    pool = Pool.open(shared_data / "imagenet-1-per-class.parquet")
    found = pipelines.prune(
        pool, keep=0.28, out=tmp_path / "run", model=str(tiny_clip), pretrained="none", epsilon=1e-4
    )
    assert found.counts["kept"] == 280
    assert "decode_failed" not in found.counts


def test_cifar10_without_captions(
    shared_data: Path, tmp_path: Path, tiny_clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels and class names are passed on; that there is no quality stage is said."""
    found = pipelines.prune(
        shared_data / "cifar10-test.parquet",
        keep=0.1,
        out=tmp_path / "run",
        model=str(tiny_clip),
        pretrained="none",
        epsilon=1e-5,
        batch_size=256,
    )
    assert found.counts["kept"] == 1000
    assert "favours junk" in caplog.text
    kept = datasets.load_dataset(
        str(tmp_path / "run" / "pool"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert kept.features["label"].names[0] == "airplane"
    assert kept[0]["image"].size == (32, 32)


def test_a_model_that_cannot_be_had_leaves_nothing(make_pool: MakePool, tmp_path: Path) -> None:
    """So that the next try with the same --out needs no --overwrite."""
    pool = make_pool(image_table(20))
    for run in (
        lambda: pipelines.prune(pool, keep=0.3, out=tmp_path / "run", model="ViT-B-23"),
        lambda: pipelines.embed(pool, out=tmp_path / "run", encoder="timm:vit_tiny_patch"),
    ):
        with pytest.raises(ModelError):
            run()
        assert not (tmp_path / "run").exists()


def test_another_model_is_refused_by_name(
    make_pool: MakePool, tmp_path: Path, tiny_clip: Path
) -> None:
    pool = make_pool(image_table(60))
    options = {"keep": 0.3, "out": tmp_path / "run", "epsilon": 1e-5}
    pipelines.prune(pool, model=str(tiny_clip), pretrained="none", precision="fp32", **options)
    with pytest.raises(FingerprintError, match=r"model .*tiny.*ViT-B-32"):
        pipelines.prune(pool, model="ViT-B-32", pretrained="none", **options)
    with pytest.raises(FingerprintError, match=r"precision .*fp32.*bf16"):
        pipelines.prune(pool, model=str(tiny_clip), pretrained="none", precision="bf16", **options)
