"""Whole runs: exact resume, accumulation, files, and what stops a run with which words."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import DataError
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.train.build import build_arch, build_optimizer
from dinov2_eq.train.finite import NonFiniteError
from dinov2_eq.train.meter import effective_rank
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch
from dinov2_eq.train.train import do_train, main
from tests.helpers import PAPERS_FORM, TINY, in_this_process, tiny_config
from tests.processes import run_ranks


def teacher(folder, step=6):
    path = folder / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "training_metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a finished run with these settings; to be copied by who changes it."""

    @cache
    def folder_of(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("finished")
        do_train(tiny_config(*overrides), folder)
        return folder

    return folder_of


class Interrupted(Exception):
    pass


def train_until(config, folder, step, monkeypatch):
    """Trains, and is killed when update number `step` is about to begin."""
    original, calls = SSLMetaArch.forward, []

    def forward(self, *args):
        calls.append(None)
        if len(calls) > step * config.train.accumulation_steps:
            raise Interrupted
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(SSLMetaArch, "forward", forward)
        do_train(config, folder)


NO_DINOV2 = ["dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"]
SIE = ["sie.loss_weight=1", "sie.expander_dim=32", "train.known_share=0.5", "equivariance.view=second"]  # of one g


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["equivariance.enabled=false", "train.centering=sinkhorn_knopp", "dino.head_norm_last_layer=true"],
        ["equivariance.loss_weight=0", "optim.clip_grad_per=tensor"],
        [*PAPERS_FORM, "evaluation.sample_period_steps=3"],
        ["equivariance.third_view_share=0.1"],  # most batches have none
        ["equivariance.third_view_size=local", "evaluation.sample_period_steps=3"],
        ["train.batch_size_per_gpu=2", "train.accumulation_steps=2", "train.num_workers=1"],
        [*NO_DINOV2, "simclr.loss_weight=1"],
        [*NO_DINOV2, "vicreg.loss_weight=1", "vicreg.expander_dim=32", "student.patch_embed=conv"],
        [*NO_DINOV2, *SIE],
        ["student.arch=resnet18", "ibot.loss_weight=0", "equivariance.enabled=false"],
    ],
)
def test_three_plus_three_steps_equal_six(finished, tmp_path, monkeypatch, overrides):
    config, whole = tiny_config(*overrides), finished(*overrides)
    train_until(config, tmp_path, 5, monkeypatch)  # killed after a checkpoint at 3 and two more steps
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    do_train(config, tmp_path)

    torch.testing.assert_close(teacher(tmp_path)["teacher"], teacher(whole)["teacher"], rtol=0, atol=0)
    pairs = list(zip(metrics(whole), metrics(tmp_path), strict=True))
    assert [line["step"] for line, _ in pairs] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in pairs:
        assert ours["total_loss"] == theirs["total_loss"]


