"""Training checkpoints: written to a temporary name, renamed when whole, checked before they are trusted."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dinov2_eq.distributed import is_distributed

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY = ".writing"


class Checkpointer:
    """Folders `<folder>/<step>/` in torch's distributed checkpoint format, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes `state` (nested dicts of tensors and plain values) as the checkpoint of `step`.

        Raises:
            OSError: the folder cannot be written; older checkpoints are untouched.
        """
        temporary, final = self.folder / f"{step}{TEMPORARY}", self.folder / str(step)
        for leftover in self.folder.glob(f"*{TEMPORARY}"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        with _one_process_is_normal():
            dcp.save(state, checkpoint_id=temporary, no_dist=not is_distributed())
        manifest = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if final.exists():  # a damaged one of the same step, which this one replaces
            shutil.rmtree(final)
        os.replace(temporary, final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / str(old))

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first; unfinished ones are not counted."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def newest_whole(self) -> int | None:
        """Step of the newest undamaged checkpoint, None where there is none at all.

        Raises:
            ValueError: there are checkpoints but every one is damaged.
        """
        for leftover in sorted(self.folder.glob(f"*{TEMPORARY}")):
            logger.warning("%s was never finished; it is ignored", leftover)
        steps = self.steps()
        damages = []
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                return step
            logger.warning("Checkpoint %s is damaged (%s); trying the one before it", self.folder / str(step), damage)
            damages.append(f"{self.folder / str(step)}: {damage}")
        if damages:
            raise ValueError(
                "No checkpoint of this run can be resumed from:\n  "
                + "\n  ".join(damages)
                + "\nRestore one of these folders, or start again with --no-resume"
            )
        return None

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fills `state` in place.

        Raises:
            ValueError: the tensors of `state["model"]` are not those that were saved (another architecture).
        """
        folder = self.folder / str(step)
        stored = self._stored(step)
        saved = {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        saved = {name: size for name, size in saved.items() if name.startswith("model.")}
        wanted = {f"model.{name}": tuple(tensor.shape) for name, tensor in state["model"].items()}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            examples = (f"{name}: {saved.get(name)} saved, {wanted.get(name)} in this config" for name in different[:3])
            raise ValueError(
                f"Checkpoint {folder} is of another architecture: {len(different)} of {len(wanted)} tensors differ ("
                + "; ".join(examples)
                + "). Use the config that the run began with, another --output-dir, or --no-resume"
            )
        try:
            with _one_process_is_normal():
                dcp.load(state, checkpoint_id=folder, no_dist=not is_distributed())
        except CheckpointException as error:
            reason = str(next(iter(error.failures.values()))[0])
            raise ValueError(
                f"Checkpoint {folder} does not fit this config: {reason}. Use the config that the run began with, "
                "another --output-dir, or --no-resume"
            ) from None

    def stored_names(self, step: int) -> set[str]:
        """Names of everything that the checkpoint of `step` holds, nested names joined by dots."""
        return set(self._stored(step))

    def _stored(self, step: int) -> dict[str, Any]:
        return dcp.FileSystemReader(self.folder / str(step)).read_metadata().state_dict_metadata

    def _damage(self, step: int) -> str | None:
        folder = self.folder / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            return f"{MANIFEST} cannot be read: {error}"
        for name, fingerprint in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if _fingerprint(path) != fingerprint:
                return f"{name} is not what was written ({path.stat().st_size} bytes)"
        return None


@contextmanager
def _one_process_is_normal() -> Iterator[None]:
    """torch warns at every call that no process group exists, which is how a single process runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
