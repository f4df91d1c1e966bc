"""Training checkpoints: written in the background, renamed when complete, verified before they are loaded."""

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
    """Saves and loads folders `<folder>/<step>/` in torch's distributed checkpoint format.

    With several processes, all of them construct one and call its methods together. Only the main process creates,
    renames and removes folders. Call `close` at the end.

    Args:
        keep: number of recent checkpoints to keep, at least 1.
        keep_every_steps: also keep every checkpoint whose step is a multiple of this; 0: none.
    """

    def __init__(self, folder: Path, keep: int, keep_every_steps: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        # A separate group, because training runs its own collectives while a save is in the background.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        # Kept between saves together with its memory: allocating at every save made the copy several times slower.
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
        # torch warns at every save and load of a single process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copies `state` (nested dicts of tensors, DTensors and plain values) and writes the copy in the background.

        Waits for the previous save to finish. If writing fails, training continues: the next `save` logs the failure,
        and `wait` raises it.
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
            storage_writer=_Writer(temporary, per_thread_copy_ahead=0),  # the copy is in memory already
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        self._under_way = self._background.submit(self._finish, step, written)

    def wait(self) -> None:
        """Waits until the current save, if any, is a complete folder.

        Raises:
            OSError: it could not be written. All processes raise it; older checkpoints are intact.
            RuntimeError: the connection to another process broke.
        """
        failure = self._outcome()
        if failure is not None:
            raise OSError(
                f"{failure}. Older checkpoints are intact. Once {self.folder} can be written again, rerun the same "
                "command to resume from the newest"
            )

    def close(self) -> None:
        """Waits for the current save without raising, then frees threads, memory and process group."""
        try:
            self._log_failure(self._outcome())
        except RuntimeError as error:
            logger.error("The last checkpoint was not finished: %s", error)
        self._background.shutdown()
        self._stager.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _outcome(self) -> str | None:
        """Waits for the current save; returns why it failed, or None."""
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
        """Publishes the written folder, or removes it after a failure; runs in the background.

        Returns:
            why the save failed, or None; the same on every process.
        """
        outcome: list[str | None] = [None]
        try:
            written.result()  # raises if any process failed: torch exchanges the failures
            if is_main_process():
                self._publish(step)
        except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
            outcome = [self._failure(step, error)]
            if is_main_process():
                _remove(self.folder / f"{step}{TEMPORARY}")
            if self._group is not None and isinstance(error, RuntimeError):
                raise  # from a collective: another process is gone, so broadcasting would fail too
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
        # Newer ones are not counted: the run went back to an older checkpoint because they are damaged.
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            if self.keep_every_steps == 0 or old % self.keep_every_steps:
                _remove(self.folder / str(old))

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def newest_whole(self) -> int | None:
        """Step of the newest undamaged checkpoint, or None if the folder has no checkpoints.

        Raises:
            ValueError: every checkpoint is damaged.
        """
        damages = []
        for step in reversed(from_main_process(self._steps_and_leftovers)):
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
                + "\nRestore one of these folders, or start over with --no-resume"
            )
        return None

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Loads a checkpoint into `state`, in place.

        Raises:
            ValueError: names or shapes in `state["model"]` differ from the saved ones, or the checkpoint does not fit
                in another way.
        """
        folder = self.folder / str(step)
        saved = {name: tuple(entry.size) for name, entry in _stored_model(folder).items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        different = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
        if different:
            examples = (f"{name}: {saved.get(name)} saved, {wanted.get(name)} in this config" for name in different[:3])
            raise ValueError(
                f"Checkpoint {folder} has another architecture: {len(different)} of {len(wanted)} tensors differ ("
                + "; ".join(examples)
                + "). Use the config that the run started with, another --output-dir, or --no-resume"
            )
        try:
            with waiting_for(f"checkpoint {folder} to be read", patience_s=PATIENCE_S):
                dcp.load(state, checkpoint_id=folder, no_dist=not is_distributed())
        except CheckpointException as error:
            reason = str(next(iter(error.failures.values()))[0])
            raise ValueError(
                f"Checkpoint {folder} does not fit this config: {reason}. Use the config that the run started with, "
                "another --output-dir, or --no-resume"
            ) from None

    def _steps_and_leftovers(self) -> list[int]:
        """Steps as `steps` returns them; logs unfinished folders."""
        for leftover in sorted(self.folder.glob(f"*{TEMPORARY}")):
            logger.warning("%s was never finished; it is ignored", leftover)
        return self.steps()

    def damage(self, name: str) -> str | None:
        """Describes what is wrong with the folder `name`; None if nothing is.

        Each process reads its share of the files, and all get the same answer.
        """
        folder = self.folder / name
        try:
            manifest = from_main_process(lambda: read_json(folder / MANIFEST))
        except (OSError, ValueError) as error:
            return f"{MANIFEST} cannot be read: {error}"
        if not manifest:
            return f"{MANIFEST} lists no files"
        share = sorted(manifest.items())[get_rank() :: get_world_size()]
        with waiting_for(f"checkpoint {folder} to be compared with its manifest", patience_s=PATIENCE_S):
            damages_by_rank = gather_objects(
                [damage for name, sha256 in share if (damage := _file_damage(folder / name, sha256))]
            )
        return next((damage for damages in damages_by_rank for damage in damages), None)


def read_model(folder: Path) -> dict[str, Tensor]:
    """Reads the unsharded tensors of `state["model"]` from a checkpoint folder, on the CPU, in a single process."""
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
    """A writer that raises the OSError behind torch's "unexpected pos", such as a full disk."""

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


def _file_damage(path: Path, sha256: str) -> str | None:
    """Describes what is wrong with a file; None if nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if file_sha256(path) != sha256:
            return f"{path.name} is not what was written ({path.stat().st_size} bytes)"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None
