"""Parses data strings, `Name:key=value:key=value`, and builds the datasets that they describe."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.decode import Decoding, EncodedImages

_OPTION = re.compile(r"""(?P<key>\w+)=(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<plain>[^:]*))(?::|$)""")


def parse_data_string(string: str) -> tuple[str, dict[str, str]]:
    """Splits `Name:key=value:...` into name and options; values that contain `:` are in single or double quotes.

    Raises:
        DataError: the string is malformed, or gives a key twice.
    """
    name, _, rest = string.partition(":")
    options: dict[str, str] = {}
    position = 0
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None:
            raise DataError(
                f"Data string {string!r}: cannot read {rest[position:]!r}. Write Name:key=value:key=value, and quote "
                "values that contain a colon: root='s3://bucket/images'."
            )
        if match["key"] in options:
            raise DataError(f"Data string {string!r}: {match['key']!r} is given twice.")
        options[match["key"]] = next(v for v in match.group("single", "double", "plain") if v is not None)
        position = match.end()
    return name, options


def build_from_table(string: str, table: dict[str, Callable[..., ImageDataset]]) -> ImageDataset:
    """Builds a dataset with the entry of `table` that a data string names.

    The keys are the arguments of the entry, checked against its signature, and for datasets that decode files also the
    fields of `Decoding`.

    Raises:
        DataError: unknown name or key, missing key, or a value of the wrong type.
    """
    name, options = parse_data_string(string)
    if name not in table:
        raise DataError(f"Data string {string!r}: unknown dataset {name!r}{_known(name, table)}")
    parameters = inspect.signature(table[name]).parameters
    decoding_types = inspect.get_annotations(Decoding) if _may_decode(table[name]) else {}
    types = {key: parameter.annotation for key, parameter in parameters.items()} | decoding_types
    for key in options:
        if key not in types:
            raise DataError(f"Data string {string!r}: {name} has no key {key!r}{_known(key, types)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and not options.get(key):
            raise DataError(f"Data string {string!r}: {name} needs {key}=..., as in '{name}:{key}=...'.")
    try:
        values = {key: _convert(key, value, types[key]) for key, value in options.items()}
        given = {key: values.pop(key) for key in decoding_types if key in values}
        decoding = Decoding(**given)
        dataset = table[name](**values)
        if isinstance(dataset, EncodedImages):
            dataset.decoding = decoding
        elif given:
            keys = "=... and ".join(given)
            raise DataError(f"{keys}=... applies to image files only, and this dataset has none; omit it.")
    except DataError as error:
        raise DataError(f"Data string {string!r}: {error}") from None
    dataset.data_string = string
    return dataset


def _may_decode(entry: Callable[..., ImageDataset]) -> bool:
    """Whether an entry may build an `EncodedImages`: any function may, and classes that derive from it do."""
    return not inspect.isclass(entry) or issubclass(entry, EncodedImages)


def _convert(key: str, value: str, kind: type) -> str | int | float | bool:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise DataError(f"{key}={value!r} is neither true nor false.")
        return value.lower() == "true"
    if kind not in (int, float):
        return value
    try:
        return kind(value)
    except ValueError:
        raise DataError(f"{key}={value!r} is not a {'whole ' * (kind is int)}number.") from None


def check_split(split: str, allowed: Iterable[str]) -> None:
    if split not in allowed:
        raise DataError(f"split={split!r} is unknown{_known(split.upper(), allowed)}")


def _known(word: str, allowed: Iterable[str]) -> str:
    """Completes a message about an unknown word with the known ones and the nearest match."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"; known are {', '.join(allowed)}.{hint}"
