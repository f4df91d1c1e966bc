"""The report of runs as a whole."""

from collections.abc import Mapping, Sequence

from dinov2_eq.report import pictures, sections
from dinov2_eq.report.feature_maps import PatchFeatures
from dinov2_eq.report.html import page
from dinov2_eq.report.runs import Run

INTRO = """\
<a href="#overview">What was trained</a>, <a href="#losses">how the losses went</a>,
<a href="#knn">what k-NN finds in the features</a>, <a href="#reconstructions">what the decoders reconstruct</a>,
<a href="#feature-maps">whether the patch features turn with the image</a>, and
<a href="#equivariance">how well the transform can be read from them</a>. Each run keeps its letter and colour
throughout."""

CLAIMS = {
    "overview": (
        "The runs side by side",
        "A dot marks the settings in which the runs differ. R\u00b2 is given where no border shows, pooled over the "
        "parameters of the transform.",
    ),
    "losses": (
        "Losses",
        "Each term before its weight, so that a panel compares the same quantity between runs even where the weights "
        "differ. Long curves are averaged over 300 equal windows.",
    ),
    "knn": (
        "k-NN accuracy",
        "Whether the class token still says what an image shows: the equivariance task should not cost accuracy "
        "against the run without it.",
    ),
    "reconstructions": (
        "Reconstructions as training went on",
        "From the equivariant features of v\u2081 and v\u2082 alone, one decoder for each target paints the view that "
        "lies part of the way from u to v\u2082. From left to right, the reconstructions should "
        "take on the shape and the orientation of the target. Under each step, the peak signal-to-noise ratio over "
        "all stored images: 3 dB more is half the squared error.",
    ),
    "feature-maps": (
        "Do the features turn with the image?",
        "The first three principal components of the teacher's patch tokens as red, green and blue, fitted once per "
        "run on all its maps. Look for a map that turns with the image and keeps its colours; colours that stay in "
        "place follow the position in the frame instead. Colours do not compare between runs.",
    ),
    "equivariance": (
        "Reading the transform from the features",
        "A probe on frozen features of an image and its transformed copy predicts the parameters of the transform: "
        "R\u00b2 = 1 is perfect, 0 no better than a constant. The tick across a bar is the same network untrained. "
        "Trust the full bars (<em>none</em>, <em>canvas</em>): all pixels are real. Of the faint bars, <em>masked</em> "
        "shows only a disc that no border reaches, and <em>zeros</em> shows the black corners, which give the angle "
        "away without any learning.",
    ),
}


def render_page(runs: Sequence[Run], patch_features: Mapping[str, PatchFeatures]) -> str:
    """One HTML page that needs no other file and no network.

    Args:
        runs: what `load_runs` returns.
        patch_features: run name -> function from images [B, H, W, 3] in uint8 to patch tokens [B, h, w, D]; a run
            without an entry gets a sentence instead of feature maps.
    """
    bodies = {
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
        claims=CLAIMS,
        bodies=bodies,
        command="dinov2-eq report",
    )
