"""The sections of the report with numbers, each a function from runs to HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dinov2_eq.report.figures import Bar, Curve, bar_panel, curve_panel
from dinov2_eq.report.html import badge, figure, labelled_row, missing, panels, table
from dinov2_eq.report.runs import BORDERS, FAINT_BORDERS, Run, all_tasks, r2_label

ABSENT = "\u2013"

# Title of each logged quantity, and how to read it.
LOSSES = {
    "total_loss": ("Total", "Weighted sum of the terms; comparable only between runs with the same weights."),
    "loss/dino": ("DINO", "Cross-entropy of the class tokens with the teacher's."),
    "loss/ibot": ("iBOT", "Cross-entropy of masked patch tokens with the teacher's."),
    "loss/koleo": ("KoLeo", "Lower means that the class tokens of a batch are further apart."),
    "loss/reconstruction": ("Reconstruction", "Mean squared error of the intermediate views, in normalised pixels."),
}
HEALTH = {
    "feature_rank": ("Feature rank", "Effective rank of the teacher's class tokens; falling towards 1 is collapse."),
    "teacher_entropy": ("Teacher entropy", "In nats, of the targets; the log of the number of prototypes is collapse."),
    "lr": ("Learning rate", "Before the multipliers of layers and parameter groups."),
}


def overview(runs: Sequence[Run]) -> str:
    """Settings and main results, with one column per run; settings that differ are marked."""
    head = "<th></th>" + "".join(f'<th scope="col">{badge(run)} {escape(run.name)}</th>' for run in runs)
    columns = [_settings(run) for run in runs]
    rows = []
    for label in columns[0]:
        values = [column[label] for column in columns]
        cells = [escape(value).replace(":", ":<wbr>") for value in values]
        rows.append(labelled_row(label, cells, "differs" if len(set(values)) > 1 else "setting"))
    rows.append(f'<tr class="group"><th colspan="{len(runs) + 1}" scope="colgroup">Results</th></tr>')
    return table(head, [*rows, *_headline_results(runs)], "runs")


def losses(runs: Sequence[Run]) -> str:
    """Curves of the loss terms and of the health of the training."""
    logged = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    others = {key: (key.removeprefix("loss/"), "Unweighted.") for key in logged if key.startswith("loss/")}
    terms = [_curve_figure(runs, key, *text) for key, text in (LOSSES | others | LOSSES).items() if key in logged]
    health = [_curve_figure(runs, key, *text) for key, text in HEALTH.items() if key in logged]
    parts = [panels(terms)]
    if health:
        parts.append("<h3>Health of the training</h3>" + panels(health))
    for run in runs:
        if not run.metrics:
            parts.append(missing(run, "nothing logged yet", "start with", f"dinov2-eq train --output-dir {run.folder}"))
    return "".join(parts)


def knn(runs: Sequence[Run]) -> str:
    """k-NN accuracy during and after training."""
    shown, notes = [], []
    on_the_way = [run for run in runs if len(run.curve("eval/knn_top1")[0])]
    if on_the_way:
        reading = "Top-1 accuracy in % of the teacher's class token."
        shown.append(_curve_figure(runs, "eval/knn_top1", "During training", reading))
    accuracies = [run.accuracies() for run in runs]
    if any(accuracies):
        head = "<th>training images, k</th>" + "".join(f"<th>{badge(run)}</th>" for run in runs)
        labels = dict.fromkeys(label for values in accuracies for label in values)
        rows = [labelled_row(label, [_number(values, label, ".1f") for values in accuracies]) for label in labels]
        shown.append(f"<div><h4>After training, accuracy in %</h4>{table(head, rows)}</div>")
    for run in runs:
        if run not in on_the_way:
            notes.append(missing(run, "no k-NN during training", "train with", "evaluation.knn_period_steps=1250"))
        if run.knn is None:
            command = _eval_command("knn", run)
            notes.append(missing(run, "no k-NN results", "make them with", command))
    return panels(shown) + "".join(notes)


def equivariance(runs: Sequence[Run]) -> str:
    """R2 of the transforms, as charts and as a table."""
    tasks = all_tasks(runs)
    parts = []
    if tasks:
        parts.append(panels([_r2_figure(runs, task) for task in tasks]))
        names = ("task", "border", "run", "encoder", "R\u00b2 pooled", "R\u00b2 mean", "each parameter")
        rows = [
            f"<tr>{_r2_cells(run, row)}</tr>"
            for task in tasks
            for border in BORDERS
            for run in runs
            for row in run.r2_rows(task, border)
        ]
        values = table("".join(f"<th>{name}</th>" for name in names), rows)
        parts.append(f"<details><summary>All values</summary>{values}</details>")
    for run in runs:
        if run.equivariance is None:
            command = (
                f"dinov2-eq eval equivariance --pretrained-weights {run.folder} --train-dataset ... --val-dataset ..."
            )
            parts.append(missing(run, "no equivariance results", "make them with", command))
    return "".join(parts)


def _settings(run: Run) -> dict[str, str]:
    task, student, train = run.config["equivariance"], run.config["student"], run.config["train"]
    if not task["enabled"]:
        role = "off: the plain base method"
    elif not run.reconstructs:
        role = "control, \u03bb = 0: nothing reconstructed"
    else:
        role = f"on, \u03bb = {task['loss_weight']:g}"
    last_step = run.metrics[-1]["step"] if run.metrics else 0
    return {
        "equivariance task": role,
        "transform": task["transform"] if task["enabled"] else ABSENT,
        "border": task["border"] if task["enabled"] else ABSENT,
        "decoder": f"{task['decoder']}, K = {task['num_intermediates']}" if run.reconstructs else ABSENT,
        "steps": f"{last_step:,} of {run.config['optim']['steps']:,}",
        "architecture": f"{student['arch']}/{student['patch_size']} at {run.config['crops']['global_crops_size']} px",
        "data": train["dataset_path"],
        "seed": str(train["seed"]),
    }


def _headline_results(runs: Sequence[Run]) -> list[str]:
    """Table rows: the first k-NN accuracy of the results, and the border-free R2 of each task."""
    rows = []
    accuracies = [run.accuracies() for run in runs]
    for label in list(max(accuracies, key=len))[:1]:
        rows.append(labelled_row(f"k-NN, {label}", [_number(values, label, ".1f") for values in accuracies]))
    for task in all_tasks(runs):
        scores = [run.border_free_r2(task) for run in runs]
        for tokens in list(dict.fromkeys(name for by_tokens in scores for name in by_tokens)):
            rows.append(
                labelled_row(r2_label(task, tokens), [_number(by_tokens, tokens, ".3f") for by_tokens in scores])
            )
    return rows or [labelled_row("evaluations", ["none yet"] * len(runs))]


def _curve_figure(runs: Sequence[Run], key: str, title: str, reading: str) -> str:
    curves = [(run, *run.curve(key)) for run in runs]
    curves = [(run, steps, values) for run, steps, values in curves if len(steps)]
    chart = curve_panel([Curve(run.color, steps, values) for run, steps, values in curves])
    spoken = "; ".join(f"run {run.letter} from {values[0]:.4g} to {values[-1]:.4g}" for run, _, values in curves)
    last = "".join(f"<span>{badge(run)} {values[-1]:.4g}</span>" for run, _, values in curves)
    caption = f'{escape(reading)} <span class="last">Last: {last}</span>'
    return figure(chart, f"{title} over the steps: {spoken}", title, caption)


def _r2_figure(runs: Sequence[Run], task: str) -> str:
    bars = []
    for border in BORDERS:
        for run in runs:
            references = [row["r2_pooled"] for row in run.r2_rows(task, border, "random-init")]
            for row in run.r2_rows(task, border, "trained"):
                reference = references[0] if references else None
                bars.append(Bar(border, run.letter, run.color, row["r2_pooled"], reference, border in FAINT_BORDERS))
    spoken = "; ".join(f"border {bar.group}, run {bar.label}: {bar.value:.3f}" for bar in bars)
    return figure(bar_panel(bars), f"R squared of {_words(task)}: {spoken}", _words(task).capitalize(), "")


def _r2_cells(run: Run, row: dict[str, Any]) -> str:
    components = ", ".join(f"{escape(name)} {value:.3f}" for name, value in row["r2_components"].items())
    texts = [_words(row["task"]), row["border"], badge(run), row["encoder"]]
    texts += [f"{row['r2_pooled']:.3f}", f"{row['r2_mean']:.3f}", components]
    return "".join(f"<td>{text}</td>" for text in texts)


def _words(task: str) -> str:
    return escape(task.replace("_", " "))


def _number(values: dict[str, Any], key: str, spec: str) -> str:
    return format(values[key], spec) if key in values else ABSENT


def _eval_command(name: str, run: Run) -> str:
    return f"dinov2-eq eval {name} --pretrained-weights {run.folder} --train-dataset ... --val-dataset ..."
