"""The dataset card: what a person who finds the folder wants to know."""

from __future__ import annotations

import html
import json
import re
from typing import Any

from distill.distilled_images import DistilledImages
from distill.soft_labels import SoftLabels

_MOST_NAMES = 100


def card(
    images: DistilledImages,
    labels: SoftLabels | None,
    provenance: dict[str, Any],
    sizes: dict[str, int],
) -> str:
    """Return README.md of a distilled set; its head names the configurations for `datasets`.

    Names of classes and what the provenance says are data: they are shown, never interpreted.

    Parameters
    ----------
    images : DistilledImages
    labels : SoftLabels or None
    provenance : dict
    sizes : dict
        Bytes of ``images`` and ``labels``.
    """
    configs = ["images"] + ([] if labels is None else ["labels"])
    lines = ["---", "configs:"]
    for name in configs:
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train"]
        lines.append(f"    path: {name}/train-*.parquet")
        lines += ["  default: true"] if name == "images" else []
    lines += ["task_categories:", "- image-classification", "tags:", "- dataset-distillation"]
    lines += ["---", "", "# Distilled images", "", *_about(images, labels, sizes), ""]
    names = [plain(name) for name in images.class_names[:_MOST_NAMES]]
    more = len(images.class_names) - len(names)
    lines += ["## Classes", "", *(f"{number}. {name}" for number, name in enumerate(names))]
    lines += [f"\n... and {more} more."] if more else []
    shown = json.dumps(provenance, indent=2, ensure_ascii=True)
    lines += ["", "## Provenance", "", f"<pre>{html.escape(shown)}</pre>", ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Return text that neither Markdown nor HTML reads as anything but text, on one line.

    Examples
    --------
    >>> plain("a_b <i>|x")
    'a&#95;b &lt;i&gt;&#124;x'
    """
    line = html.escape(" ".join(re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", text).split()))
    return re.sub(r"[\\`*_{}\[\]()#+\-.!|~$:/@]", lambda found: f"&#{ord(found[0])};", line)


def _about(images: DistilledImages, labels: SoftLabels | None, sizes: dict[str, int]) -> list[str]:
    lines = [
        f"{len(images):,} images of {images.size} x {images.size} pixels: {images.ipc} of each of "
        f"{len(images.class_names)} classes, {sizes['images']:,} bytes.",
        f"Rows are sorted by `ipc_rank`, then by class: the first k x {len(images.class_names)} "
        "rows are a balanced set of k images per class.",
        "",
        f"Normalisation of pixels in [0, 1]: mean {list(images.mean)}, std {list(images.std)}.",
        "",
    ]
    if images.soft_label is not None:
        lines.append("Column `soft_label`: log-probabilities of the whole image, float16.")
    if labels is None:
        return [*lines, "There are no soft labels of views."]
    header = labels.header
    kept = f" (k = {header.k})" if header.k else ""
    return [
        *lines,
        f"Soft labels: {labels.stored_epochs} epochs of views stored for {header.epochs} epochs "
        f"of training, in batches of {header.batch_size}; codec {header.codec}{kept}, "
        f"{sizes['labels']:,} bytes, {sizes['labels'] / max(sizes['images'], 1):.2f} x the images.",
        "`distill.DistilledSet.open(folder).torch_dataset()` replays them.",
    ]
