"""What every packaged recipe trains, step by step: losses and the final teacher, to compare two versions of the code.

Each recipe runs for 20 steps in float32 on the CPU, on generated images, with few images and prototypes and a shallow
backbone. Two versions that compute the same write the same file.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from dinov2_eq.train import train

STEPS = 20
SMALL = [
    "compute_precision.dtype=fp32",
    "student.depth=2",
    "dino.head_n_prototypes=64",
    "equivariance.patch_dim=96",
    "equivariance.equivariant_dim=32",
    "equivariance.decoder_dim=64",
    "crops.local_crops_number=2",
    "train.dataset_path=Shapes:split=TRAIN:num=64:size=64",
    "train.device=cpu",
    "train.batch_size_per_gpu=2",
    "train.accumulation_steps=2",
    "train.num_workers=0",
    "train.log_period_steps=1",
    f"train.checkpoint_period_steps={STEPS}",
    f"optim.steps={STEPS}",
    "optim.warmup_steps=4",
    "optim.freeze_last_layer_steps=2",
    "optim.freeze_backbone_steps=1",
    "teacher.warmup_teacher_temp_steps=6",
    "evaluation.eval_period_steps=0",
    "evaluation.sample_period_steps=0",
    "evaluation.knn_period_steps=0",
]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/trajectories.py", description=__doc__)
    parser.add_argument("--recipes", nargs="*", help="names of packaged recipes; all by default")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)  # sums do not depend on the machine's cores
    results = {}
    for recipe in args.recipes or packaged_recipes():
        with tempfile.TemporaryDirectory() as folder:
            train.main(["--config-file", recipe, "--output-dir", folder, *SMALL])
            results[recipe] = trajectory(Path(folder))
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def packaged_recipes() -> list[str]:
    folder = Path(str(resources.files("dinov2_eq.configs"))) / "train"
    return [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.yaml"))]


def trajectory(run: Path) -> dict[str, Any]:
    """Losses of each step, as logged, and a digest of the teacher's weights."""
    rows = [json.loads(line) for line in (run / "training_metrics.jsonl").read_text().splitlines()]
    losses = [{name: value for name, value in row.items() if name.startswith("loss/")} for row in rows]
    (file,) = run.glob("eval/training_*/teacher_checkpoint.pth")
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(file, weights_only=True)["teacher"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {"losses": losses, "teacher_sha256": digest.hexdigest()}


if __name__ == "__main__":
    main()
