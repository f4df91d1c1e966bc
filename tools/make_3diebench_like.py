"""Renders a small data set in the format of 3DIEBench: simple solids under known rotations, floor and light hues.

Every view of an object has its own rotation, hues and light; the seven numbers lie beside the image, drawn from the
ranges of 3DIEBench. The solids are of six classes, each with its own sizes, positions and colours. The same flags give
the same files. Needs Mitsuba 3, which renders on the CPU: pip install "dinov2_eq[render]".
"""

import argparse
import colorsys
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# The scene of 3DIEBench; lengths in units of which the object's radius is `RADIUS`.
CAMERA = (2.5, math.pi / 4, math.pi / 2)  # distance from the object, polar angle, azimuth
FIELD_OF_VIEW_DEG = 39.6
FLOOR_Z = -1.0
LIGHT_DISTANCE = 4.0
LIGHT_CONE_DEG = 22.5
LIGHT_INTENSITY, SUN_IRRADIANCE, SKY_RADIANCE = 60.0, 1.2, 0.15
RADIUS = 0.75
FLOOR_SATURATION_VALUE = (0.6, 0.6)
LIGHT_SATURATION_VALUE = (1.0, 0.8)
# Ranges of the latents: angle x, y, z; floor hue; polar angle, azimuth and hue of the light.
LATENTS_LOW = (-math.pi / 2, -math.pi / 2, -math.pi / 2, 0, 0, 0, 0)
LATENTS_HIGH = (math.pi / 2, math.pi / 2, math.pi / 2, 1, math.pi / 4, 2 * math.pi, 1)
SPLITS = ("train", "val")


class Part(NamedTuple):
    """A prism of a solid, or a frustum of one."""

    sides: int  # corners of its base; 4: a box
    size: tuple[float, float, float]  # along x, y, z
    centre: tuple[float, float, float]
    axis: int = 2  # from base to top: x, y or z
    taper: float = 1.0  # size of the top over that of the base
    colour: int = 0  # which of the object's three colours


ROUND, BOX = 20, 4
# No solid looks the same from two sides that the rotations reach.
SOLIDS: dict[str, list[Part]] = {
    "chair": [
        Part(BOX, (1.0, 1.0, 0.15), (0, 0, 0)),
        Part(BOX, (1.0, 0.15, 1.1), (0, -0.45, 0.6), taper=0.8, colour=1),
        *(Part(BOX, (0.14, 0.14, 0.8), (x, y, -0.45), colour=2) for x in (-0.4, 0.4) for y in (-0.4, 0.4)),
    ],
    "mug": [
        Part(ROUND, (1.0, 1.0, 1.2), (0, 0, 0), taper=1.2),
        Part(ROUND, (0.95, 0.95, 0.05), (0, 0, 0.61), colour=2),
        *(Part(BOX, (0.5, 0.16, 0.16), (0.75, 0, z), colour=1) for z in (-0.25, 0.35)),
        Part(BOX, (0.16, 0.16, 0.76), (0.95, 0, 0.05), colour=1),
    ],
    "aeroplane": [
        Part(ROUND, (1.9, 0.35, 0.35), (0, 0, 0), axis=0, taper=0.5),
        Part(BOX, (0.5, 2.0, 0.08), (-0.05, 0, 0), colour=1),
        Part(BOX, (0.3, 0.8, 0.07), (0.85, 0, 0.05), colour=1),
        Part(BOX, (0.35, 0.08, 0.5), (0.85, 0, 0.3), taper=0.6, colour=2),
    ],
    "car": [
        Part(BOX, (2.0, 0.9, 0.4), (0, 0, 0)),
        Part(BOX, (1.1, 0.8, 0.4), (0.25, 0, 0.4), taper=0.7, colour=1),
        *(Part(ROUND, (0.42, 0.2, 0.42), (x, y, -0.2), axis=1, colour=2) for x in (-0.6, 0.6) for y in (-0.45, 0.45)),
    ],
    "lamp": [
        Part(ROUND, (0.9, 0.9, 0.12), (0, 0, -0.9), colour=1),
        Part(ROUND, (0.14, 0.14, 1.4), (-0.2, 0, -0.2), colour=2),
        Part(BOX, (0.7, 0.14, 0.14), (0.1, 0, 0.5), colour=2),
        Part(ROUND, (0.9, 0.9, 0.6), (0.4, 0, 0.35), taper=0.4),
    ],
    "hammer": [
        Part(ROUND, (0.22, 0.22, 1.8), (0, 0, -0.3), taper=0.7),
        Part(BOX, (0.5, 0.36, 0.36), (-0.25, 0, 0.65), colour=1),
        Part(BOX, (0.7, 0.34, 0.34), (0.35, 0, 0.65), axis=0, taper=0.2, colour=2),
    ],
}


