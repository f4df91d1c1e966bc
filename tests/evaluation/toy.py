"""An evaluation of somebody else's, in a file of its own: the mean norm of the class token."""

from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import evaluation_parser


def build_parser():
    return evaluation_parser("dinov2-eq eval toy", __doc__, batch_size=8)


class Toy(Evaluation):
    file_name = "results_eval_toy.json"

    def open(self):
        _, self.val = read_labelled(self.args.train_dataset, [self.args.val_dataset], "The toy")

    def measure(self):
        norm = self.extractor().pooled(self.val).norm(dim=1).mean().item()
        results = {"encoder": self.encoder.description, "results": {"mean_norm": norm}}
        return Measured(results, {"num_val_images": len(self.val.indices)}, f"mean norm {norm:.4f}")


def main(argv=None):
    run(Toy, build_parser().parse_args(argv))
