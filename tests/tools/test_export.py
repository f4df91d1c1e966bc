"""Exports load in their own libraries, with the code of their README, and in this project."""

import json
import re
from math import isnan
from pathlib import Path

import pytest
import torch

from dinov2_eq.config.load import to_dict
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.hub.export_card import without_paths
from dinov2_eq.hub.export_names import to_hugging_face, to_timm
from dinov2_eq.hub.export_onnx import OnnxBackbone, resized_positions
from dinov2_eq.models import DinoVisionTransformer, build_backbone
from dinov2_eq.models.convert import adapt, backbone_arguments, infer_architecture, to_dinov2
from dinov2_eq.models.weight_files import read_metadata, read_weights
from dinov2_eq.tools import export
from dinov2_eq.train.train import do_train
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[2]
CONVERTIBLE = ["backbone", "safetensors", "hub", "timm", "hf"]
SIZES = [(32, 32), (16, 72), (72, 16), (32, 64), (8, 8), (40, 24)]
RECIPES = {
    "plain": ["student.depth=2"],
    "registers": [
        "student.num_register_tokens=3",
        "student.interpolate_antialias=true",
        "student.interpolate_offset=0",
    ],
    "bare": [
        "student.layerscale=0",
        "student.qkv_bias=false",
        "student.proj_bias=false",
        "student.ffn_bias=false",
    ],
    "swiglu": [
        "student.ffn_layer=swiglu",
        "student.patch_size=14",
        "crops.global_crops_size=28",
        "crops.local_crops_size=14",
    ],
    "bare swiglu": [
        "student.ffn_layer=swiglu",
        "student.layerscale=0",
        "student.ffn_bias=false",
        "student.num_register_tokens=1",
    ],
}


