import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from dinov2_eq.config.schema import default_config
from dinov2_eq.report.runs import COLORS, Snapshot, load_runs, load_snapshot


def write_config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    OmegaConf.save(default_config(), folder / "config.yaml")
    return folder


def snapshot(reconstructions: np.ndarray | None, targets: np.ndarray) -> Snapshot:
    view = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    return Snapshot(
        step=0,
        anchor_view=view,
        base_view=view,
        transformed_view=view,
        intermediate_targets=targets,
        reconstructions=reconstructions,
        fractions=np.array([0.5]),
        theta=np.zeros((1, 1)),
        components=np.array(["angle_deg"]),
    )


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    runs = load_runs([write_config(tmp_path / "a/out"), write_config(tmp_path / "b/out")])
    assert [(run.name, run.letter) for run in runs] == [("a/out", "A"), ("b/out", "B")]
    assert runs[0].color != runs[1].color
    assert [run.name for run in load_runs([tmp_path / "a/out"])] == ["out"]


def test_a_folder_that_is_no_run_names_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder(.|\n)*training_metrics.jsonl(.|\n)*results_eval_knn.json"):
        load_runs([tmp_path])


def test_the_same_folder_twice_and_too_many(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "run")
    with pytest.raises(ValueError, match="given twice"):
        load_runs([folder, tmp_path / "run/../run"])
    with pytest.raises(ValueError, match=f"1 to {len(COLORS)} runs"):
        load_runs([folder] * (len(COLORS) + 1))


def test_config_of_differences_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("student: {arch: vit_tiny}\n")
    with pytest.raises(ValueError, match="no section equivariance, optim"):
        load_runs([tmp_path])


def test_metrics_of_a_resumed_and_interrupted_run(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "run")
    lines = ('{"step": 0, "lr": 1}', '{"step": 10, "lr": 2}', '{"step": 10, "lr": 3}', '{"step": 10, "x": 4}', '{"ste')
    (folder / "training_metrics.jsonl").write_text("\n".join(lines))
    (run,) = load_runs([folder])
    steps, values = run.curve("lr")
    assert steps.tolist() == [0, 10] and values.tolist() == [1, 3]
    assert run.curve("x")[1].tolist() == [4]
    assert len(run.curve("absent")[0]) == 0


def test_broken_metrics_line_is_named(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "run")
    (folder / "training_metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        load_runs([folder])


def test_newest_checkpoint_is_by_step_not_by_spelling(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "run")
    for step in ("900", "1000"):
        (folder / f"eval/training_{step}").mkdir(parents=True)
        (folder / f"eval/training_{step}/teacher_checkpoint.pth").touch()
    (run,) = load_runs([folder])
    assert run.teacher_checkpoint == folder.resolve() / "eval/training_1000/teacher_checkpoint.pth"


def test_samples_without_an_array_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "step_0000010.npz", base_view=np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"lacks the arrays \['anchor_view', 'fractions'"):
        load_snapshot(tmp_path / "step_0000010.npz")


def samples(folder: Path, **changes: np.ndarray) -> Path:
    views = np.zeros((3, 2, 8, 8, 3), np.uint8)
    arrays = dict(zip(("anchor_view", "base_view", "transformed_view"), views, strict=True))
    arrays |= {"intermediate_targets": views[:2], "fractions": np.ones(2), "theta": np.zeros((2, 3))}
    np.savez(folder / "step_0000010.npz", **arrays | changes)
    return folder / "step_0000010.npz"


def test_samples_cut_off_anywhere_or_no_samples_at_all(tmp_path: Path) -> None:
    path = samples(tmp_path)
    whole = path.read_bytes()
    assert load_snapshot(path).base_view.shape == (2, 8, 8, 3)
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path} is not a samples file, or it was cut off"):
            load_snapshot(path)
    for changes in ({"theta": np.zeros(3)}, {"base_view": np.zeros((8, 8, 3), np.uint8)}):
        with pytest.raises(ValueError, match=rf"{path}: \w+ has \d dimensions, expected"):
            load_snapshot(samples(tmp_path, **changes))


KNN, EQUIVARIANCE = "results_eval_knn.json", "results_eval_equivariance.json"
ROW = {"task": "blur", "border": "none", "encoder": "trained", "tokens": "both"} | {
    "r2_pooled": 1,
    "r2_mean": 1,
    "r2_components": {"a": 1},
}
NO_METRICS = [
    "3",
    "null",
    '["step"]',
    '{"step": "x"}',
    '{"step": []}',
    '{"step": 1, "lr": null}',
    '{"step": 1, "lr": "x"}',
    '{"step": Infinity}',
    "[" * 9999,
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", ""),
        ("config.yaml", "equivariance: {enab"),
        ("config.yaml", b"\xff"),
        ("config.yaml", "word"),
        ("training_metrics.jsonl", b"\xff\xfe\n"),
        ("training_metrics.jsonl", bytes(300) + b"\n"),
        *(("training_metrics.jsonl", f"{line}\n") for line in NO_METRICS),
        *((name, text) for name in (KNN, EQUIVARIANCE) for text in ("", '{"rows": [', "[]", "{}", "null", b"\xff")),
        *(
            (KNN, json.dumps({"results": found}))
            for found in ([], {"full": 3}, {"full": {"5": 3}}, {"a": {"5": {"b": "c"}}})
        ),
        *((EQUIVARIANCE, json.dumps({"rows": rows})) for rows in (3, [3], [{}], [ROW | {"r2_mean": "x"}])),
        *((EQUIVARIANCE, json.dumps({"rows": [{k: v for k, v in ROW.items() if k != key}]})) for key in ROW),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    folder = write_config(tmp_path / "run")
    (folder / EQUIVARIANCE).write_text(json.dumps({"rows": [ROW]}))
    load_runs([folder])
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{folder / name}"):
        load_runs([folder])


NUMBERS, WORDS = ("equivariance.loss_weight", "optim.steps"), ("student.arch", "train.dataset_path")


@pytest.mark.parametrize(
    ("setting", "value"),
    [*product(NUMBERS, (None, "x", [1])), *product(WORDS, (None, 1, [1]))],
)
def test_a_config_with_another_kind_of_value_is_named(tmp_path: Path, setting: str, value: object) -> None:
    folder = write_config(tmp_path / "run")
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, setting, value, merge=False)
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(ValueError, match=f"^{folder}/config.yaml: {setting}="):
        load_runs([folder])


def test_psnr_of_a_known_error() -> None:
    targets = np.full((1, 1, 4, 4, 3), 10, dtype=np.uint8)
    assert snapshot(targets - np.uint8(5), targets).psnr() == pytest.approx(20 * np.log10(255 / 5))
