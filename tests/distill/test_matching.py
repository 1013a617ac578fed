from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from curate.errors import FingerprintError, ShardError
from distill import matching as module
from distill import recover_state
from distill.image_set import ImageSet
from distill.match_recipes import MATCH_RECIPES, MatchRecipe, match_recipe_for
from distill.match_step import RandomNetwork, attention_map, class_means, distances, draw_step
from distill.matching import match
from distill.networks import build
from distill.siamese import OPERATIONS, Siamese, _Warp, draw_siamese
from distill.teacher import normalise, pixel_range, pixels_of
from tests.distill.recover_toy import toy_images
from tests.references import matching_reference as plain

CPU = torch.device("cpu")
DM = MatchRecipe("dm", iterations=4, batch_real=5, learning_rate=0.2)
DAM = replace(DM, name="dam", attention=100.0, learning_rate=0.02)


def run(method=DAM, *, images=None, ipc=2, **options):
    options.setdefault("precision", "float64")
    return match(images or toy_images(), ipc=ipc, method=method, **options)


def same(a, b):
    return np.array_equal(a.pixels, b.pixels) and np.array_equal(
        a.recover_loss, b.recover_loss, equal_nan=True
    )


def stream(number=0):
    return torch.Generator().manual_seed(number)


def uneven_images():
    """Classes of 12, 7 and 3 images: the last has fewer than a batch."""
    whole = toy_images()
    rows = [np.flatnonzero(whole.labels == c)[:n] for c, n in enumerate((12, 7, 3))]
    return whole.subset(np.concatenate(rows))


# --- siamese augmentation -----------------------------------------------------------------------


def as_plain(siamese: Siamese, c: int, size: int) -> plain.View:
    """The operation of class `c`, found from its numbers, by the plain functions."""
    affine = siamese.affine[c]
    numbers = [float(v[c]) for v in (siamese.brightness, siamese.saturation, siamese.contrast)]
    right, down = (affine[:, 2] * size / 2).round().int().tolist()
    box = siamese.box[c].tolist()

    def view(x):
        if numbers != [0.0, 1.0, 1.0]:
            return plain.color(x, *numbers)
        if any(box):
            return plain.cutout(x, *box)
        if affine[0, 0] == -1:
            return x.flip(3)
        if affine[0, 1]:
            return plain.turn(x, float(torch.atan2(affine[1, 0], affine[1, 1])))
        if right or down:
            return plain.shift(x, right, down)
        return plain.stretch(x, float(affine[0, 0]), float(affine[1, 1]))

    return view


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_the_plain_one(operation, size):
    siamese = draw_siamese(6, size, stream(), operations=(operation,))
    x = torch.randn(6, 3, size, size, dtype=torch.float64, generator=stream(1))
    got = siamese(x, torch.arange(6))
    wanted = torch.cat([as_plain(siamese, c, size)(x[c : c + 1]) for c in range(6)])
    assert torch.allclose(got, wanted, atol=1e-12)
    assert not torch.allclose(got, x, atol=1e-3)


def test_draws_are_in_range_and_all_of_them_come():
    siamese = draw_siamese(6000, 32, stream())
    neutral = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    colored = (siamese.brightness != 0) | (siamese.saturation != 1) | (siamese.contrast != 1)
    moved = (siamese.affine != neutral).any(dim=2).any(dim=1)
    cut = (siamese.box != 0).any(dim=1)
    # Never two at once; a sixth each, and half of the flips show the image as it is.
    assert ((colored.int() + moved.int() + cut.int()) <= 1).all()
    assert colored.float().mean().item() == pytest.approx(1 / 6, abs=0.02)
    assert cut.float().mean().item() == pytest.approx(1 / 6, abs=0.02)
    assert moved.float().mean().item() == pytest.approx(3.5 / 6, abs=0.02)
    for value, low, high in (
        (siamese.brightness, -0.5, 0.5),
        (siamese.saturation, 0.0, 2.0),
        (siamese.contrast, 0.5, 1.5),
    ):
        drawn = value[colored]
        assert low <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high
    flipped = siamese.affine[:, 0, 0] == -1
    assert flipped.float().mean().item() == pytest.approx(1 / 12, abs=0.015)
    shifted = (siamese.affine[:, :, 2] != 0).any(dim=1)
    steps = siamese.affine[shifted][:, :, 2] * 16
    assert torch.equal(steps.round().unique(), torch.arange(-4.0, 5.0).double())
    assert torch.allclose(steps, steps.round())
    turned = siamese.affine[:, 0, 1].abs().asin().rad2deg()
    assert 14.5 < turned.max() <= 15
    stretched = siamese.affine[~flipped & (siamese.affine[:, 0, 1] == 0)][:, 0, 0]
    assert stretched.min() < 1 / 1.2 + 0.01 and 1.19 < stretched.max() <= 1.2
    sides = siamese.box[cut]
    assert ((sides[:, 2:] - sides[:, :2]) == 16).all()
    assert sides.min() == -8 and sides.max() == 40


