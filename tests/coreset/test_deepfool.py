import numpy as np
import pytest
import torch

from coreset.deepfool import deepfool, deepfool_model
from tests.references.deepfool_reference import distances as reference


def problem(n=50, d=5, classes=4, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, d)).astype(np.float32)
    return x, (generator.normal(size=(classes, d)), generator.normal(size=classes))


def linear(head, dtype=torch.float64):
    layer = torch.nn.Linear(head[0].shape[1], len(head[1]), dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head[0]))
        layer.bias.copy_(torch.from_numpy(head[1]))
    return layer


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (4, 1), (12, 2)])
def test_the_distance_is_that_of_the_projections(classes, seed):
    x, head = problem(classes=classes, seed=seed)
    wanted = reference(x, *head)
    found = deepfool(x, 50, head=head)
    assert found.indices.tolist() == np.argsort(wanted, kind="stable").tolist()
    np.testing.assert_allclose(-found.gains, np.sort(wanted), rtol=1e-9)


def test_no_shorter_step_changes_the_prediction():
    x, head = problem(n=20)
    found = deepfool(x, 20, head=head)
    generator = np.random.default_rng(1)
    direction = generator.normal(size=(2000, x.shape[1]))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    for row, gain in zip(found.indices, found.gains, strict=True):
        scores = (x[row] - 0.999 * gain * direction) @ head[0].T + head[1]
        assert (scores.argmax(axis=1) == (x[row] @ head[0].T + head[1]).argmax()).all()


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_the_iteration_on_a_linear_model_is_the_closed_form(classes):
    x, head = problem(classes=classes)
    found = deepfool_model(linear(head), torch.from_numpy(x).double(), batch=7)
    np.testing.assert_allclose(found, reference(x, *head), rtol=1e-9)


def test_the_iteration_crosses_the_boundary_of_a_network_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(12, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(16, 12),
    )
    model.train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(30, 3, 2, 2)
    found = deepfool_model(model, images)
    assert [part.training for part in model] == [True, True, False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.shape == (30,) and (found > 0).all() and np.isfinite(found).all()
    # The same rows one by one, and never shorter with fewer classes to go to in one step.
    alone = [deepfool_model(model, images[i : i + 1])[0] for i in range(30)]
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    # A random step of that length rarely changes a prediction that the found step just changes.
    model.eval()
    with torch.no_grad():
        own = model(images).argmax(dim=1)
        step = torch.randn(30, 3, 2, 2)
        length = torch.from_numpy(found).float()[:, None, None, None]
        step *= length / step.flatten(1).norm(dim=1)[:, None, None, None]
        assert (model(images + step).argmax(dim=1) == own).float().mean() > 0.7


def test_more_than_ten_classes_give_no_shorter_steps():
    x, head = problem(classes=30)
    ten = deepfool_model(linear(head), torch.from_numpy(x).double())
    assert (ten >= reference(x, *head) * (1 - 1e-9)).all()
    everything = deepfool_model(linear(head), torch.from_numpy(x).double(), classes=30)
    np.testing.assert_allclose(everything, reference(x, *head), rtol=1e-9)


def test_a_model_that_does_not_depend_on_its_input_is_infinitely_far():
    model = linear((np.zeros((3, 5)), np.array([0.0, 1.0, 0.5])))
    assert np.isinf(deepfool_model(model, torch.zeros(2, 5, dtype=torch.float64))).all()
    assert deepfool_model(model, torch.zeros(0, 5, dtype=torch.float64)).shape == (0,)


def test_classes_of_equal_weights_never_win():
    x, (weight, bias) = problem(classes=2)
    weight[1] = weight[0]
    found = deepfool(x, 3, head=(weight, np.array([1.0, 0.0])))
    assert found.indices.tolist() == [0, 1, 2] and np.isinf(found.gains).all()
    tie = deepfool(x, 1, head=(weight, np.array([1.0, 1.0])))
    assert tie.gains.tolist() == [0.0]
    assert np.isinf(deepfool(x, 1, head=(weight[:1], bias[:1])).gains).all()


def test_blocks_and_containers_do_not_matter(tmp_path):
    x, head = problem(n=100)
    x = x.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    whole = deepfool(x, 30, head=head)
    for other, options in (
        (x, {"block_bytes": 300}),
        (np.load(tmp_path / "x.npy", mmap_mode="r"), {}),
        (torch.from_numpy(x.copy()), {}),
        (x.astype(np.float64), {}),
    ):
        found = deepfool(other, 30, head=tuple(map(torch.from_numpy, head)), **options)
        assert found.indices.tolist() == whole.indices.tolist()
        np.testing.assert_allclose(found.gains, whole.gains, rtol=1e-9)


def test_what_is_refused():
    x, (weight, bias) = problem()
    with pytest.raises(ValueError, match=r"\(classes, 5\)"):
        deepfool(x, 1, head=(weight[:, :3], bias))
    with pytest.raises(ValueError, match="head holds NaN"):
        deepfool(x, 1, head=(weight * np.nan, bias))
    for options in ({"classes": 1}, {"max_iter": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            deepfool_model(linear((weight, bias)), torch.from_numpy(x).double(), **options)
