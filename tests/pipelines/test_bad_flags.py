"""Wrong flags, configurations, models and devices: one line, exit code 2 or 1, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pipelines.bad_input import (
    Command,
    Trap,
    check_error,
    check_refused,
    table,
    tiny_model,
    write,
)


@pytest.fixture
def curate(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write(tmp_path / "pool.parquet", table())


@pytest.mark.parametrize("keep", ["0", "1.5", "-1", "nan", "inf", "abc", ""])
def test_keep(curate: Command, pool: Path, tmp_path: Path, keep: str) -> None:
    ended = curate.prune(pool, tmp_path / "run", keep=keep)
    check_refused(ended, 2, tmp_path / "run", "keep", "must be|float")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--clusters", "0", "at least 1"),
        ("--clusters", "-3", "at least 1"),
        ("--clusters", "foo", "auto.*int"),
        ("--dedup-clusters", "0", "at least 1"),
        ("--epsilon", "-1", ">= 0"),
        ("--epsilon", "3", "<= 2"),
        ("--epsilon", "nan", "must be"),
        ("--clip-fraction", "0", r"\(0, 1\]"),
        ("--clip-fraction", "2", r"\(0, 1\]"),
        ("--clip-fraction", "nan", r"\(0, 1\]"),
        ("--temperature", "0", "> 0"),
        ("--temperature", "-0.1", "> 0"),
        ("--temperature", "nan", "> 0"),
        ("--seed", "-1", ">= 0"),
        ("--workers", "0", ">= 1"),
        ("--batch-size", "0", ">= 1"),
        ("--max-pixels", "0", ">= 1"),
        ("--max-failed", "1.1", "<= 1"),
        ("--lower", "-1", ">= 0"),
        ("--neighbours", "0", ">= 1"),
        ("--which", "hardest", "did you mean.*hard"),
        ("--dedup-mode", "gredy", "did you mean.*greedy"),
        ("--backend", "jax", "torch.*faiss"),
        ("--log-format", "xml", "text.*json"),
    ],
)
def test_value_out_of_range(
    curate: Command, pool: Path, tmp_path: Path, flag: str, value: str, says: str
) -> None:
    ended = curate.prune(pool, tmp_path / "run", flag, value)
    name = flag.removeprefix("--").replace("-", "[-_]")
    check_refused(ended, 2, tmp_path / "run", name, says)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", "inf"), ("--min-clip-score", "nan"), ("--min-clip-score", "inf")],
)
def test_number_that_is_not_finite(
    curate: Command, pool: Path, tmp_path: Path, flag: str, value: str
) -> None:
    ended = curate.prune(pool, tmp_path / "run", flag, value)
    error = check_refused(ended, 2, tmp_path / "run", flag[2:].replace("-", "[-_]"))
    assert "JSON" not in error, "a parameter is wrong, not some JSON"


@pytest.mark.parametrize(("flag", "value"), [("--clusters", "2.5"), ("--seed", "1.5")])
def test_fraction_where_a_count_is_asked(
    curate: Command, pool: Path, tmp_path: Path, flag: str, value: str
) -> None:
    """Silently cut to a whole number, it would be another run than the one asked for."""
    ended = curate.prune(pool, tmp_path / "run", flag, value)
    check_refused(ended, 2, tmp_path / "run", flag[2:], "int")


def test_unknown_flag_and_verb(curate: Command, pool: Path, tmp_path: Path) -> None:
    ended = curate.prune(pool, tmp_path / "run", "--temprature", "0.2")
    check_refused(ended, 2, tmp_path / "run", "--temprature", "did you mean --temperature")
    ended = curate("prun", "--pool", pool, "--keep", 0.3)
    check_error(ended, 2, '"prun"', 'did you mean "prune"')


def test_required_flags(curate: Command, pool: Path) -> None:
    check_error(curate("prune", "--pool", pool), 2, "--keep")
    check_error(curate("prune", "--keep", "0.3"), 2, "--pool")


def test_flag_given_twice(curate: Command, pool: Path, tmp_path: Path) -> None:
    ended = curate.prune(pool, tmp_path / "run", "--keep", "0.4")
    check_refused(ended, 2, tmp_path / "run", "--keep", "multiple")


def test_glob_that_the_shell_expanded(curate: Command, tmp_path: Path) -> None:
    """`--pool *.parquet` without quotes: the usual mistake, so the message says to quote it."""
    shards = [write(tmp_path / f"{i}.parquet", table()) for i in range(3)]
    ended = curate("prune", "--pool", *shards, "--keep", "0.3", "--out", tmp_path / "run")
    check_refused(ended, 2, tmp_path / "run", "1.parquet", "quote")


@pytest.mark.parametrize("flag", ["--pool", "--out"])
def test_empty_name(
    curate: Command, pool: Path, tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out "$UNSET"` must not mean the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = {"--pool": str(pool), "--out": str(tmp_path / "run")} | {flag: ""}
    ended = curate("prune", "--keep", "0.3", *[part for pair in names.items() for part in pair])
    assert not list((tmp_path / "here").iterdir())
    check_error(ended, 2, flag)


# --- --config ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("keep = 0.3\nclusterz = 3\n", ["clusterz", "did you mean.*clusters"]),
        ("[prune]\nkeep = 0.3\nclusterz = 3\n", ["clusterz", "did you mean.*clusters"]),
        ("clusterz = 3\n[prune]\nkeep = 0.3\n", ["clusterz"]),
        ("keep = 'a lot'\n", ["keep", "a lot", "float"]),
        ("keep = 7\n", ["keep", "<= 1"]),
        ("keep = 0.3\nwhich = 'hardest'\n", ["which", "did you mean.*hard"]),
        ("keep = \n", ["not TOML", "line 1"]),
        ("keep = 0.3\nkeep = 0.4\n", ["not TOML", "line 2"]),
        (b"keep = 0.3 # \xff\n", ["not TOML|UTF-8"]),
        ("[embed]\nmodel = 'ViT-B-32'\n", ["keep"]),
    ],
)
def test_config(
    curate: Command, pool: Path, tmp_path: Path, content: str | bytes, says: list[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = curate("prune", "--config", path, "--pool", pool, "--out", tmp_path / "run")
    check_refused(ended, 2, tmp_path / "run", *says)


def test_config_that_cannot_be_read(curate: Command, pool: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    missing = curate.prune(pool, run, "--config", tmp_path / "no.toml")
    check_refused(missing, 2, run, "--config", "no.toml", "no such file")
    folder = curate.prune(pool, run, "--config", tmp_path)
    check_refused(folder, 2, run, "--config", "directory|folder")
    check_refused(curate.prune(pool, run, "--config"), 2, run, "--config", "argument")


# --- devices, models and weights --------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "says"),
    [("foo", "'auto', 'cpu'"), ("cuda:99", "--device cpu"), ("mps", "cpu"), ("meta", "cpu")],
)
def test_device(curate: Command, pool: Path, tmp_path: Path, device: str, says: str) -> None:
    """Before anything is written: nobody wants to hear of it after hours of embedding."""
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    ended = curate.prune(pool, tmp_path / "run", "--device", device)
    check_refused(ended, 2, tmp_path / "run", "device", device, says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_without_one(curate: Command, pool: Path, tmp_path: Path) -> None:
    ended = curate.prune(pool, tmp_path / "run", "--device", "cuda")
    check_refused(ended, 2, tmp_path / "run", "cuda", "--device cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A pool that needs an encoder; its images are no images, which must not come into it."""
    return write(tmp_path / "pictures.parquet", table(embedding=None, image=[b"x"] * 20))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "ViT-B-33"], ["ViT-B-33", "close: .*ViT-B-32"]),
        (["--model", "timm:vit_tiny_patch16_244"], ["close: .*vit_tiny_patch16_224"]),
        (["--model", "ViT-L-14"], ["needs --pretrained", "datacomp_xl_s13b_b90k"]),
        (["--model", "ViT-B-32", "--pretrained", "laion2b"], ["laion2b", "did you mean"]),
        (["--pretrained", "no/such.safetensors"], ["no/such.safetensors", "neither a file"]),
    ],
)
def test_model_that_is_not_there(
    curate: Command, pictures: Path, tmp_path: Path, flags: list[str], says: list[str]
) -> None:
    check_refused(curate.prune(pictures, tmp_path / "run", *flags), 1, tmp_path / "run", *says)


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "JSON"), ("[]", "missing"), ('{"embed_dim": 8}', "vision_cfg.*missing")],
)
def test_model_configuration(
    curate: Command, pictures: Path, tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    ended = curate.prune(pictures, tmp_path / "run", "--model", path, "--pretrained", "none")
    check_refused(ended, 1, tmp_path / "run", "model.json", says)


def test_weights(curate: Command, pictures: Path, tmp_path: Path) -> None:
    """A missing file, a damaged one, another model's, and a pickle that would run code."""
    model = tiny_model(tmp_path)[:2]
    trap = tmp_path / "executed"
    torch.save({"state_dict": Trap(trap)}, tmp_path / "evil.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 100)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, says in {
        "missing.pt": ["missing.pt", "not a file"],
        "damaged.safetensors": ["damaged.safetensors", "not a readable"],
        "other.pt": ["another model's parameters"],
        "evil.pt": ["evil.pt", "run code", "safetensors"],
    }.items():
        ended = curate.prune(pictures, tmp_path / "run", *model, "--pretrained", tmp_path / name)
        check_refused(ended, 1, tmp_path / "run", *says)
        assert not trap.exists()
        assert not (tmp_path / "run").exists(), "the next try must not need --overwrite"


# --- machines ---------------------------------------------------------------------------------


def test_errors_for_machines(curate: Command, pool: Path, tmp_path: Path) -> None:
    """--log-format json promises one object per line on stderr, of the error too."""
    flags = ["--log-format", "json", "--allow-fewer"]
    assert curate.prune(pool, tmp_path / "fine", *flags).code == 0
    ended = curate.prune(tmp_path / "no.parquet", tmp_path / "run", *flags)
    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert ended.code == 1
    assert [line["level"] for line in lines] == ["error"]
    assert "no.parquet" in lines[0]["message"]


def test_dry_run_refuses_as_the_run_does(curate: Command, pool: Path, tmp_path: Path) -> None:
    for arguments in (["--text-col", "txt"], ["--embeddings", tmp_path / "none"]):
        real = curate.prune(pool, tmp_path / "run", *arguments)
        dry = curate.prune(pool, tmp_path / "run", *arguments, "--dry-run")
        assert (dry.code, dry.errors) == (real.code, real.errors)
        assert dry.code == 1
        assert not (tmp_path / "run").exists()


def test_other_verbs(curate: Command, pool: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    check_error(curate("report", "--run", nothing), 1, "nothing", "run folder|curate prune")
    check_error(curate("explain", "--run", nothing, "--uid", "a"), 1, "nothing", "curate prune")
    check_error(curate("embed", "--pool", nothing), 1, "nothing", "does not exist")
    assert curate.prune(pool, tmp_path / "run").code == 0
    ended = curate("explain", "--run", tmp_path / "run", "--uid", "someone's")
    check_error(ended, 1, "someone's", "no row")
    ended = curate("report", "--run", tmp_path / "run", "--examples", "999")
    check_error(ended, 2, "examples", "to 12|<= ")
