"""Which transforms should the features keep, and to which should they be invariant, on your images?

For each candidate it trains short runs of both kinds on your data and compares their k-NN accuracy. Ordered: stronger
changes move the features farther (the section `order`, our reading of Xie et al. 2022), and the base method has no
augmentation of that kind. Invariant: the transform is an augmentation of the base method, either the recipe's own, or,
where the recipe has none, g on the second view of all losses. The runs are a sweep; the same command goes on.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_eq.config.checks import LENGTHS
from dinov2_eq.config.load import find_recipe, load_config
from dinov2_eq.config.schema import Config
from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.evaluation.command_line import positive
from dinov2_eq.evaluation.probe_transforms import ordered_transform
from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import replace_text
from dinov2_eq.objectives.order import OrderConfig
from dinov2_eq.report.choice import KNN, NUMBERS, Arm, Candidate, as_markdown, choose, plot
from dinov2_eq.report.figures import as_svg
from dinov2_eq.run.sweep import add_flags, carry_out_sweep, how_of, listing, plan
from dinov2_eq.run.sweep_file import SEED, Row, Sweep, require_distinct, with_data
from dinov2_eq.run.sweep_table import Outcome, done, problems_of
from dinov2_eq.settings import CropsConfig
from dinov2_eq.train.timing import settings_for

NAME = "choice"
NUM_NEIGHBOURS = 20
MAX_ORDER_IMAGES = 500
RECIPE = "recipe"  # label of the runs with the recipe's own augmentation
COLOUR, BLUR = "colour", "blur"
# Parameters of g that the augmentation of a recipe can change as well, and what switches that off.
KINDS = {**dict.fromkeys(("brightness", "contrast", "saturation", "hue"), COLOUR), "blur_sigma": BLUR}
OFF = {
    COLOUR: ("crops.jitter_prob=0", "crops.grey_prob=0", "crops.solarize_prob=0"),
    BLUR: ("crops.blur_prob=[0,0,0]",),
}


class Plan(NamedTuple):
    """The two forms of training for a candidate: labels of rows, and their settings."""

    candidate: str
    ordered: tuple[str, tuple[str, ...]]
    invariant: tuple[str, tuple[str, ...]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq choose-transforms", description=__doc__)
    add = parser.add_argument
    add(
        "--candidates",
        required=True,
        metavar="NAME,NAME",
        help="transforms: rotation, translation, se2, color_jitter, blur, all, one_of_all, or package.module:ClassName",
    )
    add(
        "--config-file",
        default="cifar10/simclr",
        metavar="RECIPE",
        help="the base method, without a transform g; default: cifar10/simclr, which reads images at 32 pixels",
    )
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="length of each run; warm-ups keep their share. Default: the recipe's",
    )
    add("--seeds", type=positive, default=2, metavar="N", help="runs of each form, at least 2; default: 2")
    add(
        "--order-weight", type=float, default=1.0, metavar="W", help="order.loss_weight of the ordered runs; default: 1"
    )
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not done and writes the recommendations; exits with 2 if a run failed, after running the others.

    Raises:
        ValueError, OSError: flags, data or recipe cannot be used, or a run has other settings; nothing was trained.
        Stopped: SIGTERM or SIGHUP.
    """
    args = build_parser().parse_intermixed_args(argv)
    num_images = check_flags_and_data(args)
    recipe = str(find_recipe(args.config_file))
    config = base_config(recipe, args)
    plans = [plan_of(name, transform, config, args.order_weight) for name, transform in transforms_of(args, config)]
    planned = plan(sweep_of(plans, config, recipe, args), args.output_dir)
    if args.dry_run:
        print(listing(planned))
        return
    outcomes = carry_out_sweep(planned, args.output_dir, how_of(args))
    print(write(plans, outcomes, num_images, args))
    if any(outcome.state == "failed" for outcome in outcomes):
        sys.exit(2)


def check_flags_and_data(args: argparse.Namespace) -> int:
    """Returns the number of images to classify; raises ValueError for flags or data that cannot give an answer."""
    if args.seeds < 2:
        raise ValueError(
            f"--seeds {args.seeds}: one run has no spread, so no difference has an uncertainty; give 2 or more"
        )
    if not 0 < args.order_weight < float("inf"):
        raise ValueError(f"--order-weight must be above 0, got {args.order_weight:g}; the default is 1")
    for flag, value in (("--train-dataset", args.train_dataset), ("--val-dataset", args.val_dataset)):
        if value is None:
            raise ValueError(
                f"{flag} is missing: k-NN compares labelled images that were not trained on with the training images; "
                "give both, such as --train-dataset ImageFolder:root=data/train --val-dataset ImageFolder:root=data/val"
            )
    set_here = {SEED, "train.dataset_path", *(("optim.steps", *LENGTHS) if args.steps else ())}
    for word in args.overrides:
        if (key := word.partition("=")[0]) in set_here or key in ("order.loss_weight", "order.transform"):
            raise ValueError(
                f"{word}: this command sets {key} itself; see --candidates, --order-weight, --steps, --seeds and "
                "--train-dataset"
            )
    _, val = read_labelled(args.train_dataset, [args.val_dataset], "choose-transforms")
    return len(val.indices)


def base_config(recipe: str, args: argparse.Namespace) -> Config:
    """Loads the recipe; raises ValueError if it already has a transform g."""
    config = load_config(recipe, [f"train.dataset_path={args.train_dataset}", *args.overrides])
    if config.needs().pairing:
        names = ", ".join(name for name, section in config.objectives().items() if section.needs().pairing)
        raise ValueError(
            f"--config-file {args.config_file} already has a transform g ({names}), so it is no base to compare on; "
            "give a recipe without one, such as cifar10/simclr, or equivariance.enabled=false"
        )
    return config


