"""What a user installs: the wheel, tried from another folder; imports and start-up time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("curate", "coreset", "distill", "pipelines")


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, since building leaves its traces beside pyproject.toml.
    names = ["pyproject.toml", "README.md", "LICENSE", *PACKAGES]
    subprocess.run(
        ["cp", "-r", *[str(REPOSITORY / name) for name in names], str(source)], check=True
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("curate_distill-*.whl"))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        sources = {f"{package}/{path.name}" for path in (REPOSITORY / package).glob("*.py")}
        assert sources <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True)
    code = "import pipelines.cli as c; print(c.__file__); c.main(['prune', '--help'])"
    found = run(code, tmp_path, PYTHONPATH=str(target))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(target))
    assert "--keep" in found.stdout


def test_help_is_fast_and_does_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pipelines.cli as c\n"
        "try: c.main(['--help'])\n"
        "finally: assert not {'torch', 'pyarrow', 'open_clip', 'datasets'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = run(code, tmp_path, PYTHONPATH=str(REPOSITORY))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert found.returncode == 0, found.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Processor time, since tests share their machine; on an idle one it is the time that passes.
    assert min(seconds) < 0.3


def test_public_names(tmp_path: Path) -> None:
    code = (
        "import curate, coreset, distill, pipelines\n"
        "curate.Pool.open; curate.Selection.open; curate.Embeddings.open; curate.Clusters\n"
        "curate.kmeans.fit; curate.kmeans.assign; curate.complexity.complexity\n"
        "curate.prune.allocate; curate.prune.prune_by_complexity; curate.dedup.find_duplicates\n"
        "pipelines.embed; pipelines.prune"
    )
    found = run(code, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert found.returncode == 0, found.stderr
