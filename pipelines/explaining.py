"""`curate explain`: what a run's ledger says of a row, or its distilled set of an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from curate.errors import PoolError
from curate.selection import Selection
from pipelines.distilled_rows import explain_image, is_distilled


def explain_rows(run: Path, uids: Iterable[str]) -> Iterator[dict[str, object]]:
    """Yield what became of each row: the ledger's, or of each image of a distilled set.

    Parameters
    ----------
    run : Path
        A folder that `curate prune`, `curate coreset` or `curate distill` wrote.
    uids : iterable of str
        Uids of the pool; of a distilled set the image_id of its images.

    Raises
    ------
    PoolError
        If there is no such row or image.
    """
    if is_distilled(run):
        yield from (explain_image(run, uid) for uid in uids)
        return
    selection = Selection.open(run)
    for uid in uids:
        try:
            yield selection.explain(uid)
        except KeyError as error:
            raise PoolError(error.args[0]) from error
