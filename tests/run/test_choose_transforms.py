"""What is trained for each candidate, the whole command on a few images, how it goes on, and bad input."""

import json

import pytest

from dinov2_eq.config.load import find_recipe, load_config
from dinov2_eq.evaluation.probe_transforms import ordered_transform
from dinov2_eq.run.choose_transforms import plan_of
from tests.helpers import TINY, in_this_process, stand_in_for_programs
from tests.objectives.test_order import SIMCLR
from tests.run.test_sweep import leave_results

BASE = "cifar10/simclr"
SMALL = [*[word for word in TINY if not word.startswith(("optim.", "teacher.", "train.dataset_path"))], *SIMCLR]
TRAIN, VAL = "Shapes:split=TRAIN:num=24:size=32", "Shapes:split=VAL:num=16:size=32"


def planned(name, *overrides):
    config = load_config(BASE, overrides)
    return plan_of(name, ordered_transform("", name, vars(config.order.ranges())), config, 1.0)


def configs_of(name, *overrides):
    plan = planned(name, *overrides)
    return [load_config(BASE, [*overrides, *settings]) for _, settings in (plan.ordered, plan.invariant)]


def test_what_the_recipe_augments_is_left_out_where_it_is_ordered():
    ordered, invariant = configs_of("color_jitter")
    assert planned("color_jitter").invariant == ("recipe", ())
    assert ordered.crops.jitter_prob == ordered.crops.grey_prob == ordered.crops.solarize_prob == 0
    assert ordered.order.loss_weight == 1 and ordered.order.transform == "color_jitter"
    assert invariant == load_config(BASE)
    ordered, _ = configs_of("blur", "crops.blur_prob=[0.5,0.5,0.5]")
    assert ordered.crops.blur_prob == [0, 0, 0] and ordered.crops.jitter_prob > 0


@pytest.mark.parametrize("name", ["rotation", "blur", "all"])
def test_what_it_does_not_becomes_g_on_the_second_view(name):
    """The recipe never blurs. Of `all` it has the colours alone."""
    ranges = ["order.max_angle_deg=90", "order.border=zeros", "order.blur_sigma_min_max=[0.5,1]"]
    ordered, invariant = configs_of(name, *ranges)
    assert planned(name).invariant[0] == f"{name}, invariant"
    before, after = ordered.needs().pairing, invariant.needs().pairing
    assert (before.second, after.second) == (0, 1)
    assert (before.transform, before.border, before.ranges) == (after.transform, after.border, after.ranges)
    assert after.ranges.max_angle_deg == 90 and after.border == "zeros"
    assert invariant.order.loss_weight == 0 and invariant.needs().path is None
    assert {name: weight for name, weight in invariant.equivariance.weights().items() if weight} == {}
    assert (ordered.crops.jitter_prob == 0) == (name == "all") and invariant.crops.jitter_prob > 0


def run(folder, *flags, candidates="rotation,color_jitter", data=True):
    given = ["--train-dataset", TRAIN, "--val-dataset", VAL] if data else []
    words = ["choose-transforms", "--config-file", "debug", "--output-dir", str(folder), *given, *flags]
    return in_this_process([*words, "--candidates", candidates])


