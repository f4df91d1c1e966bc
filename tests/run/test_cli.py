"""The console program: help, commands, and mistakes without a traceback."""

import pytest

from dinov2_eq.run.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0 and f"dinov2-eq {command}" in capsys.readouterr().out


def test_ctrl_c_is_a_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov2_eq.tools.doctor.main", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "dinov2-eq: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "Unknown command 'trian'; available: train"),
        (
            ["train", "--config-file", "debug", "--output-dir", "x", "train.sed=1"],
            "unknown key 'train.sed'. Did you mean 'train.seed'",
        ),
        (["train", "--config-file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (
            ["train", "--config-file", "debug", "--dry-run", "train.dataset_path=Folder:root=/does/not/exist"],
            "/does/not/exist",
        ),
        (["report", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