def randomised(backbone):
    """Fills all tensors with random values, so that none can be lost or exchanged unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.1, generator=generator)
    return backbone.eval().requires_grad_(False)


def checkpoint(folder, overrides=(), **changes) -> Path:
    """A run folder as training writes it, with a teacher of random weights."""
    config = tiny_config("train.dataset_path=ImageFolder:root=/secret/birds", *overrides)
    arguments = backbone_arguments(to_dict(config)["student"])
    backbone = randomised(build_backbone(**arguments, img_size=config.crops.global_crops_size))
    teacher = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    path = folder / "eval" / "training_7" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True)
    torch.save({"teacher": teacher, "config": to_dict(config), "step": 7} | changes, path)
    return folder


def run(source, output, *targets, more=()):
    export.main([str(source), "--to", *targets, "--output-dir", str(output), *more])


def tokens_of(backbone, images):
    features = backbone(images, is_training=True)
    return torch.cat([features["x_norm_clstoken"].unsqueeze(1), features["x_norm_patchtokens"]], dim=1)


def message(*arguments, error=ValueError, more=()):
    with pytest.raises(error) as caught:
        run(*arguments, more=more)
    return str(caught.value)


def follow_the_readme(folder, monkeypatch):
    """Runs the code of a README.md in its folder, and returns its images and tokens."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(code.replace("PATH OF A CHECKOUT", str(ROOT)), names)
    class_token, patch_tokens = (torch.as_tensor(names[name]) for name in ("class_token", "patch_tokens"))
    return names["images"], torch.cat([class_token.unsqueeze(1), patch_tokens], dim=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip(tmp_path, recipe, monkeypatch, capsys):
    encoder = load_encoder(checkpoint(tmp_path / "run", RECIPES[recipe]))
    run(tmp_path / "run", tmp_path / "out", *CONVERTIBLE)
    printed = capsys.readouterr().out
    own = {name: getattr(encoder.backbone, name) for name in ("interpolate_antialias", "interpolate_offset")}
    for target in CONVERTIBLE:
        folder, (file, *_, as_exported) = tmp_path / "out" / target, export.TARGETS[target]
        record = json.loads((folder / "export.json").read_text())
        assert len(record["checks"]) == 3 and all(check["difference"] < 1e-5 for check in record["checks"])
        assert f"{target}: pixels" in printed and str(folder) in printed

        images, found = follow_the_readme(folder, monkeypatch)
        torch.testing.assert_close(found, tokens_of(as_exported(encoder.backbone), images), atol=1e-5, rtol=0)

        weights = to_dinov2(read_weights(folder / file))
        back = DinoVisionTransformer(**{**infer_architecture(weights), **own}).eval().requires_grad_(False)
        back.load_state_dict(adapt(weights, back)[0])
        original = export.in_half_precision(encoder.backbone) if target == "hub" else encoder.backbone
        patch = encoder.backbone.patch_size
        for rows, columns in ((2, 5), (4, 4)):
            images = torch.randn(2, 3, rows * patch, columns * patch)
            torch.testing.assert_close(tokens_of(back, images), tokens_of(original, images), atol=1e-5, rtol=0)


def test_libraries_are_told_how_to_prepare_images(tmp_path):
    encoder = load_encoder(checkpoint(tmp_path / "run", ["crops.mean=[0.4,0.5,0.6]", "crops.std=[0.2,0.3,0.1]"]))
    run(tmp_path / "run", tmp_path / "out", "timm", "hf", "safetensors")
    for source in ("timm:local-dir:{}/timm", "hf:{}/hf", "{}/safetensors/model.safetensors"):
        found = load_encoder(source.format(tmp_path / "out"))
        assert (found.image_size, found.mean, found.std) == (32, encoder.mean, encoder.std)
    assert found.step == 7 and found.config["student"] == encoder.config["student"]


def test_where_positions_are_resized_otherwise_it_is_said(tmp_path):
    """Trained with offset 0.1 and no antialiasing; timm and transformers have no offset, timm has antialiasing."""
    checkpoint(tmp_path / "run")
    run(tmp_path / "run", tmp_path / "out", "timm", "hf", "backbone")
    for target in ("timm", "hf", "backbone"):
        square, *others = json.loads((tmp_path / "out" / target / "export.json").read_text())["checks"]
        assert (square["height"], square["width"]) == (32, 32) and square["difference_as_trained"] < 1e-5
        assert all(check["height"] != check["width"] for check in others)
        assert all((check["difference_as_trained"] > 1e-3) == (target != "backbone") for check in others)
    card = (tmp_path / "out/timm/README.md").read_text()
    assert "resized as in timm: to the exact size, with antialiasing" in card
    assert f"| 16 x 56 | {others[0]['difference']:.2g} |" in (tmp_path / "out/backbone/README.md").read_text()


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_of_the_onnx_graph(antialias, offset):
    backbone = build_backbone(
        "vit_tiny", patch_size=8, img_size=32, depth=1, interpolate_antialias=antialias, interpolate_offset=offset
    )
    with torch.no_grad():
        backbone.pos_embed.normal_()
        for height, width in [*SIZES, (320, 200)]:
            grid = height // 8, width // 8
            expected = backbone.interpolate_pos_encoding(grid)
            torch.testing.assert_close(resized_positions(backbone, grid), expected, atol=1e-5, rtol=0)


def test_the_module_behind_the_onnx_graph(tmp_path):
    backbone = load_encoder(checkpoint(tmp_path, RECIPES["registers"])).backbone
    images = torch.randn(2, 3, 16, 40)
    class_token, patch_tokens = OnnxBackbone(backbone)(images)
    found = torch.cat([class_token.unsqueeze(1), patch_tokens], dim=1)
    torch.testing.assert_close(found, tokens_of(backbone, images), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of one step, with online k-NN and results of two evaluations, one of another step."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    knn = [
        "evaluation.knn_period_steps=1",
        "evaluation.knn_train_dataset=Shapes:split=TRAIN:num=24:size=32",
        "evaluation.knn_val_dataset=Shapes:split=VAL:num=10:size=32",
        "evaluation.knn_k=3",
    ]
    steps = ["optim.steps=1", "optim.warmup_steps=0", "teacher.warmup_teacher_temp_steps=0", "student.layerscale=0.5"]
    do_train(tiny_config(*knn, *steps), folder)
    protocol = {"train_dataset": "CIFAR10:split=TRAIN:root=/secret/cifar", "val_dataset": "CIFAR10:root=/secret/cifar"}
    accuracy = {"CIFAR10:split=TEST:root=/secret/cifar": {"top1": 12.345}}
    for name, step, results in (
        ("knn", 1, {"full": {"20": {"top1": 31.52}}}),
        ("linear", 1, {"head": "lr_0.1", "accuracy": accuracy}),
        ("logreg", 5, {"C": 99.75}),
    ):
        content = {"protocol": protocol, "encoder": {"step": step}, "results": results}
        (folder / f"results_eval_{name}.json").write_text(json.dumps(content))
    (folder / "results_eval_equivariance.json").write_text(
        json.dumps({"encoder": {"step": 1}, "rows": [], "summary": [{"name": "mean_zeros", "r2_pooled": 0.625}]})
    )
    return folder


def test_onnx(tmp_path, trained, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run(trained, tmp_path, "onnx")
    assert "onnx: pixels" in capsys.readouterr().out
    backbone = load_encoder(trained).backbone
    images, found = follow_the_readme(tmp_path / "onnx", monkeypatch)
    torch.testing.assert_close(found, tokens_of(backbone, images), atol=1e-5, rtol=0)
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    for batch, size in enumerate(SIZES, start=1):
        images = torch.randn(batch, 3, *size)
        class_token, patch_tokens = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        found = torch.cat([class_token.unsqueeze(1), patch_tokens], dim=1)
        torch.testing.assert_close(found, tokens_of(backbone, images), atol=1e-5, rtol=0)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == pytest.approx([0.485, 0.456, 0.406]) and about["step"] == "1"


def test_the_card_is_filled_from_the_run(tmp_path, trained):
    run(trained / "eval/training_1/teacher_checkpoint.pth", tmp_path, "safetensors", "hub")
    card = (tmp_path / "safetensors/README.md").read_text()
    [top1] = [
        line["eval/knn_top1"]
        for line in map(json.loads, (trained / "training_metrics.jsonl").read_text().splitlines())
        if line["step"] == 1 and "eval/knn_top1" in line
    ]
    for words in (
        "# vit_tiny/8, step 1: safetensors",
        "| parameters | 486,336 |",
        "| data | `Shapes:split=TRAIN:num=24:size=32` |",
        "| steps | 1 of 1 |",
        "| images per step | 4, over 1 process |",
        "| seed | 0 |",
        "transform se2, loss_weight 10.0",
        f"k-NN at step 1: {top1:.2f} % top-1",
        "`results_eval_knn.json`, `CIFAR10:split=TRAIN:root=cifar` and `CIFAR10:root=cifar`",
        "| full: 20: top1 | 31.52 |",
        "| lr_0.1: accuracy: CIFAR10:split=TEST:root=cifar: top1 | 12.35 |",
        "| mean_zeros: r2_pooled | 0.625 |",
        "`results_eval_logreg.json` is about another step and not shown",
        "This was a small run: it saw 4 images",
        "Heads, projection and decoders are not included",
        "Licence: Apache-2.0",
    ):
        assert words in card, words
    assert "99.75" not in card
    [release] = json.loads((tmp_path / "hub/manifest.json").read_text())["releases"].values()
    assert release["contains"] == ["backbone", "projection"] and release["steps"] == 1
    assert release["results"]["results_eval_knn.json: full: 20: top1"] == 31.52
    assert "Heads and decoders are not included" in (tmp_path / "hub/README.md").read_text()


def test_a_checkpoint_alone_has_a_card_too(tmp_path):
    checkpoint(tmp_path / "run", ["equivariance.enabled=false", "train.dataset_path=Folder:root=/data/caf\udce9"])
    run(tmp_path / "run/eval/training_7/teacher_checkpoint.pth", tmp_path / "out", "backbone")
    card = (tmp_path / "out/backbone/README.md").read_text()
    assert "disabled: the plain base method" in card and "Nothing: there are no results in the run folder." in card
    assert "4 in each process; the number of processes is unknown" in card and "a small run" not in card
    assert "root=caf\\udce9" in card  # a name that is not UTF-8


@pytest.mark.parametrize("name", ["environment.json", "training_metrics.jsonl", "results_eval_knn.json"])
def test_a_damaged_file_of_the_run_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"a": \n')
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name}"):
        export.read_run(tmp_path / "teacher_checkpoint.pth")


def test_no_path_of_this_machine_gets_out(tmp_path):
    checkpoint(tmp_path / "run")
    run(tmp_path / "run", tmp_path / "out", *CONVERTIBLE)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) == 19
    for file in files:
        content = file.read_bytes()
        assert b"/secret" not in content and str(tmp_path).encode() not in content, file
    assert "root=birds" in read_metadata(tmp_path / "out/safetensors/model.safetensors")["config"]


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("ImageFolder:root=/data/mine/birds:split=a", "ImageFolder:root=birds:split=a"),
        ("/home/me/weights.pth", "weights.pth"),
        ("~/weights.pth", "weights.pth"),
        ("../../alice/secret/weights.pth", "weights.pth"),
        ("runs/secret/weights.pth", "weights.pth"),
        ("C:\\alice\\weights.pth", "weights.pth"),
        ("Folder:root='/home/alice/a:b/birds'", "Folder:root=birds"),
        ("Folder:root=data/hospital/birds/", "Folder:root=birds"),
        ("Parquet:path='s3://bucket/birds'", "Parquet:path='s3://bucket/birds'"),
        ("WebDataset:urls='/home/alice/a.tar::https://a.org/b.tar'", "WebDataset:urls='a.tar::https://a.org/b.tar'"),
        ("timm:local-dir:/home/alice/birds", "timm:local-dir:birds"),
        ("hub:/home/alice/code:dinov2_eq_vitt8", "hub:code:dinov2_eq_vitt8"),
        ("hf:facebook/dinov2-small", "hf:facebook/dinov2-small"),
        ("random:vit_small/16", "random:vit_small/16"),
        ("learning rate * global batch / 256", "learning rate * global batch / 256"),
        ("timm:vit_small_patch14_dinov2", "timm:vit_small_patch14_dinov2"),
        ("https://example.org/a/w.pth", "https://example.org/a/w.pth"),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_without_paths(text, public):
    assert without_paths(text) == public


