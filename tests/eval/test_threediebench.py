import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.eval import threediebench
from dinov2_eq.eval.threediebench import read_views
from dinov2_eq.evaluation.summary import read_numbers
from dinov2_eq.models import build_backbone
from tests.helpers import in_this_process
from tests.processes import run_ranks
from tests.rendered import write_objects

VIEWS = 4
NUMBERS = {"train": 48, "val": 20}
ENCODER = "random:vit_tiny/16@32"
TASKS = ["classification", "rotation", "colour"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    names = {split: [f"{number % 3}/{split}{number}" for number in range(num)] for split, num in NUMBERS.items()}
    labels = {split: [min(number % 3, 1) for number in range(num)] for split, num in NUMBERS.items()}
    write_objects(folder, names, labels, VIEWS, size=32)
    return folder


def data_of(root):
    strings = [f"3DIEBench:split={split}:root={root}" for split in ("TRAIN", "VAL")]
    return ["--train-dataset", strings[0], "--val-dataset", strings[1], "--num-workers", "0", "--device", "cpu"]


def run(root, folder, *flags, encoder=ENCODER):
    threediebench.main(["--encoder", str(encoder), *data_of(root), "--output-dir", str(folder), *flags])
    return json.loads((folder / "results_eval_3diebench.json").read_text())


def views_of(root, num_views=VIEWS, max_objects=None):
    strings = data_of(root)
    return [read_views(images, num_views, max_objects) for images in read_labelled(strings[1], [strings[3]], "test")]


def split_checkpoint(folder, *, equivariant, invariant):
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", patch_size=16, img_size=32, depth=1)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    for part, matrix in (("equivariant", equivariant), ("invariant", invariant)):
        weights |= {f"projection.{part}.weight": matrix, f"projection.{part}.bias": torch.zeros(len(matrix))}
    overrides = ["student.depth=1", "student.patch_size=16", "crops.global_crops_size=32"]
    content = {"teacher": weights, "config": to_dict(load_config("debug", overrides)), "step": 3}
    torch.save(content, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth"


def test_parts_controls_and_what_the_file_says(root, tmp_path, capsys):
    """The invariant part is the token itself, so its numbers are those of all; the equivariant part says nothing."""
    path = split_checkpoint(tmp_path, equivariant=torch.zeros(6, 192), invariant=torch.eye(192))
    found = run(root, tmp_path, "--epochs", "5", encoder=path)
    assert list(found["results"]) == ["full", "invariant", "equivariant"]
    assert list(found["comparisons"]) == ["random-init", "latents", "constant"]
    assert list(found["comparisons"]["random-init"]) == ["full", "invariant", "equivariant"]
    assert [list(found["comparisons"][name]["full"]) for name in ("latents", "constant")] == [TASKS[1:], TASKS]
    assert found["results"]["invariant"] == found["results"]["full"]
    blind = found["results"]["equivariant"]
    assert blind["classification"] == found["comparisons"]["constant"]["full"]["classification"]
    assert blind["colour"]["r2_mean"] < 0.01 and blind["rotation"]["r2_mean"] < 0.01
    assert list(blind["colour"]["r2_components"]) == ["floor_hue", "light_hue"]
    protocol = found["protocol"]
    assert (protocol["num_train_objects"], protocol["num_val_objects"]) == (48, 20)
    assert protocol["num_views"] == {"train": 4, "val": 4} and protocol["views"] == 8
    numbers = read_numbers(tmp_path)
    assert numbers["full rotation r2_pooled"] == found["results"]["full"]["rotation"]["r2_pooled"]
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "features part top-1 % rotation R2 rotation mean colour R2 colour mean"
    assert [line.split()[:2] for line in lines if line.startswith("constant")] == [["constant", "full"]]


def test_a_split_by_channels(root, tmp_path):
    """It is that of projections which pick these channels."""
    eye = torch.eye(192)
    path = split_checkpoint(tmp_path, invariant=eye[:144], equivariant=eye[144:])
    flags = ["--epochs", "3", "--no-random-init"]
    picked = run(root, tmp_path, *flags, encoder=path)["results"]
    cut = run(root, tmp_path, *flags, "--equivariant-share", "0.25", encoder=path)["results"]
    assert picked == cut and len({cut[part]["colour"]["r2_mean"] for part in cut}) == 3


def test_what_is_visible_is_found(root, tmp_path):
    found = run(root, tmp_path, "--epochs", "60", "--no-random-init", "--tokens", "mean")
    assert set(found["comparisons"]) == {"latents", "constant"}
    assert found["results"]["full"]["colour"]["r2_mean"] > 0.4 > found["results"]["full"]["rotation"]["r2_mean"]
    latents = found["comparisons"]["latents"]["full"]
    assert latents["colour"]["r2_mean"] > 0.95 and latents["rotation"]["r2_mean"] > 0.6


def test_the_constant_predictor(root, tmp_path):
    """By scikit-learn, from what the two splits hold."""
    constant = run(root, tmp_path, "--epochs", "1", "--no-random-init")["comparisons"]["constant"]["full"]
    train, val = views_of(root)
    assert constant["classification"]["top1"] == pytest.approx(100 * (val.images.labels == 1).float().mean())
    for task in TASKS[1:]:
        given = train.theta(train.partners(torch.Generator().manual_seed(0)), task).numpy().mean(axis=0)
        wanted = val.theta(val.partners(torch.Generator().manual_seed(0)), task).numpy()
        predicted = np.broadcast_to(given, wanted.shape)
        assert constant[task]["r2_pooled"] == pytest.approx(r2_score(wanted.ravel(), predicted.ravel()), abs=1e-5)
        assert constant[task]["r2_mean"] == pytest.approx(r2_score(wanted, predicted), abs=1e-5)
        assert constant[task]["r2_mean"] <= 0
    assert constant["rotation"]["r2_pooled"] == pytest.approx(0.229, abs=0.06)  # of few pairs


def test_a_linear_probe_that_sees_the_latents_recovers_the_rotation(root):
    """The components of q1^-1 q2 are sums of products of those of q1 and q2."""
    inputs, targets = [], []
    for views in views_of(root):
        partners = views.partners(torch.Generator().manual_seed(3))
        turns = Rotation.from_euler("xyz", views.latents[:, :3]).as_quat()  # theirs, not ours
        inputs.append((turns[:, :, None] * turns[partners.numpy(), None, :]).reshape(-1, 16))
        targets.append(views.theta(partners, "rotation").double().numpy())
    fitted = LinearRegression(fit_intercept=False).fit(inputs[0], targets[0])
    assert fitted.score(inputs[1], targets[1]) == pytest.approx(1, abs=1e-9)


def test_partners_are_other_views_of_the_object(root):
    train, _ = views_of(root, num_views=3, max_objects=10)
    dataset, indices = train.images.dataset, train.images.indices
    assert len(indices) == len(train.latents) == 30 and (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(train.latents[7], dataset.latents(indices[7]))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([train.partners(generator) for _ in range(200)])
    places = torch.arange(30)
    assert (drawn != places).all() and (drawn // 3 == places // 3).all()
    assert all(len(column.unique()) == 2 for column in drawn.T)
    theta = train.theta(drawn[0], "colour").numpy()
    np.testing.assert_allclose(theta[:, 1], train.latents[drawn[0], 6] - train.latents[:, 6], atol=1e-6)


def run_in_a_process(argv):
    threediebench.main(argv)


def test_two_processes_equal_one(root, tmp_path):
    one = run(root, tmp_path / "one", "--epochs", "2", "--max-objects", "12", "--no-random-init")
    argv = ["--encoder", ENCODER, *data_of(root), "--epochs", "2", "--max-objects", "12", "--no-random-init"]
    run_ranks(run_in_a_process, 2, [*argv, "--output-dir", str(tmp_path / "two")])
    two = json.loads((tmp_path / "two" / "results_eval_3diebench.json").read_text())
    assert two["protocol"]["processes"] == 2
    for part in ("results", "comparisons"):
        assert same(two[part], one[part])


def same(first, second):
    """Whether two trees of numbers agree; features of other batches differ by rounding."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first == pytest.approx(second, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train-dataset", "Shapes:num=20:size=32"],
            "needs data in its layout, 3DIEBench:split=...:root=..., not 'S",
        ),
        (["--equivariant-share", "1"], "argument --equivariant-share: must lie between 0 and 1, got 1"),
        (["--views", "1"], "--views 1: a pair needs at least 2 images of an object"),
    ],
)
def test_bad_flags(root, tmp_path, capsys, flags, message):
    assert (
        in_this_process(
            ["eval", "3diebench", "--encoder", ENCODER, *data_of(root), "--output-dir", str(tmp_path), *flags]
        )
        == 2
    )
    found = " ".join(capsys.readouterr().err.split())
    assert message in found and "Traceback" not in found


def test_missing_latents(tmp_path, capsys):
    names = {"train": ["0/a", "1/b"], "val": ["1/c"]}
    write_objects(tmp_path, names, {"train": [0, 1], "val": [1]}, 2, size=32)
    (tmp_path / "1/b/latent_1.npy").unlink()
    command = ["eval", "3diebench", "--encoder", ENCODER, *data_of(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert in_this_process(command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Cannot evaluate on an image without its latents" in message and "1/b/image_1.jpg" in message
    assert "Traceback" not in message