def test_from_images_to_recommendations(tmp_path, monkeypatch, capsys):
    calls = stand_in_for_programs(monkeypatch, in_this_process)
    assert run(tmp_path, "--steps", "2", *SMALL) == 0
    text = capsys.readouterr().out
    rows = ("rotation-ordered", "rotation-invariant", "color_jitter-ordered", "recipe")
    assert all((tmp_path / f"{row}-seed_{seed}/config.yaml").is_file() for row in rows for seed in (0, 1))
    assert len(calls) == 8 * 3
    found = json.loads((tmp_path / "choice.json").read_text())
    for number, name in enumerate(("rotation", "color_jitter")):
        row = found["candidates"][number]
        assert row["candidate"] == name and row["half_width"] > 0
        for form, label in (("ordered", f"{name}-ordered"), ("invariant", rows[2 * number + 1])):
            for seed, run_numbers in enumerate(row[form]):
                folder = tmp_path / f"{label}-seed_{seed}"
                knn = json.loads((folder / "knn/results_eval_knn.json").read_text())["results"]["full"]
                order = json.loads((folder / "order/results_eval_order.json").read_text())["results"][name]
                assert run_numbers["k-NN %"] == knn["20"]["top1"]
                (scores,) = [order[border] for border in ("canvas", "none") if border in order]
                assert run_numbers["order_accuracy"] == scores["order_accuracy"]
    assert "- rotation: " in text and text.strip() == (tmp_path / "choice.md").read_text().strip()
    assert (tmp_path / "choice.svg").read_text().startswith("<?xml")
    trained = [call for call in calls if call[0] == "train"]
    assert {word for word in trained[0] if word.startswith("optim.steps")} == {"optim.steps=2"}
    calls.clear()
    assert run(tmp_path, "--steps", "2", *SMALL) == 0 and not calls  # all is done
    assert run(tmp_path, "--steps", "3", *SMALL) == 2 and not calls
    assert "is in" in capsys.readouterr().err


def test_a_dry_run_lists_the_runs(tmp_path, capsys):
    assert run(tmp_path / "out", "--dry-run", *SMALL, candidates="blur, color_jitter,blur") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:-1]] == [
        f"{name}-seed_{seed}" for name in ("blur-ordered", "recipe", "color_jitter-ordered") for seed in (0, 1)
    ]
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_others_and_goes_on(tmp_path, monkeypatch, capsys):
    broken = ["rotation-ordered-seed_1"]

    def carry_out(words):
        if words[0] == "train" and any(name in word for name in broken for word in words):
            print("dinov2-eq: the disk is full")
            return 2
        return leave_results(words)

    calls = stand_in_for_programs(monkeypatch, carry_out)
    assert run(tmp_path, *SMALL) == 2
    text = capsys.readouterr().out
    assert (
        "rotation, ordered, seed 1: failed; dinov2-eq: the disk is full" in text
        and "| rotation | ordered | 1 |" in text
    )
    broken.clear()
    calls.clear()
    assert run(tmp_path, *SMALL) == 0 and [words[0] for words in calls] == ["train", "eval", "eval"]
    assert "| rotation | ordered | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds 1: one run has no spread"),
        (["--order-weight", "0"], "--order-weight must be above 0, got 0"),
        (["train.seed=3"], "train.seed=3: this command sets train.seed itself"),
        (["order.transform=blur"], "order.transform=blur: this command sets order.transform itself"),
        (["--steps", "2", "optim.warmup_steps=1"], "this command sets optim.warmup_steps itself"),
        (["order.max_angle_deg=0"], "--candidates rotation: the range of angle_deg is 0"),
        (["--val-dataset", "Nope"], "unknown dataset 'Nope'"),
    ],
)
def test_mistakes(tmp_path, capsys, flags, message):
    assert run(tmp_path, *SMALL, *flags) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("rotaton", "--candidates: transform='rotaton' is unknown"),
        ("rotation,flip", "--candidates flip: a flip has no strength to order"),
        (",", "names no transform"),
    ],
)
def test_wrong_candidates(tmp_path, capsys, candidates, message):
    assert run(tmp_path, *SMALL, candidates=candidates) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_recipes_and_data_that_cannot_be_compared_on(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "--config-file debug already has a transform g (equivariance)" in " ".join(capsys.readouterr().err.split())
    assert run(tmp_path, "--train-dataset", TRAIN, *SMALL, data=False) == 2
    assert "--val-dataset is missing" in capsys.readouterr().err
    unlabelled = tmp_path / "images"
    unlabelled.mkdir()
    assert run(tmp_path, *SMALL, "--train-dataset", f"Folder:root={unlabelled}") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_default_recipe_is_a_base():
    assert load_config(str(find_recipe(BASE))).needs().pairing is None
