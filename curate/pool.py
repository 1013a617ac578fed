"""The pool: image-text pairs in Parquet or tar files, read shard by shard and never as a whole."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate import parquet, tar_rows
from curate.bundled import BundledEmbeddings, find_bundled
from curate.columns import ColumnMapping, distinct, export_schema, map_columns, no_such_column
from curate.errors import PoolError
from curate.images import ImageFolder
from curate.rows import export_batches, find_image_folder, sample_batches
from curate.sources import Shard, Source, find_source, fingerprint_files, shard_masks
from curate.uids import derive_uids, given_uids, unique_uids

__all__ = ["BundledEmbeddings", "ColumnMapping", "Pool", "Shard", "unique_uids"]

_UID_BATCH_ROWS = 1024


def _inspect(
    found: Source, given: Mapping[str, str | None]
) -> tuple[pa.Schema, ColumnMapping, tuple[Shard, ...], list[int]]:
    """Return the schema, the roles, the shards and the rows of each file, from headers alone."""
    if found.kind == "tar":
        summaries = tar_rows.summarise_files(found.files)
        schema = tar_rows.tar_schema(summaries)
        shards = tar_rows.plan_tar_shards(found.files, summaries)
        counts = [summary.samples for summary in summaries]
        return schema, map_columns(schema, given=given), shards, counts
    footers = parquet.read_footers(found.files)
    schema = parquet.unify(found.files, footers)
    mapping = map_columns(schema, given=given)
    # clip-retrieval's paths name images that are embedded already: nothing slow is done to a row.
    slow = mapping.image is not None and found.layout != "clip-retrieval"
    most = parquet.IMAGE_SHARD_ROWS if slow else parquet.METADATA_SHARD_ROWS
    shards = parquet.plan_shards(found.files, footers, max_rows=most)
    return schema, mapping, shards, [sum(n for n, _ in footer.row_groups) for footer in footers]


@dataclass(frozen=True, eq=False, repr=False)
class Pool:
    """A pool of image-text pairs; open it with `Pool.open`.

    Only footers and headers are read at first. Whatever yields batches streams, and it can be
    pickled, so that every worker of an engine can hold it.

    Attributes
    ----------
    source : Source
        Its files.
    schema : pyarrow.Schema
        The original columns, with their metadata.
    mapping : ColumnMapping
        Which column plays which role.
    shards : tuple of Shard
        Units of work: runs of rows in pool order.
    image_folder : ImageFolder or None
        Where image paths are looked up.
    bundled_embeddings : BundledEmbeddings or None
        The embeddings that the pool brings.

    Examples
    --------
    >>> import tempfile, pyarrow.parquet
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "laion.parquet")
    ...     table = pa.table({"URL": ["http://a/1.jpg"], "TEXT": ["a cat"]})
    ...     pyarrow.parquet.write_table(table, path)
    ...     pool = Pool.open(path)
    >>> len(pool), pool.columns, pool.url_only
    (1, ['URL', 'TEXT'], True)
    """

    source: Source
    schema: pa.Schema
    mapping: ColumnMapping
    shards: tuple[Shard, ...]
    image_folder: ImageFolder | None
    bundled_embeddings: BundledEmbeddings | None
    _rows: int

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        image_col: str | None = None,
        text_col: str | None = None,
        url_col: str | None = None,
        uid_col: str | None = None,
        score_col: str | None = None,
        embedding_col: str | None = None,
        image_root: str | Path | None = None,
    ) -> Pool:
        """Open a pool.

        Parameters
        ----------
        source : str or Path
            A Parquet file; a folder or a glob of Parquet or tar files; the output folder of
            img2dataset, clip-retrieval or DataComp; a remote address that fsspec understands.
        image_col, text_col, url_col, uid_col, score_col, embedding_col : str, optional
            The column of each role. None looks for a usual name, ``""`` takes no column.
        image_root : str or Path, optional
            The folder of the images where the image column holds paths; otherwise the pool's own
            folder. Nothing outside it is read.

        Returns
        -------
        Pool

        Raises
        ------
        PoolError
            If there is no such pool, a file is damaged, the shards disagree, the pool is empty, a
            column is not there or of the wrong type, or there is neither image, URL nor embedding.
        """
        columns = (image_col, text_col, url_col, uid_col, score_col, embedding_col)
        roles = ("image", "text", "url", "uid", "score", "embedding")
        given = dict(zip(roles, columns, strict=True))
        found = find_source(source)
        schema, mapping, shards, counts = _inspect(found, given)
        if not shards:
            raise PoolError(f"{source} is empty: its {len(found.files)} file(s) hold 0 rows")
        bundled = find_bundled(
            found, counts, schema, column=mapping.embedding, prefer_column=bool(embedding_col)
        )
        if mapping.image is None and mapping.url is None and bundled is None:
            raise PoolError(
                f"{source} has no image, URL or embedding column; its columns are "
                f"{', '.join(schema.names)}. Name one with --image-col, --url-col or "
                "--embedding-col"
            )
        folder = find_image_folder(found, schema, mapping, image_root)
        return cls(found, schema, mapping, shards, folder, bundled, sum(counts))

    def __getstate__(self) -> dict[str, Any]:
        # pyarrow's own pickling forgets the names of list items, and so the exported bytes would
        # depend on whether the pool went to another process.
        return {**self.__dict__, "schema": self.schema.serialize().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        schema = pa.ipc.read_schema(pa.BufferReader(state["schema"]))
        self.__dict__.update(state, schema=schema)

    def __len__(self) -> int:
        return self._rows

    @property
    def columns(self) -> list[str]:
        """The names of the original columns."""
        return list(self.schema.names)

    @property
    def nbytes(self) -> int:
        """The size of the files, in bytes."""
        return sum(file.size for file in self.source.files)

    @property
    def url_only(self) -> bool:
        """Whether the images are only named by URL, so that they have to be downloaded first."""
        return self.mapping.image is None and self.mapping.url is not None

    def _subset(self, names: Sequence[str]) -> pa.Schema:
        if not names:
            raise PoolError("columns must name at least one column of the pool")
        for name in names:
            if name not in self.schema.names:
                raise no_such_column(name, self.schema.names, "columns")
        return pa.schema([self.schema.field(name) for name in names], self.schema.metadata)

    def _read(
        self,
        shard: Shard,
        names: Sequence[str],
        most: int,
        kept: NDArray[np.bool_] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        if most < 1:
            raise ValueError(f"rows must be at least 1, got {most}")
        read = tar_rows.read_tar_batches if shard.row_groups is None else parquet.read_batches
        return parquet.coalesce(read(shard, self._subset(names), most, kept), most)

    def batches(
        self,
        rows: int = 1024,
        *,
        shards: Iterable[Shard] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Read the original rows as a stream, in pool order.

        Parameters
        ----------
        rows : int
            The rows of each batch but the last; fewer where a batch would exceed 256 MiB.
        shards : iterable of Shard, optional
            Read only these.
        columns : sequence of str, optional
            Read only these.

        Yields
        ------
        pyarrow.RecordBatch

        Raises
        ------
        PoolError
            If a column is not there.
        ShardError
            If a file is damaged, or changed since the pool was opened.
        """
        names = self.schema.names if columns is None else columns
        chosen = self.shards if shards is None else shards
        parts = (batch for shard in chosen for batch in self._read(shard, names, rows))
        return parquet.coalesce(parts, rows)

    def take(self, rows: Iterable[int]) -> pa.Table:
        """Read single rows, images as ``struct<bytes, path>``, for a look at them.

        Parameters
        ----------
        rows : iterable of int
            Numbers of rows of the pool; only their shards are read.

        Returns
        -------
        pyarrow.Table
            In the order of `rows`.

        Raises
        ------
        IndexError
            If there is no such row.
        """
        wanted = np.fromiter(rows, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows must be in 0 ... {len(self) - 1}")
        unique, back = np.unique(wanted, return_inverse=True)
        masks = shard_masks(self.shards, unique)
        batches = [b for shard, mask in masks for b in self.export_batches(shard, mask)]
        return pa.Table.from_batches(batches, self.export_schema()).take(back)

    def samples(self, shard: Shard, rows: int = 256) -> Iterator[pa.RecordBatch]:
        """Read a shard's rows in one form, whatever the pool's columns are.

        Parameters
        ----------
        shard : Shard
            One of `shards`.
        rows : int
            The most rows of a batch.

        Yields
        ------
        pyarrow.RecordBatch
            ``image`` binary, null if there is none; ``detail`` string, why there is none; ``text``
            and ``url`` string. One row per row of the shard, in its order.

        Raises
        ------
        ShardError
            If the file is damaged, or changed since the pool was opened.
        """
        image, text, url = self.mapping.image, self.mapping.text, self.mapping.url
        names = distinct(image, text, url) or self.columns[:1]
        for batch in self._read(shard, names, rows):
            yield from sample_batches(
                batch, image=image, text=text, url=url, folder=self.image_folder
            )

    def shard_uids(self, shard: Shard) -> pa.StringArray:
        """Return the uids of a shard's rows: the uid column, or derived from the contents.

        A derived uid is 128 bits of BLAKE2b over the image (its bytes, else its path, else the
        row's URL) and the text. Rows with the same contents have the same one until `unique_uids`
        has seen the whole pool.

        Parameters
        ----------
        shard : Shard
            One of `shards`.

        Returns
        -------
        pyarrow.StringArray

        Raises
        ------
        PoolError
            If the uid column is null in some row.
        ShardError
            If the file is damaged, or changed since the pool was opened.
        """
        parts: list[pa.Array] = []
        uid = self.mapping.uid
        names = [uid] if uid is not None else self._identity()
        for batch in self._read(shard, names, _UID_BATCH_ROWS):
            if uid is None:
                parts.append(derive_uids(batch, self.mapping))
            else:
                first = shard.first_row + sum(map(len, parts))
                parts.append(given_uids(batch.column(0), name=uid, first_row=first))
        return pa.concat_arrays(parts)

    def _identity(self) -> list[str]:
        """Return the columns that a derived uid is made of."""
        mapping = self.mapping
        names = distinct(mapping.image, mapping.url, mapping.text)
        return names or distinct(mapping.embedding) or self.columns[:1]

    def export_schema(self) -> pa.Schema:
        """Return the schema of `export_batches`: the pool's, with images that `datasets` decodes.

        Every column as it is, except that an image column becomes ``struct<bytes: binary, path:
        string>`` with the ``huggingface`` metadata key.
        """
        return export_schema(self.schema, self.mapping)

    def export_batches(
        self, shard: Shard, kept: NDArray[np.bool_], rows: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """Read the rows that are kept, in the export schema.

        Parameters
        ----------
        shard : Shard
            One of `shards`.
        kept : (r,) bool
            Which of the shard's rows.
        rows : int
            The most rows of a batch.

        Yields
        ------
        pyarrow.RecordBatch
            Images that the pool names by path have their bytes in it, and keep the path.

        Raises
        ------
        ValueError
            If the mask does not fit the shard.
        ShardError
            If the file is damaged, or changed since the pool was opened.
        """
        mask = np.asarray(kept)
        if mask.dtype != np.bool_ or mask.shape != (shard.rows,):
            raise ValueError(
                f"kept must be {shard.rows} bool values, one per row of the shard; got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        schema, image = self.export_schema(), self.mapping.image
        for batch in self._read(shard, self.schema.names, rows, mask):
            yield from export_batches(batch, schema, image=image, folder=self.image_folder)

    def fingerprint(self) -> str:
        """Return a digest of the files and the mapping that does not depend on where they lie.

        Of each file its name, size and 16 blocks of 64 KiB go in, so it is cheap for any size.
        The files of bundled embeddings count too.
        """
        bundled = self.bundled_embeddings
        files = [*self.source.files, *(bundled.files() if bundled is not None else ())]
        return fingerprint_files(files, repr(sorted(asdict(self.mapping).items())))

    @property
    def _place(self) -> str:
        files = self.source.files
        place = Path(files[0].path if len(files) == 1 else self.source.root)
        here = Path.cwd()
        return str(place.relative_to(here) if place.is_relative_to(here) else place)

    def _facts(self) -> dict[str, Any]:
        return {
            "rows": f"{len(self):,}",
            "shards": f"{len(self.shards):,}",
            "bytes": f"{self.nbytes:,}",
            "columns": self.mapping.describe(),
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}: {value}" for name, value in self._facts().items())
        return f"Pool({self._place}, {facts})"

    def _repr_html_(self) -> str:
        """Show the pool in a notebook."""
        body = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        return f"<table><caption>{html.escape(self._place)}</caption>{body}</table>"
