"""Differences, their intervals and recommendations, against scipy and a simulation."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from dinov2_eq.report.choice import KNN, Arm, Candidate, as_markdown, choose, half_width, plot, sentence, spread

MANY = 10**12  # images: no error of sampling them


def arm(label, *values):
    return Arm(label, [{KNN: value} for value in values])


def test_the_interval_of_two_arms_is_that_of_students_t_test():
    ordered, invariant = [60.0, 61.5, 59.5], [57.0, 58.5]
    deviation, freedom = spread([ordered, invariant])
    expected = ttest_ind(ordered, invariant).confidence_interval(0.95)
    found = half_width(ordered, invariant, deviation, freedom, MANY)
    assert found == pytest.approx((expected.high - expected.low) / 2, rel=1e-5) and freedom == 3


def test_without_spread_the_images_remain():
    assert half_width([50.0], [50.0], 0.0, 4, 100) == pytest.approx(100 * 1.96 * math.sqrt(2 * 0.25 / 100), rel=1e-3)


@pytest.mark.parametrize(
    ("ordered", "invariant", "text"),
    [
        ((64.0, 64.2), (60.0, 60.2), "rotation: keep, +4.0 ± 0.6 k-NN"),
        ((60.0, 60.2), (64.0, 64.2), "rotation: make invariant, -4.0 ± 0.6 k-NN"),
        ((60.0, 63.0), (60.0, 62.0), "rotation: no difference that these runs can show, +0.5 ± "),
        ((), (60.0, 62.0), "rotation: not done yet"),
        ((60.0,), (62.0,), "rotation: not done yet"),
    ],
)
def test_recommendations(ordered, invariant, text):
    (choice,) = choose([Candidate("rotation", arm("ordered", *ordered), arm("invariant", *invariant))], MANY)
    assert sentence(choice).startswith(text)


def test_few_images_show_less():
    candidate = Candidate("blur", arm("a", 64.0, 64.2), arm("b", 60.0, 60.2))
    assert choose([candidate], 1000)[0].recommendation == "no difference that these runs can show"
    assert choose([candidate], 100000)[0].recommendation == "keep"


def test_a_shared_arm_counts_once():
    shared = arm("recipe", 60.0, 61.0)
    candidates = [Candidate("blur", arm("a", 62.0, 62.0), shared), Candidate("color_jitter", arm("b", 50, 50), shared)]
    deviation, freedom = spread([[62.0, 62.0], [60.0, 61.0], [50.0, 50.0]])
    found = choose(candidates, MANY)[0].half_width
    assert freedom == 3 and found == pytest.approx(half_width([62, 62], [60, 61], deviation, freedom, MANY))


def test_without_a_true_difference_one_in_twenty_is_called_one():
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        values = generator.normal(60, 1, (4, 2))
        arms = [arm(str(number), *row) for number, row in enumerate(values)]
        choices = choose([Candidate("a", arms[0], arms[1]), Candidate("b", arms[2], arms[3])], MANY)
        wrong += choices[0].recommendation != "no difference that these runs can show"
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)


def test_page_and_plot():
    candidates = [
        Candidate("rotation", arm("rotation, ordered", 64.0, 64.2), arm("rotation, invariant", 60.0, 60.2)),
        Candidate("blur", arm("blur, ordered"), arm("recipe", 60.0, 61.0)),
    ]
    choices = choose(candidates, MANY)
    text = as_markdown(candidates, choices, ["steps: 5"], ["blur, ordered, seed 0: failed; no disk"])
    assert "- rotation: keep, +4.0 ± " in text and "- blur: not done yet" in text
    assert "| rotation | ordered | 2 | 64.1 ± 0.1 |" in text and "| rotation | invariant | 2 |" in text
    assert "| blur | invariant (recipe) | 2 | 60.5 ± 0.7 |" in text
    assert "our reading of Xie et al. 2022" in text and "- steps: 5" in text and "no disk" in text
    (axes,) = plot(choices).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rotation", "blur"]
    assert len(axes.containers) == 1  # the other one has no result
