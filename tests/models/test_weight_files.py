import argparse
import errno
import json
import os
import pickle
import random
import struct
from functools import partial

import pytest
import torch
from safetensors.torch import save, save_file

from dinov2_eq.files import file_sha256
from dinov2_eq.models.weight_files import (
    DTYPES,
    read_checkpoint,
    read_metadata,
    read_weights,
    write_safetensors,
)

TENSORS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "odd": torch.arange(3, dtype=torch.uint8),  # moves what follows off every alignment
    "weights": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
}


def message(path, **arguments):
    with pytest.raises(ValueError) as caught:
        read_weights(path, **arguments)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_reads_what_the_safetensors_package_writes(tmp_path, dtype):
    tensors = {name: (tensor * 10).to(dtype) for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "w.safetensors", {"note": "ä"})
    found = read_weights(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert read_metadata(tmp_path / "w.safetensors") == {"note": "ä"}


def test_writing_makes_the_folder_and_takes_views(tmp_path):
    path, whole = tmp_path / "new" / "w.safetensors", torch.arange(6.0).view(2, 3)
    write_safetensors(path, {"whole": whole, "part": whole[:, 1:], "turned": whole.T}, {"step": "3"})
    found = read_weights(path)
    assert torch.equal(found["part"], whole[:, 1:]) and torch.equal(found["turned"], whole.T)
    assert read_metadata(path) == {"step": "3"} and os.listdir(path.parent) == ["w.safetensors"]
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # for whoever may read the user's other files


def test_torch_files_with_a_command_line_in_them(tmp_path):
    torch.save({"teacher": TENSORS, "args": argparse.Namespace(arch="vit_small"), "epoch": 3}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert torch.equal(found["teacher"]["weights"], TENSORS["weights"]) and found["args"].arch == "vit_small"
    assert read_metadata(tmp_path / "w.pth") == {}


def test_missing_files(tmp_path):
    for path, reason in ((tmp_path / "w.pth", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(FileNotFoundError, match=reason):
            read_weights(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40], lambda data: b"", lambda data: b"?" * 99]
)
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"w.{suffix}"
    save_file(TENSORS, path) if suffix == "safetensors" else torch.save(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    assert "not a file of weights, or it was cut off" in message(path)


CUT = {"zip": torch.save, "legacy": partial(torch.save, _use_new_zipfile_serialization=False), "safetensors": save_file}


@pytest.mark.parametrize("kind", CUT)
def test_files_cut_off_anywhere(tmp_path, kind):
    path, generator = tmp_path / f"w.{kind}", random.Random(0)
    CUT[kind]({f"blocks.{number}.weight": torch.randn(100, 100) for number in range(40)}, path)
    whole = path.read_bytes()
    lengths = [5_000, 50_000, 1_000_000, *range(0, 400, 3), *(generator.randrange(len(whole)) for _ in range(100))]
    for length in (*lengths, *range(len(whole) - 300, len(whole), 7)):
        path.write_bytes(whole[:length])
        assert "cut off while it was written or copied" in message(path), length


@pytest.mark.parametrize("kind", CUT)
def test_what_the_disk_answers_stays_what_it_is_and_names_the_file(tmp_path, monkeypatch, kind):
    path = tmp_path / f"w.{kind}"
    CUT[kind](TENSORS, path)

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr("json.loads" if kind == "safetensors" else "torch.load", broken)
        read_weights(path)
    assert caught.value.errno == errno.EIO and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", CUT)
def test_names_that_are_not_utf_8(tmp_path, kind):
    path = tmp_path / os.fsdecode(b"caf\xe9") / f"w.{kind}"
    path.parent.mkdir()
    path.touch()
    with path.open("wb") as file:
        torch.save(TENSORS, file) if kind != "safetensors" else file.write(save(TENSORS))
    assert torch.equal(read_weights(path)["weights"], TENSORS["weights"])


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},  # too few bytes
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},  # beyond the end
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [1, 2],
    ],
)
def test_headers_that_lie(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "tensor 'a'" in message(tmp_path / "w.safetensors")


def test_headers_that_are_no_table(tmp_path):
    for header in (b"[1]", b"{1}", b"\xff\xfe", b'{"__metadata__": [1]}', b"[" * 100_000):
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert "its header is" in message(tmp_path / "w.safetensors")


def test_checksum(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    digest = file_sha256(path)
    assert read_weights(path, sha256=digest.upper()).keys() == TENSORS.keys()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    text = message(path, sha256=digest)
    assert "not the file that was published" in text and digest in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["zip", "legacy"])
def test_bytes_that_were_changed_are_read_or_called_damaged(tmp_path, suffix):
    torch.save({"a": torch.arange(9.0)}, tmp_path / "w.pth", _use_new_zipfile_serialization=suffix == "zip")
    whole, generator = (tmp_path / "w.pth").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(3):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        (tmp_path / "w.pth").write_bytes(changed)
        try:
            read_weights(tmp_path / "w.pth")
        except ValueError:  # and no other kind
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "{}"},
        {"config": '{"student": {}}', "step": "last"},
        {"config": "vit", "step": "3"},
        {"config": '{"student": 3}', "step": "3"},
    ],
)
def test_notes_of_others_are_no_config(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "w.safetensors", metadata)
    assert read_checkpoint(tmp_path / "w.safetensors")[1:] == (None, None)


def test_a_header_with_notes_that_are_null(tmp_path):
    header = json.dumps({"__metadata__": None, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert read_checkpoint(tmp_path / "w.safetensors").config is None


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("never",)


def test_code_in_a_file_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, path = {"model": TENSORS["scalar"], "extra": Malicious()}, tmp_path / "w.pth"
    for write in (
        lambda: torch.save(content, path),
        lambda: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(content, protocol=2)),
    ):
        write()
        message(path)
        assert os.listdir(tmp_path) == ["w.pth"]
    torch.save(content, path)
    assert "would call posix.mkdir" in message(path) and "state dict" in message(path)


def test_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "w.pth")
    assert "it is not a dict but a list" in message(tmp_path / "w.pth")
