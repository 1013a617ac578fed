import numpy as np
import pytest
import torch

from coreset import pairwise_greedy
from coreset.sas import sas, sas_steps
from coreset.selecting import select
from tests.references import sas_reference as reference


def rows(n, d=4, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + rng.normal(size=d)).astype(np.float32)


@pytest.mark.parametrize("buffer", [1, 5, 1024])
def test_choices_and_gains_are_greedy_by_definition(buffer, monkeypatch):
    monkeypatch.setattr(pairwise_greedy, "BUFFER", buffer)
    x = rows(45, seed=1)
    s = reference.similarities(x)
    chosen = reference.greedy(s, 45)
    values = [reference.value(s, chosen[:i]) for i in range(46)]
    for block_bytes in (None, 300, 1):
        found = sas(x, 45, block_bytes=block_bytes)
        assert found.indices.tolist() == chosen
        np.testing.assert_allclose(found.gains, np.diff(values), atol=1e-9)
    assert found.facts["objective"] == pytest.approx(0, abs=1e-9)  # nothing is left out


def test_published_row_for_column_choices_change_what_follows():
    """The authors' code zeroes the row, not the column: its order is that of static row sums."""
    x = rows(120, seed=2)
    s = reference.similarities(x)
    found, static = sas(x, 60).indices.tolist(), reference.static(s, 60)
    assert found != static
    assert reference.value(s, found) > reference.value(s, static)


def test_diminishing_returns():
    rng = np.random.default_rng(0)
    s = reference.similarities(rows(30))
    for _ in range(100):
        order = rng.permutation(30)
        small, large = np.sort(rng.integers(0, 30, 2))
        j, S, T = order[-1], list(order[:small]), list(order[:large])
        gain = reference.value(s, [*S, j]) - reference.value(s, S)
        assert gain >= reference.value(s, [*T, j]) - reference.value(s, T) - 1e-9


def test_select_divides_the_budget_between_classes():
    x, labels = rows(60, seed=3), np.repeat([0, 1, 2], [30, 20, 10])
    found = select(x, 12, method="sas", labels=labels)
    assert np.bincount(labels[found.indices]).tolist() == [6, 4, 2]
    for c in range(3):
        members = np.flatnonzero(labels == c)
        chosen = found.indices[labels[found.indices] == c]
        assert chosen.tolist() == members[sas(x[members], len(chosen)).indices].tolist()


def test_selected_prefixes_steps_and_containers(tmp_path):
    half = rows(45, seed=4).astype(np.float16)
    whole = sas(half.astype(np.float32), 45)
    steps = list(sas_steps(half))
    assert [step.row for step in steps] == whole.indices.tolist()
    np.testing.assert_allclose([step.gain for step in steps], whole.gains)
    rest = sas(half, 20, selected=whole.indices[:8])
    assert np.array_equal(rest.indices, whole.indices[8:28])
    np.save(tmp_path / "x.npy", half)
    for x in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(half)):
        assert np.array_equal(sas(x, 17).indices, whole.indices[:17])


def test_edges_and_bad_input():
    x = rows(9)
    assert len(sas(x, 0)) == 0
    assert sas(x[:1], 1).indices.tolist() == [0]
    assert sas(np.ones((9, 2)), 9).indices.tolist() == list(range(9))
    pooled = select(x, 5, method="sas", labels=np.arange(9) % 2, per_class="pooled")
    assert np.array_equal(pooled.indices, sas(x, 5).indices)
    with pytest.raises(ValueError, match="labels have shape"):
        sas(x, 2, labels=[0, 1])
    x[3] = 0
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        sas(x, 2)
