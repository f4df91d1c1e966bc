"""Processes that connect to each other, or fail to."""

import socket

import pytest
import torch
import torch.distributed as dist

from dinov2_eq.distributed import meeting
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.distributed.meeting import Place, await_all, open_store
from dinov2_eq.exits import ProcessLost
from tests.processes import free_port, run_ranks


def place(rank, world_size=2, port=None, host="127.0.0.1", is_hosted=False):
    return Place(rank, world_size, host, free_port() if port is None else port, is_hosted, "Start them all")


def test_all_have_come():
    main = place(0, world_size=3)
    store = open_store(main)
    others = [open_store(main._replace(rank=rank)) for rank in (1, 2)]
    for rank, other in enumerate(others, start=1):
        other.set(f"came/{rank}", "")
        other.add("came", 1)
    await_all(store, main)


def test_who_is_missing_is_told_at_once_and_named_at_the_end(monkeypatch, caplog):
    monkeypatch.setattr(meeting, "TELL_AFTER_S", 0.3)
    monkeypatch.setattr(meeting, "MEETING_S", 1.0)
    main = place(0, world_size=9)
    store = open_store(main)
    store.set("came/3", "")
    store.add("came", 1)
    with pytest.raises(TimeoutError, match=r"after waiting 1 s for 7 of 9 processes, ranks 1, 2, 4, 5, 6, \.\.\."):
        await_all(store, main)
    assert "waiting for 7 of 9 processes, ranks 1, 2, 4, 5, 6, ... (" in caplog.text
    assert "Start them all" in caplog.text


def test_nobody_hosts_the_store(monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_S", 0.5)
    where = place(1)
    expected = rf"waiting 0 s for a response from process 0 at 127\.0\.0\.1:{where.port} \(.*refused\)\. Start them all"
    with pytest.raises(TimeoutError, match=expected):
        open_store(where)


def test_a_launcher_that_promises_a_store_and_has_none(monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_S", 0.5)
    with pytest.raises(TimeoutError, match="for a response from torchrun at"):
        open_store(place(0, is_hosted=True))


def test_the_port_is_taken():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"Port {port} of MASTER_PORT is in use on this host .* another port"):
            open_store(place(0, port=port))


def test_somebody_else_answers_at_the_port(monkeypatch):
    """Something else listens at the port and never responds."""
    monkeypatch.setattr(meeting, "MEETING_S", 2.0)
    monkeypatch.setattr(meeting, "ANSWER_S", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(TimeoutError, match=r"for a response from .*something other than a torch store"):
            open_store(place(1, port=other.getsockname()[1]))


def test_a_main_process_that_is_not_where_it_should_be(monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER_S", 1.0)
    with pytest.raises(
        ValueError, match=r"cannot reach itself as process 0 at nowhere\.invalid:\d+: .*Set MASTER_ADDR to"
    ):
        open_store(place(0, host="nowhere.invalid"))


def test_the_main_process_leaves_before_all_have_come():
    class Closed:
        def set(self, key, value):
            raise dist.DistNetworkError("Connection reset by peer\nand a trace")

    with pytest.raises(
        ProcessLost, match=r"The store of process 0 at .* closed before all .* had connected \(Connection reset by"
    ):
        await_all(Closed(), place(1))


def meet_twice(port):
    launch = find_launch()._replace(master_port=port, has_store=True)
    for attempt in ("0", "1"):
        with process_group(launch._replace(attempt=attempt), torch.device("cpu"), 30):
            dist.barrier()
    return True


def test_a_second_meeting_in_the_same_store():
    """Processes that torchrun restarts meet in its store, which still holds the old entries."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_ranks(meet_twice, 2, store.port) == [True, True]
