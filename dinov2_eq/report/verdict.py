"""What the task changed, in words from the numbers: the first section of the report."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from statistics import fmean

from dinov2_eq.report.html import badge, labelled_row, table
from dinov2_eq.report.runs import Run, all_tasks, r2_label

CLEAR_R2 = 0.02  # a smaller difference is called none
CLEAR_ERRORS = 2.0  # standard errors; a smaller difference of accuracies is called none


def verdict(runs: Sequence[Run]) -> str:
    """One sentence for each run with the task and each run without it, and the numbers; "" without such a pair."""
    pairs = [(task, control) for task in runs if task.reconstructs for control in runs if not control.reconstructs]
    sentences = [sentence for pair in pairs if (sentence := _sentence(*pair))]
    if not sentences:
        return ""
    paragraphs = "".join(f'<p class="verdict">{sentence}</p>' for sentence in sentences)
    return paragraphs + "".join(_numbers(*pair) for pair in pairs)


def _sentence(task: Run, control: Run) -> str:
    """A sentence such as "the task raised R2 of rotation by 0.12, at equal k-NN accuracy"; "" without numbers."""
    findings = [finding for finding in (_r2_finding(task, control), _accuracy_finding(task, control)) if finding]
    against = f"({badge(task)} {escape(task.name)} against {badge(control)} {escape(control.name)})"
    return f"The task {' and '.join(findings)} {against}." if findings else ""


def _r2_finding(task: Run, control: Run) -> str:
    """Of the mean over the transforms that both runs were probed for, with the first tokens that both have."""
    changes = {}
    for name, _, ours, theirs in _shared_scores(task, control):
        changes.setdefault(name, ours - theirs)
    if not changes:
        return ""
    change = fmean(changes.values())
    names = ", ".join(escape(name.replace("_", " ")) for name in changes)
    what = f"R\u00b2 of {names}" if len(changes) == 1 else f"the mean R\u00b2 of {names}"
    if abs(change) < CLEAR_R2:
        return f"did not change {what} ({change:+.2f})"
    return f"{'raised' if change > 0 else 'lowered'} {what} by {abs(change):.2f}"


def _accuracy_finding(task: Run, control: Run) -> str:
    label, error = _shared_accuracy(task, control)
    if not label:
        return ""
    change = task.accuracies()[label] - control.accuracies()[label]
    if abs(change) <= CLEAR_ERRORS * error:
        return f"left k-NN accuracy equal within the error of sampling ({change:+.1f} \u00b1 {error:.1f} points)"
    return f"{'gained' if change > 0 else 'cost'} {abs(change):.1f} points of k-NN accuracy (\u00b1 {error:.1f})"


def _numbers(task: Run, control: Run) -> str:
    rows = []
    for name, tokens, ours, theirs in _shared_scores(task, control):
        rows.append(labelled_row(r2_label(name, tokens), [f"{ours:.3f}", f"{theirs:.3f}", f"{ours - theirs:+.3f}"]))
    label, _ = _shared_accuracy(task, control)
    if label:
        ours, theirs = task.accuracies()[label], control.accuracies()[label]
        rows.append(labelled_row(f"k-NN, {label}", [f"{ours:.1f}", f"{theirs:.1f}", f"{ours - theirs:+.1f}"]))
    head = f"<th></th><th>{badge(task)} with the task</th><th>{badge(control)} without</th><th>difference</th>"
    return table(head, rows) if rows else ""


def _shared_scores(task: Run, control: Run) -> Iterator[tuple[str, str, float, float]]:
    """Yields transform, tokens, and the border-free R2 of both runs."""
    for name in all_tasks([task, control]):
        ours, theirs = task.border_free_r2(name), control.border_free_r2(name)
        yield from ((name, tokens, ours[tokens], theirs[tokens]) for tokens in ours if tokens in theirs)


def _shared_accuracy(task: Run, control: Run) -> tuple[str, float]:
    """The first accuracy of both and the standard error of its difference in points, as if test images were drawn."""
    accuracies = control.accuracies()
    label = next((label for label in task.accuracies() if label in accuracies), "")
    if not label:
        return "", math.nan
    variances = []
    for run in (task, control):
        share = run.accuracies()[label] / 100
        variances.append(share * (1 - share) / run.knn["protocol"]["num_val_images"])
    return label, 100 * math.sqrt(sum(variances))
