"""The card as a reader gets it: complete, self-contained, and honest about what was not measured."""

import base64
import copy
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dinov2_eq.report import MAX_ENCODERS, render_card
from tests.browser import needs_browser, opened, require_sound
from tests.report.reading import Page

ENCODERS = ("runs/task<1>", "runs/disabled", "random-init")
BORDERS = {"rotation": ("zeros", "masked", "canvas"), "color_jitter": ("none", "masked"), "flip": ("none", "masked")}
TOKENS, HEADS = ("both", "cls", "mean"), ("mlp", "linear")


def results(encoders=ENCODERS, tokens=TOKENS, heads=HEADS, seeds=3) -> dict:
    """What `dinov2-eq eval equivariance --card` writes, with made-up numbers."""
    spread = {"r2_pooled_std": 0.013, "r2_pooled_by_seed": [0.5] * seeds} if seeds > 1 else {}
    rows, means, cosines, curves = [], [], [], []
    for i, encoder in enumerate(encoders):
        for kind in tokens:
            shared = {"encoder": encoder, "tokens": kind}
            for task, borders in BORDERS.items():
                for border in borders:
                    where = {**shared, "task": task, "border": border}
                    cosines.append({**where, "cosine": 0.877 - 0.1 * i, "cosine_of_others": 0.25})
                    value = {"r2_pooled": 0.938 - 0.4 * i, "r2_mean": 0.5, "r2_components": {"theta<0>": 0.432}}
                    rows += [{**where, "head": head, **value, **spread} for head in heads]
            for head in heads:
                for name in ("mean_border_free", "mean_zeros", "mean_masked"):
                    means.append({**shared, "head": head, "name": name, "r2_pooled": 0.625, "r2_mean": 0.6, **spread})
            recall = [0.1 + 0.9 * math.exp(-min(step, 24 - step)) for step in range(24)]
            curves.append({**shared, "recall_at_1": recall, "knn_top1": [40 + 20 * value for value in recall]})
    description = {"step": 10, "parameters": 5_500_000, "embed_dim": 192, "patch_size": 8, "image_size": 32}

    def split(found: list[dict]) -> tuple[list[dict], list[dict]]:
        headline = [row for row in found if (row["tokens"], row["head"]) == (tokens[0], heads[0])]
        return headline, [row for row in found if row not in headline]

    (rows, other_rows), (means, other_means) = split(rows), split(means)
    return {
        "protocol": {
            "num_val_images": 400,
            "seconds": 1.23456,
            "blur_sigma": (0.1, 2.0),
            "environment": {"a": "b"},
            "notices": [],
        },
        "encoders": {
            name: {**description, "source": f"/data/{name}", "loaded_tensors": 0 if name == "random-init" else 86}
            for name in encoders
        },
        "rows": rows,
        "summary": means,
        "variants": {"rows": other_rows, "summary": other_means},
        "cosines": cosines,
        "angles": {
            "angles_deg": list(range(0, 360, 15)),
            "k": 20,
            "recall_at_1_by_chance": 0.01,
            "knn_top1_by_chance": 10.0,
            "curves": curves,
        },
    }


@pytest.fixture(scope="module")
def card_html() -> str:
    return render_card(results())


def test_every_chart_is_embedded_and_has_words(card_html: str) -> None:
    images = Page(card_html).images
    assert len(images) == len(BORDERS) + len(TOKENS) + 2 * len(TOKENS)  # R2, cosines, k-NN and retrieval
    for image in images:
        head, _, content = image["src"].partition(";base64,")
        assert head == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(content, validate=True)).tag.endswith("svg")
    (turned,) = [
        image["alt"]
        for image in images
        if image["alt"].startswith("k-NN") and "patch token, over" in image["alt"] and "class" not in image["alt"]
    ]
    assert "k = 20" in turned and "encoder A 60 at 0°, 42.9 at 45°" in turned


def test_nothing_is_fetched(card_html: str) -> None:
    assert all(address.startswith(("data:", "#")) for address in Page(card_html).addresses)
    assert "url(" not in card_html and "@import" not in card_html


def test_numbers_are_told(card_html: str) -> None:
    text = Page(card_html).text.replace("\u00a0", " ")
    assert "3 encoders side by side" in text and "runs/task<1>" in text and "task<1>" not in card_html
    assert "0.938 ± 0.013" in text and "0.138 ± 0.013" in text and "0.877 (0.250)" in text
    assert "SE(2)" not in text and "colour jitter, none: theta<0>" in text and text.count("0.432") == 3 * 7 * 6
    assert "class token, linear, masked" in text and "none: untrained" in text and "86 tensors" in text
    assert "blur sigma0.1, 2" in text and "seconds1.235" in text
    assert "k-NN %, upright" in text and "60.0" in text
    assert "With 400 held-out images, the standard error of a point is up to 2.5 %" in text


def test_one_seed_one_head_no_labels() -> None:
    found = results(["trained"], ["cls"], ["linear"], seeds=1)
    notice = "There is no k-NN over the angle: <data> has no labels."
    found["protocol"]["notices"] = [notice]
    for name in ("k", "knn_top1_by_chance"):
        del found["angles"][name]
    for curve in found["angles"]["curves"]:
        del curve["knn_top1"]
    html = render_card(found)
    page = Page(html)
    assert notice in page.text and notice not in html
    assert "k-NN top-1" not in page.text and "k-NN %" not in page.text and "±" not in page.text
    assert "Other tokens" not in page.text and len(page.images) == len(BORDERS) + 2


def test_results_are_left_as_they_were() -> None:
    found = results(ENCODERS[:1])
    before = copy.deepcopy(found)
    render_card(found)
    assert found == before


@needs_browser
@pytest.mark.parametrize("encoders", [ENCODERS, [f"runs/a rather long name, number {i}" for i in range(MAX_ENCODERS)]])
def test_browser_shows_it_without_errors_or_requests(encoders: list[str], tmp_path: Path) -> None:
    path = tmp_path / "report_card.html"
    html = render_card(results(encoders))
    path.write_text(html, encoding="utf-8")
    with opened(path, tmp_path / "profile") as browser:
        assert require_sound(browser, path) == len(Page(html).images)
        browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
