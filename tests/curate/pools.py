"""Small pools for the tests of the pool layer."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curate.pool import unique_uids

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def jpeg(shade, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 0, 0)).save(buffer, format="JPEG")
    return buffer.getvalue()


def table(n=10, **columns):
    base = {"image": [jpeg(i) for i in range(n)], "text": [f"caption {i}" for i in range(n)]}
    return pa.table({**base, **columns})


def write(path, data, **options):
    pq.write_table(data, path, **options)
    return path


def everything(pool, **options):
    return pa.Table.from_batches(pool.batches(**options), pool.schema)


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and "pyarrow" not in text
    return text


def rows_of(pool, **options):
    return [row for s in pool.shards for b in pool.samples(s, **options) for row in b.to_pylist()]


def uids_of(pool):
    return unique_uids(
        pa.chunked_array([pool.shard_uids(s) for s in pool.shards], pa.string()),
        derived=pool.mapping.uid is None,
    ).to_pylist()