def test_real_and_synthetic_images_of_a_class_change_alike():
    siamese = draw_siamese(4, 8, stream())
    x = torch.randn(3, 3, 8, 8, generator=stream(1))
    for c in range(4):
        alone = siamese(x[:1], torch.tensor([c]))
        among = siamese(x, torch.tensor([c, 0, 1]))
        assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize("size", [8, 9, 32])
def test_the_gradient_of_a_view_is_that_of_autograd(size):
    """By torch's own gradient of the same sampling, with many draws of every kind."""
    affine = draw_siamese(300, size, stream(), operations=OPERATIONS).affine
    x = torch.randn(300, 2, size, size, dtype=torch.float64, generator=stream(1))
    weight = torch.randn(x.shape, dtype=torch.float64, generator=stream(2))
    x.requires_grad_(True)
    (got,) = torch.autograd.grad((_Warp.apply(x, affine) * weight).sum(), x)
    grid = nn.functional.affine_grid(affine, list(x.shape), align_corners=False)
    seen = nn.functional.grid_sample(x, grid, align_corners=False)
    (wanted,) = torch.autograd.grad((seen * weight).sum(), x)
    assert torch.allclose(got, wanted, atol=1e-10)


# --- the distance -------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_attention_maps_have_length_one_and_the_power_of_the_paper(power):
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=stream())
    got = attention_map(x, power)
    wanted = (x.abs() ** power).sum(dim=1).flatten(1)
    wanted = wanted / (wanted**2).sum(dim=1, keepdim=True).sqrt()
    assert torch.allclose(got, wanted, atol=1e-14)


def features_of(recipe, images=None):
    network = RandomNetwork(recipe, images or toy_images(), CPU, torch.float64)
    network.redraw(stream())
    return network


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(
    "weights", [{}, {"attention": 100.0}, {"attention": 3.0, "power": 1, "embedding": 0.0}]
)
def test_the_loss_and_its_gradient_are_the_plain_ones(weights, mirror):
    recipe = replace(DM, mirror=mirror, **weights)
    network = features_of(recipe)
    real = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=stream(1))
    synthetic = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=stream(2))
    synthetic.requires_grad_(True)

    def means(x):
        x = torch.cat([x, x.flip(-1)]) if mirror else x
        return [class_means(f, [len(x)]) for f in network(x)]

    got = distances(means(synthetic), means(real), recipe)
    wanted = plain.class_loss(
        network.layers,
        real,
        synthetic,
        lambda x: x,
        embedding=recipe.embedding,
        attention=recipe.attention,
        power=recipe.power,
        mirror=mirror,
    )
    assert got.item() == pytest.approx(wanted.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), synthetic)
    (reference,) = torch.autograd.grad(wanted, synthetic)
    assert torch.allclose(gradient, reference, rtol=1e-9, atol=1e-14)


def test_class_means_of_uneven_classes():
    x = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(class_means(x, [2, 4]), torch.stack([x[:2].mean(0), x[2:].mean(0)]))
    assert torch.equal(class_means(x, [3, 3]), torch.stack([x[:3].mean(0), x[3:].mean(0)]))


def test_fyi_the_loss_does_not_see_which_way_a_synthetic_image_looks():
    recipe = replace(DAM, augment=OPERATIONS)
    for mirror, equal in ((True, True), (False, False)):
        state = module._Matching(
            replace(recipe, mirror=mirror), toy_images(), 3, 0, CPU, torch.float64, 1000
        )
        turned = deepcopy(state)
        turned.x[:, 1] = turned.x[:, 1].flip(-1)
        state.step()
        turned.step()
        assert torch.allclose(state.loss, turned.loss, rtol=1e-9) == equal
        # The gradient of a mirrored image is the mirrored gradient.
        assert torch.allclose(state.velocity[:, 0], turned.velocity[:, 0], atol=1e-10) == equal
        flipped = turned.velocity[:, 1].flip(-1)
        assert torch.allclose(state.velocity[:, 1], flipped, atol=1e-10) == equal


