"""`curate distill`: from a labelled pool to a distilled set with soft labels.

decode -> squeeze (teachers) -> recover (images) -> relabel (soft labels) -> the set -> validate;
each a folder that is used again where nothing that it depends on has changed.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curate.manifest import (
    StepFolder,
    atomic_write_bytes,
    atomic_write_json,
    check_step,
    locked,
    open_step,
    read_manifest,
)
from curate.pool import Pool
from curate.runtime import resolve_device
from distill.distilled import DistilledSet
from distill.distilled_images import DistilledImages
from distill.image_set import ImageSet
from distill.match_recipes import MatchRecipe
from distill.matching import match
from distill.recover import recover
from distill.relabel import relabel
from distill.soft_labels import SoftLabels
from distill.squeeze import squeeze
from distill.teacher import Teacher
from distill.validate import usual_batch
from pipelines.distill_config import DistillConfig
from pipelines.distill_params import Request
from pipelines.labelled_images import check_unusable, decode_pool, open_images
from pipelines.outputs import check_out, default_out, with_paths
from pipelines.pool_labels import Labels, check_classes
from pipelines.report_distill_pictures import keep_beginnings
from pipelines.reporting import REPORT, write_report
from pipelines.source import open_pool, pool_path

logger = logging.getLogger(__name__)


def distill_pool(pool: str | Path | Pool, *, ipc: int, **flags: Any) -> DistilledSet:
    """Distill a labelled pool to `ipc` synthetic images of every class.

    Parameters
    ----------
    pool : str, Path or Pool
        What `curate.Pool.open` takes, or a pool that is open; it must have a column of classes.
    ipc : int
        Images per class.
    **flags
        The other fields of `pipelines.distill_config.DistillConfig`, which are the flags of
        ``curate distill``: out, label_col, size, method, network (one name or several),
        squeeze_epochs, iterations, label_epochs, test_pool, validate_epochs, seed, ...

    Returns
    -------
    distill.DistilledSet
        What lies in ``out / "distilled"``.

    Raises
    ------
    ValueError
        If a parameter is out of range, or a network is not known.
    PoolError
        If the pool has no images, no column of classes, or only one class.
    BudgetError
        If a class has fewer usable images than `ipc`.
    FailedRowsError
        If more rows cannot be used than ``max_failed`` allows.
    FingerprintError
        If the output folder holds the result of other parameters and ``overwrite`` is off.
    """
    opened = pool if isinstance(pool, Pool) else None
    name = pool_path(pool) if isinstance(pool, Pool) else str(pool)
    network = flags.pop("network", None)
    if network is not None:
        flags["network"] = (network,) if isinstance(network, str) else tuple(network)
    if flags.get("test_pool") is not None:
        flags["test_pool"] = str(flags["test_pool"])
    out = run_distill(DistillConfig(pool=name, ipc=ipc, **with_paths(flags)), opened)
    return DistilledSet.open(out / "distilled")


def run_distill(config: DistillConfig, opened: Pool | None = None) -> Path:
    """Distill as the configuration says, and return the output folder; see `distill_pool`."""
    resolve_device(config.device)  # a wrong one is told before hours of work, not after
    request = Request(config, opened or open_pool(config))
    if request.test is not None and request.test[0].fingerprint() == request.pool.fingerprint():
        logger.warning("--test-pool is --pool: accuracies on training images say little")
    out = config.out or default_out(config.pool, "distilled")
    check_out(config.pool, out)
    with locked(out):
        check_step(out, **request.identity, overwrite=config.overwrite)
        run = open_step(out, **request.identity, overwrite=config.overwrite, keep_content=True)
        if run.complete and _is_whole(out, config):
            logger.info("%s is complete already; nothing to do", out)
        else:
            _Distillation(request, run).run()
    return out


def describe_run(out: Path) -> str:
    """Return what a run made and where it lies, in lines for people."""
    manifest = read_manifest(out) or {}
    sizes, teachers = manifest["bytes"], manifest["teachers"]
    lines = [
        f"teacher     {teacher['network']}, {teacher['epochs']} epochs, "
        + ("no test images" if teacher["accuracy"] is None else f"{teacher['accuracy']:.2%} top-1")
        for teacher in teachers
    ]
    lines += [
        f"images      {manifest['images']:,} of {manifest['classes']} classes, "
        f"{manifest['size']} x {manifest['size']}, {sizes['images']:,} bytes",
        f"labels      {manifest['label_epochs']} epochs of views, {sizes['labels']:,} bytes",
        f"result      {out / 'distilled'}",
        f"report      {out / REPORT}",
    ]
    table = out / "validation" / "table.md"
    if manifest["params"]["validate_epochs"]:
        lines += ["", table.read_text(encoding="utf-8")]
    return "\n".join(lines)


class _Distillation:
    """One run; the methods are its stages, in their order."""

    def __init__(self, request: Request, run: StepFolder) -> None:
        self.request, self.config, self.step, self.folder = request, request.config, run, run.path

    def run(self) -> None:
        """Run what is not there yet."""
        step = self.decode("images", self.request.pool, self.request.labels)
        check_unusable(step, self.config.max_failed)
        train = open_images(step)
        check_classes(self.request.labels, train.counts, self.config.ipc)
        test = self.test_images()
        teachers = [
            self.teacher(number, name, train, step, test)
            for number, name in enumerate(self.config.network)
        ]
        images = self.recover(teachers, train, step)
        labels = self.relabel(images, teachers)
        distilled = DistilledSet(images, labels, self.provenance(step, teachers))
        distilled.write(self.folder / "distilled", overwrite=True)
        keep_beginnings(
            self.folder, train, teachers, recipe=self.request.recipe, seed=self.config.seed
        )
        if test is not None and self.config.validate_epochs:
            self.validate(distilled, train, test[1], teachers)
        self.finish(step, teachers, labels)

    def decode(self, name: str, pool: Pool, labels: Labels) -> StepFolder:
        """Decode the images of one of the pools."""
        config = self.config
        return decode_pool(
            pool,
            labels,
            self.folder / name,
            index=self.folder / f"{name}-index",
            size=self.request.size,
            # The test images take the size that was found in the pool.
            resize=config.size is not None or pool is not self.request.pool,
            max_pixels=config.max_pixels,
            workers=config.workers,
        )

    def test_images(self) -> tuple[StepFolder, ImageSet] | None:
        """Decode the held-out images, if there are any."""
        if self.request.test is None:
            return None
        step = self.decode("test-images", *self.request.test)
        check_unusable(step, self.config.max_failed)
        return step, open_images(step)

    def teacher(
        self,
        number: int,
        network: str,
        train: ImageSet,
        images: StepFolder,
        test: tuple[StepFolder, ImageSet] | None,
    ) -> Teacher:
        """Train a teacher; with a number above 0, from other random weights."""
        folder = self.folder / f"teacher-{number}"
        seed = self.config.seed + number
        inputs = {"images": images.fingerprint}
        if test is not None:
            inputs["test"] = test[0].fingerprint
        step = open_step(
            folder,
            step="squeeze",
            step_version=1,
            params={"network": network, "epochs": self.config.squeeze_epochs, "seed": seed},
            inputs=inputs,
            overwrite=True,
        )
        file, device = folder / "teacher.safetensors", resolve_device(self.config.device)
        if not (step.complete and file.exists()):
            found = squeeze(
                train,
                network=network,
                epochs=self.config.squeeze_epochs,
                seed=seed,
                test=None if test is None else test[1],
                device=device,
                checkpoint=folder / "checkpoint.pt",
            )
            found.save(file)
            step.finish(**found.facts())
        return Teacher.load(file, device)

    def recover(
        self, teachers: Sequence[Teacher], train: ImageSet, images: StepFolder
    ) -> DistilledImages:
        """Synthesize the images, or read what an interrupted run has made."""
        folder, config, recipe = self.folder / "recovered", self.config, self.request.recipe
        asked = {} if isinstance(recipe, MatchRecipe) else _hashes(teachers)
        step = open_step(
            folder,
            step="recover",
            step_version=1,
            params={"recipe": asdict(recipe), "ipc": config.ipc, "seed": config.seed},
            inputs={"images": images.fingerprint, **asked},
            overwrite=True,
        )
        checkpoint = folder / "checkpoint.safetensors"
        if not (step.complete and (folder / "set" / "images").exists()):
            found = self.synthesized(teachers, train, checkpoint)
            DistilledSet(found, None, {}).write(folder / "set", overwrite=True)
            step.finish()
        checkpoint.unlink(missing_ok=True)
        return DistilledSet.open(folder / "set").images

    def synthesized(
        self, teachers: Sequence[Teacher], train: ImageSet, checkpoint: Path
    ) -> DistilledImages:
        """Recover images from the teachers or, by a matching method, without them."""
        recipe, config = self.request.recipe, self.config
        ipc, seed, device = config.ipc, config.seed, config.device
        if isinstance(recipe, MatchRecipe):
            return match(
                train, ipc=ipc, method=recipe, seed=seed, device=device, checkpoint=checkpoint
            )
        return recover(
            teachers,
            train,
            ipc=ipc,
            method=recipe,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
        )

    def relabel(self, images: DistilledImages, teachers: Sequence[Teacher]) -> SoftLabels | None:
        """Ask the teachers about views of the images."""
        config, folder = self.config, self.folder / "soft-labels"
        if not config.label_epochs:
            return None
        draw = {"epochs": config.label_epochs, "batch_size": usual_batch(images)}
        step = open_step(  # around relabel's own, which would refuse to replace other labels
            folder,
            step="soft-labels",
            step_version=1,
            params={**draw, "label_bytes": config.label_bytes, "seed": config.seed},
            inputs={"images": DistilledSet(images, None, {}).source.identity, **_hashes(teachers)},
            overwrite=True,
        )
        labels = relabel(
            images,
            teachers,
            epochs=draw["epochs"],
            batch_size=draw["batch_size"],
            label_bytes=config.label_bytes,
            seed=config.seed,
            device=config.device,
            folder=folder / "parts",
        )
        if not step.complete:
            step.finish()
        return labels

    def provenance(self, images: StepFolder, teachers: Sequence[Teacher]) -> dict[str, Any]:
        """Return how the set came to be."""
        return {
            "method": self.config.method,
            "recipe": asdict(self.request.recipe),
            "config": self.step.manifest["params"],
            "seed": self.config.seed,
            "source": {
                "pool": Path(self.config.pool).name,
                "fingerprint": self.request.pool.fingerprint(),
                "rows": images.manifest["rows"],
                "counts": images.manifest["counts"],
            },
            "teachers": [teacher.facts() for teacher in teachers],
            "versions": self.step.manifest["versions"],
        }

    def validate(
        self,
        distilled: DistilledSet,
        train: ImageSet,
        test: ImageSet,
        teachers: Sequence[Teacher],
    ) -> None:
        """Train students on the set and on what it is compared with."""
        from distill.validate import validate

        config, folder = self.config, self.folder / "validation"
        seeds = [config.seed + number for number in range(3)]
        identity = self.folder / "distilled"
        step = open_step(
            folder,
            step="validate",
            step_version=1,
            params={"epochs": config.validate_epochs, "seeds": seeds},
            inputs={
                "distilled": str((read_manifest(identity) or {})["fingerprint"]),
                "test": self.step.manifest["inputs"]["test_pool"],
            },
            overwrite=True,
        )
        if step.complete and (folder / "table.md").exists():
            return
        found = validate(
            distilled,
            train=train,
            test=test,
            teachers=teachers,
            networks=tuple(dict.fromkeys(config.network)),
            seeds=seeds,
            epochs=config.validate_epochs,
            device=config.device,
            checkpoint=folder / "students.json",
        )
        atomic_write_json(folder / "results.json", found.facts())
        atomic_write_bytes(folder / "table.md", found.markdown().encode())
        step.finish()

    def finish(
        self, images: StepFolder, teachers: Sequence[Teacher], labels: SoftLabels | None
    ) -> None:
        """Write the manifest and the report."""
        distilled = read_manifest(self.folder / "distilled") or {}
        self.step.record(
            pool={"path": self.config.pool, "mapping": asdict(self.request.pool.mapping)},
            rows=images.manifest["rows"],
            counts=images.manifest["counts"],
            classes=len(self.request.labels.names),
            size=self.request.size,
            images=distilled["images"],
            bytes=distilled["bytes"],
            label_epochs=0 if labels is None else labels.epochs,
            teachers=[teacher.facts() for teacher in teachers],
            environment={
                "device": str(resolve_device(self.config.device)),
                "python": platform.python_version(),
            },
        )
        write_report(self.folder)
        self.step.finish()


def _hashes(teachers: Sequence[Teacher]) -> dict[str, str]:
    return {f"teacher {number}": teacher.sha256 for number, teacher in enumerate(teachers)}


def _is_whole(out: Path, config: DistillConfig) -> bool:
    """Return whether what a complete run has written is still there."""
    folder = out / "distilled"
    manifest = read_manifest(folder) if folder.is_dir() else None
    parts = ["images"] + (["labels"] if config.label_epochs else [])
    whole = manifest is not None and bool(manifest["complete"]) and (folder / "README.md").exists()
    whole = whole and all(any((folder / part).glob("train-*.parquet")) for part in parts)
    whole = whole and (out / REPORT).exists()
    return whole and (not config.validate_epochs or (out / "validation" / "table.md").exists())
