"""The rendered images show what their latents say, by other means than the renderer's."""

import builtins
import colorsys
import math

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.tools import make_3diebench_like as tool

BLUE_ON_GREEN = [1 / 3, 0.0, 0.0, 1 / 3]  # hue of the floor, place and hue of the light


def make(folder, *flags):
    tool.main(["--output", str(folder), "--train-objects", "2", "--val-objects", "1", "--views", "2", *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "new"
    make(folder, "--size", "24", "--samples", "4")
    return folder


def test_the_data_set_reads_it(made):
    train, val = (build_dataset(f"3DIEBench:split={split}:root={made}") for split in ("TRAIN", "VAL"))
    classes = len(tool.SOLIDS)
    assert len(train) == 4 * classes and len(val) == 2 * classes
    assert train.labels.tolist() == np.repeat(range(classes), 4).tolist()
    assert not set(train.objects) & set(val.objects)
    latents = np.array([data.latents(index) for data in (train, val) for index in range(len(data))])
    assert (latents >= tool.LATENTS_LOW).all() and (latents <= tool.LATENTS_HIGH).all()
    assert len(np.unique(latents)) == latents.size  # every image has its own
    assert train.read(3).size == (24, 24) and np.asarray(train.read(3)).std() > 5


def test_the_same_flags_give_the_same_files_and_another_seed_others(made, tmp_path):
    make(tmp_path / "again", "--size", "24", "--samples", "4")
    make(tmp_path / "other", "--size", "24", "--samples", "4", "--seed", "1")
    paths = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(paths) == 6 * len(tool.SOLIDS) * 2 + 4
    for path in paths:
        content = (made / path).read_bytes()
        assert content == (tmp_path / "again" / path).read_bytes()
        assert path.parent.name == "" or content != (tmp_path / "other" / path).read_bytes()


def sticker(place, side=0.12):
    """A small blue cube at a place away from the centre of the rotation."""
    points, triangles = tool.prism(tool.BOX, 1.0, 2)
    return tool.Solid(points * side + place, triangles, np.tile([0.0, 0.0, 1.0], (len(points), 1)))


def project(point, size):
    """Pixel (column, row) of a point, for a camera at distance 2.5 that looks down by 45 degrees at the origin."""
    s = math.sqrt(0.5)
    depth = 2.5 - (point[1] * s + point[2] * s)
    right, up = -point[0], point[2] * s - point[1] * s
    scale = size / 2 / math.tan(math.radians(39.6) / 2) / depth
    return size / 2 + right * scale, size / 2 - up * scale


@pytest.mark.parametrize("seed", range(4))
def test_the_object_is_where_the_rotation_takes_it(seed):
    generator, size = np.random.default_rng(seed), 96
    angles, place = generator.uniform(-math.pi / 2, math.pi / 2, 3), np.array([0.4, 0.3, 0.25])
    latents = np.array([*angles, *BLUE_ON_GREEN])
    pixels = tool.render(tool.load_renderer(), sticker(place), latents, size, 16, seed=0).astype(float)
    rows, columns = np.nonzero(pixels[..., 2] > pixels[..., 1])
    turned = np.array([[0, 0, 0]]) + place
    for axis, angle in zip("xyz", angles, strict=True):  # one after the other, about axes that stay where they are
        turned = Rotation.from_euler(axis, angle).apply(turned)
    column, row = project(turned[0], size)
    assert len(rows) > 5
    assert columns.mean() + 0.5 == pytest.approx(column, abs=2) and rows.mean() + 0.5 == pytest.approx(row, abs=2)


@pytest.mark.parametrize("hue", [0.05, 0.4, 0.7, 0.9])
def test_floor_and_light_have_their_hues(hue):
    far_light = [hue, 0.0, 0.0, 0.2]
    pixels = tool.render(tool.load_renderer(), sticker((0, 0, 0)), np.array([0, 0, 0, *far_light]), 48, 16, seed=0)
    corner = linear(pixels[:8, :8]).mean(axis=(0, 1))  # outside the light's cone: sun and sky are white
    assert colorsys.rgb_to_hsv(*corner)[0] == pytest.approx(hue, abs=0.01)

    lit, unlit = (
        linear(tool.render(tool.load_renderer(), grey_box(), np.array([0, 0, 0, 0.5, 0, 0, light]), 48, 16, seed=0))
        for light in (hue, (hue + 0.5) % 1)
    )
    difference = (lit - unlit)[16:24, 16:32].mean(axis=(0, 1))  # of the upper side, which the light above shines on
    colours = [np.array(tool.hsv(light, *tool.LIGHT_SATURATION_VALUE)) for light in (hue, (hue + 0.5) % 1)]
    expected = colours[0] - colours[1]
    assert difference @ expected / np.linalg.norm(difference) / np.linalg.norm(expected) > 0.99


def grey_box():
    points, triangles = tool.prism(tool.BOX, 1.0, 2)
    return tool.Solid(points, triangles, np.full((len(points), 3), 0.2))


def linear(pixels):
    """Undoes the curve of sRGB: [..., 3] in [0, 1]."""
    values = pixels / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("name", tool.SOLIDS)
def test_solids_are_centred_closed_and_of_one_size(name):
    solids = [tool.draw_solid(tool.SOLIDS[name], np.random.default_rng(seed)) for seed in (0, 1)]
    for solid in solids:
        np.testing.assert_allclose(solid.corners.min(axis=0), -solid.corners.max(axis=0), atol=1e-12)
        assert np.linalg.norm(solid.corners, axis=1).max() == pytest.approx(tool.RADIUS)
        edges = solid.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        assert len(np.unique(edges, axis=0)) == len(edges)  # each edge once in each direction:
        assert {tuple(edge) for edge in edges} == {tuple(edge[::-1]) for edge in edges}  # no hole, one orientation
        first, second, third = (solid.corners[solid.triangles[:, corner]] for corner in range(3))
        assert (first * np.cross(second, third)).sum() > 0  # the enclosed volume: seen from outside
    assert not np.allclose(solids[0].corners, solids[1].corners)
    assert not np.allclose(solids[0].colours, solids[1].colours)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views", "1"], "--views 1: a pair needs at least 2 views of an object"),
        (["--size", "0"], "argument --size: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "new", *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    with pytest.raises(SystemExit) as stop:
        make(tmp_path)
    assert stop.value.code == 2 and f"{tmp_path} is not an empty folder; name a new one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_without_the_renderer(tmp_path, capsys, monkeypatch):
    original = builtins.__import__

    def without_mitsuba(name, *args, **kwargs):
        if name == "mitsuba":
            raise ImportError("No module named 'mitsuba'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mitsuba)
    with pytest.raises(SystemExit) as stop:
        make(tmp_path / "new")
    assert stop.value.code == 2 and 'pip install "dinov2_eq[render]"' in capsys.readouterr().err
