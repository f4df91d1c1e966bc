"""Checkpoints: whole or not there, kept to the newest few, and never trusted when damaged."""

import logging

import pytest
import torch

from dinov2_eq.checkpointer import Checkpointer


def state(value, width=3):
    return {"model": {"weight": torch.full((width, 2), float(value))}, "counter": {"read": value}}


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "checkpoints", keep=2)


def test_round_trip_and_keep(checkpointer):
    for step in (1, 2, 3):
        checkpointer.save(step, state(step))
    assert checkpointer.steps() == [2, 3] and checkpointer.newest_whole() == 3
    loaded = state(0)
    checkpointer.load(2, loaded)
    assert loaded["model"]["weight"].eq(2).all() and loaded["counter"]["read"] == 2


def test_nothing_yet(checkpointer):
    assert checkpointer.newest_whole() is None


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


DAMAGES = [damage_truncate, damage_flip_a_bit, damage_lose_a_file, damage_lose_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(checkpointer, damage, caplog):
    checkpointer.save(1, state(1))
    checkpointer.save(2, state(2))
    damage(checkpointer.folder / "2")
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest_whole() == 1
    assert "2 is damaged" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_whole_checkpoint_is_an_error(checkpointer, damage):
    checkpointer.save(1, state(1))
    damage(checkpointer.folder / "1")
    with pytest.raises(ValueError, match=r"No checkpoint of this run can be resumed from(.|\n)*--no-resume"):
        checkpointer.newest_whole()


def test_an_unfinished_checkpoint_is_ignored_and_replaced(checkpointer, caplog):
    checkpointer.save(1, state(1))
    unfinished = checkpointer.folder / "2.writing"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest_whole() == 1
    assert "2.writing was never finished" in caplog.text
    checkpointer.save(2, state(2))
    assert checkpointer.steps() == [1, 2] and not unfinished.exists()


def test_a_failed_save_leaves_older_checkpoints(checkpointer, monkeypatch):
    checkpointer.save(1, state(1))

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov2_eq.checkpointer.dcp.save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save(2, state(2))
    assert checkpointer.newest_whole() == 1


def test_another_architecture(checkpointer):
    checkpointer.save(1, state(1))
    with pytest.raises(
        ValueError, match=r"another architecture: 1 of 1 tensors differ \(model.weight: \(3, 2\) saved, \(5, 2\)"
    ):
        checkpointer.load(1, state(0, width=5))
