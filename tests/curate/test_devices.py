"""Several devices share the work: here the CPU stands for each of them."""

import numpy as np
import pytest
import torch

from curate import unit_rows
from curate.dedup import MODES, find_duplicates
from curate.kmeans import assign, fit
from curate.runtime import WORKER_VARIABLE, resolve_devices
from tests.conftest import unit_rows as some_rows

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 5])
def devices(request, monkeypatch):
    """Return a function that makes "auto" mean so many devices."""

    def several():
        monkeypatch.setattr(unit_rows, "resolve_devices", lambda device: [CPU] * request.param)

    return several


@pytest.mark.parametrize("code_bytes", [1 << 30, 0])
def test_kmeans_is_the_same_on_any_number_of_devices(devices, monkeypatch, code_bytes):
    monkeypatch.setattr("curate.lloyd.CODE_BYTES", code_bytes)
    x = some_rows(9_000, 16)
    init = x[:60]
    one = fit(x, 60, init=init, tolerance=0, iterations=6, device="cpu")
    devices()
    several = fit(x, 60, init=init, tolerance=0, iterations=6, device="auto")
    assert several.iterations == one.iterations and several.objective == one.objective
    for name in ("centroids", "cluster", "cosine_distance"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name))
    np.testing.assert_array_equal(assign(x, one.centroids)[0], one.cluster)


def test_more_devices_than_rows(devices):
    x = some_rows(3, 8, duplicates=0.0)
    devices()
    assert sorted(fit(x, 3, device="auto").cluster) == [0, 1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_duplicates_are_the_same_on_any_number_of_devices(devices, mode):
    x = some_rows(4_000, 16)
    cluster, distance = assign(x, x[:8], device="cpu")
    assert np.bincount(cluster).max() > 256 > np.bincount(cluster).min()
    expected = find_duplicates(x, cluster, distance, mode=mode, device="cpu")
    devices()
    found = find_duplicates(x, cluster, distance, mode=mode, device="auto")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_auto_is_all_gpus_but_in_a_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv(WORKER_VARIABLE, raising=False)
    gpus = [torch.device("cuda", number) for number in range(3)]
    assert resolve_devices() == gpus and resolve_devices("cuda:1") == gpus[1:2]
    assert resolve_devices("cpu") == [CPU]
    monkeypatch.setenv(WORKER_VARIABLE, "2")
    assert resolve_devices() == gpus[2:]
