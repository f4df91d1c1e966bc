"""Data strings: `Name:key=value:key=value`."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable

from dinov2_eq.data.datasets.base import DataError, ImageDataset

_OPTION = re.compile(r"""(?P<key>\w+)=(?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<plain>[^:]*))(?::|$)""")


def parse_data_string(string: str) -> tuple[str, dict[str, str]]:
    """Splits `Name:key=value:...`; a value that holds `:` is quoted, 'so' or "so".

    Raises:
        DataError
    """
    name, _, rest = string.partition(":")
    options: dict[str, str] = {}
    position = 0
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None:
            raise DataError(
                f"Data string {string!r}: cannot read {rest[position:]!r}. Write Name:key=value:key=value, and quote "
                "values that hold a colon: root='s3://bucket/images'."
            )
        if match["key"] in options:
            raise DataError(f"Data string {string!r}: {match['key']!r} is given twice.")
        options[match["key"]] = next(v for v in match.group("single", "double", "plain") if v is not None)
        position = match.end()
    return name, options


def build_from_table(string: str, table: dict[str, Callable[..., ImageDataset]]) -> ImageDataset:
    """Calls the entry of `table` that a data string names; its options are the arguments, checked by its signature.

    Raises:
        DataError: unknown name or key, missing key, or a value of the wrong type.
    """
    name, options = parse_data_string(string)
    if name not in table:
        raise DataError(f"Data string {string!r}: unknown dataset {name!r}{_known(name, table)}")
    parameters = inspect.signature(table[name]).parameters
    for key in options:
        if key not in parameters:
            raise DataError(f"Data string {string!r}: {name} has no key {key!r}{_known(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and not options.get(key):
            raise DataError(f"Data string {string!r}: {name} needs {key}=..., as in '{name}:{key}=...'.")

    arguments: dict[str, str | int] = {}
    for key, value in options.items():
        try:
            arguments[key] = int(value) if parameters[key].annotation is int else value
        except ValueError:
            raise DataError(f"Data string {string!r}: {key}={value!r} is not a whole number.") from None
    try:
        dataset = table[name](**arguments)
    except DataError as error:
        raise DataError(f"Data string {string!r}: {error}") from None
    dataset.data_string = string
    return dataset


def check_split(split: str, allowed: Iterable[str]) -> None:
    if split not in allowed:
        raise DataError(f"split={split!r} is unknown{_known(split.upper(), allowed)}")


def _known(word: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown word."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"; known are {', '.join(allowed)}.{hint}"
