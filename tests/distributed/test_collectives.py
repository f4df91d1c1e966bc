"""The collectives, on one process and on three."""

import torch

from dinov2_eq.distributed import (
    all_reduce_sum,
    from_main_process,
    gather_objects,
    gather_rows,
    get_local_world_size,
    get_rank,
    get_world_size,
    is_main_process,
    pick_device,
)
from dinov2_eq.distributed.launch import find_launch, process_group
from tests.processes import run_ranks


def collect() -> dict:
    with process_group(find_launch(), torch.device("cpu"), 30):
        rank = get_rank()
        try:
            from_main_process(lambda: {}["missing"])
            raised = None
        except KeyError as error:
            raised = str(error)
        return {
            "ranks": (rank, get_local_world_size(), get_world_size(), is_main_process()),
            "sum": all_reduce_sum(torch.tensor([1.0, rank])).tolist(),
            "rows": gather_rows(torch.full((2, 1), rank)).flatten().tolist(),
            "objects": gather_objects({"rank": rank}),
            "main": from_main_process(lambda: rank + 10),
            "raised": raised,
        }


def test_one_process():
    found = collect()
    assert found["ranks"] == (0, 1, 1, True)
    assert found["sum"] == [1, 0] and found["rows"] == [0, 0] and found["objects"] == [{"rank": 0}]
    assert found["main"] == 10 and found["raised"] == "'missing'"


def test_three_processes_on_two_nodes():
    answers = run_ranks(collect, 3, per_node=2)
    assert [answer["ranks"] for answer in answers] == [(0, 2, 3, True), (1, 2, 3, False), (2, 2, 3, False)]
    for answer in answers:
        assert answer["sum"] == [3, 3] and answer["rows"] == [0, 0, 1, 1, 2, 2]
        assert answer["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert answer["main"] == 10 and answer["raised"] == "'missing'"


def test_a_device_for_each_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [pick_device("auto", rank) for rank in (0, 3)] == [torch.device("cuda"), torch.device("cuda", 3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each task sees a GPU of its own
    assert pick_device("cuda", 3) == torch.device("cuda", 0)