class Solid(NamedTuple):
    """The triangles of an object, centred, with a circumscribed box of radius `RADIUS`."""

    corners: np.ndarray  # [V, 3] float64
    triangles: np.ndarray  # [T, 3] int64
    colours: np.ndarray  # [V, 3] RGB in [0, 1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/make_3diebench_like.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--train-objects", type=positive, default=16, help="objects of each class to train on")
    add("--val-objects", type=positive, default=4, help="other objects of each class, to evaluate on")
    add("--views", type=positive, default=20, help="images of each object; 3DIEBench has 50")
    add("--size", type=positive, default=64, help="side of an image in pixels; 3DIEBench has 256")
    add("--samples", type=positive, default=16, help="light paths for each pixel")
    add("--seed", type=int, default=0, help="of everything that is random")
    return parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.views < 2:
        parser.error(f"--views {args.views}: a pair needs at least 2 views of an object")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} must not be negative")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"--output {args.output} is not an empty folder; name a new one, or remove what is there")
    try:
        renderer = load_renderer()
    except ImportError as error:
        parser.error(f'Mitsuba 3 cannot be imported ({error}); run: pip install "dinov2_eq[render]"')
    numbers = {"train": args.train_objects, "val": args.val_objects}
    total = len(SOLIDS) * sum(numbers.values()) * args.views
    with tqdm(total=total, unit="image", disable=None, file=sys.stderr) as progress:
        for split, number in numbers.items():
            write_split(renderer, args, split, number, progress)
    print(f"{total} images of {total // args.views} objects in {args.output}")
    print(f"3DIEBench:split=TRAIN:root={args.output}")


def load_renderer() -> ModuleType:
    """Imports Mitsuba; its scalar variant needs no driver, no display and no compiler."""
    import mitsuba

    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def write_split(renderer: ModuleType, args: argparse.Namespace, split: str, number: int, progress: tqdm) -> None:
    """Renders the objects of a split. Its files come last, so that an interrupted data set is not taken for a whole."""
    objects, labels = [], []
    for label, name in enumerate(SOLIDS):
        for member in range(number):
            generator = np.random.default_rng([args.seed, SPLITS.index(split), label, member])
            solid = draw_solid(SOLIDS[name], generator)
            folder = f"{label:08d}/{split}{member:04d}"
            (args.output / folder).mkdir(parents=True)
            for view in range(args.views):
                latents = generator.uniform(LATENTS_LOW, LATENTS_HIGH)
                pixels = render(renderer, solid, latents, args.size, args.samples, seed=view)
                Image.fromarray(pixels).save(args.output / folder / f"image_{view}.jpg", quality=95)
                np.save(args.output / folder / f"latent_{view}.npy", latents)
                progress.update()
            objects.append(f"/{folder}/")
            labels.append(label)
    np.save(args.output / f"{split}_labels.npy", np.array(labels, dtype=np.int64))
    np.save(args.output / f"{split}_images.npy", np.array(objects))


def draw_solid(parts: Sequence[Part], generator: np.random.Generator) -> Solid:
    """Draws a member of a class: all parts in other proportions, in three colours."""
    stretch = generator.uniform(0.75, 1.3, 3)
    shades = generator.uniform((0, 0.3, 0.4), (1, 0.9, 0.95), (3, 3))  # hue, saturation, value
    palette = np.array([hsv(*shade) for shade in shades])
    corners, triangles, colours, start = [], [], [], 0
    for part in parts:
        points, faces = prism(part.sides, part.taper, part.axis)
        size = np.array(part.size) * generator.uniform(0.85, 1.15, 3)
        corners.append((points * size + part.centre) * stretch)
        triangles.append(faces + start)
        colours.append(np.tile(palette[part.colour], (len(points), 1)))
        start += len(points)
    points = np.concatenate(corners)
    points -= (points.min(axis=0) + points.max(axis=0)) / 2
    points *= RADIUS / np.linalg.norm(points, axis=1).max()
    return Solid(points, np.concatenate(triangles), np.concatenate(colours))


