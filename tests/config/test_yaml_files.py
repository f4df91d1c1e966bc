"""YAML in and out: any bytes are read or refused in a sentence, and names that are not UTF-8 survive."""

import os
import random

import pytest
import yaml

from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.config.yaml_files import dump_yaml, parse_override, read_yaml

LATIN_1 = os.fsdecode(b"Folder:root=/data/caf\xe9")


def write(tmp_path, content: str | bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold sections of keys, .* but holds nothing"),
        ("# only a comment\n", "must hold sections of keys"),
        ("{}", "must hold sections of keys"),
        ("3", "must hold sections of keys, .* but holds '3'"),
        ("- 1\n- 2\n", "must hold sections of keys, .* but holds '- 1'"),
        ("train: {seed: 3\n", "is not valid YAML: .* in line"),
        ("train:\n\tseed: 3\n", r"is not valid YAML: found character .* in line 2: '\\tseed: 3'"),
        ("train: {seed: 3, seed: 4}\n", "is not valid YAML: found duplicate key seed in line 1"),
        ("train: &a {seed: 3, self: *a}\n", "is not valid YAML: YAML recursive aliases"),
        ("train: *nowhere\n", "is not valid YAML: found undefined alias"),
        ("train: {seed: !!python/name:os.system ''}\n", "is not valid YAML: could not determine a constructor"),
        ("train: {seed: !!int ''}\n", "is not valid YAML"),
        ("train: {seed: !!float abc}\n", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("a: " * 3000, "is not valid YAML"),
        ("train: {seed: 3}\n---\ntrain: {seed: 4}\n", "is not valid YAML: but found another document"),
        ("train: {seed: \x00}\n", "is not valid YAML"),
        ("train: {seed: '${'}\n", "cannot be used: .*'\\$\\{'"),
        (b"train: {dataset_path: caf\xe9}\n", "is not valid YAML: byte 0xe9 in line 1 is not UTF-8"),
        ("train: {seed: 3}\n".encode("utf-16"), "is not valid YAML: byte 0xff in line 1 is not UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_in_a_sentence(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{path} {message}") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert read_yaml(write(tmp_path, "\ufefftrain: {seed: 3}\n")) == {"train": {"seed": 3}}


def test_interpolations(tmp_path):
    path = write(tmp_path, "a: {b: 3, c: '${a.b}', d: '${e}'}\n")
    assert read_yaml(path)["a"]["c"] == "${a.b}"
    with pytest.raises(ValueError, match=f"^{path} cannot be used: Interpolation key 'e' not found"):
        read_yaml(path, resolve=True)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, "train: {seed: 3}\n")

    def broken(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", broken)
    with pytest.raises(OSError, match=rf"^\[Errno 5\] Input/output error: '{path}'$"):
        read_yaml(path)


PIECES = [
    "train", "seed", ":", " ", "\n", "  ", "{", "}", "[", "]", ",", "- ", "&a", "*a", "!!int", "!!binary", "|", ">",
    "'", '"', "#", "${", "${a}", "???", "\t", "\x00", "\x85", "é", "3", "1e3", "~", "<<", "? ", "=", "%", "@", "base",
    "optim", "epochs", "MODEL", "WEIGHTS", "steps", "equivariance", "2001-99-99", ".nan", "0x", "1:99", "\\x",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_are_a_config_or_a_sentence(tmp_path, seed):
    """Bytes at random, pieces of YAML at random, and a resolved config with bytes changed or cut off."""
    generator, whole, path = random.Random(seed), to_yaml(load_config("debug")).encode(), tmp_path / "run.yaml"
    refused = 0
    for _ in range(30):
        changed = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        pieces = "".join(generator.choice(PIECES) for _ in range(generator.randrange(1, 12)))
        for content in (
            generator.randbytes(generator.randrange(1, 40)),
            pieces.encode(),
            bytes(changed),
            whole[: generator.randrange(len(whole))],
        ):
            path.write_bytes(content)
            try:
                load_config(str(path), tell=lambda _: None)
            except (ValueError, OSError) as error:  # and no other kind
                assert str(path) in str(error), content
                refused += 1
    assert refused > 40


@pytest.mark.parametrize("seed", range(2))
def test_any_override_is_a_setting_or_a_sentence(seed):
    generator = random.Random(seed)
    for _ in range(40):
        key = "".join(
            generator.choice(["train", "seed", ".", "[", "]", "\\", "optim", "=", "0", "", "epochs", "\udce9"])
            for _ in range(4)
        )
        value = "".join(generator.choice([*PIECES, "\udce9"]) for _ in range(generator.randrange(6)))
        for overrides in ([f"{key}={value}"], [f"train.dataset_path={value}", f"{key}={value}"]):
            try:
                load_config(None, overrides, tell=lambda _: None)
            except ValueError as error:  # and no other kind
                assert str(error)


@pytest.mark.parametrize(
    "name",
    [LATIN_1, os.fsdecode(b"\x80\xff: # '\"\xc3\xa9"), "é 文 💥", "a\x07\x85\u2028b", "- {[", "!!binary x", "3", ""],
)
def test_any_name_is_written_and_read_back(tmp_path, name):
    config = load_config("debug")
    config.train.dataset_path = config.student.pretrained_weights = name
    path = write(tmp_path, to_yaml(config))
    assert load_config(str(path)) == config
    found = yaml.safe_load(path.read_text())["train"]["dataset_path"]  # for other programs
    assert (os.fsdecode(found) if isinstance(found, bytes) else found) == name


@pytest.mark.parametrize(
    "typed", [LATIN_1, f"'{LATIN_1}'", f'"{LATIN_1}" # a comment', os.fsdecode(b"'Folder:root=\"/\xc3\xa9: \xe9\"'")]
)
def test_a_name_on_the_command_line_is_yaml_whatever_its_bytes(typed):
    as_ascii = typed.replace("\udce9", "e").replace("é", "o")
    expected = parse_override(f"train.dataset_path={as_ascii}")["train"]["dataset_path"]
    found = parse_override(f"train.dataset_path={typed}")["train"]["dataset_path"]
    assert found.replace("\udce9", "e").replace("é", "o") == expected and "\udce9" in found


def test_lists_and_keys_with_such_names(tmp_path):
    content = {LATIN_1: [LATIN_1, {"a": [LATIN_1, 3, None, True, 0.5]}]}
    assert read_yaml(write(tmp_path, dump_yaml(content))) == content
