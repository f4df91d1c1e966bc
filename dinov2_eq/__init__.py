"""dinov2_eq: DINOv2-style pretraining that keeps how an image is transformed."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is not installed, programs, recipes and weights lie beside the package.
_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "configs" / "train" / "vitl16_eq_short.yaml").is_file():
    __path__.append(str(_CHECKOUT))
