"""3DIEBench: renderings of 3-D objects under known rotations and colours (Garrido et al., arXiv 2302.10283).

ROOT/SYNSET/OBJECT/image_VIEW.jpg    VIEW = 0, 1, ...
ROOT/SYNSET/OBJECT/latent_VIEW.npy   how it was rendered: numbers in the order of `LATENTS`
ROOT/train_images.npy                "/SYNSET/OBJECT/" for each object of the split; val_images.npy likewise
ROOT/train_labels.npy                the class of each of these objects; val_labels.npy likewise
"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch

from dinov2_eq.data.datasets.base import DataError, PairDataset, UnreadableImage
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.datasets.decode import EncodedImages
from dinov2_eq.data.datasets.listing import check_folder, list_folders
from dinov2_eq.types import ImagePair

SPLITS = ("TRAIN", "VAL")
# Angles are in radians, hues in turns. The object is rotated about the fixed axes x, y and z, in this order; the light
# stands on a sphere around it.
LATENTS = ("angle_x", "angle_y", "angle_z", "floor_hue", "light_polar", "light_azimuth", "light_hue")
ANGLES = slice(0, 3)
HUES = [LATENTS.index("floor_hue"), LATENTS.index("light_hue")]
ROTATION = ("quaternion_x", "quaternion_y", "quaternion_z", "quaternion_w")
COLOUR = ("floor_hue", "light_hue")


class ThreeDIEBench(PairDataset, EncodedImages):
    """All views of the objects of a split, labelled with the class of the object.

    The first image of a pair is the one at the index, the second is another view of the same object, chosen at random.
    Images come object by object. Theta is what `relative_theta` returns.

    Args:
        root: folder of the synsets and of the split files.
        views: use only the first so many of each object, at least 2; 0: as many as the first object has.

    Raises:
        DataError: the split files or the objects that they name cannot be used.
    """

    components = (*ROTATION, *COLOUR)

    def __init__(self, root: str, split: str = "TRAIN", views: int = 0) -> None:
        check_split(split, SPLITS)
        self.root = check_folder(root)
        self.objects, labels = _read_split(self.root, split.lower())
        self.views = _count_views(self.root / self.objects[0], views)
        self.labels = np.repeat(labels, self.views)

    def __len__(self) -> int:
        return len(self.objects) * self.views

    def name(self, index: int) -> str:
        return str(self._path(index, "image_{}.jpg"))

    def content(self, index: int) -> Path:
        return Path(self.name(index))

    def read_pair(self, index: int, generator: torch.Generator) -> ImagePair:
        second = self.another_view(index, generator)
        theta = relative_theta(self.latents(index), self.latents(second))
        return ImagePair(self.read(index), self.read(second), torch.from_numpy(theta).float())

    def another_view(self, index: int, generator: torch.Generator) -> int:
        """Draws the index of another image of the same object, each with the same probability."""
        first_view = index - index % self.views
        step = int(torch.randint(1, self.views, (), generator=generator))
        return first_view + (index + step) % self.views

    def latents(self, index: int) -> np.ndarray:
        """Reads how an image was rendered, [7] float64, see `LATENTS`.

        Raises:
            UnreadableImage: the file is missing, is no array, or holds other than 7 finite numbers.
        """
        path = self._path(index, "latent_{}.npy")
        try:
            latents = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UnreadableImage(self.name(index), f"its latents cannot be read: {error}") from None
        if latents.shape != (len(LATENTS),) or latents.dtype.kind not in "fiu" or not np.isfinite(latents).all():
            raise UnreadableImage(
                self.name(index),
                f"{path.name} beside it must hold {len(LATENTS)} finite numbers, {', '.join(LATENTS)}; it holds an "
                f"array {list(latents.shape)} of {latents.dtype}",
            )
        return latents.astype(np.float64)

    def _path(self, index: int, file_name: str) -> Path:
        return self.root / self.objects[index // self.views] / file_name.format(index % self.views)


def relative_theta(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Computes what leads from one image of an object to another.

    Args:
        first, second: [..., 7] latents of the two images.

    Returns:
        [..., 6]: the unit quaternion (x, y, z, w) of R1^-1 R2, whose sign is left as it comes, then the floor's and the
        light's hue in the second image minus those in the first, in [-1, 1].
    """
    inverse = quaternion(first[..., ANGLES]) * [-1, -1, -1, 1]
    rotation = multiply(inverse, quaternion(second[..., ANGLES]))
    return np.concatenate([rotation, second[..., HUES] - first[..., HUES]], axis=-1)


