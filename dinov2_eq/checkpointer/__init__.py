"""Training checkpoints: written in the background, renamed when whole, checked before they are trusted."""

import json
import logging
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from dinov2_eq.distributed import (
    PATIENCE_S,
    from_main_process,
    gather_objects,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)
from dinov2_eq.files import TEMPORARY, file_sha256, read_json
from dinov2_eq.waiting import waiting_for

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class Checkpointer:
    """Folders `<folder>/<step>/` in torch's distributed checkpoint format.

    With several processes all of them make one and call its methods together; the main process alone makes, renames
    and removes folders. Call `close` at the end.

    Args:
        keep: how many of the newest stay, at least 1.
        keep_every_steps: those whose step is a multiple of it stay as well; 0: none.
    """

    def __init__(self, folder: Path, keep: int, keep_every_steps: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        # The background's collectives must not meet those of the training, which go on meanwhile.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        # Kept, with the memory of its copy: fresh memory at every save made the copy several times slower.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None
        # torch's remark, from a thread of its own, at every save and load of a single process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies `state` (nested dicts of tensors, DTensors and plain values); the copy is written in the background.

        Waits for the save before this one. A failed save stops nothing here: the next `save` logs it, `wait` raises.
        """
        self._log_failure(self._outcome())
        temporary = self.folder / f"{step}{TEMPORARY}"
        try:
            from_main_process(lambda: self._make_room(temporary))
        except OSError as error:
            self._under_way = Future()
            self._under_way.set_result(self._failure(step, error))
            return
        written = dcp.async_save(
            state,
            storage_writer=_Writer(temporary, per_thread_copy_ahead=0),  # nothing to copy ahead: it is in memory
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        self._under_way = self._background.submit(self._finish, step, written)

    def wait(self) -> None:
        """Returns when the save under way, if there is one, is a whole folder.

        Raises:
            OSError: it could not be written, on every process alike; older checkpoints are intact.
            RuntimeError: the connection to another process broke.
        """
        failure = self._outcome()
        if failure is not None:
            raise OSError(
                f"{failure}. Older checkpoints are intact: when {self.folder} can be written again, the same command "
                "goes on from the newest"
            )

    def close(self) -> None:
        """Waits without raising, and frees threads, memory and process group."""
        try:
            self._log_failure(self._outcome())
        except RuntimeError as error:
            logger.error("The last checkpoint was not finished: %s", error)
        self._background.shutdown()
        self._stager.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _outcome(self) -> str | None:
        """Waits for the save under way; what went wrong with it."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return None
        with waiting_for(f"a checkpoint to be written to {self.folder}"):
            return under_way.result()

    def _log_failure(self, failure: str | None) -> None:
        if failure is not None and is_main_process():
            logger.error("%s. Older checkpoints are intact", failure)

    def _failure(self, step: int, error: BaseException) -> str:
        return f"Checkpoint {self.folder / str(step)} could not be written: {_reason(error)}"

    def _make_room(self, temporary: Path) -> None:
        for leftover in self.folder.glob(f"*{TEMPORARY}"):
            _remove(leftover)
        temporary.mkdir(parents=True)

    def _finish(self, step: int, written: Future) -> str | None:
        """In the background: a whole folder, or none; returns what went wrong, the same on every process."""
        outcome: list[str | None] = [None]
        try:
            written.result()  # of all processes: torch exchanges their failures
            if is_main_process():
                self._publish(step)
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            outcome = [self._failure(step, error)]
            if is_main_process():
                _remove(self.folder / f"{step}{TEMPORARY}")
            if self._group is not None and isinstance(error, RuntimeError):
                raise  # a collective's: another process is gone, there is nothing to agree upon
        if self._group is not None:
            dist.broadcast_object_list(outcome, group=self._group)
        return outcome[0]

    def _publish(self, step: int) -> None:
        temporary, final = self.folder / f"{step}{TEMPORARY}", self.folder / str(step)
        manifest = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        with (temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        replaced = self.folder / f"{step}.replaced{TEMPORARY}"
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        logger.info("saved %s", final)
        if replaced.exists():
            _remove(replaced)
        # Newer ones are damaged: the run went back behind them.
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            if self.keep_every_steps == 0 or old % self.keep_every_steps:
                _remove(self.folder / str(old))

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
        damages = []
        for step in reversed(from_main_process(self._look)):
            damage = self.damage(str(step))
            if damage is None:
                return step
            folder = self.folder / str(step)
            damages.append(f"{folder}: {damage}")
            if is_main_process():
                logger.warning("Checkpoint %s is damaged (%s); trying the one before it", folder, damage)
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
        saved = {name: tuple(entry.size) for name, entry in _stored_model(folder).items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            examples = (f"{name}: {saved.get(name)} saved, {wanted.get(name)} in this config" for name in different[:3])
            raise ValueError(
                f"Checkpoint {folder} is of another architecture: {len(different)} of {len(wanted)} tensors differ ("
                + "; ".join(examples)
                + "). Use the config that the run began with, another --output-dir, or --no-resume"
            )
        try:
            with waiting_for(f"checkpoint {folder} to be read", patience_s=PATIENCE_S):
                dcp.load(state, checkpoint_id=folder, no_dist=not is_distributed())
        except CheckpointException as error:
            reason = str(next(iter(error.failures.values()))[0])
            raise ValueError(
                f"Checkpoint {folder} does not fit this config: {reason}. Use the config that the run began with, "
                "another --output-dir, or --no-resume"
            ) from None

    def _look(self) -> list[int]:
        for leftover in sorted(self.folder.glob(f"*{TEMPORARY}")):
            logger.warning("%s was never finished; it is ignored", leftover)
        return self.steps()

    def damage(self, name: str) -> str | None:
        """What is wrong with a folder in here, None where nothing is; the same answer on all processes.

        Each reads its share of the files.
        """
        folder = self.folder / name
        try:
            manifest = from_main_process(lambda: read_json(folder / MANIFEST))
        except (OSError, ValueError) as error:
            return f"{MANIFEST} cannot be read: {error}"
        if not manifest:
            return f"{MANIFEST} names no files"
        share = sorted(manifest.items())[get_rank() :: get_world_size()]
        with waiting_for(f"checkpoint {folder} to be compared with its manifest", patience_s=PATIENCE_S):
            found = gather_objects(
                [damage for name, fingerprint in share if (damage := _compare(folder / name, fingerprint))]
            )
        return next((damage for damages in found for damage in damages), None)


def read_model(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of `state["model"]` in one checkpoint folder, on the CPU; for one process by itself."""
    model = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in _stored_model(folder).items()
    }
    dcp.load({"model": model}, checkpoint_id=folder, no_dist=True)
    return model


def _stored_model(folder: Path) -> dict[str, TensorStorageMetadata]:
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): entry
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


class _Writer(dcp.FileSystemWriter):
    """Says why a file could not be written: torch reports a full disk as an "unexpected pos" in its archive."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return _reason(cause) + (f" (process {rank})" if is_distributed() else "")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def _compare(path: Path, fingerprint: str) -> str | None:
    """What is wrong with a file."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if file_sha256(path) != fingerprint:
            return f"{path.name} is not what was written ({path.stat().st_size} bytes)"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None
