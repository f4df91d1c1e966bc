"""Rank and world size from the variables of each launcher."""

import pytest

from dinov2_eq.distributed.launch import Launch, find_launch

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "a", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4"},
    **{"SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
    "SLURM_STEP_NODELIST": "node[001-002],other",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's program that knows this one list; tests/slurm uses the real one."""
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[001-002],other" ] && printf "node001\\nnode002\\nother\\n"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_a_plain_python_is_alone():
    assert find_launch({}) == Launch("single", 0, 1, 0, 1)


def test_torchrun():
    assert find_launch(TORCHRUN) == Launch("torchrun", 3, 4, 1, 2, "a", 29500)


def test_torchrun_inside_a_slurm_job_is_torchrun():
    assert find_launch(SLURM | TORCHRUN).how == "torchrun"


def test_srun(scontrol):
    launch = find_launch(SLURM)
    assert launch[:6] == ("slurm", 4, 5, 0, 1, "node001")
    assert 20000 <= launch.master_port < 40000
    assert find_launch(SLURM | {"SLURM_NODEID": "1"}).local_world_size == 2


def test_steps_of_one_job_have_ports_of_their_own(scontrol):
    assert find_launch(SLURM).master_port != find_launch(SLURM | {"SLURM_STEP_ID": "1"}).master_port


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_plain_python_in_a_batch_script_or_a_shell_of_srun_is_alone(step):
    assert find_launch({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", **step}).how == "single"


def test_a_part_of_torchruns_variables_is_an_error():
    with pytest.raises(ValueError, match="LOCAL_RANK and MASTER_ADDR and MASTER_PORT missing"):
        find_launch({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_node_list_without_slurms_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"scontrol cannot list the hosts of .*'node\[001-002\],other'"):
        find_launch(SLURM)
