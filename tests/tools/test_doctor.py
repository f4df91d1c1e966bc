"""The doctor as a user calls it: alone, with torchrun's variables and under srun."""

import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from PIL import Image

from dinov2_eq.tools import doctor as program
from tests.processes import run_ranks
from tests.slurm.cluster import Cluster, why_not

DOCTOR = [sys.executable, "-m", "dinov2_eq.tools.doctor", "--config-file", "debug"]
CHECKS = {"launch", "versions", "devices", "compile", "slurm", "attention", "data", "limits", "disk", "memory"}


def parse(output):
    """Splits the output into (level, check, text) of each line."""
    return [tuple(line.split(maxsplit=2)) for line in output.splitlines()]


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Runs the doctor on the recipe `debug` with more arguments; returns exit code and lines."""
    monkeypatch.setattr(program, "READING_S", 0.1)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            program.main(["--config-file", "debug", *arguments])
        return stop.value.code, parse(capsys.readouterr().out)

    return call


def texts(lines, check, level):
    return [text for found, name, text in lines if (found, name) == (level, check)]


def test_a_machine_that_is_well(doctor, tmp_path):
    code, lines = doctor("train.num_workers=1", "--output-dir", str(tmp_path / "run"))
    assert (code, [line for line in lines if line[0] == "fix"]) == (0, [])
    assert {name for _, name, _ in lines} == CHECKS
    [versions] = texts(lines, "versions", "ok")
    assert "torch " in versions and "submitit " in versions and "pytest" not in versions
    assert any("0 workers: " in text and "images per second" in text for text in texts(lines, "data", "ok"))
    assert any("1 workers: " in text for text in texts(lines, "data", "ok"))
    assert any("sdpa for torch.float32 on cpu" in text for text in texts(lines, "attention", "ok"))
    assert any("4 checkpoints of" in text for text in texts(lines, "disk", "ok"))


def what_it_prints():
    """The output of a process, and its exit code."""
    with redirect_stdout(StringIO()) as output, pytest.raises(SystemExit) as stop:
        program.main(["--config-file", "debug"])
    return output.getvalue(), stop.value.code


def test_two_processes_measure_what_connects_them():
    (main, code), (other, _) = run_ranks(what_it_prints, 2)
    assert code == 0 and other == ""
    lines = parse(main)
    assert {name for _, name, _ in lines} == {*CHECKS, "interconnect"}
    assert "torchrun: 2 processes on 1 nodes" in texts(lines, "launch", "ok")[0]
    *reduced, link = texts(lines, "interconnect", "ok")
    assert [text.split(":")[0] for text in reduced] == [
        f"gloo all-reduce of {size} MiB" for size in ("0.00391", "1", "64")
    ]
    assert all(float(text.split()[-2]) > 0 for text in reduced)
    assert link.startswith("slowest link: process ")
    assert len(texts(lines, "versions", "ok")) == 1  # the second process says only what the first does not


def test_a_run_that_does_not_fit(doctor):
    recipe = ["student.arch=vit_giant2", "student.depth=40", "train.batch_size_per_gpu=512"]
    code, lines = doctor("--gpus", "8", "--nodes", "2", "--gpu-memory", "0.5", *recipe)
    [memory] = texts(lines, "memory", "fix")
    assert code == 2
    assert "16 processes" in memory and "of 512 MiB" in memory and "fsdp.activation_checkpointing=true" in memory


def test_a_broken_config_hides_nothing_else(doctor):
    code, lines = doctor("train.sed=1")
    assert code == 2
    assert [name for level, name, _ in lines if level == "fix"] == ["config"]
    assert "Did you mean 'train.seed'" in texts(lines, "config", "fix")[0]
    assert texts(lines, "versions", "ok") and not texts(lines, "data", "ok")


def test_data_that_cannot_be_read(doctor, tmp_path):
    code, lines = doctor(f"train.dataset_path=Folder:root={tmp_path / 'nowhere'}")
    assert code == 2 and str(tmp_path / "nowhere") in texts(lines, "data", "fix")[0]
    for index in range(8):
        image = Image.fromarray(np.full((40, 40, 3), 30 * index, np.uint8))
        path = tmp_path / f"{index}.png"
        image.save(path)
        if index % 2:
            path.write_bytes(path.read_bytes()[:60])
    code, lines = doctor(f"train.dataset_path=Folder:root={tmp_path}")
    assert code == 2 and "unreadable, above train.max_corrupt_share" in texts(lines, "data", "fix")[0]


def test_a_folder_that_cannot_be_written(doctor, tmp_path):
    (tmp_path / "file").touch()
    code, lines = doctor("--output-dir", str(tmp_path / "file" / "run"))
    assert code == 2 and "cannot be written" in texts(lines, "disk", "fix")[0]


def test_slurm_that_is_expected_and_does_not_answer(doctor, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    code, lines = doctor("--slurm")
    assert code == 2 and "SLURM does not respond" in texts(lines, "slurm", "fix")[0]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.cluster
def test_two_nodes_of_a_real_slurm():
    with Cluster():
        command = [*["srun", "-N2", "-n2", "-t5"], *DOCTOR, "--slurm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = parse(done.stdout)
    assert texts(lines, "launch", "ok") == ["slurm: 2 processes on 2 nodes, connected through node1"]
    *_, link = texts(lines, "interconnect", "ok")
    assert "on node1" in link and "on node2" in link
    version, controller, partitions = texts(lines, "slurm", "ok")
    assert version.startswith("slurm") and "is UP" in controller
    assert "low* up, 2 nodes" in partitions and "high up, 2 nodes" in partitions
    assert texts(lines, "slurm", "info")[0].startswith("no accounting (sacct: ")
