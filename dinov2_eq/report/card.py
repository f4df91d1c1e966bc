"""Renders the results of `dinov2-eq eval equivariance --card` as one page, the report card."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from dinov2_eq.report.figures import Bar, Curve, angle_panel, bar_panel
from dinov2_eq.report.html import badge, figure, labelled_row, page, panels, table
from dinov2_eq.report.runs import BORDERS, COLORS, FAINT_BORDERS, TOKENS
from dinov2_eq.report.sections import ABSENT

MAX_ENCODERS = len(COLORS)
MEANS = {"mean_border_free": "no border", "mean_masked": "masked", "mean_zeros": "zeros"}
SHOWN_ANGLES = (0, 45, 90, 180)
R2 = "R\u00b2"

INTRO = """\
What frozen features encode about the transform of an image:
<a href="#r2">whether the transform can be predicted from them</a>, <a href="#cosines">how much they change</a>,
<a href="#angles">whether a rotated image and its class are still found</a>, and
<a href="#protocol">how this was measured</a>. Each encoder has the same letter and colour throughout."""

CLAIMS = {
    "encoders": (
        "The encoders side by side",
        "Means are over rotation, translation, colour and blur. Only read differences that are much larger than the "
        "spread, which comes from the probe's seeds alone: training the same encoder again, or using other images, "
        "may change a number further.",
    ),
    "r2": (
        "Predicting the transform from the features",
        "A probe on the features of an image and of its transformed copy predicts the parameters of the transform: "
        "R\u00b2 = 1 is perfect, 0 no better than a constant. Trust the solid bars (<em>none</em>, <em>canvas</em>): "
        "all pixels are real. Of the faint bars, <em>masked</em> only shows a disc that no border reaches, and "
        "<em>zeros</em> includes the black corners, which reveal angle and shift even to an untrained network. A flip "
        "is a target of -1 or 1.",
    ),
    "cosines": (
        "How much the features change",
        "Mean cosine similarity between the features of an image and of its transformed copy: at 1 the features ignore "
        "the transform. The tick is the mean between <em>different</em> images: if a bar ends there, the transform "
        "changes the features as much as another image would. Read the gap between the two, not the bar alone, because "
        "the features of some encoders all point in nearly the same direction.",
    ),
    "angles": (
        "Rotation by all angles",
        "Held-out images are rotated by 0\u00b0 to 345\u00b0, training images are upright. All are cut to a disc, "
        "so that only the content rotates and no corner reveals the angle. k-NN predicts the class; retrieval counts "
        "how often the nearest of all upright held-out images is the image itself. Dashed: chance. At multiples of "
        "90\u00b0 nothing is interpolated; the peaks there are partly due to this sharpness.",
    ),
    "protocol": ("How it was measured", "Everything that the numbers depend on, as in the results file."),
}


class ShownEncoder(NamedTuple):
    """An encoder on the page."""

    name: str
    letter: str
    color: str
    description: Mapping[str, Any]


def render_card(results: Mapping[str, Any]) -> str:
    """Renders one HTML page that needs no other file and no network.

    Args:
        results: the content of the JSON file of `dinov2-eq eval equivariance --card`.
    """
    entries = [
        ShownEncoder(name, chr(ord("A") + i), COLORS[i], description)
        for i, (name, description) in enumerate(results["encoders"].items())
    ]
    bodies = {
        "encoders": _encoders(entries, results),
        "r2": _r2(entries, results),
        "cosines": _cosines(entries, results["cosines"]),
        "angles": _angles(entries, results),
        "protocol": _protocol(results["protocol"]),
    }
    return page(
        entries[0].description["source"] if len(entries) == 1 else f"{len(entries)} encoders side by side",
        kicker="dinov2_eq equivariance report card",
        intro=INTRO,
        kind="Encoders",
        shown=entries,
        claims=CLAIMS,
        bodies=bodies,
        command="dinov2-eq eval equivariance --card",
    )


def _encoders(entries: Sequence[ShownEncoder], results: Mapping[str, Any]) -> str:
    facts = {
        "source": lambda about: escape(str(about["source"])),
        "step": lambda about: ABSENT if about["step"] is None else f"{about['step']:,}",
        "parameters": lambda about: f"{about['parameters'] / 1e6:.1f} M",
        "features": lambda about: f"{about['embed_dim']} in each of two tokens",
        "image and patch": lambda about: f"{about['image_size']} and {about['patch_size']} px",
        "loaded": lambda about: f"{about['loaded_tensors']} tensors" if about["loaded_tensors"] else "none: untrained",
    }
    rows = [
        labelled_row(label, [write(entry.description) for entry in entries], "setting")
        for label, write in facts.items()
    ]
    rows.append(f'<tr class="group"><th colspan="{len(entries) + 1}" scope="colgroup">Results</th></tr>')
    for name, border in MEANS.items():
        row_of = _by_encoder(row for row in results["summary"] if row["name"] == name)
        if row_of:
            rows.append(labelled_row(f"mean {R2}, {border}", [_with_spread(row_of.get(e.name)) for e in entries]))
    tokens = _headline(results)[0]
    curves = _by_encoder(row for row in results["angles"]["curves"] if row["tokens"] == tokens)
    angles = results["angles"]["angles_deg"]
    for key, label, spec in (("knn_top1", "k-NN %", ".1f"), ("recall_at_1", "retrieval", ".3f")):
        values = [curves[entry.name].get(key) for entry in entries]
        for what, at in (("upright", lambda v: v[angles.index(0)]), ("mean over the angles", np.mean)):
            if all(values):
                rows.append(labelled_row(f"{label}, {what}", [format(at(value), spec) for value in values]))
    return table(_columns(entries), rows, "runs") + f"<p><small>Features: {TOKENS[tokens]}.</small></p>"


def _r2(entries: Sequence[ShownEncoder], results: Mapping[str, Any]) -> str:
    tokens, head = _headline(results)
    parts = [f"<p>Shown: {TOKENS[tokens]}, {escape(head)} head.</p>"]
    parts.append(panels([_r2_figure(entries, results["rows"], task) for task in _tasks(results["rows"])]))
    parts.append(f"<h3>As numbers</h3>{_r2_table(entries, results['rows'])}")
    everything = [*results["rows"], *results["variants"]["rows"]]
    means = [*results["summary"], *results["variants"]["summary"]]
    if results["variants"]["summary"]:
        parts.append(f"<h3>Other tokens, other heads</h3>{_means_table(entries, means)}")
    for kind in dict.fromkeys((row["tokens"], row["head"]) for row in everything):
        rows = [row for row in everything if (row["tokens"], row["head"]) == kind]
        values = _r2_table(entries, rows) if kind != (tokens, head) else ""
        title = f"All values and components: {TOKENS[kind[0]]}, {escape(kind[1])} head"
        parts.append(f"<details><summary>{title}</summary>{values}{_component_table(entries, rows)}</details>")
    return "".join(parts)


def _r2_figure(entries: Sequence[ShownEncoder], rows: Sequence[Mapping[str, Any]], task: str) -> str:
    bars = []
    for border in BORDERS:
        row_of = _by_encoder(row for row in rows if (row["task"], row["border"]) == (task, border))
        for entry in entries:
            if row := row_of.get(entry.name):
                spread = row.get("r2_pooled_std", 0.0)
                faint = border in FAINT_BORDERS
                bars.append(Bar(border, entry.letter, entry.color, row["r2_pooled"], None, faint, spread))
    spoken = "; ".join(f"border {bar.group}, encoder {bar.label}: {bar.value:.3f}" for bar in bars)
    return figure(bar_panel(bars), f"R squared of {_words(task)}: {spoken}", _as_title(_words(task)), "")


def _r2_table(entries: Sequence[ShownEncoder], rows: Sequence[Mapping[str, Any]]) -> str:
    """Table with a row for each task and border."""
    lines = []
    for task, border in _settings(rows):
        row_of = _by_encoder(row for row in rows if (row["task"], row["border"]) == (task, border))
        lines.append(labelled_row(f"{_words(task)}, {border}", [_with_spread(row_of.get(e.name)) for e in entries]))
    return table(_columns(entries, f"{R2}, pooled"), lines)


def _component_table(entries: Sequence[ShownEncoder], rows: Sequence[Mapping[str, Any]]) -> str:
    """Table with a row for each parameter of each task and border."""
    lines = []
    for task, border in _settings(rows):
        row_of = _by_encoder(row for row in rows if (row["task"], row["border"]) == (task, border))
        for component in next(iter(row_of.values()))["r2_components"]:
            values = [f"{row_of[entry.name]['r2_components'][component]:.3f}" for entry in entries]
            lines.append(labelled_row(f"{_words(task)}, {border}: {component}", values))
    return table(_columns(entries, f"{R2} of one parameter"), lines)


def _means_table(entries: Sequence[ShownEncoder], means: Sequence[Mapping[str, Any]]) -> str:
    """Table with a row for each choice of tokens and head, and each mean."""
    lines = []
    for kind in dict.fromkeys((row["tokens"], row["head"]) for row in means):
        for name, border in MEANS.items():
            row_of = _by_encoder(row for row in means if (row["tokens"], row["head"], row["name"]) == (*kind, name))
            label = f"{TOKENS[kind[0]]}, {kind[1]}, {border}"
            lines.append(labelled_row(label, [_with_spread(row_of[entry.name]) for entry in entries]))
    return table(_columns(entries, f"mean {R2} of four tasks"), lines)


def _cosines(entries: Sequence[ShownEncoder], rows: Sequence[Mapping[str, Any]]) -> str:
    charts, parts = [], []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        of_tokens = [row for row in rows if row["tokens"] == tokens]
        bars, lines = [], []
        for task, border in _settings(of_tokens):
            row_of = _by_encoder(row for row in of_tokens if (row["task"], row["border"]) == (task, border))
            pairs = [(entry, row_of[entry.name]["cosine"], row_of[entry.name]["cosine_of_others"]) for entry in entries]
            lines.append(
                labelled_row(f"{_words(task)}, {border}", [f"{same:.3f}\u00a0({o:.3f})" for _, same, o in pairs])
            )
            if border not in FAINT_BORDERS:
                bars += [Bar(_words(task), e.letter, e.color, same, others, False) for e, same, others in pairs]
        spoken = "; ".join(f"{bar.group}, encoder {bar.label}: {bar.value:.3f}" for bar in bars)
        title = _as_title(TOKENS[tokens])
        charts.append(figure(bar_panel(bars), f"Cosine with the transformed image, {title}: {spoken}", title, ""))
        values = table(_columns(entries, "cosine (of different images)"), lines)
        parts.append(f"<details><summary>All values: {TOKENS[tokens]}</summary>{values}</details>")
    return panels(charts) + "".join(parts)


def _angles(entries: Sequence[ShownEncoder], results: Mapping[str, Any]) -> str:
    measured, parts = results["angles"], []
    for key, title in (
        ("knn_top1", f"k-NN top-1 in %, k = {measured.get('k')}"),
        ("recall_at_1", "Retrieval, recall at 1"),
    ):
        curves = [curve for curve in measured["curves"] if key in curve]
        if curves:
            # One scale for all panels of a row.
            top = 1.05 * max(measured[f"{key}_by_chance"], *(value for curve in curves for value in curve[key]))
            kinds = dict.fromkeys(curve["tokens"] for curve in curves)
            charts = [_angle_figure(entries, measured, key, tokens, title, top) for tokens in kinds]
            parts.append(f"<h3>{title}</h3>{panels(charts)}")
    number = results["protocol"]["num_val_images"]
    parts.append(
        f"<p><small>With {number} held-out images, the standard error of a point is up to {50 / number**0.5:.1f} % for "
        "either curve.</small></p>"
    )
    parts += [f'<p class="missing">{escape(notice)}</p>' for notice in results["protocol"]["notices"]]
    return "".join(parts)


def _angle_figure(
    entries: Sequence[ShownEncoder], measured: Mapping[str, Any], key: str, tokens: str, title: str, top: float
) -> str:
    curves = _by_encoder(curve for curve in measured["curves"] if curve["tokens"] == tokens)
    angles = np.array(measured["angles_deg"])
    lines = [Curve(entry.color, angles, np.array(curves[entry.name][key])) for entry in entries]
    chart = angle_panel(lines, top, measured[f"{key}_by_chance"])
    places = [measured["angles_deg"].index(angle) for angle in SHOWN_ANGLES]
    values = [[f"{curves[entry.name][key][place]:.3g}" for place in places] for entry in entries]
    named = [f"{angle}\u00b0" for angle in SHOWN_ANGLES]
    spoken = "; ".join(
        f"encoder {entry.letter} " + ", ".join(f"{value} at {angle}" for value, angle in zip(row, named, strict=True))
        for entry, row in zip(entries, values, strict=True)
    )
    shown = "".join(
        f'<span class="last">{badge(entry)} {" / ".join(row)}</span>'
        for entry, row in zip(entries, values, strict=True)
    )
    alt = f"{title}, {TOKENS[tokens]}, over the angle: {spoken}"
    return figure(chart, alt, _as_title(TOKENS[tokens]), f"At {' / '.join(named)}:{shown}")


def _protocol(protocol: Mapping[str, Any]) -> str:
    rows = [labelled_row(name.replace("_", " "), [escape(_value(value))]) for name, value in protocol.items()]
    return table("<th></th><th></th>", rows, "runs")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(entries: Sequence[ShownEncoder], corner: str = "") -> str:
    return f"<th>{corner}</th>" + "".join(f'<th scope="col">{badge(e)} {escape(e.name)}</th>' for e in entries)


def _headline(results: Mapping[str, Any]) -> tuple[str, str]:
    return results["rows"][0]["tokens"], results["rows"][0]["head"]


def _by_encoder(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["encoder"]: row for row in rows}


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """All pairs of task and border, in the order of `BORDERS`."""
    present = {(row["task"], row["border"]) for row in rows}
    return [(task, border) for task in _tasks(rows) for border in BORDERS if (task, border) in present]


def _words(task: str) -> str:
    return {"se2": "SE(2)", "color_jitter": "colour jitter"}.get(task, task.replace("_", " "))


def _as_title(text: str) -> str:
    return text[:1].upper() + text[1:]


def _with_spread(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ABSENT
    spread = f"\u00a0\u00b1\u00a0{row['r2_pooled_std']:.3f}" if "r2_pooled_std" in row else ""
    return f"{row['r2_pooled']:.3f}{spread}"
