import json
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata, util
from threading import Thread

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

from dinov2_eq.evaluation.encoder import find_checkpoint, load_encoder, random_encoder
from dinov2_eq.hub import ENTRY_POINTS, entry_point_of
from dinov2_eq.hub.manifest import MANIFEST, read_manifest, weights_folder, write_manifest
from dinov2_eq.models import build_backbone
from dinov2_eq.models.weight_files import read_weights
from tests.hub.conftest import ROOT

TINY, TINY_REG = ENTRY_POINTS["dinov2_eq_vitt8"], ENTRY_POINTS["dinov2_eq_vitt8_reg"]


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def refusal(call, *, error=ValueError, **arguments):
    with pytest.raises(error) as caught:
        call(**arguments)
    return str(caught.value)


def assert_released(model: nn.Module, run) -> None:
    """The model has the teacher's weights, up to half precision."""
    teacher = torch.load(find_checkpoint(run), weights_only=True)["teacher"]
    for name, tensor in model.state_dict().items():
        prefix = "" if name.startswith(("backbone.", "projection.")) else "backbone."
        assert torch.equal(tensor, teacher[f"{prefix}{name}"].half().float())


def test_hubconf_has_a_documented_function_for_each_name():
    spec = util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert len(names) == 30 and {"dinov2_eq_vitb14", "dinov2_eq_vitg16_reg", "dinov2_eq_vitt8"} <= set(names)
    for name in names:
        function = getattr(hubconf, name)
        assert function.__name__ == name and "patches of" in function.__doc__ and "{" not in function.__doc__
    assert (
        "vit_large, patches of 14 pixels, 4 register tokens: 24 blocks, tokens of 1024"
        in hubconf.dinov2_eq_vitl14_reg.__doc__
    )
    assert hubconf.dependencies == ["torch"]


@torch.no_grad()
def test_random_weights():
    model = TINY_REG(pretrained=False, img_size=64, depth=2)
    assert (model.num_register_tokens, model.interpolate_offset, model.n_blocks) == (4, 0.0, 2)
    assert model.patch_size == 8 and not model.training and model.preprocessing is None
    assert model(images(64)).shape == (2, 192)
    assert ENTRY_POINTS["dinov2_eq_vits14"](pretrained=False, depth=1).patch_embed.num_patches == 256
    assert "omit weights and projection" in refusal(TINY, pretrained=False, weights="split")


def test_the_default_release(released, runs):
    model = TINY()
    assert model.n_blocks == 1 and not model.training  # the file's depth, not the architecture's
    assert model.preprocessing == {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.229, 0.224, 0.225]}
    assert_released(model, runs["split"])
    assert_released(TINY_REG(weights="plain"), runs["plain"])
    assert_released(TINY(weights=released / "split.safetensors"), runs["split"])
    assert_released(TINY(weights=find_checkpoint(runs["split"])).half().float(), runs["split"])
    assert TINY(drop_path_rate=0.5).blocks[0].drop_path_rate == 0.5


@torch.no_grad()
def test_invariant_and_equivariant_features(released, runs):
    model = TINY(projection=True)
    assert_released(model, runs["split"])
    features = model(images(48))
    teacher = torch.load(find_checkpoint(runs["split"]), weights_only=True)["teacher"]
    invariant, equivariant = (
        teacher[f"projection.{part}.weight"].half().float() for part in ("invariant", "equivariant")
    )
    expected = TINY()(images(48), is_training=True)
    assert torch.equal(features.cls, expected["x_norm_clstoken"])
    assert torch.equal(features.patches, expected["x_norm_patchtokens"])
    assert features.invariant.shape == (2, 1 + 36, len(invariant))
    torch.testing.assert_close(features.invariant[:, 0], features.cls @ invariant.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.equivariant[:, 1:], features.patches @ equivariant.T, atol=1e-5, rtol=0)
    assert model.preprocessing["image_size"] == 32
    text = refusal(TINY_REG, weights="plain", projection=True)
    assert "has no projection" in text and "released weights: split (dinov2_eq_vitt8)" in text


@torch.no_grad()
def test_the_invariant_features_may_be_the_whole_tokens(released, runs, tmp_path):
    content = torch.load(find_checkpoint(runs["split"]), weights_only=True)
    for name in ("weight", "bias"):
        del content["teacher"][f"projection.invariant.{name}"]
    torch.save(content, tmp_path / "whole.pth")
    features = TINY(weights=tmp_path / "whole.pth", projection=True)(images(48))
    assert torch.equal(features.invariant, torch.cat([features.cls.unsqueeze(1), features.patches], dim=1))
    torch.testing.assert_close(
        features.equivariant, TINY(weights=find_checkpoint(runs["split"]), projection=True)(images(48)).equivariant
    )