def prism(sides: int, taper: float, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes a prism in the cube [-0.5, 0.5]^3: corners [2 sides + 2, 3], triangles [4 sides, 3] seen from outside."""
    angles = 2 * math.pi * (np.arange(sides) + 0.5) / sides
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring *= 0.5 / np.abs(ring).max()
    ends = [np.column_stack([ring * scale, np.full(sides, z)]) for scale, z in ((1.0, -0.5), (taper, 0.5))]
    corners = np.concatenate([*ends, [[0, 0, -0.5], [0, 0, 0.5]]])
    here = np.arange(sides)
    after = (here + 1) % sides
    base, top = np.full(sides, 2 * sides), np.full(sides, 2 * sides + 1)
    sheets = [(here, after, after + sides), (here, after + sides, here + sides), (after, here, base)]
    sheets += [(here + sides, after + sides, top)]
    triangles = np.concatenate([np.stack(sheet, axis=1) for sheet in sheets])
    return np.roll(corners, axis - 2, axis=1), triangles  # a cyclic exchange of axes keeps the orientation


def render(renderer: ModuleType, solid: Solid, latents: np.ndarray, size: int, samples: int, seed: int) -> np.ndarray:
    """Renders an object as its latents say; returns [size, size, 3] uint8 in sRGB."""
    floor_hue, polar, azimuth, light_hue = latents[3:]
    turned = solid.corners @ Rotation.from_euler("xyz", latents[:3]).as_matrix().T
    to_world = renderer.ScalarTransform4f
    camera = {
        "type": "perspective",
        "fov": FIELD_OF_VIEW_DEG,
        "to_world": to_world().look_at(origin=on_sphere(*CAMERA), target=[0, 0, 0], up=[0, 0, 1]),
        # A box filter keeps the blocks of threads apart, so that the pixels do not depend on their order.
        "film": {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}},
        "sampler": {"type": "multijitter", "sample_count": samples},
    }
    light = {
        "type": "spot",
        "to_world": to_world().look_at(
            origin=on_sphere(LIGHT_DISTANCE, polar, azimuth), target=[0, 0, 0], up=[0, 1, 0.01]
        ),
        "intensity": rgb(LIGHT_INTENSITY * hsv(light_hue, *LIGHT_SATURATION_VALUE)),
        "cutoff_angle": LIGHT_CONE_DEG,
    }
    floor = {
        "type": "rectangle",
        "to_world": to_world().translate([0, 0, FLOOR_Z]).scale([20, 20, 1]),
        "bsdf": {"type": "diffuse", "reflectance": rgb(hsv(floor_hue, *FLOOR_SATURATION_VALUE))},
    }
    scene = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 3},
        "camera": camera,
        "light": light,
        "sun": {"type": "directional", "direction": [0.3, -0.2, -1], "irradiance": rgb([SUN_IRRADIANCE] * 3)},
        "sky": {"type": "constant", "radiance": rgb([SKY_RADIANCE] * 3)},
        "floor": floor,
        "object": mesh_of(renderer, turned, solid),
    }
    image = renderer.render(renderer.load_dict(scene), seed=seed)
    return np.array(renderer.util.convert_to_bitmap(image))


def mesh_of(renderer: ModuleType, corners: np.ndarray, solid: Solid) -> Any:
    """Makes a mesh of flat triangles in the solid's colours, with its corners where they are given."""
    bsdf = {"type": "diffuse", "reflectance": {"type": "mesh_attribute", "name": "vertex_color"}}
    properties = renderer.Properties()
    properties["bsdf"] = renderer.load_dict({"type": "twosided", "material": bsdf})
    mesh = renderer.Mesh("object", len(corners), len(solid.triangles), properties)
    mesh.add_attribute("vertex_color", 3, solid.colours.ravel().astype(np.float32))
    parameters = renderer.traverse(mesh)
    parameters["vertex_positions"] = corners.ravel().astype(np.float32)
    parameters["faces"] = solid.triangles.ravel().astype(np.uint32)
    parameters.update()
    return mesh


def on_sphere(distance: float, polar: float, azimuth: float) -> list[float]:
    """Returns the point (x, y, z) at a distance from the origin; the polar angle is measured from the z axis."""
    across = distance * math.sin(polar)
    return [across * math.cos(azimuth), across * math.sin(azimuth), distance * math.cos(polar)]


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Returns RGB [3] in [0, 1]; hue in turns."""
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def rgb(values: Sequence[float]) -> dict[str, object]:
    return {"type": "rgb", "value": [float(value) for value in values]}


if __name__ == "__main__":
    main()
