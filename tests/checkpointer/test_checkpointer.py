"""Checkpoints are written in the background, complete or absent; old ones are removed, damaged ones not used."""

import logging
import threading
import time

import pytest
import torch

from dinov2_eq.checkpointer import Checkpointer


def state(value, width=3):
    return {"model": {"weight": torch.full((width, 2), float(value))}, "counter": {"read": value}}


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    yield checkpointer
    checkpointer.close()


def save(checkpointer, *steps):
    for step in steps:
        checkpointer.save(step, state(step))
    checkpointer.wait()


class Blocked:
    """A value whose writing waits until the test allows it."""

    def __init__(self):
        self.released = threading.Event()

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        assert self.released.wait(20)
        return int, (7,)


def test_round_trip_and_keep(checkpointer):
    save(checkpointer, 1, 2, 3)
    assert checkpointer.steps() == [2, 3] and checkpointer.newest_whole() == 3
    loaded = state(0)
    checkpointer.load(2, loaded)
    assert loaded["model"]["weight"].eq(2).all() and loaded["counter"]["read"] == 2


def test_nothing_yet(checkpointer):
    checkpointer.wait()
    assert checkpointer.newest_whole() is None


def test_every_mth_stays(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2, keep_every_steps=4)
    save(checkpointer, *range(2, 15, 2))
    assert checkpointer.steps() == [4, 8, 12, 14]


def test_training_goes_on_while_the_copy_is_written(checkpointer):
    for step in (1, 2):  # the second copy is made in the memory of the first
        live, blocked = state(step), Blocked()
        checkpointer.save(step, {**live, "blocked": blocked})
        live["model"]["weight"].fill_(-1)
        live["counter"]["read"] = -1
        assert checkpointer.steps() == [1][: step - 1]
        blocked.released.set()
        checkpointer.wait()
        loaded = {**state(0), "blocked": 0}
        checkpointer.load(step, loaded)
        assert loaded["model"]["weight"].eq(step).all() and loaded["counter"]["read"] == step
        assert loaded["blocked"] == 7


def test_a_second_save_waits_for_the_first(checkpointer):
    blocked = Blocked()
    checkpointer.save(1, {**state(1), "blocked": blocked})
    threading.Timer(0.3, blocked.released.set).start()
    checkpointer.save(2, state(2))
    assert 1 in checkpointer.steps()
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]


def test_it_becomes_whole_without_a_further_call(checkpointer):
    checkpointer.save(1, state(1))
    deadline = time.monotonic() + 20
    while not checkpointer.steps():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert Checkpointer(checkpointer.folder, keep=1).newest_whole() == 1


def test_one_of_the_same_step_is_replaced(checkpointer):
    save(checkpointer, 1)
    checkpointer.save(1, state(5))
    checkpointer.wait()
    loaded = state(0)
    checkpointer.load(1, loaded)
    assert loaded["model"]["weight"].eq(5).all() and [path.name for path in checkpointer.folder.iterdir()] == ["1"]


def damage_truncate(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def damage_flip_a_bit(folder):
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_lose_a_file(folder):
    (folder / ".metadata").unlink()


def damage_lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_manifest(content):
    return lambda folder: (folder / "manifest.json").write_bytes(content)


MANIFESTS = [
    b"",
    b'{".metadata": "',
    b"[]",
    b'["a"]',
    b"3",
    b"null",
    b"{}",
    b'{"a": 3}',
    bytes(40),
    b"\xff",
    b"[" * 9999,
    b'{".metadata": null}',
]
DAMAGES = [
    damage_truncate,
    damage_flip_a_bit,
    damage_lose_a_file,
    damage_lose_the_manifest,
    *map(damage_manifest, MANIFESTS),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(checkpointer, damage, caplog):
    save(checkpointer, 1, 2)
    damage(checkpointer.folder / "2")
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest_whole() == 1
    assert "2 is damaged" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_whole_checkpoint_is_an_error(checkpointer, damage):
    save(checkpointer, 1)
    damage(checkpointer.folder / "1")
    with pytest.raises(ValueError, match=r"No checkpoint of this run can be resumed from(.|\n)*--no-resume"):
        checkpointer.newest_whole()


def test_a_damaged_one_does_not_displace_a_whole_one(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 2, 10)
    damage_truncate(tmp_path / "10")
    save(checkpointer, 6)  # the run went on from 2, with another period
    assert checkpointer.newest_whole() == 6


def test_an_unfinished_checkpoint_is_ignored_and_replaced(checkpointer, caplog):
    save(checkpointer, 1)
    unfinished = checkpointer.folder / "2.writing"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest_whole() == 1
    assert "2.writing was never finished" in caplog.text
    save(checkpointer, 2)
    assert checkpointer.steps() == [1, 2] and not unfinished.exists()


def test_another_architecture(checkpointer):
    save(checkpointer, 1)
    with pytest.raises(
        ValueError, match=r"another architecture: 1 of 1 tensors differ \(weight: \(3, 2\) saved, \(5, 2\)"
    ):
        checkpointer.load(1, state(0, width=5))