@torch.no_grad()
def test_another_image_size_keeps_the_features_at_that_size(released):
    torch.testing.assert_close(TINY(img_size=48)(images(48)), TINY()(images(48)), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("projection", [False, True])
def test_models_can_be_traced(released, projection):
    model = TINY(projection=projection)
    traced = torch.jit.trace(model, images(32)[:1])
    torch.testing.assert_close(tuple(traced(images(32))), tuple(model(images(32))), atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_in_the_naming_of_others(released, tmp_path):
    own = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=2, layerscale=0.0, qkv_bias=False)
    state = own.state_dict()
    del state["mask_token"]
    torch.save(
        {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}, "student": {}},
        tmp_path / "dino.pth",
    )
    model = TINY(weights=tmp_path / "dino.pth")
    assert torch.equal(model(images()), own.eval()(images())) and model.preprocessing is None
    state["blocks.1.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pth")
    assert "1 unexpected (blocks.1.extra)" in refusal(TINY, weights=tmp_path / "more.pth")
    torch.save(
        {name: torch.zeros(len(tensor), 0) for name, tensor in state.items() if "norm" in name}, tmp_path / "no.pth"
    )
    assert "No vision transformer is named" in refusal(TINY, weights=tmp_path / "no.pth")


@pytest.fixture
def published(released, tmp_path):
    """A folder of weights, and the address where a web server has it."""
    folder = shutil.copytree(released, tmp_path / "published")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(released, published, tmp_path):
    digest = read_manifest(released)["split"].sha256
    file, url = published[0] / "split.safetensors", f"{published[1]}/split.safetensors"
    expected = TINY()(images())
    assert torch.equal(TINY(weights=url)(images()), expected)
    cached = list((tmp_path / "torch_home" / "hub" / "checkpoints").iterdir())
    assert len(cached) == 1 and cached[0].name.endswith("-split.safetensors")
    file.unlink()
    assert torch.equal(TINY(weights=f"{url}#sha256={digest}")(images()), expected)  # from the cache
    cached[0].write_bytes(cached[0].read_bytes()[:-2] + b"??")
    text = refusal(TINY, weights=f"{url}#sha256={digest}")
    assert str(cached[0]) in text and "not the file that was published" in text
    cached[0].unlink()
    assert f"{url} cannot be downloaded" in refusal(TINY, weights=url, error=OSError)
    file.write_bytes(b"something else")
    assert "not the file that was published" in refusal(TINY, weights=f"{url}#sha256={digest}")
    assert not list(cached[0].parent.iterdir())


