"""Encoded images in Parquet files, as on the Hugging Face hub."""

import glob
import logging
import os
from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from dinov2_eq.data.datasets.base import DataError, ImageDataset, UnreadableImage
from dinov2_eq.data.datasets.decode import decode_image

logger = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20  # of each process
LARGE_ROW_GROUP_BYTES = 32 * 2**20


class Parquet(ImageDataset):
    """Rows of one or more Parquet files.

    Args:
        path: a file, a folder (its *.parquet, at any depth) or a glob pattern.
        image: column with the encoded image: binary, or the Hugging Face struct {bytes, path}.
        label: column with whole numbers, or with strings, which become ranks; by default `label`, if there is one.

    A row is reached by decoding its row group; row groups are kept up to `CACHE_BYTES`, so small files stay in memory.
    Training deals the rows of a row group near each other (`chunk_ends`), so that a node fetches large files once a
    pass and not once a row.
    """

    labels_hint = "Name the label column: Parquet:path=...:label=..."

    def __init__(self, path: str, image: str = "image", label: str = "") -> None:
        self._files = _list_files(path)
        self._image_column = image
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()
        self._cached_bytes = 0
        # Kept, because a file with many row groups takes longer to describe than to read one of them.
        self._metadata = [self._check_file(file, label) for file in self._files]
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
                "%s: its row groups hold %d MB on average, and each random read decodes a whole one. Write the files "
                "again with a row_group_size of about 100 rows.",
                path,
                np.mean(image_bytes) / 2**20,
            )
        if label or all("label" in pq.read_schema(file).names for file in self._files):
            self._set_labels(label or "label")

    def _check_file(self, file: str, label: str) -> pq.FileMetaData:
        try:
            metadata = pq.read_metadata(file)
        except pa.ArrowException as error:
            raise DataError(f"{file} is not a Parquet file: {error}") from None
        schema = metadata.schema.to_arrow_schema()
        columns = ", ".join(schema.names)
        for key, column in (("image", self._image_column), ("label", label)):
            if column and column not in schema.names:
                raise DataError(f"{file} has no column {column!r}; its columns are {columns}. Choose one by {key}=...")
        kind = schema.field(self._image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"{file}: column {self._image_column!r} is of type {kind}, not encoded images (binary, or a struct "
                f"with bytes); its columns are {columns}. Choose one by image=..."
            )
        return metadata

    def _set_labels(self, column: str) -> None:
        values = pa.chunked_array(
            [chunk for file in self._files for chunk in pq.read_table(file, columns=[column])[column].chunks]
        )
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            raise DataError(f"column {column!r} has {values.null_count} empty labels; remove these rows")
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            self.class_names = sorted(pc.unique(values).to_pylist())
            values = pc.index_in(values, pa.array(self.class_names, type=values.type))
        elif not pa.types.is_integer(values.type):
            raise DataError(f"column {column!r} is of type {values.type}; labels are whole numbers or strings")
        self.labels = values.to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return int(self.chunk_ends[-1]) if len(self.chunk_ends) else 0

    def _locate(self, index: int) -> tuple[int, int]:
        """(group, row in it)"""
        group = int(np.searchsorted(self.chunk_ends, index, side="right"))
        return group, index - (int(self.chunk_ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, row = self._locate(index)
        file, group_in_file = self._groups[group]
        return f"{self._files[file]}, row group {group_in_file}, row {row}"

    def read(self, index: int) -> Image.Image:
        group, row = self._locate(index)
        value = self._read_group(group)[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise UnreadableImage(self.name(index), "the row holds no image bytes")
        return decode_image(content, self.name(index))

    def _read_group(self, group: int) -> pa.Array:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, group_in_file = self._groups[group]
        # Single-threaded: Arrow's threads do not survive the fork of a worker.
        with pq.ParquetFile(self._files[file], metadata=self._metadata[file], memory_map=True) as parquet:
            table = parquet.read_row_group(int(group_in_file), columns=[self._image_column], use_threads=False)
        images = table[self._image_column].combine_chunks()
        self._cache[group] = images
        self._cached_bytes += images.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": OrderedDict(), "_cached_bytes": 0}


def _list_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    pattern = os.path.join(glob.escape(path), "**", "*.parquet") if os.path.isdir(path) else path
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise DataError(f"no Parquet file at {path} (a file, a folder with *.parquet, or a glob pattern)")
    return files