def test_a_nan_in_any_feature_is_a_difference():
    whole, broken = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
    assert isnan(export.largest_difference((whole, broken), (whole, whole)))
    assert isnan(export.largest_difference((broken, whole), (whole, whole)))


def test_widths_that_hugging_face_cannot_express_and_timm_can():
    backbone = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=192, depth=1, num_heads=3, mlp_ratio=3.51)
    with pytest.raises(ValueError, match="cannot express feed-forward layers 673 wide on tokens of 192 channels"):
        to_hugging_face(backbone)
    assert int(192 * to_timm(backbone)[1]["model_args"]["mlp_ratio"]) == 673


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    def exchanged(backbone):
        weights, config = to_timm(backbone)
        weights["blocks.0.norm1.weight"] = weights["blocks.0.norm2.weight"]
        return weights, config

    checkpoint(tmp_path / "run")
    monkeypatch.setattr(export, "to_timm", exchanged)
    assert "The features of the timm export differ by" in message(tmp_path / "run", tmp_path / "out", "timm")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_replaced_unasked(tmp_path):
    source, output = checkpoint(tmp_path / "run"), tmp_path / "out"
    run(source, output, "backbone")
    assert "backbone exists; choose another --output-dir, or --force" in message(
        source, output, "safetensors", "backbone", error=FileExistsError
    )
    assert not (output / "safetensors").exists()
    (output / "backbone" / "backbone.pth").write_bytes(b"")
    run(source, output, "backbone", more=["--force"])
    assert (output / "backbone" / "backbone.pth").stat().st_size > 1000
    (output / "timm").mkdir()
    (output / "timm" / "precious").write_text("")
    assert "is not an earlier export" in message(source, output, "timm", error=FileExistsError, more=["--force"])
    assert (output / "timm" / "precious").exists()


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    source = checkpoint(tmp_path / "run")
    assert "cannot be written" in message(source, tmp_path / "file" / "out", "backbone", error=OSError)