def test_weights_are_drawn_as_torch_draws_those_of_new_networks():
    images = toy_images()
    network = RandomNetwork(DM, images, CPU, torch.float32)
    fresh = build("convnet3-in", classes=3, size=8).features
    for number in range(3):
        network.redraw(stream(number))
        for own, other in zip(network.layers, fresh, strict=True):
            assert type(own) is type(other)
            for (name, mine), theirs in zip(
                own.named_parameters(), other.parameters(), strict=True
            ):
                if isinstance(own, nn.GroupNorm):
                    assert torch.equal(mine, theirs)
                    continue
                bound = own.weight[0].numel() ** -0.5
                assert mine.shape == theirs.shape and mine.abs().max() <= bound
                assert theirs.abs().max() <= bound
                if name == "weight":
                    assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
                    assert mine.mean().item() == pytest.approx(0, abs=bound / 20)
    first = network.layers[0].weight.clone()
    network.redraw(stream(1))
    assert not torch.equal(network.layers[0].weight, first)
    network.redraw(stream(2))
    assert torch.equal(network.layers[0].weight, first)


# --- whole runs ---------------------------------------------------------------------------------


def plainly(recipe, images, ipc, seed=0):
    """The run by the reference: its pixels by rank and class, and each class's last loss."""
    mean, std = images.moments()
    rows = [np.flatnonzero(images.labels == c) for c in range(images.classes)]

    def pixels(chosen):
        return normalise(images.batch(chosen), mean, std).double()

    steps = []
    for number in range(recipe.iterations):
        drawn = draw_step(recipe, rows, size=images.size, ipc=ipc, seed=seed, step=number)
        network = RandomNetwork(recipe, images, CPU, torch.float64)
        network.redraw(drawn.network)
        views = [
            as_plain(drawn.siamese, c, images.size) if drawn.siamese else (lambda x: x)
            for c in range(images.classes)
        ]
        steps.append((network.layers, [pixels(own) for own in drawn.rows], views))
    at_first = match(images, ipc=ipc, method=replace(recipe, iterations=0), seed=seed)
    ids = at_first.init_id.reshape(ipc, -1)
    begun = [pixels(np.searchsorted(images.ids, ids[:, c])) for c in range(images.classes)]
    limits = tuple(limit.double() for limit in pixel_range(mean, std))
    found, losses = plain.run(
        begun,
        steps,
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum,
        limits=limits,
        embedding=recipe.embedding,
        attention=recipe.attention,
        power=recipe.power,
        mirror=recipe.mirror,
    )
    by_rank = torch.stack(found, dim=1).flatten(0, 1)
    return pixels_of(by_rank, mean, std).permute(0, 2, 3, 1).numpy(), losses


def sorted_ids(images: ImageSet) -> ImageSet:
    order = np.argsort(images.ids)
    return images.subset(order)


