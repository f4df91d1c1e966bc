"""Faults of one process of two: what both do, and how the run resumes."""

import os
import re
import signal
from collections.abc import Iterator
from multiprocessing import Process

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from dinov2_eq.distributed import get_rank
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.logging import setup_logging
from tests.processes import start_ranks
from tests.reliability.runs import Run, exit_codes

pytestmark = pytest.mark.cluster

KILLED = -signal.SIGKILL
NAME = r"process {} \(host .+, pid \d+\)"


@pytest.fixture(scope="module")
def struck(tmp_path_factory) -> Iterator[dict[str, tuple[Run, list[Process]]]]:
    """Runs with faults that take long to be noticed; they are started together, so that they wait together."""
    runs = {fault: Run(tmp_path_factory.mktemp("struck")) for fault in ("kill 1", "stop 1", "stop 0", "memory 1")}
    processes = {fault: run.start(fault=f"{fault} 6") for fault, run in runs.items()}
    yield {fault: (runs[fault], processes[fault]) for fault in runs}
    for process in (process for pair in processes.values() for process in pair):
        process.kill()


def test_a_process_is_killed(struck, uninterrupted):
    run, processes = struck["kill 1"]
    assert exit_codes(processes) == [5, KILLED]
    assert re.search(NAME.format(1) + r" has been silent for 1\d s\. This process ends", run.printed(0))
    run.goes_on(uninterrupted, 4)


def test_the_main_process_is_killed(run, uninterrupted):
    assert run.train(fault="kill 0 6") == [KILLED, 5]
    assert re.search(NAME.format(0) + " hosts the store of all processes and no longer responds", run.printed(1))
    run.stopped_after(uninterrupted, 4)


def test_all_others_name_the_process_that_is_killed(tmp_path):
    processes, _ = start_ranks(wait_for_each_other, 3, tmp_path)
    assert exit_codes(processes) == [5, 5, KILLED]
    for rank in (0, 1):
        assert re.search(NAME.format(2) + " has been silent", (tmp_path / "logs" / f"log.{rank}.txt").read_text())


def wait_for_each_other(folder):
    with process_group(find_launch(), torch.device("cpu"), silence_limit_s=20):
        setup_logging(folder)
        if get_rank() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def test_a_process_hangs(struck, uninterrupted):
    run, (main, hung) = struck["stop 1"]
    assert exit_codes([main]) == [5]
    assert re.search(NAME.format(1) + r" has been silent for 2\d s", run.printed(0))
    assert hung.exitcode is None
    os.kill(hung.pid, signal.SIGCONT)  # it finds itself alone
    assert exit_codes([hung]) == [5]
    run.stopped_after(uninterrupted, 4)


def test_the_main_process_hangs(struck, uninterrupted):
    """Its store does not respond, and torch would wait forever."""
    run, (hung, other) = struck["stop 0"]
    assert exit_codes([other]) == [5]
    assert re.search(NAME.format(0) + " hosts the store of all processes and no longer responds", run.printed(1))
    assert hung.exitcode is None
    os.kill(hung.pid, signal.SIGCONT)
    assert exit_codes([hung]) == [5]
    assert re.search(NAME.format(1) + " has been silent", run.printed(0))
    run.stopped_after(uninterrupted, 4)


def test_a_signal_to_one_process(run, uninterrupted):
    assert run.train(fault="term 0 3") == [4, 4]
    assert run.train(fault="usr2 1 2") == [4, 4]  # its second step is the fifth
    for rank in (0, 1):
        for name, step in {"SIGTERM": 3, "SIGUSR2": 5}.items():
            stop = f"dinov2-eq: stopped by {name} after step {step}, saved; rerun the same command to resume"
            assert stop in run.printed(rank)
    run.goes_on(uninterrupted, 5)


def test_a_mistake_in_one_process(run, uninterrupted):
    assert run.train(fault="mistake 1 6") == [5, 2]
    assert re.search(NAME.format(1) + " stopped: ValueError: this image is not what it seems", run.printed(0))
    assert "dinov2-eq: this image is not what it seems" in run.printed(1)
    run.stopped_after(uninterrupted, 4)


def test_an_error_of_one_process_that_may_be_another_ones_fault(struck, uninterrupted):
    """torch raises RuntimeError for an error here as well as for a lost connection."""
    run, processes = struck["memory 1"]
    assert exit_codes(processes) == [5, 1]
    assert re.search(NAME.format(1) + " stopped: RuntimeError: out of memory", run.printed(0))
    assert "Traceback" in run.printed(1)
    run.stopped_after(uninterrupted, 4)


def test_a_nan_in_one_batch(run, uninterrupted):
    assert run.train(fault="nan 1 6") == [3, 3]
    for rank in (0, 1):
        assert "dinov2-eq: Loss not finite at step 5: dino = nan" in run.printed(rank)
    run.stopped_after(uninterrupted, 4)


def test_a_worker_is_killed(run, uninterrupted):
    assert run.train("train.num_workers=2", fault="kill_a_worker 1 3") == [5, 2]
    reason = r"A data-loading process is gone \(.+\)\. If .* ran out of memory: request more, or lower train.num_w"
    assert re.search(f"dinov2-eq: {reason}", run.printed(1))
    assert re.search(f"{NAME.format(1)} stopped: DataError: {reason}", run.printed(0))
    newest = int(max(run.names_of_checkpoints()))  # batches that were ready may have been used
    run.goes_on(uninterrupted, newest, "train.num_workers=1")


def test_corrupt_images(run):
    images = run.folder / "images"
    images.mkdir()
    for number in range(24):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
            images / f"{number:02}.png"
        )
    (images / "07.png").write_bytes(b"not an image")
    (images / "08.png").write_bytes((images / "08.png").read_bytes()[:-200])
    data = [f"train.dataset_path=Folder:root={images}", "train.batch_size_per_gpu=10"]
    assert run.train(*data) == [2, 2]
    for rank in (0, 1):
        assert re.search(r"dinov2-eq: \d+ of 1\d\d images could not be read.*/07.png.*/08.png", run.printed(rank))
    assert run.train(*data, "train.max_corrupt_share=0.2") == [0, 0]
    for name in ("07.png", "08.png"):
        assert f"Unreadable image skipped: {images / name}" in run.log(0) + run.log(1)
