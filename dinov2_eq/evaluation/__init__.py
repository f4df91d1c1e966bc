"""Table of the evaluations: one file and one line each. Read by `dinov2-eq eval NAME`, `eval all` and `submit`."""

from typing import NamedTuple


class Program(NamedTuple):
    module: str  # has build_parser() and main(argv)
    summary: str  # for the list of commands


EVALUATIONS: dict[str, Program] = {
    "knn": Program("dinov2_eq.eval.knn", "k-NN classification with frozen features"),
    "linear": Program("dinov2_eq.eval.linear", "linear classification with frozen features, DINOv2's grid of heads"),
    "logreg": Program("dinov2_eq.eval.logreg", "logistic regression with frozen features"),
    "equivariance": Program(
        "dinov2_eq.eval.equivariance", "how well frozen features tell how an image was transformed"
    ),
    "order": Program("dinov2_eq.eval.order", "whether stronger changes of an image move its frozen features farther"),
    "3diebench": Program(
        "dinov2_eq.eval.threediebench", "class, rotation and colours of rendered objects, from frozen features"
    ),
}
