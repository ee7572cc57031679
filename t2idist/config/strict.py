"""Convert dataclasses from and to plain values; unknown keys and wrong types raise an error that names their path."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from t2idist.config.ranges import RangeError

C = TypeVar("C")


def from_dict(cls: type[C], values: Any, path: str = "") -> C:
    """Build a dataclass from nested mappings; an unknown key or a wrong type raises ValueError that names its path."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'config'}: {values!r}; expected a mapping of keys")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    dot = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise ValueError(unknown_key(f"{dot}{key}", str(key), known))
    missing = [
        name
        for name, f in known.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{dot}{missing[0]}: missing, and it has no default; give {dot}{missing[0]}=VALUE")
    try:
        return cls(**{key: _value(hints[key], value, f"{dot}{key}") for key, value in values.items()})
    except RangeError as error:
        raise ValueError(f"{dot}{error}") from None


def unknown_key(path: str, key: str, known: Iterable[str]) -> str:
    """Return the error sentence for an unknown key, with the closest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(names)}"
    return f"{path}: unknown key{hint}"


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [a for a in arguments if a is not type(None)]
        return _value(rest[0], value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if origin is tuple:
        return _tuple(arguments, value, path)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise ValueError(f"{path}: {value!r}; expected a mapping with text keys")
        return {k: _value(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is Literal:
        if not any(type(value) is type(allowed) and value == allowed for allowed in arguments):
            raise ValueError(f"{path}: {value!r}; expected {' or '.join(map(repr, arguments))}")
        return value
    if hint is Any:
        return value
    return _scalar(hint, value, path)


def _tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if arguments == (int, int) and isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}: {value!r}; expected a list, such as [a, b]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{path}: {list(value)!r}; expected {len(arguments)} values, as a list")
    return tuple(_value(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float | datetime.date):
        raise ValueError(f"{path}: {value!r}; expected a text: put it in quotes")
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))
    raise ValueError(f"{path}: {value!r}; expected {name}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the plain values of a dataclass (tuples as lists), ready for YAML or JSON."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset; a duplicate key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 parses 1e-4 as a string
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML into plain values; `source` names the text in error messages."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def type_at(cls: Any, path: Sequence[str]) -> Any:
    """Return the type of the key at a path below a dataclass; Any if it is not known."""
    for key in path:
        if dataclasses.is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(key, Any)
        elif typing.get_origin(cls) is dict:
            cls = typing.get_args(cls)[1]
        else:
            return Any
    return cls


def parse_value(text: str, hint: Any, source: str) -> Any:
    """Parse one YAML value of a known type: where a text is expected, 123 and true are texts.

    A key that takes nothing but a text takes it as it stands, such as "x: y" or "@home", unless it is in quotes.
    """
    choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if {*choices} - {types.NoneType} == {str}:
        return _parse_text(text.strip(), types.NoneType in choices)
    value = parse_yaml(text, source)
    if (value is None and types.NoneType in choices) or not {str, tuple[str, ...], dict[str, str]} & set(choices):
        return value
    if isinstance(value, list | dict):
        return yaml.BaseLoader(text).get_single_data()  # every scalar is a text
    return value if isinstance(value, str) else text.strip()


def _parse_text(text: str, optional: bool) -> str | None:
    if optional and text in ("", "~", "null", "Null", "NULL"):
        return None
    if text[:1] in ("'", '"'):
        with contextlib.suppress(ValueError):  # for example 'tis
            value = parse_yaml(text, text)
            return value if isinstance(value, str) else text
    return text


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=110)