def test_other_checkpoints(tmp_path):
    output = tmp_path / "out"
    assert "timm:vit_small does not exist" in message("timm:vit_small", output, "hf", error=FileNotFoundError)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no teacher checkpoint" in message(tmp_path, output, "hf", error=FileNotFoundError)
    backbone = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    assert "contains no training config" in message(tmp_path / "weights.pth", output, "hf")
    (tmp_path / "run.yaml").write_text(
        "student: {arch: vit_tiny, depth: 1, patch_size: 8}\n"
        "crops: {global_crops_size: 32, local_crops_size: 16}\n"
        "optim: {steps: 10, warmup_steps: 1, freeze_last_layer_steps: 1}\nteacher: {warmup_teacher_temp_steps: 1}\n"
    )
    config = ["--config-file", str(tmp_path / "run.yaml")]
    run(tmp_path / "weights.pth", output, "backbone", more=config)
    assert "vit_tiny/8, unknown step" in (output / "backbone/README.md").read_text()
    assert "does not contain its step" in message(tmp_path / "weights.pth", output, "safetensors", more=config)
    assert "not a teacher checkpoint with config" in message(tmp_path / "weights.pth", output, "hub", more=config)


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert message(tmp_path, tmp_path, "onnx") == (
        "--to onnx needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"
    )


def test_unknown_formats(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path, "tensorflow")
    assert "invalid choice: 'tensorflow'" in capsys.readouterr().err


def test_the_commands_of_the_page():
    commands = re.findall(r"^dinov2-eq export (.*)$", (ROOT / "docs/export.md").read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        assert set(export.build_parser().parse_args(command.split()).to) <= set(export.TARGETS)
    assert set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/export.md").read_text(), re.MULTILINE)) == set(
        export.TARGETS
    )