def test_updates_are_computed_as_this_start_does(finished, tmp_path, monkeypatch):
    """Not as the one that wrote the checkpoint; torch keeps that with the optimizer's state."""
    config, optimizers = tiny_config(), []

    def build(fused, *args):
        optimizers.append(build_optimizer(*args))
        for settings in (optimizers[-1].defaults, *optimizers[-1].param_groups):
            settings["fused"] = fused
        return optimizers[-1]

    for fused, train in ((None, partial(train_until, step=4, monkeypatch=monkeypatch)), (True, do_train)):
        monkeypatch.setattr("dinov2_eq.train.build.build_optimizer", partial(build, fused))
        train(config, tmp_path)
    assert [{group["fused"] for group in optimizer.param_groups} for optimizer in optimizers] == [{None}, {True}]
    torch.testing.assert_close(teacher(tmp_path)["teacher"], teacher(finished())["teacher"], rtol=0, atol=1e-5)


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Without the terms that look at one forward at a time (KoLeo, stochastic depth). The teacher moves fast, so that
    one that moved with every forward would be found out."""
    exact = ["dino.koleo_loss_weight=0", "student.drop_path_rate=0", "optim.steps=3", "optim.base_lr=0.01"]
    exact += ["teacher.momentum_teacher=0.5", "teacher.final_momentum_teacher=0.5"]
    for name, (size, steps) in {"whole": (4, 1), "parts": (1, 4)}.items():
        sizes = [f"train.batch_size_per_gpu={size}", f"train.accumulation_steps={steps}"]
        do_train(tiny_config(*exact, *sizes), tmp_path / name)
    for ours, theirs in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        for term in ("dino", "ibot", "reconstruction"):
            assert theirs[f"loss/{term}"] == pytest.approx(ours[f"loss/{term}"], abs=1e-5)
    whole, parts = (teacher(tmp_path / name, 3)["teacher"] for name in ("whole", "parts"))
    begin = build_arch(tiny_config(*exact), torch.device("cpu")).teacher.state_dict()
    moved = max((whole[name] - begin[name]).abs().max() for name in whole)
    apart = max((whole[name] - parts[name]).abs().max() for name in whole)
    assert apart < 0.02 * moved and moved > 1e-4


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        do_train(tiny_config("optim.steps=2", f"train.num_workers={workers}"), tmp_path / str(workers))
    zero, two = (teacher(tmp_path / name, 2)["teacher"] for name in ("0", "2"))
    torch.testing.assert_close(two, zero, rtol=0, atol=0)


def test_files_of_a_run(tmp_path):
    """The debug recipe, whole, as a user starts it."""
    main(
        [
            "--config-file",
            "debug",
            "optim.steps=6",
            "--output-dir",
            str(tmp_path),
            "teacher.warmup_teacher_temp_steps=2",
        ]
    )
    assert load_config(str(tmp_path / "config.yaml")).optim.steps == 6
    assert set(json.loads((tmp_path / "environment.json").read_text())) >= {"torch", "commit", "device"}
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "eval/knn_top1" in line] == [0, 5, 6]
    training = [line for line in lines if "total_loss" in line]
    assert {
        *("loss/dino", "loss/ibot", "loss/koleo", "loss/reconstruction", "teacher_entropy", "feature_rank"),
        *("grad_norm/backbone", "lr", "teacher_temp", "data_wait_share", "images_per_second"),
    } <= set(training[-1])
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5", "6"]

    saved = teacher(tmp_path)
    assert saved["step"] == 6 and saved["config"]["student"]["arch"] == "vit_tiny"
    samples = np.load(tmp_path / "samples" / "step_0000005.npz")
    assert samples["reconstructions"].shape == samples["intermediate_targets"].shape == (2, 4, 32, 32, 3)
    assert samples["fractions"] == pytest.approx([1 / 3, 2 / 3])
    assert not np.array_equal(samples["base_view"], samples["transformed_view"])


@pytest.mark.parametrize("view", ["second", "third"])
def test_samples_of_the_control_have_targets_but_no_reconstructions(tmp_path, view):
    task = [f"equivariance.view={view}", "evaluation.sample_period_steps=3"]
    do_train(tiny_config("equivariance.loss_weight=0", *task), tmp_path / "control")
    do_train(tiny_config(*task), tmp_path / "task")
    samples, others = (np.load(tmp_path / name / "samples/step_0000003.npz") for name in ("control", "task"))
    assert "reconstructions" not in samples and samples["intermediate_targets"].shape[0] == 2
    for name in ("base_view", "transformed_view", "intermediate_targets", "theta"):
        assert np.array_equal(samples[name], others[name])
    assert not np.array_equal(samples["base_view"], samples["transformed_view"])


def test_pictures_do_not_change_the_run(finished, tmp_path):
    do_train(tiny_config("evaluation.sample_period_steps=1"), tmp_path)
    torch.testing.assert_close(teacher(tmp_path)["teacher"], teacher(finished())["teacher"], rtol=0, atol=0)


SHORT = "optim.steps=3"


def test_a_finished_run_is_left_alone(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "training_metrics.jsonl").read_text()
    do_train(tiny_config(SHORT), tmp_path)
    assert (tmp_path / "training_metrics.jsonl").read_text() == before


def test_no_resume_sets_the_earlier_run_aside(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    of_evaluations = ("results_eval_knn.json", "running_checkpoint_linear_eval.pth", "checkpoint_linear_eval_8.pth")
    for name in of_evaluations:
        (tmp_path / name).write_text("{}")
    do_train(tiny_config("optim.steps=2"), tmp_path, resume=False)
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} >= {
        *("checkpoints", "eval", "training_metrics.jsonl", "config.yaml", *of_evaluations)
    }
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["training_2"]


def test_a_mistake_leaves_the_earlier_run_in_place(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    with pytest.raises(DataError):
        do_train(tiny_config("train.dataset_path=Folder:root=/does/not/exist"), tmp_path, resume=False)
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_resume_with_a_changed_setting(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"train.seed was 0, now 1.*--no-resume"):
        do_train(tiny_config("train.seed=1"), tmp_path)
    do_train(tiny_config("optim.steps=4", "optim.base_lr=0.0001"), tmp_path)
    log = (tmp_path / "logs" / "log.0.txt").read_text()
    assert "optim.base_lr was 0.001, now 0.0001" in log and "optim.steps was 3, now 4" in log


@pytest.mark.parametrize("content", [b"", b"train: {se", b"word", b"\xff", b"train: 3", b"nothing: {known: 1}"])
def test_resume_with_a_damaged_config(finished, tmp_path, content):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)config.yaml.*restore it, or delete it to skip the comparison"):
        do_train(tiny_config(SHORT), tmp_path)


def test_resume_with_another_architecture(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"has another architecture: \d+ of \d+ tensors differ.*--no-resume"):
        do_train(tiny_config("student.arch=vit_small"), tmp_path)


def test_resume_from_a_half_written_checkpoint(finished, tmp_path):
    shutil.copytree(finished(SHORT), tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="No checkpoint of this run can be resumed from"):
        do_train(tiny_config(), tmp_path)
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "3.writing")
    do_train(tiny_config(SHORT), tmp_path)  # an unfinished folder counts as none: the run starts again
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written.*choose another --output-dir"):
        do_train(tiny_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize("term", ["dino", "ibot", "koleo", "reconstruction"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_term_is_named_and_nothing_is_updated(tmp_path, monkeypatch, term, value):
    original = SSLMetaArch.forward
    seen = []

    def forward(self, *args):
        output = original(self, *args)
        seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
        if len(seen) == 2:
            output.losses[term] = output.losses[term] * value
        arch.append(self)
        return output

    arch = []
    monkeypatch.setattr(SSLMetaArch, "forward", forward)
    with pytest.raises(NonFiniteError, match=f"not finite at step 1: {term} = {value}"):
        do_train(tiny_config(), tmp_path)
    before, after = seen[-1], dict(arch[-1].state_dict())
    weights = [name for name in before if "center" not in name]
    torch.testing.assert_close({n: after[n] for n in weights}, {n: before[n] for n in weights}, rtol=0, atol=0)


def test_a_non_finite_gradient_is_named(tmp_path, monkeypatch):
    original = SSLMetaArch.forward

    def forward(self, *args):
        weight = self.student["dino_head"].last_layer.weight_v
        weight.register_hook(lambda gradient: gradient * float("nan"))
        return original(self, *args)

    monkeypatch.setattr(SSLMetaArch, "forward", forward)
    with pytest.raises(NonFiniteError, match="gradient of dino_head is not finite at step 0"):
        do_train(tiny_config(), tmp_path)


def test_corrupt_images_are_skipped_named_and_counted(tmp_path, caplog):
    data = tmp_path / "images"
    data.mkdir()
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            data / f"{number:02}.png"
        )
    (data / "07.png").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING):
        do_train(tiny_config(f"train.dataset_path=Folder:root={data}", "train.max_corrupt_share=0.2"), tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["corrupt_images"] >= 1
    log = (tmp_path / "run" / "logs" / "log.0.txt").read_text()
    assert f"Unreadable image skipped: {data}/07.png: UnidentifiedImageError: not an image" in log


def test_a_folder_of_corrupt_files_stops_the_run(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="could not be read"):
        do_train(tiny_config(f"train.dataset_path=Folder:root={tmp_path}"), tmp_path / "run")


def test_missing_output_dir():
    with pytest.raises(ValueError, match="--output-dir is missing"):
        main(["--config-file", "debug"])


def test_print_config_and_dry_run(capsys):
    main(["train.seed=7", "--print-config", "--config-file", "debug"])
    assert "seed: 7" in capsys.readouterr().out
    main(["--config-file", "debug", *TINY, "--dry-run", "train.accumulation_steps=3"])
    plan = capsys.readouterr().out
    for words in (
        "effective batch    12",
        "learning rate",
        "images seen        72, 3.00 passes over 24",
        "parameters",
        "memory",
    ):
        assert words in plan


def test_the_plan_is_shown_where_the_data_are_not(capsys):
    data = "train.dataset_path=Folder:root=/does/not/exist"
    with pytest.raises(DataError, match="/does/not/exist"):
        main(["--config-file", "debug", *TINY, "--dry-run", data])
    plan = capsys.readouterr().out
    assert "effective batch    4" in plan and "images seen        24\n" in plan and "memory" in plan
    with pytest.raises(DataError, match="/does/not/exist"):
        main(
            [
                "--config-file",
                "debug",
                *TINY,
                "--dry-run",
                "evaluation.knn_period_steps=3",
                data.replace("train.dataset_path", "evaluation.knn_val_dataset"),
            ]
        )
    assert "effective batch    4" in capsys.readouterr().out


def test_what_the_config_gives_to_say_is_logged_once(tmp_path):
    (tmp_path / "theirs.yaml").write_text("student: {block_chunks: 2}\n")
    data = "train.dataset_path=Folder:root=/does/not/exist"  # found out just after that
    with pytest.raises(RuntimeError, match="/does/not/exist"):
        run_ranks(
            main, 2, ["--config-file", str(tmp_path / "theirs.yaml"), "--output-dir", str(tmp_path / "run"), data]
        )
    logs = [(tmp_path / f"run/logs/log.{rank}.txt").read_text() for rank in (0, 1)]
    for sentence in ("block_chunks (each block is sharded by itself)", "set equivariance.enabled=true"):
        assert [log.count(sentence) for log in logs] == [1, 0]


def test_names_that_are_not_utf_8(tmp_path, capsys):
    """Of the config file and the data: the run is described, and goes on."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    root.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 9, 9)).save(root / f"{number}.png")
    (root / "run.yaml").write_text("base: debug\n")
    data = f"Folder:root={root}"
    argv = ["--config-file", str(root / "run.yaml"), "--output-dir", str(tmp_path / "run"), *TINY]
    argv += [f"train.dataset_path={data}", "evaluation.knn_period_steps=0"]
    for steps in (3, 6):
        main([*argv, f"optim.steps={steps}"])
        expected = tiny_config(f"train.dataset_path={data}", f"optim.steps={steps}")
        assert load_config(str(tmp_path / "run/config.yaml")) == expected
        saved = teacher(tmp_path / "run", steps)
        assert saved["config"]["train"]["dataset_path"] == data
    assert "dataset_path was" not in (tmp_path / "run/logs/log.0.txt").read_text()
    assert load_encoder(tmp_path / "run").step == 6
    (root / "run.yaml").write_text("base: debug\nstudent: {block_chunks: 2}\n")
    assert in_this_process(["train", *argv, "--dry-run", "equivariance.enabled=true", f"MODEL.WEIGHTS={root}"]) == 0
    assert "caf\\udce9 is student.pretrained_weights=" in capsys.readouterr().out


def test_effective_rank():
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.ones(8, 3)) == pytest.approx(1, abs=1e-3)
