"""From flags and YAML to checked dataclasses, and back to a flat mapping. Unknown keys fail with the nearest known one."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Settings = dict[str, Any]


def parse_flags(argv: Sequence[str], known: Iterable[str]) -> Settings:
    """`--name value`, `--name=value` and bare `--name` (true) to a flat mapping; values stay text until `convert`.

    Several values after one flag make a list. Raises ValueError for anything that is not a flag or not a known name.
    """
    names = list(known)
    settings: Settings = {}
    current = None
    for word in argv:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            current = canonical(name.replace("-", "_"), names, "--")
            settings[current] = [value] if has_value else []
        elif current is None:
            raise ValueError(f"{word!r} is not a flag; write settings as --name value, for example --learning_rate 1e-5")
        else:
            settings[current].append(word)
    return {name: _scalar(values) for name, values in settings.items()}


def split_flags(argv: Sequence[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """(the flags named in `own` with their values, everything else), for a command that passes the rest on."""
    names = set(own)
    taken: list[str] = []
    rest: list[str] = []
    into = rest
    for word in argv:
        if word.startswith("--"):
            into = taken if word[2:].partition("=")[0].replace("-", "_") in names else rest
        into.append(word)
    return taken, rest


def _scalar(words: list[str]) -> str | bool | list[str]:
    return (words[0] if len(words) == 1 else words) if words else True


def read_yaml(path: str | Path, known: Iterable[str]) -> Settings:
    """Read a flat YAML mapping of settings. Raises ValueError naming file and key for anything else."""
    names = list(known)
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error.strerror}; give the path of a YAML file") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"config {str(path)!r} has {len(text)} bytes, at most {MAX_CONFIG_BYTES}; give a file of settings")
    try:
        loaded = yaml.load(text.decode(), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config {str(path)!r} is not readable YAML: {reason}; write one `name: value` per line") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config {str(path)!r} holds a {type(loaded).__name__}; it must be a mapping with one `name: value` per line")
    return {canonical(str(key), names, f"config {str(path)!r}: "): value for key, value in loaded.items()}


MAX_CONFIG_BYTES = 100_000


class _PlainLoader(yaml.SafeLoader):
    """Safe, and without aliases: a few of them expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node that stands where it is used."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name); write the value out")
        return super().compose_node(parent, index)


def canonical(name: str, known: Sequence[str], place: str) -> str:
    """`name` if it is known. Raises ValueError with the nearest known name."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists the known ones"
    raise ValueError(f"{place}{name} is not a setting; {hint}")


def build(cls: type[T], settings: Mapping[str, Any]) -> T:
    """Make a dataclass from settings, converting and checking types. Raises ValueError naming the setting."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: convert(name, value, hints[name]) for name, value in settings.items()})


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or ValueError. 1e-5 written as text is a number; true is not."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or value in ("none", "None", "null"):
            return None
        return convert(name, value, next(a for a in args if a is not type(None)))
    if origin is typing.Literal:
        value = _word(value, args)
        if value not in args:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(name, item, args[0]) for item in items)
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, str) and hint is bool and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    if isinstance(value, str) and hint is int and re.fullmatch(r"[+-]?\d+", value):
        return int(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{name} is {value!r}; it must be {_kind(hint)}")


def _word(value: Any, accepted: Sequence[Any]) -> Any:
    """A switch as the word that means on or off among the accepted ones: `--gradient_checkpointing` is full, false in YAML is no."""
    if isinstance(value, str) and value not in accepted:
        value = _TRUTH.get(value.lower(), value)
    if not isinstance(value, bool):
        return value
    words = ("yes", "full") if value else ("no", "off")
    return next((word for word in words if word in accepted), value)


def _kind(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def names_of(*classes: Any) -> list[str]:
    """The init fields of dataclasses, in order."""
    return [f.name for cls in classes for f in dataclasses.fields(cls) if f.init]


def to_flat(*parts: Any) -> Settings:
    """The resolved settings of dataclass instances as plain values for YAML and JSON, without secrets: fields with repr=False."""
    flat: Settings = {}
    for part in parts:
        flat |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.repr}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, for --help and the docs."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(text.value.value)
    return docs


def help_text(*classes: Any) -> str:
    """One line per setting: name, type, default, meaning."""
    lines = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        lines.append(f"\n{cls.__name__}:")
        for f in dataclasses.fields(cls):
            kind = getattr(hints[f.name], "__name__", str(hints[f.name]).replace("typing.", ""))
            lines.append(f"  --{f.name}  ({kind}, default {f.default})\n      {field_docs(cls).get(f.name, '')}")
    return "\n".join(lines)
