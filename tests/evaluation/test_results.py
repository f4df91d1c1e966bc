import json

import pytest

from dinov2_eq.evaluation.results import results_folder, write_results


def test_writes_json_into_a_new_folder_and_leaves_nothing_else(tmp_path):
    path = write_results(tmp_path / "a" / "b" / "results.json", {"top1": 12.5})
    write_results(path, {"top1": 13.5})
    assert json.loads(path.read_text()) == {"top1": 13.5}
    assert list(path.parent.iterdir()) == [path]


def test_what_json_cannot_say_leaves_the_old_file(tmp_path):
    path = write_results(tmp_path / "results.json", {"r2": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, {"r2": float("nan")})
    assert json.loads(path.read_text()) == {"r2": 0.5}


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/results cannot be written .*; choose another --output-dir"):
        write_results(tmp_path / "file" / "results" / "results.json", {})


def test_default_folder(tmp_path):
    (tmp_path / "teacher_checkpoint.pth").touch()
    assert results_folder(tmp_path, None) == tmp_path
    assert results_folder(tmp_path / "teacher_checkpoint.pth", None) == tmp_path
    assert results_folder(tmp_path, "elsewhere").name == "elsewhere"


@pytest.mark.parametrize("output_dir", [None, "elsewhere"])
def test_weights_that_do_not_exist(tmp_path, output_dir):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        results_folder(tmp_path / "a" / "typo", output_dir and tmp_path / output_dir)