@pytest.mark.parametrize(
    "changes",
    [{"mirror": False, "augment": ()}, {"mirror": False}, {"mirror": True}, {"power": 1}],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_a_run_is_the_one_written_plainly(changes):
    images = sorted_ids(uneven_images())
    recipe = replace(DAM, learning_rate=1.0, iterations=3, **changes)
    got = run(recipe, images=images)
    wanted, losses = plainly(recipe, images, 2)
    assert np.array_equal(got.pixels, wanted)
    assert got.recover_loss == pytest.approx(losses * 2, rel=1e-6)
    begun = run(replace(recipe, iterations=0), images=images)
    assert np.abs(got.pixels.astype(int) - begun.pixels).mean() > 0.5


def test_dm_is_the_one_written_plainly():
    images = sorted_ids(toy_images())
    recipe = replace(DM, iterations=3)
    got = run(recipe, images=images)
    wanted, losses = plainly(recipe, images, 2)
    assert np.array_equal(got.pixels, wanted)
    assert got.recover_loss == pytest.approx(losses * 2, rel=1e-6)


def test_flip_off_is_the_base_method():
    base = run(replace(DAM, mirror=False))
    assert same(run(DAM, flip=False), base)
    assert not same(run(DAM, flip=True), base)


def test_datadam_without_attention_is_dm():
    assert same(run(replace(DAM, attention=0.0, learning_rate=DM.learning_rate)), run(DM))


def test_classes_that_go_together_do_not_matter(monkeypatch):
    one = run(images=uneven_images())
    monkeypatch.setitem(module._TOGETHER, "cpu", 1)
    apart = run(images=uneven_images())
    assert np.array_equal(one.pixels, apart.pixels)
    assert np.allclose(one.recover_loss, apart.recover_loss, rtol=1e-9)


def test_blocks_hold_no_more_images_than_go_together():
    rows = [np.arange(n) for n in (5, 5, 3, 30, 1, 1)]
    for mirror, wanted in (
        (False, [[0, 1, 2], [3], [4, 5]]),
        (True, [[0], [1, 2], [3], [4, 5]]),
    ):
        recipe = replace(DM, mirror=mirror)
        state = module._Matching(recipe, toy_images(), 2, 0, CPU, torch.float32, 17)
        assert state._blocks(rows) == wanted


def test_images_begin_as_real_ones_and_stay_in_range():
    images = toy_images()
    begun = run(replace(DAM, iterations=0), ipc=4)
    rows = [int(name.removeprefix("img")) for name in begun.init_id]
    assert np.array_equal(begun.pixels, images.images[rows])
    assert np.array_equal(images.labels[rows], begun.labels)
    assert len(set(rows)) == 12 and set(begun.init_kind) == {"real"}
    assert np.isnan(begun.recover_loss).all() and np.isnan(begun.bn_loss).all()
    assert np.array_equal(run(replace(DAM, iterations=0), ipc=2).init_id, begun.init_id[:6])
    state = module._Matching(replace(DM, learning_rate=1e3), images, 2, 0, CPU, torch.float32, 1000)
    state.step()
    low, high = pixel_range(*images.moments())
    assert (state.x >= low).all() and (state.x <= high).all()
    assert (state.x == low).any() and (state.x == high).any()
    got = run(ipc=4)
    assert (got.mean, got.std) == images.moments()
    assert np.array_equal(got.init_id, begun.init_id) and np.isfinite(got.recover_loss).all()
    assert np.isnan(got.teacher_confidence).all()


def test_a_step_draws_real_images_of_each_class_without_repetition():
    images = uneven_images()
    rows = [np.flatnonzero(images.labels == c) for c in range(3)]
    seen = [set() for _ in rows]
    for step in range(30):
        drawn = draw_step(DM, rows, size=8, ipc=2, seed=0, step=step)
        assert [len(own) for own in drawn.rows] == [5, 5, 3]
        for c, own in enumerate(drawn.rows):
            assert len(set(own)) == len(own) and (images.labels[own] == c).all()
            seen[c] |= set(own.tolist())
        again = draw_step(DM, rows, size=8, ipc=2, seed=0, step=step)
        assert all(map(np.array_equal, drawn.rows, again.rows))
    assert [len(own) for own in seen] == [12, 7, 3]


MATCHED = {"dm": replace(DM, learning_rate=1.0), "datadam": replace(DAM, learning_rate=0.1)}


@cache
def distance(name, steps, prefix, nested=False):
    """Of the first `prefix` of 4 images of each class from all real ones, by the reference.

    On a network that torch drew and that no run has seen.
    """
    images = toy_images(size=16)
    recipe = replace(
        MATCHED[name], batch_real=16, augment=(), mirror=False, iterations=steps, nested=nested
    )
    got = run(recipe, images=images, ipc=4, precision="float32").prefix(prefix)
    x = normalise(torch.from_numpy(got.pixels).permute(0, 3, 1, 2), got.mean, got.std)
    real = normalise(images.batch(slice(None)), got.mean, got.std)
    layers = build("convnet3-in", classes=3, size=16, seed=1000).features
    with torch.no_grad():
        return sum(
            plain.class_loss(
                layers,
                real[images.labels == c],
                x[got.labels == c],
                lambda x: x,
                embedding=recipe.embedding,
                attention=recipe.attention,
                power=4,
                mirror=False,
            ).item()
            for c in range(3)
        )


@pytest.mark.parametrize("name", ["dm", "datadam"])
def test_matching_lowers_the_distance_on_a_network_never_seen(name):
    assert distance(name, 25, 4) < 0.7 * distance(name, 0, 4)


def test_nested_matches_prefixes_too():
    """MDC's aim: the first image alone is nearer to its class than where the whole is matched."""
    assert distance("datadam", 25, 1, nested=True) < 0.8 * distance("datadam", 25, 1)
    assert distance("datadam", 25, 4, nested=True) < 0.8 * distance("datadam", 0, 4)


# --- resume, seeds, streams ---------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_check_k_a_resumed_run_is_the_uninterrupted_one(tmp_path, after, precision, monkeypatch):
    path, recipe = tmp_path / "match.safetensors", replace(DAM, nested=True)
    wanted = run(recipe, precision=precision)
    monkeypatch.setattr(module, "_CHECKPOINT_SECONDS", 0.0)
    save, saves = recover_state.save, 0

    def killed(*arguments):
        nonlocal saves
        save(*arguments)
        saves += 1
        if saves == after:
            raise KilledError

    monkeypatch.setattr(recover_state, "save", killed)
    with pytest.raises(KilledError):
        run(recipe, precision=precision, checkpoint=path)
    monkeypatch.setattr(recover_state, "save", save)
    assert same(run(recipe, precision=precision, checkpoint=path), wanted)
    monkeypatch.setattr(module._Matching, "step", None)  # a finished run takes no step
    assert same(run(recipe, precision=precision, checkpoint=path), wanted)


def test_checkpoints_of_other_runs_and_other_files(tmp_path):
    path = tmp_path / "match.safetensors"
    run(replace(DM, iterations=1), checkpoint=path)
    with pytest.raises(FingerprintError, match="another run; different: seed"):
        run(replace(DM, iterations=1), checkpoint=path, seed=1)
    with pytest.raises(FingerprintError, match="different: recipe"):
        run(replace(DM, iterations=1), checkpoint=path, flip=False)
    path.write_bytes(b"nothing")
    with pytest.raises(ShardError, match="remove it"):
        run(DM, checkpoint=path)


def test_the_result_is_a_function_of_inputs_and_seed():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = run(precision="auto")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    torch.manual_seed(2)
    assert same(run(precision="auto"), one)
    other = run(precision="auto", seed=1)
    assert not same(other, one) and not np.array_equal(other.init_id, one.init_id)


def test_bfloat16_is_near_float32():
    recipe = replace(DAM, iterations=10)
    half, full = (run(recipe, precision=p) for p in ("bfloat16", "float32"))
    assert not same(half, full)
    assert np.allclose(half.recover_loss, full.recover_loss, rtol=0.1)
    assert np.abs(half.pixels.astype(int) - full.pixels).mean() < 4


# --- names and bad requests ---------------------------------------------------------------------


def test_named_methods():
    dm, dam = MATCH_RECIPES["dm"], MATCH_RECIPES["datadam"]
    assert (dm.iterations, dm.batch_real, dm.learning_rate) == (20000, 256, 1.0)
    assert (dm.momentum, dm.attention, dm.embedding) == (0.5, 0.0, 1.0)
    assert (dam.iterations, dam.attention, dam.power) == (8000, 100.0, 4)
    assert dam.embedding == pytest.approx(100 * 0.01)
    assert all(r.mirror and r.augment == OPERATIONS for r in MATCH_RECIPES.values())
    assert all(r.name == name for name, r in MATCH_RECIPES.items())
    assert match_recipe_for("datadam", size=32, ipc=50).learning_rate == 1
    assert match_recipe_for("datadam", size=32, ipc=51).learning_rate == 10
    assert match_recipe_for("datadam", size=224, ipc=1).embedding == pytest.approx(2.0)
    assert match_recipe_for("dm", size=64, ipc=1).network == "convnet4-in"
    assert match_recipe_for("dm", size=32, ipc=1, iterations=7).iterations == 7
    assert match_recipe_for(DAM, size=224, ipc=99) is DAM


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iterations": -1}, "iterations is -1; it must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"batch_real": 0}, "batch_real is 0; it must be at least 1"),
        ({"power": 0}, "power is 0; it must be at least 1"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must be in \[0, 1\)"),
        ({"embedding": -1.0}, "must not be negative"),
        ({"embedding": 0.0}, "one of them above 0"),
        ({"embedding": float("nan")}, "one of them above 0"),
        ({"augment": ("colour",)}, "augment has 'colour'; use some of color, crop"),
    ],
)
def test_numbers_out_of_range(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(DM, **changes)


def test_bad_requests():
    images = toy_images()
    with pytest.raises(ValueError, match="method 'datadan' is not one of dm, datadam; did you"):
        match(images, ipc=1, method="datadan")
    with pytest.raises(ValueError, match="ipc is 0"):
        run(ipc=0)
    with pytest.raises(ValueError, match="class 'c0' has 16 images and ipc is 17"):
        run(ipc=17)
    with pytest.raises(ValueError, match="one class"):
        run(images=ImageSet.of(images.images[:2], [0, 0]), ipc=1)
    with pytest.raises(ValueError, match="'convnet3' cannot be matched with; use convnet3-in"):
        run(replace(DM, network="convnet3"))
    with pytest.raises(ValueError, match="'resnet18' cannot be matched with"):
        run(replace(DM, network="resnet18"))
    with pytest.raises(ValueError, match="precision 'half' is not one of auto"):
        run(precision="half")
    small = ImageSet.of(images.images[:, :4, :4], images.labels)
    with pytest.raises(ValueError, match="4 pixels are too small"):
        run(images=small)


def test_progress_is_reported(caplog):
    from curate import progress

    progress.show("log")
    try:
        with caplog.at_level("INFO"):
            run(DM)
    finally:
        progress.show("silent")
    assert "match: 4 steps" in caplog.text
