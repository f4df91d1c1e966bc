"""DINOv2-style self-supervised training that keeps how an image is transformed, not only what it shows."""

__version__ = "0.1.0"
