"""Reads and writes weight files, without running code that a file contains.

A .safetensors file is a JSON header with the position of each tensor, followed by the bytes of the tensors; see
https://github.com/huggingface/safetensors. It is parsed here rather than by the package safetensors, because models of
torch.hub must load with torch alone, and because the package refuses paths that are not UTF-8.
"""

import argparse
import errno
import json
import mmap
import pickletools
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.files import file_sha256, read_errors_named, whole_file

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_weights(path: str | Path, sha256: str | None = None) -> dict[str, Any]:
    """Reads a weight file to the CPU.

    Args:
        path: a .safetensors file, or one that torch saved; of the latter only tensors and plain containers are read.
        sha256: the expected SHA-256 in hexadecimal digits, checked first; None: not checked.

    Returns:
        tensors by name; for a torch file the dictionary as it was saved, often nested.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read; names the file.
        ValueError: wrong checksum, or the file is damaged, would run code when loaded, or holds no weights.
    """
    path = _existing(path)
    if sha256 is not None and (actual := file_sha256(path)) != sha256.lower():
        raise ValueError(
            f"{path} is not the file that was published: its SHA-256 is {actual}, expected {sha256.lower()}. Delete it "
            "and get it again"
        )
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights by name: it is not a dict but a {type(content).__name__}")
    return dict(content)


class Checkpoint(NamedTuple):
    """The content of a weight file; `config` and `step` are None unless this project wrote it."""

    content: dict[str, Any]  # as returned by `read_weights`
    config: dict[str, Any] | None  # the training config, with its sections as dictionaries
    step: int | None  # optimizer updates


def read_checkpoint(path: str | Path, sha256: str | None = None) -> Checkpoint:
    """Reads a weight file and its config, which is in a teacher checkpoint or in the header of a release.

    Raises:
        FileNotFoundError, OSError, ValueError: as in `read_weights`.
    """
    content, metadata = read_weights(path, sha256), read_metadata(path)
    config, step = content.get("config"), content.get("step")
    if metadata.keys() >= {"config", "step"}:
        with suppress(TypeError, ValueError):  # other programs may use the same names
            config, step = json.loads(metadata["config"]), int(metadata["step"])
    if not isinstance(config, Mapping) or not isinstance(config.get("student"), Mapping):
        return Checkpoint(content, None, None)
    return Checkpoint(content, dict(config), step)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata in the header of a .safetensors file; {} for other files.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    path = _existing(path)
    return _read_header(path)[0].get(METADATA) or {} if path.suffix == ".safetensors" else {}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, completely or not at all; creates its folder if needed.

    Raises:
        ImportError: the package safetensors is missing; reading does not need it.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(own, dict(metadata)))  # save_file would make it unreadable for other users


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; give a weight file (.safetensors, .pth, .pt or .bin)")
    if path.suffix == ".onnx":
        raise ValueError(f"{path}: ONNX is written for other programs and not read back; give a weight file")
    return path


def instead_of_folder(path: Path) -> str:
    """Completes a message about a folder without a run by an exported model in it; "" if there is none.

    Exports for a library are suggested as a folder, because only the folder contains the pixel statistics.
    """
    described = (path / "config.json").read_text(errors="replace") if (path / "config.json").is_file() else ""
    for key, source in {"model_type": f"hf:{path}", "architecture": f"timm:local-dir:{path}"}.items():
        if f'"{key}"' in described:
            return f"; or give {source}"
    files = sorted(file for pattern in ("*.safetensors", "*.pth") for file in path.glob(pattern))
    return f"; or give {files[0]}" if files else ""


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not a file of weights, or it was cut off while it was written or copied ({reason}). Get it again"
    )


def _read_torch(path: Path) -> Any:
    try:
        # Checkpoints of DINO and iBOT contain their command line as a Namespace, which only has attributes.
        with read_errors_named(path), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise nearly anything
        # In a truncated zip file torch seeks to a position before the start, which fails with EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        text = str(error)
        refused = re.search(r"(?:GLOBAL|global:?|class|function) (\w+(?:\.\w+)+)", text)
        if refused and _is_named(path, refused[1]):
            raise ValueError(
                f"{path} was refused: it contains more than tensors, and loading it would call {refused[1]}, which "
                "means running code from the file. If you trust its author, load it yourself and save the bare state "
                "dict: torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        # torch's message starts with advice to load the file unsafely, and ends with the reason.
        reason = re.sub(r"(?s).*WeightsUnpickler error: ", "", text).strip() or type(error).__name__
        if isinstance(error, OSError):
            reason = "its end is missing"
        raise _damaged(path, reason.splitlines()[0]) from None


def _is_named(path: Path, called: str) -> bool:
    """Whether a file really refers to this function; a file that was cut off inside a name may seem to."""
    if zipfile.is_zipfile(path):
        return True  # it is complete, because its directory is at the end
    with suppress(ValueError), path.open("rb") as file:  # genops raises it after the last pickle
        while True:
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL" and argument.replace(" ", ".") == called:
                    return True
    return False


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a .safetensors file, and the offset of the first tensor."""
    size = path.stat().st_size
    with read_errors_named(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its first 8 bytes announce a header of {length} bytes, but the file has {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get(METADATA) or {}, dict):
        raise _damaged(path, "its header is not a table of tensors")
    return header, 8 + length


def _read_tensors(path: Path) -> dict[str, Tensor]:
    header, start = _read_header(path)
    with path.open("rb") as file:  # torch.from_file refuses paths that are not UTF-8
        raw = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)[start:]
    num_bytes = len(raw)
    tensors = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        try:
            dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            fits = 0 <= first <= last <= num_bytes and last - first == prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"its header describes tensor {name!r} as {entry}") from None
        if not fits:
            raise _damaged(path, f"tensor {name!r} should lie at bytes {first} to {last} of {num_bytes}")
        tensors[name] = raw[first:last].clone().view(dtype).reshape(shape)
    return tensors
