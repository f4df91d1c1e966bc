"""Settings of the transform g, for every objective whose loss reads a pair of views u and g_theta(u)."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from dinov2_eq.equivariance.pairing import BORDERS, TransformPairing
from dinov2_eq.equivariance.transforms import Transform, TransformRanges, build_transform
from dinov2_eq.objectives.base import Context, ObjectiveSettings
from dinov2_eq.settings import LARGEST_HUE, LOW_HIGH, setting


@dataclass(frozen=True)
class TransformNeed:
    """A pairing as plain data: two objectives may share one when their values are equal."""

    transform: str
    border: str
    second: float
    ranges: TransformRanges

    def __call__(self) -> TransformPairing:
        return TransformPairing(build_transform(self.transform, **vars(self.ranges)), self.border, self.second)


@dataclass
class TransformSettings(ObjectiveSettings):
    """Base of the sections of such objectives. All sections that are used must agree on g."""

    transform: str = setting(
        "se2",
        "g: rotation, translation, se2, color_jitter, blur, all (these together), one_of_all, or a registered name",
    )
    border: str = setting(
        "canvas", "zeros: black outside the crop (the papers); canvas: real pixels around it", choices=BORDERS
    )
    max_angle_deg: float = setting(45.0, "rotation is uniform in [-max, max] degrees", interval="[0, 180]")
    max_shift: float = setting(
        10 / 224,
        "shifts are uniform in [-max, max], as a share of the side (the papers: 10 px of 224)",
        interval="[0, 1)",
    )
    max_color: float = setting(
        0.4, "brightness, contrast and saturation: factor 1 + uniform in [-max, max]", interval="[0, 1]"
    )
    max_hue: float = setting(0.1, "hue: uniform in [-max, max] turns", interval=f"[0, {LARGEST_HUE}]")
    blur_sigma_min_max: list[float] = setting([0.1, 2.0], "sigma in pixels", interval="[0, inf)", elements=LOW_HIGH)

    def pairing(self, second: float) -> TransformNeed:
        """Returns the pairing of u and g_theta(u); the second global view lies at the fraction `second` of theta."""
        return TransformNeed(self.transform, self.border, second, self.ranges())

    def ranges(self) -> TransformRanges:
        return TransformRanges(**{each.name: getattr(self, each.name) for each in fields(TransformRanges)})

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        transform = self.build_transform() if self.is_used() else None
        if transform is None or not (transform.low == transform.high).all():
            return
        values = zip(transform.components, transform.high.tolist(), strict=True)
        ranges = ", ".join(f"{name} {value:g}" for name, value in values)
        what = "does the same to every image" if transform.low.any() else "changes nothing"
        yield (
            f"{section}.transform={self.transform} {what} ({ranges}), so there is nothing to keep. Widen its range, "
            f"or switch {section} off"
        )

    def build_transform(self) -> Transform:
        """Returns g."""
        return build_transform(self.transform, **vars(self.ranges()))
