import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coreset.label_errors import (
    confident_joint,
    find_label_errors,
    label_error_votes,
    label_errors,
    label_quality,
)
from tests.references import label_errors_reference as reference


def noisy(n=300, classes=4, noise=0.2, seed=0):
    """Predictions of a fair model, and labels some of which were flipped."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(classes, size=n)
    logits = generator.normal(size=(n, classes)) + 3 * np.eye(classes)[truth]
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    wrong = generator.random(n) < noise
    labels = np.where(wrong, (truth + generator.integers(1, classes, size=n)) % classes, truth)
    return p, labels, wrong


@settings(deadline=None, max_examples=40)
@example(seed=315, n=30, classes=4, noise=0.3)  # equal remainders
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    classes=st.integers(2, 5),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_flags_and_joint_are_those_of_the_plain_algorithm(seed, n, classes, noise):
    p, labels, _ = noisy(n, classes, noise, seed)
    assert confident_joint(p, labels).tolist() == reference.joint(p, labels).tolist()
    assert find_label_errors(p, labels).tolist() == reference.errors(p, labels).tolist()


def test_flipped_labels_are_found():
    p, labels, wrong = noisy(3000)
    found = find_label_errors(p, labels)
    assert (found & wrong).sum() / wrong.sum() > 0.75
    assert (found & wrong).sum() / found.sum() > 0.85


def test_a_class_of_low_confidence_is_not_all_wrong():
    """A threshold of its own for each class: hard classes are not taken for noise."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    own = np.where(labels == 0, generator.uniform(0.9, 1, 400), generator.uniform(0.3, 0.6, 400))
    p = np.where(np.eye(2, dtype=bool)[labels], own[:, None], 1 - own[:, None])
    flagged = find_label_errors(p, labels)[labels == 1]
    assert flagged.sum() < (own[labels == 1] < 0.5).sum() / 2


def test_no_class_is_emptied_and_no_label_is_flagged_that_is_predicted():
    p, labels, _ = noisy(40, 3, 1.0, seed=3)
    found = find_label_errors(p, labels)
    assert not found[p.argmax(axis=1) == labels].any()
    for c in np.unique(labels):
        assert not found[labels == c].all()


def test_the_least_likely_wrong_come_first():
    p, labels, wrong = noisy()
    found = label_errors(p, 300, labels=labels)
    flagged = find_label_errors(p, labels)
    assert found.facts["label_errors"] == flagged.sum() > 0
    assert not flagged[found.indices[: -flagged.sum()]].any()
    assert (np.diff(found.gains) <= 0).all()
    np.testing.assert_allclose(found.gains, (label_quality(p, labels) - flagged)[found.indices])
    kept = label_errors(p, 150, labels=labels)
    assert kept.indices.tolist() == found.indices[:150].tolist()
    assert wrong[kept.indices].mean() < 0.02 < wrong.mean()


def test_quality():
    p = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    assert label_quality(p, [0, 2]).tolist() == pytest.approx([0.7, 0.1])
    margins = label_quality(p, [0, 2], score="normalized-margin")
    assert margins.tolist() == pytest.approx([(0.5 + 1) / 2, (-0.6 + 1) / 2])
    with pytest.raises(ValueError, match="'self-confidence' or 'normalized-margin'"):
        label_quality(p, [0, 2], score="margin")


def test_numbers_are_columns_even_where_classes_are_absent():
    p, labels, _ = noisy()
    rows = labels != 1
    assert find_label_errors(p[rows], labels[rows]).tolist() == (
        reference.errors(p[rows], labels[rows]).tolist()
    )
    with pytest.raises(ValueError, match="label of row 2 is 4; with 4 columns"):
        find_label_errors(p[:3], [0, 1, 4])


def test_names_are_columns_in_sorted_order():
    p, labels, _ = noisy()
    names = np.array(["ant", "bee", "cat", "dog"])[labels]
    assert find_label_errors(p, names).tolist() == find_label_errors(p, labels).tolist()
    with pytest.raises(ValueError, match="3 different labels and 4 columns"):
        find_label_errors(p[labels != 0], names[labels != 0])


def test_half_precision_and_tensors():
    p, labels, _ = noisy()
    p = p.astype(np.float16)
    wanted = label_errors(p, 50, labels=labels)
    for other in (torch.from_numpy(p.copy()), p.astype(np.float64)):
        found = label_errors(other, 50, labels=torch.from_numpy(labels))
        assert found.indices.tolist() == wanted.indices.tolist()


def clusters(n=300, classes=3, noise=0.2, seed=0):
    generator = np.random.default_rng(seed)
    truth = generator.integers(classes, size=n)
    x = generator.normal(size=(n, 8)) + 6 * np.eye(classes, 8)[truth]
    wrong = generator.random(n) < noise
    return x, np.where(wrong, (truth + 1) % classes, truth), wrong


def test_votes_are_those_of_brute_force():
    x, labels, wrong = clusters()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similar = unit @ unit.T
    np.fill_diagonal(similar, -np.inf)
    near = np.argsort(-similar, axis=1, kind="stable")[:, :7]
    found = label_error_votes(x, labels, neighbours=7)
    np.testing.assert_allclose(found.agreement, (labels[near] == labels[:, None]).mean(axis=1))
    for i in range(len(x)):
        counts = np.bincount(labels[near[i]], minlength=3)
        best = counts.max()
        wanted = labels[i] if counts[labels[i]] == best else int(counts.argmax())
        assert found.majority[i] == wanted
    assert found.errors.tolist() == (found.majority != labels).tolist()
    assert (found.errors & wrong).sum() / wrong.sum() > 0.9
    assert (found.errors & wrong).sum() / found.errors.sum() > 0.8


def test_votes_of_names_of_few_rows_and_in_small_blocks():
    x, labels, _ = clusters(50)
    names = np.array(["x", "y", "z"])[labels]
    whole = label_error_votes(x, names)
    small = label_error_votes(x.astype(np.float64), names, block_bytes=300)
    assert set(whole.majority.tolist()) <= {"x", "y", "z"}
    assert whole.majority.tolist() == small.majority.tolist()
    assert label_error_votes(x[:1], names[:1]).errors.tolist() == [False]
    assert label_error_votes(x[:2], ["a", "b"]).agreement.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        label_error_votes(np.where(np.arange(50)[:, None] == 3, 0.0, x), names)
    with pytest.raises(ValueError, match="neighbours is 0"):
        label_error_votes(x, names, neighbours=0)
