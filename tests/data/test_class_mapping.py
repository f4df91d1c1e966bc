import numpy as np
import pytest

from dinov2_eq.data.class_mapping import read_class_mapping


def test_reads_any_whole_numbers(tmp_path):
    for dtype in (np.int64, np.int32, np.uint8):
        np.save(tmp_path / "mapping.npy", np.array([3, 0, 7], dtype))
        found = read_class_mapping(tmp_path / "mapping.npy")
        assert found.path == tmp_path / "mapping.npy"
        assert found.labels.tolist() == [3, 0, 7] and found.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], r"its shape is \(1, 2\)"),
        ([0.0, 1.0], "of float64"),
        ([], r"its shape is \(0,\)"),
        (3, r"its shape is \(\)"),
        ([2, -1], "it holds -1"),
        ([2, 0, 2], "it holds 2 2 times, so these classes"),
        ([None], "is not an .npy file of whole numbers"),
    ],
)
def test_no_mapping(tmp_path, values, message):
    np.save(tmp_path / "mapping.npy", np.array(values), allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_class_mapping(tmp_path / "mapping.npy")


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Class mapping .*missing.npy does not exist"):
        read_class_mapping(tmp_path / "missing.npy")
    for content in (b"", b"0 1 2\n", b"\x93NUMPY"):
        (tmp_path / "mapping.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"is not an \.npy file"):
            read_class_mapping(tmp_path / "mapping.npy")
    np.savez(tmp_path / "mapping.npz", np.arange(2))
    with pytest.raises(ValueError, match="an archive of several arrays"):
        read_class_mapping(tmp_path / "mapping.npz")
    content = (tmp_path / "mapping.npz").read_bytes()
    (tmp_path / "mapping.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is not an \.npy file"):
        read_class_mapping(tmp_path / "mapping.npz")
    with pytest.raises(OSError, match="cannot be read: Is a directory"):
        read_class_mapping(tmp_path)
