"""A dataset of encoded images in Parquet files, as on the Hugging Face hub."""

import glob
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinov2_eq.data.datasets.base import DataError, UnreadableImage
from dinov2_eq.data.datasets.decode import EncodedImages
from dinov2_eq.data.datasets.listing import PARQUET, LeftOut, describe, endings, list_files, warn_left_out

logger = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20  # per process
LARGE_ROW_GROUP_BYTES = 32 * 2**20
# Errors that pyarrow raises on damaged files; most of them, but not all, are ArrowExceptions.
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError)


class Parquet(EncodedImages):
    """Rows of one or more Parquet files.

    Args:
        path: a file, a folder (its *.parquet, at any depth) or a glob pattern.
        image: column with the encoded image: binary, or the Hugging Face struct {bytes, path}.
        label: column with whole numbers, or with strings, which become ranks; by default `label`, if it exists.

    Reading a row decodes its row group. Up to `CACHE_BYTES` of row groups are cached, so small files stay in memory.
    In training, rows of a row group come near each other (`chunk_ends`), so that a node reads large files once per
    pass instead of once per row.
    """

    labels_hint = "Name the label column: Parquet:path=...:label=..."

    def __init__(self, path: str, image: str = "image", label: str = "") -> None:
        self._files = _list_files(path)
        self._image_column, self._label_column = image, label
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()
        self._cached_bytes = 0
        # Kept, because parsing the metadata of a file with many row groups takes longer than reading one group.
        self._metadata = [self._check_file(file) for file in self._files]
        groups: list[tuple[int, int]] = []
        rows, image_bytes = [], []
        for number, metadata in enumerate(self._metadata):
            for group in range(metadata.num_row_groups):
                row_group = metadata.row_group(group)
                groups.append((number, group))
                rows.append(row_group.num_rows)
                image_bytes.append(row_group.total_byte_size)
        self._groups = np.array(groups)  # [num_groups, 2]: file, row group in it
        self.chunk_ends = np.cumsum(rows)
        if not len(self):
            raise DataError(f"{path} has no rows")
        if sum(image_bytes) > CACHE_BYTES and np.mean(image_bytes) > LARGE_ROW_GROUP_BYTES:
            logger.warning(
                "%s: its row groups hold %d MB on average, and each random read decodes a whole group. Rewrite the "
                "files with a row_group_size of about 100 rows.",
                path,
                np.mean(image_bytes) / 2**20,
            )

    def _check_file(self, file: str) -> pq.FileMetaData:
        if not os.path.isfile(file):  # a pattern may match other things, and opening a named pipe waits forever
            raise DataError(f"{file} is a broken link or not a regular file; restore or remove it")
        try:
            with _open(file) as parquet:
                metadata = parquet.metadata
            schema = metadata.schema.to_arrow_schema()
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except ARROW_ERRORS as error:
            raise DataError(f"{file} is not a Parquet file, or is damaged: {error}") from None
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise DataError(f"{file} is damaged: its row groups have {sum(rows)} rows, and it says {metadata.num_rows}")
        columns = ", ".join(schema.names)
        for key, column in (("image", self._image_column), ("label", self._label_column)):
            if column and schema.names.count(column) != 1:
                number = "two columns" if column in schema.names else "no column"
                raise DataError(f"{file} has {number} {column!r}; its columns are {columns}. Choose one by {key}=...")
        kind = schema.field(self._image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
            raise DataError(
                f"{file}: column {self._image_column!r} is of type {kind}, not encoded images (binary, or a struct "
                f"with bytes); its columns are {columns}. Choose one by image=..."
            )
        return metadata

    def read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        column = self._label_column or "label"
        schemas = {
            file: metadata.schema.to_arrow_schema()
            for file, metadata in zip(self._files, self._metadata, strict=True)
            if metadata.num_rows
        }
        lacking = [file for file, schema in schemas.items() if column not in schema.names]
        if len(lacking) == len(schemas):
            return None, None
        if lacking:
            raise DataError(
                f"{len(lacking)} of {len(schemas)} files have no column {column!r}, for example {lacking[0]}. Give it "
                "to all files, or to none"
            )
        parts = {file: _read_labels(file, column) for file in schemas}
        numbers, strings = (
            [file for file, part in parts.items() if pa.types.is_integer(part.type) == wanted]
            for wanted in (True, False)
        )
        if numbers and strings:
            number_type, string_type = (schemas[files[0]].field(column).type for files in (numbers, strings))
            raise DataError(
                f"column {column!r} is of type {number_type} in {numbers[0]} and of type {string_type} in "
                f"{strings[0]}. Write whole numbers to all files, or strings to all"
            )
        values = pa.chunked_array([chunk for part in parts.values() for chunk in part.chunks])
        if numbers:
            return values.to_numpy(), None
        names = sorted(pc.unique(values).to_pylist())
        return pc.index_in(values, pa.array(names, type=values.type)).to_numpy().astype(np.int64), names

    def __len__(self) -> int:
        return int(self.chunk_ends[-1]) if len(self.chunk_ends) else 0

    def _locate(self, index: int) -> tuple[int, int]:
        """Row group and row within it, for the index of an image."""
        group = int(np.searchsorted(self.chunk_ends, index, side="right"))
        return group, index - (int(self.chunk_ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, row = self._locate(index)
        return f"{self._group_name(group)}, row {row}"

    def _group_name(self, group: int) -> str:
        file, group_in_file = self._groups[group]
        return f"{self._files[file]}, row group {group_in_file}"

    def content(self, index: int) -> bytes:
        group, row = self._locate(index)
        try:
            value = self._read_group(group)[row].as_py()
        except ARROW_ERRORS as error:
            reason, rest = f"{type(error).__name__}: {error}", int(self.chunk_ends[group]) - index - 1
            raise UnreadableImage(self._group_name(group), reason, rest) from error
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise UnreadableImage(self.name(index), "the row holds no image bytes")
        return content

    def _read_group(self, group: int) -> pa.Array:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, group_in_file = self._groups[group]
        # Without threads, because Arrow's threads do not survive the fork of a worker.
        with _open(self._files[file], self._metadata[file]) as parquet:
            table = parquet.read_row_group(int(group_in_file), columns=[self._image_column], use_threads=False)
        images = table[self._image_column].combine_chunks()
        self._cache[group] = images
        self._cached_bytes += images.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0}


@contextmanager
def _open(file: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    # As bytes, because Arrow only accepts text that is valid UTF-8.
    with pa.memory_map(os.fsencode(file)) as source, pq.ParquetFile(source, metadata=metadata) as parquet:
        yield parquet


def _read_labels(file: str, column: str) -> pa.ChunkedArray:
    """Reads the labels of a file, as int64 or large_string.

    Raises:
        DataError: labels are missing or of another type, or the file is damaged.
    """
    try:
        with _open(file) as parquet:
            values = parquet.read(columns=[column], use_threads=False)[column]
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        values = values.cast(kind)
        values.validate(full=True)
        if not values.null_count:
            if pa.types.is_integer(kind):
                return values.cast(pa.int64())
            if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
                return values.cast(pa.large_string())
    except ARROW_ERRORS as error:
        raise DataError(f"{file}: the labels in column {column!r} cannot be read: {error}") from None
    if values.null_count:
        raise DataError(f"{file}: column {column!r} has {values.null_count} empty labels; remove these rows")
    raise DataError(f"{file}: column {column!r} is of type {kind}; labels are whole numbers or strings")


def _list_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        files, skipped = sorted(glob.glob(path, recursive=True)), {}
    else:
        left_out = LeftOut(Path(path).joinpath)
        files = []
        for name in list_files(Path(path), left_out, needed=".parquet"):
            base = os.path.basename(name)
            if base.endswith(".parquet") and not base.startswith("."):
                files.append(os.path.join(path, name))
            elif not PARQUET.isdisjoint(endings(base)) and not base.endswith(".crc"):
                left_out.add("Parquet files that are hidden or do not end in .parquet", name)
            else:
                left_out.look_at(name)
        files, skipped = sorted(files), left_out.by_kind()
    if not files:
        others = describe(skipped, "; skipped: ")
        raise DataError(f"no Parquet file at {path} (a file, a folder with *.parquet, or a glob pattern){others}")
    warn_left_out(path, skipped)
    return files
