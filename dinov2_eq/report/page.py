"""Renders the report of runs."""

from collections.abc import Mapping, Sequence

from dinov2_eq.report import pictures, sections
from dinov2_eq.report.feature_maps import PatchFeatures
from dinov2_eq.report.html import page
from dinov2_eq.report.runs import Run
from dinov2_eq.report.verdict import verdict

INTRO = """\
<a href="#reconstructions">What the decoders reconstruct</a>,
<a href="#feature-maps">whether the patch features rotate with the image</a>, <a href="#overview">what was trained</a>,
<a href="#equivariance">how well the transform can be predicted from the features</a>,
<a href="#knn">their k-NN accuracy</a>, and <a href="#losses">how the losses developed</a>. Each run has the same letter
and colour throughout."""

CLAIMS = {
    "verdict": (
        "What the task changed",
        "R\u00b2 says how well a probe reads the transform from frozen features: 1 is perfect, 0 no better than a "
        "constant; all pixels are real. k-NN accuracy says how well the features tell classes apart. The error given "
        "with it is that of drawing the test images; other seeds vary more. Differences of R\u00b2 below 0.02 count as "
        "none.",
    ),
    "reconstructions": (
        "Reconstructions during training",
        "One decoder per target reconstructs a view between u and g(u) from equivariant features alone: those of "
        "v\u2081 and g(u), or, with a third view, of u and g(u). From left to right, the reconstructions should "
        "approach the shape and orientation of the target. Under each step is the peak signal-to-noise ratio over "
        "all stored images: 3 dB more means half the squared error.",
    ),
    "feature-maps": (
        "Do the features rotate with the image?",
        "The first three principal components of the teacher's patch tokens are shown as red, green and blue, fitted "
        "once per run on all its maps. Look for a map that rotates with the image and keeps its colours; colours that "
        "stay in place encode the position in the frame instead. Colours cannot be compared between runs.",
    ),
    "overview": (
        "The runs side by side",
        "A dot marks settings in which the runs differ. R\u00b2 is given without visible borders, pooled over the "
        "parameters of the transform.",
    ),
    "equivariance": (
        "Predicting the transform from the features",
        "A probe on frozen features of an image and its transformed copy predicts the parameters of the transform: "
        "R\u00b2 = 1 is perfect, 0 no better than a constant. The tick across a bar is the same network untrained. "
        "Trust the solid bars (<em>none</em>, <em>canvas</em>): all pixels are real. Of the faint bars, "
        "<em>masked</em> only shows a disc that no border reaches, and <em>zeros</em> includes the black corners, "
        "which reveal the angle without any learning.",
    ),
    "knn": (
        "k-NN accuracy",
        "This shows whether the class token still encodes what an image shows: compared with the run without it, the "
        "equivariance task should not cost accuracy.",
    ),
    "losses": (
        "Losses",
        "Each term is shown before weighting, so that a panel compares the same quantity between runs even if their "
        "weights differ. Long curves are averaged over 300 equal windows.",
    ),
}


def render_page(runs: Sequence[Run], patch_features: Mapping[str, PatchFeatures]) -> str:
    """Renders one HTML page that needs no other file and no network.

    Args:
        runs: from `load_runs`.
        patch_features: by name of the run, a function from images [B, H, W, 3] in uint8 to patch tokens [B, h, w, D]; a
            run without an entry gets a note instead of feature maps.
    """
    bodies = {
        "verdict": verdict(runs),
        "overview": sections.overview(runs),
        "losses": sections.losses(runs),
        "knn": sections.knn(runs),
        "reconstructions": pictures.reconstructions(runs),
        "feature-maps": pictures.feature_maps(runs, patch_features),
        "equivariance": sections.equivariance(runs),
    }
    return page(
        " and ".join(run.name for run in runs) if len(runs) <= 2 else f"{len(runs)} runs side by side",
        kicker="dinov2_eq training report",
        intro=INTRO,
        kind="Runs",
        shown=runs,
        claims={name: claim for name, claim in CLAIMS.items() if bodies[name]},
        bodies=bodies,
        command="dinov2-eq report",
    )
