from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "dinov2_eq/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
# What `dinov2-eq export` writes for, and compares with.
EXPORT = ["timm", "transformers", "onnx", "onnxscript", "onnxruntime"]
# What `tools/make_3diebench_like.py` renders with.
RENDER = ["mitsuba>=3.5"]

setup(
    name="dinov2_eq",
    version=VERSION,
    description="DINOv2-style pretraining of vision transformers that keeps how an image is transformed",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Tools, recipes and weights live at the top of a checkout and are installed below the package.
    packages=[
        *find_packages(include=["dinov2_eq", "dinov2_eq.*"]),
        "dinov2_eq.tools",
        "dinov2_eq.configs",
        "dinov2_eq.weights",
    ],
    package_dir={f"dinov2_eq.{name}": name for name in ("tools", "configs", "weights")},
    package_data={
        "dinov2_eq.configs": ["train/*.yaml", "train/*/*.yaml", "sweep/*.yaml", "reproduce/*.yaml"],
        "dinov2_eq.weights": ["*.json", "*.safetensors"],
    },
    install_requires=[
        "torch>=2.10",
        "torchvision",
        "xformers; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "fvcore",
        "omegaconf",
        "submitit",
        "numpy",
        "packaging",
        "pillow",
        "kornia",
        "pyarrow",
        "safetensors",
        "scikit-learn",
        "scipy",
        "matplotlib",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "export": EXPORT,
        "render": RENDER,
        "dev": [*EXPORT, *RENDER, "pytest", "pytest-xdist", "ruff", "selenium"],
    },
    entry_points={"console_scripts": ["dinov2-eq = dinov2_eq.run.cli:main"]},
)
