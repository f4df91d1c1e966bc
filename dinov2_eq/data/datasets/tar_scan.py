"""Finds the images of a tar file and their labels with one pass over its headers.

A file in/a.b.png has the stem in/a.b and belongs to the sample in/a, to which other files may belong too.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.listing import BROKEN, EXTENSIONS, Counts, LeftOut, describe, looks_like_image

NO_LABEL = -1
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
MAX_LINKS = 16  # longest chain of links that is followed
CHUNK_BYTES = 2**20


class TarImages(NamedTuple):
    """The images of a tar file, in its order, with names as in the tar file."""

    rows: np.ndarray  # [num_images, 3] int64: byte offset, size in bytes, label or `NO_LABEL`
    left_out: Counts  # files that look like images or labels but are not used
    shared: tuple[int, str]  # number of images that share their sample with other images, and the name of one
    bad_label: str  # describes the first label that is not a whole number; "": there is none


def scan_tar(path: str, image: str, label: str) -> TarImages:
    """Reads the headers and labels of a tar file, for `index_tar`, which describes arguments and errors.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        names, members = _list_files(file, path)
        left_out = LeftOut(lambda name: _read(file, members[name], CHUNK_BYTES))
        stems_and_names, labels = _sort_by_name(names, members.keys(), image, label, left_out)
        if not image:
            stems_and_names = _without_parts(stems_and_names, left_out)
        images: dict[str, str] = {}  # names by stem
        for stem, name in stems_and_names:
            if stem in images:
                raise DataError(
                    f"{path} has two images for the sample {stem!r}, {images[stem]} and {name}. Choose one with "
                    "image=<extension>, or give each sample its own name."
                )
            images[stem] = name
        if not images:
            wanted = f".{image}" if image else ", ".join(EXTENSIONS)
            splits = [os.path.basename(name).lower().partition(".") for name in names]
            extensions = {extension for stem, _, extension in splits if stem and extension}
            present = ", ".join(sorted(extensions)[:8]) or "none"
            others = describe(left_out.by_kind(), "; skipped: ")
            raise DataError(f"{path} holds no images (looked for {wanted}; its extensions are: {present}){others}")

        rows, bad_label = [], ""
        for stem, name in images.items():
            member, number = members[name], NO_LABEL
            if member.issparse():
                raise DataError(
                    f"{path}/{name} is stored as a sparse file, without its zeros. Write the tar file again without "
                    "--sparse."
                )
            label_name = labels.get(stem) or labels.get(_sample(stem))
            if label_name:
                try:
                    number = _read_label(file, members[label_name])
                except ValueError as error:
                    bad_label = bad_label or f"{label_name} {error}"
            rows.append((member.offset_data, member.size, number))
        of_images = {key for stem in images for key in (stem, _sample(stem))}
        for stem, name in labels.items():
            if stem not in of_images:
                left_out.add("labels without an image", name)
    return TarImages(np.array(rows, dtype=np.int64), left_out.by_kind(), _count_shared(images), bad_label)


def _sample(stem: str) -> str:
    folder, name = os.path.split(stem)
    return os.path.join(folder, name.partition(".")[0])


def _sort_by_name(
    names: list[str], present: Collection[str], image: str, label: str, left_out: LeftOut
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Splits names into (stem, name) of images and names of labels by stem; counts others that look like images."""
    images, labels = [], {}
    for name in names:
        base = os.path.basename(name).lower()
        if name not in present:
            if looks_like_image(base) or base.endswith(f".{label}"):
                left_out.add(BROKEN, name)
        elif base.startswith("."):
            left_out.look_at(name)
        elif image and base.partition(".")[2] == image:
            images.append((name[: -len(image) - 1], name))
        elif base.endswith(f".{label}"):
            labels[name[: -len(label) - 1]] = name
        elif not base.endswith(EXTENSIONS):
            left_out.look_at(name)
        elif image:
            left_out.add(f"images whose extension is not {image}", name)
        else:
            images.append((os.path.splitext(name)[0], name))
    return images, labels


def _without_parts(images: list[tuple[str, str]], left_out: LeftOut) -> list[tuple[str, str]]:
    """Removes images such as 0001.seg.png if there is 0001.jpg, but keeps 0001.5.png, which is another image."""
    stems = {stem for stem, _ in images}
    kept = []
    for stem, name in images:
        sample = _sample(stem)
        if sample != stem and sample in stems and not _is_numbered(stem):
            extension = name.removeprefix(f"{sample}.")
            left_out.add("additional images of a sample", f"{name}; image={extension} reads these instead")
        else:
            kept.append((stem, name))
    return kept


def _is_numbered(stem: str) -> bool:
    """Whether there are only digits and dots between the sample and the extension."""
    return stem.removeprefix(_sample(stem)).replace(".", "").isdigit()


def _count_shared(images: Mapping[str, str]) -> tuple[int, str]:
    """Counts images that share their sample, such as 1.left.png and 1.right.png; also returns the name of one."""
    parts = {stem: name for stem, name in images.items() if stem != _sample(stem) and not _is_numbered(stem)}
    sizes = Counter(map(_sample, parts))
    names = [name for stem, name in parts.items() if sizes[_sample(stem)] > 1]
    return len(names), names[0] if names else ""


def _list_files(file: BinaryIO, path: str) -> tuple[list[str], dict[str, tarfile.TarInfo]]:
    """Names of all members except folders, in order, and for each name the regular file that it is or links to."""
    members = _list_members(file, path)
    by_path = {os.path.normpath(member.name): member for member in members}
    files = {}
    for member in members:
        target = member
        for _ in range(MAX_LINKS):
            if target is None or not (target.islnk() or target.issym()):
                break
            folder = os.path.dirname(target.name) if target.issym() else ""
            target = by_path.get(os.path.normpath(os.path.join(folder, target.linkname)))
        if target is not None and target.isreg():
            files[member.name] = target
    return [member.name for member in members if not member.isdir()], files


def _list_members(file: BinaryIO, path: str) -> list[tarfile.TarInfo]:
    """Lists all members of a tar file, which must be complete."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = tar.getmembers()
            end = tar.offset
    except tarfile.TarError as error:
        file.seek(0)
        start = file.read(8)
        for magic, program in COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"{path} is compressed, so reading one image would require reading everything before it. Unpack it "
                    f"with {program}; images hardly become larger."
                ) from None
        raise DataError(f"{path} is not a complete tar file: {error}. Write or copy it again.") from None
    # tarfile treats an unreadable header as the end of the archive, but a real end is a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{path} is truncated or damaged after {len(members)} files, at byte {end} of {os.path.getsize(path)}. "
            "Write or copy it again."
        )
    while rest := file.read(CHUNK_BYTES):
        if rest != bytes(len(rest)):
            raise DataError(
                f"{path} has data after the end of its archive, at byte {end}, like tar files that were joined with "
                "cat. Join them with tar --concatenate instead, or list them separately."
            )
    return members


def _read(file: BinaryIO, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    return os.pread(file.fileno(), min(member.size, max_bytes), member.offset_data)


def _read_label(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """Reads a label; raises ValueError if the file does not hold a 64-bit whole number."""
    if member.issparse():
        raise ValueError("is stored as a sparse file")
    content = _read(file, member, CHUNK_BYTES)
    try:
        return int(np.int64(int(content)))
    except (ValueError, OverflowError):
        raise ValueError(f"holds {content[:40]!r}") from None
