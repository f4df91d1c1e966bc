"""The sections of the report with pictures: reconstructions and feature maps."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from html import escape

import numpy as np

from dinov2_eq.report.feature_maps import ANGLES_DEG, PatchFeatures, turned_maps
from dinov2_eq.report.figures import picture
from dinov2_eq.report.html import badge, missing, table
from dinov2_eq.report.runs import Run, Snapshot, load_snapshot

NUM_IMAGES = 3
NUM_SNAPSHOTS = 5
SHOWN_SIDE = 96  # CSS pixels of a picture on the page
VIEW_HEADS = ["anchor<br>view v\u2081", "base<br>view u", "transformed<br>view g(u)"]
SAMPLING = "evaluation.sample_period_steps=1250"


def reconstructions(runs: Sequence[Run]) -> str:
    """Views, targets and reconstructions of each run over the steps."""
    return "".join(f"<h3>{badge(run)} {escape(run.name)}</h3>{_reconstructions_of(run)}" for run in runs)


def feature_maps(runs: Sequence[Run], patch_features: Mapping[str, PatchFeatures]) -> str:
    """Feature maps of each run; arguments as for `render_page`."""
    blocks, notes = [], []
    for run in runs:
        if not run.snapshots:
            notes.append(missing(run, "no stored image to map", "train with", SAMPLING))
        elif run.name not in patch_features:
            command = f"dinov2-eq train --output-dir {run.folder}"
            notes.append(missing(run, "no teacher checkpoint yet", "training writes one:", command))
        else:
            blocks.append(_feature_maps_of(run, patch_features[run.name]))
    return f'<div class="columns">{"".join(blocks)}</div>{"".join(notes)}'


def _reconstructions_of(run: Run) -> str:
    if not run.snapshots:
        return missing(run, "no samples", "train with", SAMPLING)
    last = load_snapshot(run.snapshots[-1])
    comparable = [snapshot for snapshot in map(load_snapshot, run.snapshots) if snapshot.same_images(last)]
    picks = np.unique(np.linspace(0, len(comparable) - 1, NUM_SNAPSHOTS).round().astype(int))
    shown = [comparable[i] for i in picks] if last.reconstructions is not None else []
    images = range(min(NUM_IMAGES, len(last.base_view)))
    notes = []
    if shown:
        steps = [f"step {snapshot.step:,}<br><small>{snapshot.psnr():.1f} dB</small>" for snapshot in shown]
        heads = [*VIEW_HEADS, "target", *steps]
        rows = [row for r in images for row in _image_rows(run, last, shown, r)]
    else:
        reason = "the control, \u03bb = 0" if run.config["equivariance"]["enabled"] else "the plain base method"
        notes.append(f"<p>Nothing is reconstructed in this run ({reason}), so only its views are shown.</p>")
        heads = VIEW_HEADS * len(images)
        rows = [f"<tr>{''.join(_view_cells(run, last, r) for r in images)}</tr>"]
    if len(comparable) < len(run.snapshots):
        num_others = len(run.snapshots) - len(comparable)
        notes.append(f"<p>{num_others} earlier samples show other images and are not included.</p>")
    return "".join(notes) + table("".join(f"<th>{head}</th>" for head in heads), rows, "pictures")


def _view_cells(run: Run, last: Snapshot, r: int, num_rows: int = 1) -> str:
    """Table cells with anchor, base and transformed view of image r, the last one with theta."""
    theta = "<br>".join(
        f"{escape(name)} {value:+.3g}" for name, value in zip(last.components, last.theta[r], strict=True)
    )
    alt = f"Run {run.letter}, image {r + 1}"
    views = [
        _image(last.anchor_view[r], f"{alt}: anchor view"),
        _image(last.base_view[r], f"{alt}: base view"),
        _image(last.transformed_view[r], f"{alt}: transformed view") + f"<small>{theta}</small>",
    ]
    return "".join(f'<td rowspan="{num_rows}">{view}</td>' for view in views)


def _image_rows(run: Run, last: Snapshot, shown: Sequence[Snapshot], r: int) -> list[str]:
    """Table rows for the K targets of image r; its three views span all of them."""
    num_rows = len(last.fractions)
    rows = []
    for k, fraction in enumerate(last.fractions):
        share = f"{Fraction(float(fraction)).limit_denominator(20)} of \u03b8"
        alt = f"Run {run.letter}, image {r + 1}, {share}"
        target = _image(last.intermediate_targets[k, r], f"{alt}: target")
        painted = [_image(s.reconstructions[k, r], f"{alt}: reconstruction at step {s.step}") for s in shown]
        views = "" if k else _view_cells(run, last, r, num_rows)
        cells = "".join(f"<td>{cell}</td>" for cell in (f"{target}<small>{share}</small>", *painted))
        rows.append(f'<tr class="{"" if k else "first"}">{views}{cells}</tr>')
    return rows


def _feature_maps_of(run: Run, patch_features: PatchFeatures) -> str:
    base_views = load_snapshot(run.snapshots[-1]).base_view[:NUM_IMAGES]
    rows = []
    for i, (images, maps) in enumerate(turned_maps(base_views, patch_features), start=1):
        for kind, turned in (("image", images), ("features", maps)):
            cells = "".join(
                f"<td>{_image(image, f'Run {run.letter}, image {i}: {kind} at {angle} degrees')}</td>"
                for angle, image in zip(ANGLES_DEG, turned, strict=True)
            )
            rows.append(f'<tr class="{"first" if kind == "image" else ""}"><th scope="row">{kind}</th>{cells}</tr>')
    head = "<th></th>" + "".join(f"<th>{angle}\u00b0</th>" for angle in ANGLES_DEG)
    return f"<div><h3>{badge(run)} {escape(run.name)}</h3>{table(head, rows, 'pictures')}</div>"


def _image(image: np.ndarray, alt: str) -> str:
    kind = "enlarged" if image.shape[0] < SHOWN_SIDE else ""
    return f'<img src="{picture(image)}" alt="{escape(alt)}" class="{kind}" width="{SHOWN_SIDE}" height="{SHOWN_SIDE}">'
