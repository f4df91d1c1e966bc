"""Programs in processes of their own."""

import threading
import time

from dinov2_eq import __version__
from dinov2_eq.evaluation.programs import Programs, last_line
from dinov2_eq.exits import STOPPED


def test_output_and_exit_code(tmp_path):
    log = tmp_path / "log.txt"
    with Programs({"DINOV2_EQ_TEST": "1"}) as programs:
        assert programs.run(["--version"], log) == 0 and log.read_text() == f"{__version__}\n"
        assert programs.run(["trian"], log) == 2
    assert last_line(log, 2).startswith("dinov2-eq: Unknown command 'trian'")
    assert last_line(log, 2).endswith(f"(see {log})")
    log.write_text("")
    assert last_line(log, 7) == f"exit code 7 (see {log})"


def test_what_runs_is_ended_and_nothing_starts_after_that(tmp_path):
    """The program would train for hours; it is one of another thread."""
    codes = []
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path / "run"), "optim.steps=1000000"]
    programs = Programs()
    thread = threading.Thread(target=lambda: codes.append(programs.run(words, tmp_path / "log.txt")))
    thread.start()
    deadline = time.monotonic() + 60
    while not programs._running and time.monotonic() < deadline:
        time.sleep(0.01)
    programs.end()
    thread.join(timeout=60)
    assert codes and codes[0] != 0
    assert programs.run(["--version"], tmp_path / "later.txt") == STOPPED and not (tmp_path / "later.txt").read_text()