def quaternion(angles: np.ndarray) -> np.ndarray:
    """Computes quaternions (x, y, z, w) [..., 4] of rotations about the fixed axes x, y, z, by angles [..., 3]."""
    whole = np.array([0.0, 0.0, 0.0, 1.0])
    for axis in range(3):
        half = angles[..., axis] / 2
        turn = np.zeros((*half.shape, 4))
        turn[..., axis], turn[..., 3] = np.sin(half), np.cos(half)
        whole = multiply(turn, whole)
    return whole


def multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiplies quaternions (x, y, z, w), both [..., 4]: the rotation `right`, then the rotation `left`."""
    (u, a), (v, b) = ((each[..., :3], each[..., 3:]) for each in (left, right))
    vector = a * v + b * u + np.cross(u, v)
    return np.concatenate([vector, a * b - (u * v).sum(axis=-1, keepdims=True)], axis=-1)


def _read_split(root: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Reads the objects of a split as "SYNSET/OBJECT", and their labels [objects] int64."""
    files = [root / f"{split}_{what}.npy" for what in ("images", "labels")]
    arrays = []
    for path in files:
        if not path.is_file():
            raise DataError(
                f"there is no file {path}; copy the split files of 3DIEBench ({split}_images.npy, {split}_labels.npy) "
                "next to the folders of the synsets"
            )
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    objects, labels = arrays
    if objects.dtype.kind != "U" or objects.ndim != 1 or not len(objects):
        raise DataError(f"{files[0]} must list objects as strings; it holds {list(objects.shape)} of {objects.dtype}")
    if labels.dtype.kind not in "iu" or labels.shape != objects.shape or labels.min() < 0:
        raise DataError(
            f"{files[1]} must hold a whole number of at least 0 for each of the {len(objects)} objects; it holds "
            f"{list(labels.shape)} of {labels.dtype}{f', as low as {labels.min()}' if labels.size else ''}"
        )
    names = [name.strip("/") for name in objects.tolist()]
    _check_objects(root, files[0], names)
    return names, labels.astype(np.int64)


def _check_objects(root: Path, split_file: Path, names: Sequence[str]) -> None:
    """Raises DataError if an object has no folder; each synset's folder is listed once, which takes little time."""
    malformed = [name for name in names if name.count("/") != 1]
    if malformed:
        raise DataError(f"{split_file} names {malformed[0]!r}, which is not of the form /SYNSET/OBJECT/")
    synsets = {name.split("/")[0] for name in names} & set(list_folders(root))
    present = {f"{synset}/{folder}" for synset in synsets for folder in list_folders(root / synset)}
    absent = [name for name in names if name not in present]
    if absent:
        raise DataError(
            f"{split_file} names {len(names)} objects, and {len(absent)} of them are not in {root}, such as "
            f"{absent[0]}. Unpack the whole archive, or use the split files that belong to it"
        )


def _count_views(folder: Path, wanted: int) -> int:
    """Returns the views of each object, judged by the folder of the first one."""
    found = next(view for view in count() if not (folder / f"image_{view}.jpg").is_file())
    if found < 2:
        raise DataError(f"{folder} holds {found} images; a pair needs at least image_0.jpg and image_1.jpg")
    if wanted and not 2 <= wanted <= found:
        raise DataError(f"views={wanted} must lie between 2 and {found}, the number of images in {folder}")
    return wanted or found