def transforms_of(args: argparse.Namespace, config: Config) -> list[tuple[str, Transform]]:
    names = list(dict.fromkeys(name.strip() for name in args.candidates.split(",") if name.strip()))
    if not names:
        raise ValueError(f"--candidates {args.candidates!r} names no transform; give for example rotation,color_jitter")
    return [(name, ordered_transform("--candidates", name, vars(config.order.ranges()))) for name in names]


def plan_of(name: str, transform: Transform, config: Config, weight: float) -> Plan:
    """Returns how to train for a candidate in both forms, as settings on top of the base config."""
    kinds = list(dict.fromkeys(KINDS.get(component) for component in transform.components))
    own = [kind for kind in kinds if kind and augments(config.crops, kind)]
    ordered = [
        f"order.loss_weight={weight:g}",
        f"order.transform={name}",
        *(word for kind in own for word in OFF[kind]),
    ]
    if own == kinds:
        return Plan(name, (f"{name}, ordered", tuple(ordered)), (RECIPE, ()))
    return Plan(name, (f"{name}, ordered", tuple(ordered)), (f"{name}, invariant", as_augmentation(name, config.order)))


def augments(crops: CropsConfig, kind: str) -> bool:
    """Whether the recipe's augmentation changes colours, or blurs."""
    if kind == COLOUR:
        return crops.jitter_prob > 0 and any(crops.jitter)
    return any(crops.blur_prob)


def as_augmentation(name: str, order: OrderConfig) -> tuple[str, ...]:
    """Returns settings that make g, with the ranges and border of the ordered runs, an augmentation of the base method.

    The second global view of all losses becomes g(u), and nothing is rebuilt: the control of the reconstruction task.
    """
    settings = {
        "enabled": "true",
        "loss_weight": "0",
        "view": "second",
        "invariant_projection": "false",
        "transform": name,
        "border": order.border,
        **{key: str(value).replace(" ", "") for key, value in vars(order.ranges()).items()},
    }
    return tuple(f"equivariance.{key}={value}" for key, value in settings.items())


def sweep_of(plans: Sequence[Plan], config: Config, recipe: str, args: argparse.Namespace) -> Sweep:
    """Returns all runs as a sweep; those that several candidates share are in it once."""
    lengths = settings_for(config, args.steps) if args.steps else []
    shared = (f"train.dataset_path={args.train_dataset}", *args.overrides, *lengths)
    forms = dict(form for each in plans for form in (each.ordered, each.invariant))
    rows = [Row(label, seed, recipe, own, shared) for label, own in forms.items() for seed in range(args.seeds)]
    require_distinct(Path(recipe), rows)
    workers = {"num-workers": config.train.num_workers}
    order: dict[str, Any] = {
        "tasks": [each.candidate for each in plans],
        "tokens": "mean" if config.order.pool == "mean" else "cls",
        "max-val-images": MAX_ORDER_IMAGES,
        **{flag_of(key): value for key, value in vars(config.order.ranges()).items()},
    }
    evaluations = {"knn": {"nb_knn": NUM_NEIGHBOURS, **workers}, "order": {**order, **workers}}
    return Sweep(Path(recipe), rows, with_data(evaluations, args.train_dataset, args.val_dataset))


def flag_of(key: str) -> str:
    """The flag of `eval order` for a setting of the ranges."""
    return key.removesuffix("_min_max").replace("_", "-")


def write(plans: Sequence[Plan], outcomes: Sequence[Outcome], num_images: int, args: argparse.Namespace) -> str:
    """Writes choice.json, choice.md and choice.svg; returns the Markdown."""

    def arm(label: str, candidate: str) -> Arm:
        return Arm(label, [numbers_of(outcome, candidate) for outcome in outcomes if outcome.row.label == label])

    candidates = [
        Candidate(each.candidate, arm(each.ordered[0], each.candidate), arm(each.invariant[0], each.candidate))
        for each in plans
    ]
    choices = choose(candidates, num_images)
    conditions = [
        f"recipe: {args.config_file} {' '.join(args.overrides)}".rstrip(),
        f"steps: {args.steps or 'those of the recipe'}",
        f"order.loss_weight of the ordered runs: {args.order_weight:g}",
        f"training images: {args.train_dataset}",
        f"classified images: {args.val_dataset}, {num_images}",
    ]
    arms = [
        {"ordered": [*each.ordered.runs], "invariant": [*each.invariant.runs], "invariant_by": each.invariant.label}
        for each in candidates
    ]
    rows = [choice._asdict() | found for choice, found in zip(choices, arms, strict=True)]
    write_results(args.output_dir / f"{NAME}.json", {"conditions": conditions, "candidates": rows})
    text = as_markdown(candidates, choices, conditions, problems_of(outcomes))
    replace_text(args.output_dir / f"{NAME}.md", text)
    replace_text(args.output_dir / f"{NAME}.svg", as_svg(plot(choices)))
    return text


def numbers_of(outcome: Outcome, candidate: str) -> dict[str, float]:
    """k-NN accuracy of a run, and what `eval order` says of a candidate, with real pixels where it has borders."""
    entries: Mapping[str, Mapping[str, float]] = {entry.evaluation: entry.numbers for entry in done(outcome)}
    found = {}
    for name, value in entries.get("knn", {}).items():
        if name.endswith(" top1"):  # there is one, of one k
            found[KNN] = value
    order = entries.get("order", {})
    for name in NUMBERS:
        for border in ("none", "canvas"):
            if (key := f"{candidate} {border} {name}") in order:
                found[name] = order[key]
    return found


if __name__ == "__main__":
    main()
