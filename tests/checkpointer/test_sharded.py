"""Checkpoints of several processes: each writes its shards, all agree on the outcome, any number can resume."""

import logging
import re

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dinov2_eq.checkpointer import Checkpointer
from tests.checkpointer.test_checkpointer import damage_flip_a_bit, damage_lose_the_manifest
from tests.checkpointer.test_faults import SMALL, TOO_LARGE
from tests.processes import run_ranks


def network_state(seed, *, sharded):
    """Parameters and Adam's moments after one update; 7 rows are shared unevenly by 2 and by 3 processes."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    if sharded:
        for module in (*model, model):
            fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 5)).square().sum().backward()
    optimizer.step()
    moments = get_optimizer_state_dict(model, optimizer)
    return {"model": model.state_dict(), "optimizer": moments, "read": {"images": seed}}


def tensors(state):
    """The tensors by name; each process may hold a part."""
    moments = {f"{name} {key}": t for name, entry in state["optimizer"]["state"].items() for key, t in entry.items()}
    return state["model"] | moments


def values(state):
    """The unsharded tensors as lists, which can be sent between processes."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors(state).items()}
    return {name: t.tolist() for name, t in whole.items()} | state["read"]


def save_in_part(folder, step):
    dist.init_process_group("gloo")
    live = network_state(step, sharded=True)
    before = values(live)
    checkpointer = Checkpointer(folder, keep=2)
    checkpointer.save(step, live)
    for tensor in tensors(live).values():
        tensor.fill_(-1)
    dist.all_reduce(torch.ones(3))  # the training's own collectives do not meet the background's
    checkpointer.wait()
    assert checkpointer.newest_whole() == step
    checkpointer.close()
    dist.destroy_process_group()
    return before


def load_in_part(folder, step):
    dist.init_process_group("gloo")
    loaded = network_state(99, sharded=True)
    checkpointer = Checkpointer(folder, keep=2)
    assert checkpointer.newest_whole() == step
    checkpointer.load(step, loaded)
    return values(loaded)


def test_two_processes_save_and_one_or_three_go_on(tmp_path):
    saved, also_saved = run_ranks(save_in_part, 2, tmp_path, 5)
    assert saved == also_saved and len(saved) == 4 + 4 * 3 + 1
    assert len(list((tmp_path / "5").glob("*.distcp"))) == 2

    alone = network_state(99, sharded=False)
    Checkpointer(tmp_path, keep=2).load(5, alone)
    assert values(alone) == saved

    assert run_ranks(load_in_part, 3, tmp_path, 5) == [saved] * 3


def find_newest(folder):
    dist.init_process_group("gloo")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("dinov2_eq").addHandler(handler)
    try:
        found = Checkpointer(folder, keep=2).newest_whole()
    except ValueError as error:
        found = str(error)
    return found, len(lines)


def test_all_processes_agree_on_the_newest_whole_one(tmp_path):
    for step in (5, 6):
        run_ranks(save_in_part, 2, tmp_path, step)
    damage_flip_a_bit(tmp_path / "6")
    assert run_ranks(find_newest, 3, tmp_path) == [(5, 1), (5, 0), (5, 0)]
    damage_lose_the_manifest(tmp_path / "5")
    (first, num_lines), (second, num_lines_of_second) = run_ranks(find_newest, 2, tmp_path)
    assert first == second and first.startswith("No checkpoint of this run can be resumed from")
    assert (num_lines, num_lines_of_second) == (2, 0)


def save_on_a_small_disk(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, keep=2)
    outcomes = []
    for step, size in ((1, SMALL), (2, TOO_LARGE if rank else SMALL)):  # the second process fills the disk
        checkpointer.save(step, {"model": {f"of {rank}": torch.full((size,), float(step))}})
        try:
            checkpointer.wait()
            outcomes.append("whole")
        except OSError as error:
            outcomes.append(str(error))
    return outcomes, checkpointer.newest_whole()


def test_a_full_disk_is_an_error_of_all_processes(small_disk):
    first, second = run_ranks(save_on_a_small_disk, 2, small_disk / "checkpoints")
    assert first == second
    (whole, failure), newest = first
    assert whole == "whole" and newest == 1
    assert re.search(r"No space left on device \(process [01]\)", failure)  # the first process, too, may find it full
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["1"]


class Intruder:
    """Puts a folder where files are expected, while they are written."""

    def __init__(self, folder):
        self.folder = folder

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        self.folder.mkdir()
        return int, (0,)


def save_with_an_intruder(folder):
    dist.init_process_group("gloo")
    checkpointer = Checkpointer(folder, keep=2)
    checkpointer.save(1, {f"of {dist.get_rank()}": torch.ones(3), "intruder": Intruder(folder / "1.writing" / "x")})
    try:
        checkpointer.wait()
    except OSError as error:
        return str(error)


def test_what_the_main_process_meets_after_writing_is_told_to_all(tmp_path):
    first, second = run_ranks(save_with_an_intruder, 2, tmp_path)
    assert first == second and f"{tmp_path / '1'} could not be written: Is a directory" in first
    assert not list(tmp_path.iterdir())
