"""Files of weights in and out: nothing here runs code that a file brings along.

Reading needs torch alone. A .safetensors file is a JSON header, which says where each tensor lies, and then the bytes
of the tensors; see https://github.com/huggingface/safetensors for the format.
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
    """What a file of weights holds, on the CPU.

    Args:
        path: a .safetensors file, or one that torch saved; of the latter only tensors and plain containers are read.
        sha256: the file's SHA-256 in hexadecimal digits, checked before anything is read; None: not checked.

    Returns:
        tensors by name; for a torch file the dictionary as it was saved, often nested.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read; names the file.
        ValueError: another checksum, a damaged file, one that would run code when it is read, or no weights at all.
    """
    path = _existing(path)
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        raise ValueError(
            f"{path} is not the file that was published: its SHA-256 is {found}, expected {sha256.lower()}. Delete it "
            "and get it again"
        )
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights by name, it is no dict but {type(content).__name__}")
    return dict(content)


class Checkpoint(NamedTuple):
    """What a file holds; `config` and `step` where this project wrote it."""

    content: dict[str, Any]  # as `read_weights` returns it
    config: dict[str, Any] | None  # the training config, its sections as dictionaries
    step: int | None  # optimizer updates


def read_checkpoint(path: str | Path, sha256: str | None = None) -> Checkpoint:
    """A file of weights together with the config it carries: a teacher checkpoint's own, or a release's in its header.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`.
    """
    content, metadata = read_weights(path, sha256), read_metadata(path)
    config, step = content.get("config"), content.get("step")
    if metadata.keys() >= {"config", "step"}:
        with suppress(TypeError, ValueError):  # somebody else's notes under the same names
            config, step = json.loads(metadata["config"]), int(metadata["step"])
    if not isinstance(config, Mapping) or not isinstance(config.get("student"), Mapping):
        return Checkpoint(content, None, None)
    return Checkpoint(content, dict(config), step)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The notes in the header of a .safetensors file; {} for other files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file.
    """
    path = _existing(path)
    return _read_header(path)[0].get(METADATA) or {} if path.suffix == ".safetensors" else {}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all; makes the folder.

    Raises:
        ImportError: the package safetensors is missing; reading does not need it.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(own, dict(metadata)))  # save_file would keep the file from everybody else


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; give a file of weights (.safetensors, .pth, .pt or .bin)")
    if path.suffix == ".onnx":
        raise ValueError(f"{path}: ONNX is written for other programs and not read back; give a file of weights")
    return path


def instead_of_folder(path: Path) -> str:
    """What to name in place of a folder that holds no run: an exported model in it; "" where there is none.

    A folder for a library says which pixel statistics belong to the weights, their file does not.
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
        # DINO and iBOT keep their command line in the checkpoint, a Namespace: attributes and nothing else.
        with read_errors_named(path), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes make of the reader: nearly every kind
        # In a zip file that was cut off torch looks for a place before its beginning, which the system calls invalid.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        text = str(error)
        refused = re.search(r"(?:GLOBAL|global:?|class|function) (\w+(?:\.\w+)+)", text)
        if refused and _is_named(path, refused[1]):
            raise ValueError(
                f"{path} was refused: it holds more than tensors, and reading it would call {refused[1]}, that is run "
                "code that came with the file. If you trust who made it, load it there and save the bare state dict: "
                "torch.save(model.state_dict(), 'weights.pth')"
            ) from None
        # torch begins with the advice to read the file without this care, and ends with the reason.
        reason = re.sub(r"(?s).*WeightsUnpickler error: ", "", text).strip() or type(error).__name__
        if isinstance(error, OSError):
            reason = "its end is missing"
        raise _damaged(path, reason.splitlines()[0]) from None


def _is_named(path: Path, called: str) -> bool:
    """Whether a file names this function; one that was cut off within a name may seem to name another."""
    if zipfile.is_zipfile(path):
        return True  # whole: its table is at its end
    with suppress(ValueError), path.open("rb") as file:  # raised where no more pickles follow
        while True:
            for code, argument, _ in pickletools.genops(file):
                if code.name == "GLOBAL" and argument.replace(" ", ".") == called:
                    return True
    return False


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and the byte where the tensors begin."""
    size = path.stat().st_size
    with read_errors_named(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its first 8 bytes promise a header of {length} bytes, and it has {size} in all")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get(METADATA) or {}, dict):
        raise _damaged(path, "its header is no table of tensors")
    return header, 8 + length


def _read_tensors(path: Path) -> dict[str, Tensor]:
    header, start = _read_header(path)
    with path.open("rb") as file:  # torch.from_file takes no name that is not UTF-8
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
