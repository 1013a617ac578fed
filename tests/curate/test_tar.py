import contextlib
import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import PoolError, ShardError
from curate.pool import Pool
from curate.tar import read_samples, summarise


def make_tar(members, fmt=tarfile.PAX_FORMAT):
    """Write (name, data or TarInfo) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as archive:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                archive.addfile(info)
    return buffer.getvalue()


def read(data, **options):
    return list(read_samples(io.BytesIO(data), name="x.tar", **options))


def pairs(data, **options):
    return [(sample.key, sample.members) for sample in read(data, **options)]


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_groups_by_key_up_to_the_first_dot():
    data = make_tar(
        [
            ("a/1.jpg", b"J"),
            ("a/1.seg.png", b"S"),
            ("a/1.TXT", b"t"),
            ("b/1.jpg", b"K"),
            ("./2.jpg", b"L"),
        ]
    )
    assert pairs(data) == [
        ("a/1", {"jpg": b"J", "seg.png": b"S", "txt": b"t"}),
        ("b/1", {"jpg": b"K"}),
        ("./2", {"jpg": b"L"}),
    ]
    assert summarise(io.BytesIO(data), name="x").samples == 3


def test_names_without_key_or_extension_are_passed_over():
    data = make_tar([("README", b"r"), (".hidden.jpg", b"h"), ("._1.jpg", b"m"), ("1.jpg", b"J")])
    assert pairs(data)[-1] == ("1", {"jpg": b"J"})
    assert len(pairs(data)) == 1


def test_repeated_extension_starts_another_sample():
    data = make_tar([("1.jpg", b"A"), ("1.jpg", b"B")])
    assert pairs(data) == [("1", {"jpg": b"A"}), ("1", {"jpg": b"B"})]


def test_links_devices_and_folders_are_ignored():
    data = make_tar(
        [
            ("d", special("d.jpg", tarfile.DIRTYPE)),
            ("l", special("1.jpg", tarfile.SYMTYPE, "/etc/passwd")),
            ("h", special("2.jpg", tarfile.LNKTYPE, "3.jpg")),
            ("c", special("4.jpg", tarfile.CHRTYPE)),
            ("f", special("5.jpg", tarfile.FIFOTYPE)),
            ("3.jpg", b"J"),
        ]
    )
    assert pairs(data) == [("3", {"jpg": b"J"})]


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(fmt):
    folder = "f" * 90
    names = [f"{folder}/{'k' * 60}.jpg", "2.txt"]
    if fmt != tarfile.USTAR_FORMAT:
        names += [f"{'x' * 300}.jpg", f"{'ü' * 80}.jpg"]
    data = make_tar([(name, name.encode()) for name in names], fmt)
    assert [sample.key for sample in read(data)] == [name.rpartition(".")[0] for name in names]
    assert [next(iter(s.members.values())) for s in read(data)] == [n.encode() for n in names]


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd.jpg", "/etc/passwd.jpg", "a\\b\\c.jpg", "a\nb.jpg", "y" * 9000 + ".jpg"],
)
def test_path_tricks_are_only_strings(name):
    (sample,) = read(make_tar([(name, b"J")]))
    assert sample.members == {"jpg": b"J"}
    assert "\n" not in sample.key and len(sample.key) <= 1024


def test_nul_in_a_pax_name():
    data = make_tar([("q" * 120 + ".jpg", b"J")]).replace(b"q" * 120, b"q" * 60 + b"\0" + b"q" * 59)
    (sample,) = read(data)
    assert "\0" not in sample.key


def test_large_members_are_recorded_not_read():
    data = make_tar([("1.jpg", b"J" * 1000), ("1.txt", b"t")])
    (sample,) = read(data, max_member_bytes=999)
    assert sample.members == {"txt": b"t"} and sample.skipped == {"jpg": 1000}


def test_unwanted_members_are_not_read():
    data = make_tar([("1.jpg", b"J"), ("1.txt", b"t"), ("2.jpg", b"K")])
    assert pairs(data, wanted=lambda extension: extension == "txt") == [
        ("1", {"txt": b"t"}),
        ("2", {}),
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=1500)), max_size=8), st.data())
def test_same_as_tarfile_and_cut_anywhere(parts, data):
    members = [(f"{i:03}/{n}.jpg", content) for i, (n, content) in enumerate(parts)]
    raw = make_tar(members, data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    assert pairs(raw) == [(name.removesuffix(".jpg"), {"jpg": body}) for name, body in members]
    cut = raw[: data.draw(st.integers(0, len(raw)))]
    got = []
    try:
        for sample in read_samples(io.BytesIO(cut), name="cut.tar"):
            got.append((sample.key, sample.members))
    except ShardError as error:
        assert f"{len(got)} samples" in str(error) and "cut.tar" in str(error)
    assert got == pairs(raw)[: len(got)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_a_shard_error_or_nothing(data):
    raw = bytearray(make_tar([(f"{i}" * 130 + ".jpg", b"J" * 600) for i in range(3)]))
    for _ in range(3):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ShardError):
        read(bytes(raw))


def test_truncated_shard_keeps_what_came_before():
    raw = make_tar([(f"{i}.jpg", b"J" * 2000) for i in range(4)])
    good = []
    with pytest.raises(
        ShardError, match=r"cut\.tar is damaged: .*; 2 samples before that are good"
    ):
        for sample in read_samples(io.BytesIO(raw[: 3 * 2560 + 700]), name="cut.tar"):
            good.append(sample.key)
    assert good == ["0", "1"]


def test_not_a_tar():
    with pytest.raises(ShardError, match="0 samples"):
        read(b"\x1f\x8b" + b"z" * 2000)


@pytest.fixture
def shards(tmp_path):
    def sample(i):
        described = {"uid": f"{i:032x}", "url": f"http://h/{i}", "caption": "x", "similarity": 0.3}
        return [
            (f"{i:05}.jpg", b"J%d" % i),
            (f"{i:05}.txt", b"<b>caption</b> %d" % i),
            (f"{i:05}.json", json.dumps(described).encode()),
            (f"{i:05}.cls", b"7"),
        ]

    (tmp_path / "00000.tar").write_bytes(make_tar(sample(0) + sample(1)))
    (tmp_path / "00001.tar").write_bytes(make_tar(sample(2)[1:] + sample(3)))
    return tmp_path


def test_pool_of_tars(shards):
    pool = Pool.open(shards)
    assert len(pool) == 4 and [s.rows for s in pool.shards] == [2, 2]
    assert pool.columns == ["key", "image", "text", "json", "uid", "url", "similarity", "cls"]
    assert pool.mapping.describe() == ("image=image text=text url=url uid=uid score=similarity")
    batch = next(pool.batches(10))
    assert batch.num_rows == 4 and batch.column("key").to_pylist()[3] == "00003"
    (last,) = pool.samples(pool.shards[1])
    assert last.column("image").to_pylist() == [None, b"J3"]
    assert last.column("detail").to_pylist() == ["the row holds no image", None]
    assert last.column("text")[0].as_py() == "<b>caption</b> 2"
    assert pool.shard_uids(pool.shards[1]).to_pylist() == [f"{2:032x}", f"{3:032x}"]


def test_img2dataset_sidecar_is_not_the_pool(shards):
    (shards / "00000.parquet").write_bytes(b"not read at all")
    (shards / "00000_stats.json").write_text("{}")
    assert len(Pool.open(shards)) == 4
    (shards / "other.parquet").write_bytes(b"")
    with pytest.raises(PoolError, match="glob"):
        Pool.open(shards)
    assert len(Pool.open(f"{shards}/*.tar")) == 4


def test_text_columns_need_no_images(shards):
    pool = Pool.open(shards)
    batch = next(pool.batches(columns=["cls", "uid"]))
    assert batch.schema.names == ["cls", "uid"] and batch.num_rows == 4


def test_caption_from_json_and_odd_json(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        make_tar(
            [
                ("0.jpg", b"J"),
                ("0.json", b'{"caption": "from \\ud800 json", "url": 5}'),
                ("1.jpg", b"J"),
                ("1.json", b"[" * 100_000),
                ("2.jpg", b"K"),
                ("2.txt", b"caf\xe9"),
                ("2.json", b'{"uid": {"a": 1}, "caption": []}'),
            ]
        )
    )
    pool = Pool.open(path)
    (batch,) = pool.batches()
    texts = batch.column("text").to_pylist()
    assert texts[0].startswith("from ") and texts[1] is None and texts[2] == "caf\ufffd"
    assert batch.column("url").to_pylist() == ["5", None, None]
    uids = pool.shard_uids(pool.shards[0]).to_pylist()
    assert len(set(uids)) == 3 and all(len(uid) == 32 for uid in uids)


def test_pool_of_a_truncated_tar(shards):
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes()[:1700])
    with pytest.raises(PoolError, match=r"00001\.tar is damaged") as caught:
        Pool.open(shards)
    assert "\n" not in str(caught.value)


def test_tar_that_changes_afterwards(shards):
    pool = Pool.open(shards)
    (shards / "00001.tar").write_bytes(make_tar([("9.jpg", b"J")]))
    with pytest.raises(ShardError, match="changed"):
        list(pool.batches())


def test_compressed_tar_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(PoolError, match="uncompressed"):
        Pool.open(tmp_path / "a.tar.gz")
