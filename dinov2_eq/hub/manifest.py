"""Reads and writes the list of released weights, `weights/manifest.json`, and finds or downloads their files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from dinov2_eq.files import as_written, read_json, replace_text

MANIFEST = "manifest.json"
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Release:
    """A released weight file, whose header holds the whole training config and the step."""

    entry_point: str  # in hubconf.py, for example dinov2_eq_vitt8
    default: bool  # whether `pretrained=True` loads it for this entry point
    file: str  # name in the folder of the manifest
    url: str | None  # where to download the file if it is not there
    size: int  # bytes
    sha256: str
    dtype: str  # of the tensors in the file
    contains: list[str]  # some of backbone, projection, heads and decoders
    architecture: dict[str, Any]  # arguments of `build_backbone`: arch, depth, patch_size, img_size, ...
    data: str  # training data
    steps: int  # optimizer updates
    results: dict[str, float]  # by name of the measurement, with its unit
    licence: str
    notes: str  # what the release is good for and what not


def weights_folder() -> Path:
    """`weights/` of the checkout, or of the installed package."""
    checkout, installed = PACKAGE.parent / "weights", PACKAGE / "weights"
    return checkout if (checkout / MANIFEST).is_file() else installed


def read_manifest(folder: Path) -> dict[str, Release]:
    """Reads the releases by name; an empty dict if the folder has no manifest.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: it is not a table of releases, or an entry has missing or unknown fields.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    known, releases = {field.name for field in fields(Release)}, {}
    with as_written(path):
        for name, entry in read_json(path)["releases"].items():
            if wrong := sorted(entry.keys() ^ known):
                raise ValueError(f"{path}: release {name!r} lacks or should not have {', '.join(wrong)}")
            releases[name] = Release(**entry)
    return releases


def write_manifest(folder: Path, releases: Mapping[str, Release]) -> None:
    """Writes the manifest, completely or not at all.

    Raises:
        ValueError: a result is NaN or infinite.
    """
    entries = {name: asdict(release) for name, release in sorted(releases.items())}
    text = json.dumps({"releases": entries}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_text(folder / MANIFEST, text)


def find_file(name: str, release: Release, folder: Path) -> Path:
    """Finds the file of a release next to the manifest, or downloads it; does not verify its checksum.

    Raises:
        FileNotFoundError: the file is missing and has no URL.
        OSError: it cannot be downloaded.
    """
    if (path := folder / release.file).is_file():
        return path
    if release.url is None:
        raise FileNotFoundError(
            f"{path} is missing, and the weights {name!r} have no URL; restore the file with git restore weights"
        )
    return download(release.url, release.sha256)


def download(url: str, sha256: str | None) -> Path:
    """Downloads a file to the cache `<TORCH_HOME>/hub/checkpoints`, unless it is there already.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: the downloaded file does not have the given SHA-256.
    """
    basename = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{basename}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 and sha256.lower(), progress=False)
        except RuntimeError as error:  # torch raises it for a wrong checksum
            raise ValueError(f"{url} is not the file that was published: {error}") from None
        except OSError as error:
            raise OSError(f"{url} cannot be downloaded: {error}") from None
    return path
