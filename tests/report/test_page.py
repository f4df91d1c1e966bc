"""The page as a reader gets it: complete, self-contained, and honest about what a run lacks."""

import base64
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from dinov2_eq.config.schema import default_config
from dinov2_eq.report import load_runs, render_page
from tests.browser import needs_browser, opened, require_sound
from tests.report.reading import Page

STEPS = (0, 50, 100)


def write_run(folder: Path, *, enabled: bool = True, loss_weight: float = 1.0, evaluated: bool = True) -> Path:
    """A run folder as training and evaluations leave it, with two 16-pixel images and K = 2."""
    config = default_config()
    config.equivariance.transform = "a_module_that_is_not_here:Gamma"
    config.equivariance.enabled, config.equivariance.loss_weight = enabled, loss_weight
    (folder / "samples").mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    reconstructs = enabled and loss_weight > 0
    write_metrics(folder, reconstructs)
    for step in STEPS:
        components = ["log_gamma", "a<b", ""] if reconstructs else None
        write_samples(folder / f"samples/step_{step:07d}.npz", reconstructs, 100 - step // 2, components)
    if evaluated:
        knn = {
            "protocol": {"num_val_images": 10000},
            "encoder": {},
            "results": {"full": {"20": {"top1": 35.1, "top5": 88.0}}},
        }
        (folder / "results_eval_knn.json").write_text(json.dumps(knn))
        r2 = {"protocol": {}, "encoder": {}, "rows": equivariance_rows()}
        (folder / "results_eval_equivariance.json").write_text(json.dumps(r2))
    return folder


def write_metrics(folder: Path, reconstructs: bool) -> None:
    lines = []
    for step in range(0, 101, 10):
        terms = {"loss/dino": 8 - step / 50, "loss/koleo": 0.1, "loss/sie": 0.5}
        terms |= {"loss/reconstruction": 1 - step / 200} if reconstructs else {}
        health = {"lr": 1e-3, "teacher_entropy": 5.0, "feature_rank": 20.0}
        lines.append({"step": step, "total_loss": sum(terms.values()), **terms, **health})
    lines.append({"step": 100, "eval/knn_top1": 34.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "training_metrics.jsonl").write_text(text + '{"step": 110, "total')


def write_samples(path: Path, reconstructs: bool, error: int, components: list[str] | None) -> None:
    random = np.random.default_rng(0)
    views = random.integers(0, 150, (3, 2, 16, 16, 3), dtype=np.uint8)
    targets = random.integers(0, 150, (2, 2, 16, 16, 3), dtype=np.uint8)
    arrays = dict(zip(("anchor_view", "base_view", "transformed_view"), views, strict=True))
    arrays |= {"intermediate_targets": targets, "fractions": np.array([1 / 3, 2 / 3]), "theta": np.full((2, 3), 0.5)}
    if reconstructs:
        arrays["reconstructions"] = targets + np.uint8(error)
    if components is not None:
        arrays["components"] = np.array(components)
    np.savez(path, **arrays)


def equivariance_rows() -> list[dict]:
    return [
        {
            "encoder": encoder,
            "tokens": "both",
            "task": task,
            "border": border,
            "r2_pooled": value,
            "r2_mean": value,
            "r2_components": {"theta": value},
        }
        for task, borders in (("rotation", ("zeros", "canvas")), ("blur", ("none",)))
        for border in borders
        for encoder, value in (("trained", 0.8125), ("random-init", -0.25))
    ]


def color_features(images: np.ndarray) -> np.ndarray:
    """Patch tokens that rotate with the image: the mean colour of each 4-pixel patch."""
    batch, height, width, _ = images.shape
    return images.reshape(batch, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4))


@pytest.fixture(scope="module")
def page_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(folder / "with task"),
        write_run(folder / "control<0>", loss_weight=0.0),
        write_run(folder / "base", enabled=False, evaluated=False),
    ]
    runs = load_runs(folders)
    return render_page(runs, {run.name: color_features for run in runs[:2]})


def test_every_picture_is_embedded_decodes_and_has_words(page_html: str) -> None:
    page = Page(page_html)
    kinds = set()
    for image in page.images:
        head, _, content = image["src"].partition(";base64,")
        decoded = base64.b64decode(content, validate=True)
        if head == "data:image/png":
            Image.open(io.BytesIO(decoded)).load()
        else:
            assert head == "data:image/svg+xml"
            assert ElementTree.fromstring(decoded).tag == "{http://www.w3.org/2000/svg}svg"
        kinds.add(head)
        assert image["alt"]
    assert len(kinds) == 2


def test_nothing_is_fetched(page_html: str) -> None:
    assert all(address.startswith(("data:", "#")) for address in Page(page_html).addresses)
    assert "url(" not in page_html and "@import" not in page_html


def test_pictures_of_each_run(page_html: str) -> None:
    alts = [image["alt"] for image in Page(page_html).images]

    def count(words: str) -> int:
        return sum(words in alt for alt in alts)

    assert count("Run A") - count("Run A, image 1:") - count("Run A, image 2:") == 2 * 2 * (1 + len(STEPS))
    assert count("Run B") == 2 * 3 + 2 * 3 * 2  # views, and feature maps at three angles
    assert count("Run C") == 2 * 3
    assert count("reconstruction at step") == 2 * 2 * len(STEPS)
    assert any(alt.startswith("sie over the steps") for alt in alts)  # a term that the report has no text for


def test_numbers_and_gaps_are_told(page_html: str) -> None:
    text = Page(page_html).text
    assert "control<0>" in text and "control<0>" not in page_html
    assert "35.1" in text and "0.812" in text and "-0.250" in text
    assert "Nothing is reconstructed in this run (the control" in text
    assert "Nothing is reconstructed in this run (the plain base method" in text
    for command in ("dinov2-eq eval knn", "dinov2-eq eval equivariance", "no teacher checkpoint yet"):
        assert text.count(command) == 1, command


def test_parameters_are_named_where_the_samples_name_them(page_html: str) -> None:
    assert "<small>log_gamma +0.5<br>a&lt;b +0.5<br>" in page_html
    assert "<small> +0.5<br> +0.5<br> +0.5</small>" in page_html  # older samples


def test_a_run_that_only_began(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    OmegaConf.save(default_config(), tmp_path / "new/config.yaml")
    page = Page(render_page(load_runs([tmp_path / "new"]), {}))
    assert page.images == []
    for gap in ("nothing logged yet", "no k-NN results", "no samples", "no stored image", "no equivariance results"):
        assert gap in page.text


@needs_browser
def test_browser_shows_it_without_errors_or_requests(page_html: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_html, encoding="utf-8")
    with opened(path, tmp_path / "profile") as browser:
        assert require_sound(browser, path) == len(Page(page_html).images)
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
