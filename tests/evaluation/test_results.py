import json

import pytest

from dinov2_eq.evaluation.results import publish, results_folder, write_results


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


@pytest.mark.parametrize("encoder", ["timm:vit_small_patch16_224", "hf:org/name", "random:vit_tiny/8@32"])
def test_an_encoder_without_a_folder(encoder, tmp_path):
    assert results_folder(encoder, tmp_path) == tmp_path
    with pytest.raises(ValueError, match=f"--output-dir is missing: {encoder} "):
        results_folder(encoder, None)


def test_a_folder_with_a_colon(tmp_path):
    (tmp_path / "run:3").mkdir()
    assert results_folder(tmp_path / "run:3", None) == tmp_path / "run:3"


def test_publishing(tmp_path, capsys):
    publish(tmp_path / "results.json", {"top1": 1.5}, "the table")
    assert json.loads((tmp_path / "results.json").read_text()) == {"top1": 1.5}
    assert capsys.readouterr().out.splitlines() == ["the table", str(tmp_path / "results.json")]
