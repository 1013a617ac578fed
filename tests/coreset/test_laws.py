"""Laws that every selection method obeys: all of `coreset.METHODS`, called as users call them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import coreset
from coreset.selecting import select
from coreset.selectors import class_name
from tests.coreset.toy import store_of, toy

N, CLASSES = 60, 3
NAMES = list(coreset.METHODS)
GREEDY = [name for name in NAMES if coreset.METHODS[name].steps]
NESTED = [name for name in NAMES if coreset.METHODS[name].nested]
FEATURES = [name for name in NAMES if coreset.METHODS[name].needs[0] == "features"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return _inputs(toy(N, classes=CLASSES), tmp_path_factory.mktemp("store"))


def _inputs(made: dict[str, Any], folder: Any) -> dict[str, Any]:
    from coreset.gradients import LastLayerGradients

    held_out = toy(N, classes=CLASSES, seed=1)
    return {
        **made,
        "dynamics": store_of(folder, made),
        "validation": LastLayerGradients.of(
            held_out["probabilities"], held_out["labels"], features=held_out["features"]
        ),
    }


def run(name: str, inputs: dict[str, Any], budget: int | float, **options: Any):
    named = {key: value for key, value in inputs.items() if key != "features"}
    return select(inputs["features"], budget, method=name, **named, **options)


def same(a: Any, b: Any) -> None:
    assert a.indices.tolist() == b.indices.tolist()
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-5)
    np.testing.assert_allclose(a.gains, b.gains, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_class", ["pooled", "balanced"])
@pytest.mark.parametrize("budget", [0, 1, 7, N - 1, N])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_budget(pool, name, budget, per_class):
    found = run(name, pool, budget, per_class=per_class)
    assert len(found) == len(set(found.indices.tolist())) == budget
    assert found.indices.dtype == np.int64
    assert found.weights.dtype == np.float32 and found.weights.shape == (budget,)
    assert found.gains.dtype == np.float64 and found.gains.shape == (budget,)
    assert budget == 0 or 0 <= found.indices.min() <= found.indices.max() < N
    if per_class == "balanced":
        counts = np.bincount(pool["labels"][found.indices], minlength=CLASSES)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_result_and_the_global_streams_stay_as_they_are(pool, name):
    np.random.seed(5)  # noqa: NPY002 - the stream that must not be touched
    torch.manual_seed(5)
    before = np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002
    errors = np.geterr()
    first = run(name, pool, 12, seed=3)
    after = np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()  # noqa: NPY002
    assert after == before and np.geterr() == errors
    same(first, run(name, pool, 12, seed=3))


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_are_left_as_they_are(pool, name):
    kept = {key: np.array(pool[key]) for key in ("features", "labels", "probabilities")}
    run(name, pool, 12)
    for key, value in kept.items():
        np.testing.assert_array_equal(pool[key], value)


@pytest.mark.parametrize("name", NESTED)
def test_a_smaller_budget_gives_a_prefix(pool, name):
    small, large = (run(name, pool, m, per_class="pooled") for m in (9, 25))
    assert small.indices.tolist() == large.indices[:9].tolist()
    np.testing.assert_allclose(small.gains, large.gains[:9], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_selected_rows_are_not_chosen_again(pool, name):
    before = np.array([3, 50, 17])
    found = run(name, pool, 20, selected=before)
    assert len(found) == 20
    assert not set(found.indices.tolist()) & set(before.tolist())
    assert len(run(name, pool, N - 3, selected=before)) == N - 3


@pytest.mark.parametrize("name", GREEDY)
def test_going_on_from_the_first_choices_is_choosing_all_at_once(pool, name):
    whole = run(name, pool, 20, per_class="pooled")
    rest = run(name, pool, 12, per_class="pooled", selected=whole.indices[:8])
    assert rest.indices.tolist() == whole.indices[8:].tolist()


@pytest.mark.parametrize("name", GREEDY)
def test_the_generator_makes_the_same_choices(pool, name):
    method = coreset.METHODS[name]
    named = {need: pool[need] for need in method.needs[1:]}
    stream = coreset.steps(pool[method.needs[0]], method=name, **named)
    first = [next(stream) for _ in range(10)]
    found = run(name, pool, 10, per_class="pooled", seed=0)
    assert [step.row for step in first] == found.indices.tolist()
    np.testing.assert_allclose([step.gain for step in first], found.gains, rtol=1e-6)
    assert len(first) + len(list(stream)) == N


@pytest.mark.parametrize("container", ["memmap", "tensor", "float64", "read-only"])
@pytest.mark.parametrize("name", FEATURES)
def test_the_container_of_the_features_does_not_matter(pool, name, container, tmp_path):
    x = pool["features"].astype(np.float16)
    if container == "memmap":
        np.save(tmp_path / "x.npy", x)
        other = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif container == "tensor":
        other = torch.from_numpy(x.copy())
    elif container == "float64":
        other = x.astype(np.float64)
    else:
        other = x.copy()
        other.flags.writeable = False
    same(
        run(name, {**pool, "features": x}, 12, seed=2),
        run(name, {**pool, "features": other}, 12, seed=2),
    )


@pytest.mark.parametrize("name", FEATURES)
def test_small_blocks_give_the_same_result(pool, name):
    import inspect

    if "block_bytes" not in inspect.signature(coreset.METHODS[name].function).parameters:
        assert name in ("uniform",), "a method that reads features reads them in bounded blocks"
        return
    same(run(name, pool, 12), run(name, pool, 12, block_bytes=500))


@pytest.mark.parametrize("name", FEATURES)
def test_a_row_of_nan_is_named(pool, name):
    if name == "uniform":
        return  # reads only the number of rows
    x = pool["features"].copy()
    x[41, 2] = np.nan
    with pytest.raises(ValueError, match=r"row 41\b.*NaN"):
        run(name, {**pool, "features": x}, 5, per_class="pooled")


@pytest.mark.parametrize("name", NAMES)
def test_duplicated_rows(name, tmp_path):
    made = toy(20, classes=2)
    twice = {key: np.concatenate([value, value]) for key, value in made.items() if key != "head"}
    inputs = _inputs({**twice, "head": made["head"]}, tmp_path)
    if coreset.METHODS[name].needs[-1] == "validation":
        inputs["validation"] = inputs["validation"].subset(np.arange(0))
        two = toy(10, classes=2, seed=1)
        from coreset.gradients import LastLayerGradients

        inputs["validation"] = LastLayerGradients.of(
            two["probabilities"], two["labels"], features=two["features"]
        )
    for budget in (3, 30, 40):
        assert len(run(name, inputs, budget)) == budget


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_equal(name, tmp_path):
    made = toy(12, classes=1)
    equal = {key: np.repeat(value[:1], 12, axis=0) for key, value in made.items() if key != "head"}
    inputs = _one_class(_with_head(equal, made), tmp_path)
    for budget in (1, 5, 12):
        assert sorted(set(run(name, inputs, budget).indices.tolist())) == sorted(
            run(name, inputs, budget).indices.tolist()
        )
        assert len(run(name, inputs, budget)) == budget


@pytest.mark.parametrize("name", NAMES)
def test_one_row(name, tmp_path):
    inputs = _one_class(toy(1, classes=1), tmp_path)
    assert run(name, inputs, 1).indices.tolist() == [0]
    assert run(name, inputs, 0).indices.tolist() == []


def _with_head(rows: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    return {**rows, "head": made["head"]}


def _one_class(made: dict[str, Any], folder: Any) -> dict[str, Any]:
    from coreset.gradients import LastLayerGradients

    gradients = LastLayerGradients.of(
        made["probabilities"], made["labels"], features=made["features"]
    )
    return {**made, "dynamics": store_of(folder, made), "validation": gradients}


@pytest.mark.parametrize("bad", [-1, N + 1, 1.5, -0.2, "10", None, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_makes_no_sense_is_refused(pool, name, bad):
    with pytest.raises((ValueError, TypeError), match="budget"):
        run(name, pool, bad)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_input_is_named(pool, name):
    method = coreset.METHODS[name]
    empty = {key: None for key in pool}
    with pytest.raises(ValueError, match="needs"):
        run(name, empty, 5)
    for need in method.needs[1:]:
        with pytest.raises(ValueError, match=need):
            run(name, {**pool, need: None}, 5, per_class="pooled")


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_different_lengths_are_refused(pool, name):
    for need in (*coreset.METHODS[name].needs[1:], "labels"):
        if need in ("labels", "probabilities", "difficulty"):
            with pytest.raises(ValueError, match=r"rows|one per row|length"):
                run(name, {**pool, need: pool[need][:-1]}, 5, per_class="balanced")


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_refused(pool, name):
    with pytest.raises(TypeError, match="no option 'blok_bytes'"):
        run(name, pool, 5, blok_bytes=3)


@pytest.mark.parametrize("name", NAMES)
def test_the_class_is_the_function(pool, name):
    from sklearn.base import clone

    named = {key: value for key, value in pool.items() if key not in ("features", "labels")}
    made = getattr(coreset, class_name(name))(budget=0.2, seed=4)
    fitted = clone(made).fit(pool["features"], pool["labels"], **named)
    found = run(name, pool, 0.2, seed=4)
    assert fitted.indices_.tolist() == found.indices.tolist()
    assert fitted.weights_.tolist() == found.weights.tolist()
    assert fitted.transform(pool["features"]).shape == (12, pool["features"].shape[1])
    assert hasattr(fitted, "radius_") == ("radius" in found.facts)
