"""Logging never fails: not on a lost terminal, a full disk, or names that are not valid Unicode."""

import errno
import io
import json
import logging
import os
import sys

import pytest

from dinov2_eq.logging import MetricLogger, first_value, progress_bar, setup_logging
from dinov2_eq.logging.metrics import FILE_NAME

LATIN_1 = os.fsdecode(b"caf\xe9.png")


@pytest.fixture
def log(tmp_path):
    """The log file of a run in `tmp_path`; resets logging afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    setup_logging(tmp_path)
    yield tmp_path / "logs" / "log.0.txt"
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level


class Lost(io.StringIO):
    """A terminal or pipe whose reader is gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error"), ValueError("closed file")],
)
def test_a_lost_terminal_is_no_error(log, monkeypatch, error):
    monkeypatch.setattr(sys, "stderr", Lost(error))
    logging.info("step 3")
    for _ in progress_bar(range(3)):
        logging.info("step 4")
    assert [line[-6:] for line in log.read_text().splitlines()] == ["step 3", *["step 4"] * 3]


def test_a_closed_stderr_is_no_error(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    logging.info("step 3")
    assert "step 3" in log.read_text()


def test_names_that_are_no_text_are_escaped(log):
    """Uses a logger that the test runner does not capture, because it could not write the name either."""
    logger = logging.Logger("alone")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            logger.addHandler(handler)
    logger.warning("Unreadable image skipped: %s", LATIN_1)
    assert r"Unreadable image skipped: caf\udce9.png" in log.read_text(encoding="utf-8")


def test_a_full_disk_is_told_once(log, capsys, monkeypatch):
    (file,) = (handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler))

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "stream", io.StringIO())
    monkeypatch.setattr(file.stream, "write", full)
    for _ in range(3):
        logging.info("step 3")
    told = capsys.readouterr().err
    assert told.count(f"{log} cannot be written any more: No space left on device") == 1
    assert told.count("step 3") == 3 and "Traceback" not in told


@pytest.mark.parametrize("line", [b"3", b"null", b'{"step": "x"}', b"[1]", b'{"step": null}', b"\xe9", b'{"step": 4'])
def test_lines_that_are_no_metrics_are_dropped(tmp_path, line):
    (tmp_path / FILE_NAME).write_bytes(b'{"step": 2, "loss": 5.0}\n' + line + b"\n")
    assert first_value(tmp_path, "loss") == [5.0]
    MetricLogger(tmp_path, start_step=3).close()
    assert (tmp_path / FILE_NAME).read_text() == '{"step": 2, "loss": 5.0}\n'


def test_a_folder_whose_name_is_no_text(tmp_path, caplog):
    folder = tmp_path / LATIN_1
    folder.mkdir()
    metrics = MetricLogger(folder, start_step=0)
    metrics.log(1, {"loss": 5.0})
    metrics.close()
    assert json.loads((folder / FILE_NAME).read_text()) == {"step": 1, "loss": 5.0}
    assert "no TensorBoard events" in caplog.text