def test_a_release_that_lies_elsewhere(released, tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "checkout" / "weights", tmp_path / "elsewhere"
    shutil.copytree(released, elsewhere)
    here.mkdir(parents=True)
    releases = read_manifest(released)
    entry = {**vars(releases["split"]), "url": (elsewhere / "split.safetensors").as_uri()}
    write_manifest(here, {"split": type(releases["split"])(**entry), "plain": releases["plain"]})
    expected = TINY()(images())
    monkeypatch.setattr("dinov2_eq.hub.manifest.PACKAGE", tmp_path / "checkout" / "dinov2_eq")
    assert torch.equal(TINY()(images()), expected)
    assert "have no URL" in refusal(TINY_REG, weights="plain", error=FileNotFoundError)


def test_an_installed_package_has_its_weights_inside(released, tmp_path, monkeypatch):
    shutil.copytree(released, tmp_path / "site" / "dinov2_eq" / "weights")
    monkeypatch.setattr("dinov2_eq.hub.manifest.PACKAGE", tmp_path / "site" / "dinov2_eq")
    assert weights_folder() == tmp_path / "site" / "dinov2_eq" / "weights" and TINY().n_blocks == 1
    monkeypatch.setattr("dinov2_eq.hub.manifest.PACKAGE", tmp_path / "nowhere")
    assert "released weights: none yet" in refusal(TINY)


def test_refusals(released):
    text = refusal(ENTRY_POINTS["dinov2_eq_vits14"])
    assert "No weights are released for dinov2_eq_vits14" in text and "pretrained=False" in text
    assert "released weights: plain (dinov2_eq_vitt8_reg), split (dinov2_eq_vitt8)" in text
    assert "is neither a release, a file nor a URL" in refusal(TINY, weights="splt", error=FileNotFoundError)
    assert "are for dinov2_eq_vitt8_reg, not for dinov2_eq_vitt8" in refusal(TINY, weights="plain")
    assert "not for dinov2_eq_vits8" in refusal(ENTRY_POINTS["dinov2_eq_vits8"], weights="split")
    assert "not for dinov2_eq_vitt16" in refusal(ENTRY_POINTS["dinov2_eq_vitt16"], weights="split")
    assert "another architecture: blocks 1 there, 2 here; loaded 21 of 35" in refusal(TINY, depth=2)
    assert "No entry point for vit_tiny with patches of 7" in refusal(
        entry_point_of, arch="vit_tiny", patch_size=7, num_register_tokens=0
    )


def test_a_damaged_release(released, tmp_path, monkeypatch):
    folder = tmp_path / "checkout" / "weights"
    shutil.copytree(released, folder)
    monkeypatch.setattr("dinov2_eq.hub.manifest.PACKAGE", tmp_path / "checkout" / "dinov2_eq")
    file = folder / "split.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert "not the file that was published" in refusal(TINY)
    content = json.loads((folder / MANIFEST).read_text())
    del content["releases"]["split"]["licence"]
    (folder / MANIFEST).write_text(json.dumps(content))
    assert "release 'split' lacks or should not have licence" in refusal(TINY)


@pytest.mark.parametrize(
    "content",
    ["", '{"releases": {', "[]", "3", "{}", '{"releases": []}', '{"releases": {"a": 3}}', '{"releases": null}'],
)
def test_a_damaged_manifest(released, tmp_path, monkeypatch, content):
    monkeypatch.setattr("dinov2_eq.hub.manifest.PACKAGE", tmp_path / "checkout" / "dinov2_eq")
    path = tmp_path / "checkout" / "weights" / MANIFEST
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert refusal(TINY).startswith(f"{path} ")


def test_the_manifest_of_this_checkout_is_true():
    releases = read_manifest(weights_folder())
    assert weights_folder() == ROOT / "weights"
    defaults = [release.entry_point for release in releases.values() if release.default]
    assert len(defaults) == len(set(defaults))
    for release in releases.values():
        content = read_weights(weights_folder() / release.file, sha256=release.sha256)
        assert (weights_folder() / release.file).stat().st_size == release.size < 12e6
        assert {name.split(".")[0] for name in content} == set(release.contains)


def test_evaluations_load_releases(checkout, released):
    encoder = load_encoder(f"hub:{checkout}:dinov2_eq_vitt8")
    assert (encoder.image_size, encoder.mean) == (32, [0.4, 0.5, 0.6])
    states = [each.backbone.state_dict() for each in (encoder, random_encoder(encoder, 0), random_encoder(encoder, 0))]
    assert states[0].keys() == states[1].keys()  # one block, as the file has
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed"):
        assert torch.equal(states[1][name], states[2][name]) and not torch.equal(states[0][name], states[1][name])
    file = load_encoder(checkout / "weights" / "split.safetensors")
    assert (file.step, file.mean, file.config["train"]["dataset_path"]) == (
        1,
        encoder.mean,
        "Shapes:split=TRAIN:num=24:size=32",
    )
    assert torch.equal(file.backbone(images()), encoder.backbone(images()))


BARE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

allowed = set(sys.stdlib_module_names) | set(sys.argv[2].split(","))
sys.meta_path.insert(0, Blocker())
import torch

model = torch.hub.load(sys.argv[1], "dinov2_eq_vitt8", source="local", projection=True)
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
features = model(images)
print(sys.modules["dinov2_eq"].__file__, "numpy" in sys.modules, features.cls.sum().item(), *features.equivariant.shape)
print(torch.hub.load(sys.argv[1], "dinov2_eq_vits14", source="local", pretrained=False, depth=1).embed_dim)
import dinov2_eq.distributed, dinov2_eq.types
"""


def what_torch_needs() -> set[str]:
    """Import names of torch and of the packages that it requires, directly and in turn, as installed here."""
    modules_of = {}
    for module, packages in metadata.packages_distributions().items():
        for package in packages:
            modules_of.setdefault(canonicalize_name(package), set()).add(module)
    needed, queue = set(), ["torch"]
    while queue:
        package = queue.pop()
        if package in needed or package not in modules_of:
            continue
        needed.add(package)
        requirements = [Requirement(text) for text in metadata.requires(package) or []]
        queue += [
            canonicalize_name(each.name)
            for each in requirements
            if not each.marker or each.marker.evaluate({"extra": ""})
        ]
    return set().union(*(modules_of[package] for package in needed))


def test_a_bare_checkout_needs_torch_alone(checkout, released, tmp_path):
    allowed = what_torch_needs() | {"dinov2_eq", "hubconf"}
    assert "torch" in allowed and not allowed & {"numpy", "safetensors", "omegaconf", "PIL", "torchvision", "yaml"}
    arguments = [sys.executable, "-I", "-c", BARE, str(checkout), ",".join(sorted(allowed))]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()[-2:]
    file, has_numpy, total, *shape = first.split()
    assert file == str(checkout / "dinov2_eq" / "__init__.py") and has_numpy == "False"
    expected = TINY(projection=True)(images())
    assert float(total) == pytest.approx(expected.cls.sum().item(), abs=1e-4)
    assert list(map(int, shape)) == list(expected.equivariant.shape) and second == "384"
