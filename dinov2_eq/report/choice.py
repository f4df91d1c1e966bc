"""Compares runs that keep the order of a transform with runs that are invariant to it, and says which did better."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import norm, t

from dinov2_eq.report.figures import INK, tidy
from dinov2_eq.report.row_table import OWN, cell, markdown

CONFIDENCE = 0.95
KNN = "k-NN %"
NUMBERS = {"order_accuracy": "order accuracy", "relative_distance": "relative distance"}
METHOD = f"""\
The difference is k-NN accuracy of the class token with the order of the transform kept, minus that with invariance to
it, in points. ± is its {CONFIDENCE:.0%} confidence interval: the spread between seeds, which is taken to be the same
for all runs (Student's t), together with the error of sampling the images that are classified, as if both runs had seen
other ones, which is cautious. A recommendation is made where the interval does not hold 0. Several candidates are so
many chances to be wrong. The ordered runs follow our reading of Xie et al. 2022.
"""


class Arm(NamedTuple):
    """The runs of one form of training, one for each seed that is done, with their numbers by name."""

    label: str
    runs: Sequence[Mapping[str, float]]

    def values(self, name: str) -> list[float]:
        return [run[name] for run in self.runs if name in run]


class Candidate(NamedTuple):
    name: str  # of the transform
    ordered: Arm
    invariant: Arm

    @property
    def invariant_by(self) -> str:
        """What the table says; runs that several candidates share are named."""
        return "invariant" if self.invariant.label.startswith(self.name) else f"invariant ({self.invariant.label})"


class Choice(NamedTuple):
    """What the runs say about a candidate."""

    candidate: str
    difference: float | None  # ordered minus invariant, in points of k-NN accuracy; None: runs are missing
    half_width: float | None  # of its confidence interval
    recommendation: str


def spread(arms: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Returns the standard deviation between seeds, pooled over the arms, and its degrees of freedom."""
    squares = sum((value - fmean(arm)) ** 2 for arm in arms for value in arm)
    freedom = sum(len(arm) - 1 for arm in arms if arm)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def half_width(
    ordered: Sequence[float], invariant: Sequence[float], deviation: float, freedom: int, num_images: int
) -> float:
    """Half the confidence interval of the difference between the means of two arms, in points.

    Args:
        ordered, invariant: accuracies in per cent, one for each seed.
        deviation, freedom: from `spread`.
        num_images: images that each accuracy is a share of.
    """
    shares = [fmean(values) / 100 for values in (ordered, invariant)]
    of_images = 100 * math.sqrt(sum(share * (1 - share) for share in shares) / num_images)
    of_seeds = deviation * math.sqrt(1 / len(ordered) + 1 / len(invariant))
    tail = (1 + CONFIDENCE) / 2
    return math.hypot(t.ppf(tail, freedom) * of_seeds, norm.ppf(tail) * of_images)


def choose(candidates: Sequence[Candidate], num_images: int) -> list[Choice]:
    """Returns a choice for each candidate; arms that several candidates share count once in the spread."""
    arms = {arm.label: arm.values(KNN) for each in candidates for arm in (each.ordered, each.invariant)}
    deviation, freedom = spread(list(arms.values()))
    choices = []
    for each in candidates:
        ordered, invariant = each.ordered.values(KNN), each.invariant.values(KNN)
        if not ordered or not invariant or not freedom:
            choices.append(Choice(each.name, None, None, "not done yet"))
            continue
        difference = fmean(ordered) - fmean(invariant)
        half = half_width(ordered, invariant, deviation, freedom, num_images)
        if abs(difference) <= half:
            recommendation = "no difference that these runs can show"
        else:
            recommendation = "keep" if difference > 0 else "make invariant"
        choices.append(Choice(each.name, difference, half, recommendation))
    return choices


def sentence(choice: Choice) -> str:
    """Such as "rotation: keep, +4.1 ± 0.9 k-NN"."""
    if choice.difference is None:
        return f"{choice.candidate}: {choice.recommendation}"
    return f"{choice.candidate}: {choice.recommendation}, {choice.difference:+.1f} ± {choice.half_width:.1f} k-NN"


def as_markdown(
    candidates: Sequence[Candidate], choices: Sequence[Choice], conditions: Sequence[str], problems: Sequence[str]
) -> str:
    """Renders recommendations, a table of all arms (mean ± standard deviation over seeds), and how it was compared."""
    header = ["transform", "trained to be", "runs", KNN, *NUMBERS.values()]
    rows = [
        [each.name, form, str(len(arm.values(KNN))), *(cell(arm.values(name)) for name in (KNN, *NUMBERS))]
        for each in candidates
        for form, arm in (("ordered", each.ordered), (each.invariant_by, each.invariant))
    ]
    lists = [[f"- {line}" for line in lines] for lines in ([sentence(choice) for choice in choices], conditions)]
    parts = ["\n".join(lists[0]), markdown(header, rows, words=2).rstrip(), METHOD.rstrip(), "\n".join(lists[1])]
    parts += ["\n".join(f"- {problem}" for problem in problems)] if problems else []
    return "\n\n".join(parts) + "\n"


def plot(choices: Sequence[Choice]) -> Figure:
    """Draws the difference of each candidate with its confidence interval, and a line at 0."""
    figure = Figure(figsize=(5.2, 1.0 + 0.4 * len(choices)), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    for place, choice in enumerate(choices):
        if choice.difference is not None:
            axes.errorbar(choice.difference, place, xerr=choice.half_width, fmt="o", color=OWN, capsize=3, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(choices)), [choice.candidate for choice in choices], fontsize=8)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.set_xlabel("k-NN accuracy, ordered minus invariant (points)", fontsize=8, color=INK)
    axes.patch.set_visible(False)
    tidy(axes)
    axes.tick_params(colors=INK)
    axes.spines[:].set(color=INK)
    return figure
