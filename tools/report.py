"""Writes one HTML page about one or more run folders: `dinov2-eq report OUT... [--output FILE]`."""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch

from dinov2_eq.evaluation.encoder import Encoder, load_encoder
from dinov2_eq.files import replace_text
from dinov2_eq.report import load_runs, render_page
from dinov2_eq.report.feature_maps import PatchFeatures


def patch_features_of(encoder: Encoder) -> PatchFeatures:
    """Wraps an encoder as a function from square images [B, H, W, 3] in uint8 to patch tokens [B, h, w, D]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))

    @torch.inference_mode()
    def patch_features(images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # [B, 3, H, W]
        tokens = encoder.backbone((pixels - mean) / std, is_training=True)["x_norm_patchtokens"]  # [B, N, D]
        side = math.isqrt(tokens.shape[1])
        return tokens.unflatten(1, (side, side)).float().numpy()

    return patch_features


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dinov2-eq report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="output folder of a training")
    parser.add_argument(
        "--output", type=Path, help="HTML file (default: report.html in the folder that contains all runs)"
    )
    arguments = parser.parse_args(argv)
    runs = load_runs(arguments.runs)
    encoders = {run.name: load_encoder(run.folder) for run in runs if run.teacher_checkpoint and run.snapshots}
    page = render_page(runs, {name: patch_features_of(encoder) for name, encoder in encoders.items()})
    output = arguments.output or Path(os.path.commonpath([run.folder for run in runs])) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, page)
    print(f"{output}: {len(runs)} run(s), {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
