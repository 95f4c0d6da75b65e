"""`--set KEY=VALUE`: values of a run file that one call of a command replaces. The file stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trimtab.errors import ConfigError, nearest
from trimtab.train.runfile import read_value, shown

MADE = ("defaults", "evaluate")
"""Mappings that a run file need not have; they are made where a value is put into them."""


def with_changes(content: Any, changes: Sequence[str], where: str) -> Any:
    """A copy of a run file's content with each of the changes made, in order. A change is "key.key…=value", the value in YAML. Names with
    dots are found, elements of a list are counted from 0, and the last key may be a new one.

    ConfigError that lists every change that cannot be made.
    """
    if not changes or not isinstance(content, Mapping):
        return content
    content, problems = copy.deepcopy(dict(content)), list[str]()
    for change in changes:
        key, is_one, text = change.partition("=")
        try:
            if not is_one or not key.strip():
                raise ValueError("write KEY=VALUE")
            _put(content, key.strip(), read_value(text))
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"--set {change[:160]}: {error}")
    if problems:
        place = "--set 'sweep.search.lr=[1e-4, 1e-3]'" if "sweep" in content else "--set variants.v.lr=1e-4"
        raise ConfigError(
            f"{where} cannot be changed in this way",
            problems=problems,
            fix=f"name a place as the file has it, such as {place} or --set defaults.epochs=3",
        )
    return content


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    at: Any = content
    rest, path = key.split("."), list[str]()
    while True:
        name, n = _next(at, rest)
        if n == len(rest):
            at[name] = value
            return
        if isinstance(at, dict) and (name not in at or at[name] is None):
            if path or name not in MADE:
                raise ValueError(f"there is no {'.'.join([*path, str(name)])!r}{nearest(str(name), map(str, at))}")
            at[name] = {}
        at, rest, path = at[name], rest[n:], [*path, str(name)]
        if not isinstance(at, dict | list):
            raise ValueError(f"{'.'.join(path)!r} is {shown(at)}, which has no {rest[0]!r}: set it whole")


def _next(at: Any, rest: Sequence[str]) -> tuple[Any, int]:
    """(the key or index that `rest` begins with, how many of its parts that takes): the longest name that there is, else the first part."""
    if isinstance(at, list):
        if not rest[0].isdecimal() or int(rest[0]) >= len(at):
            raise ValueError(f"{rest[0]!r} is none of the {len(at)} elements there, which are counted from 0")
        return int(rest[0]), 1
    known = {str(k): k for k in at}
    return next(((known[n], i) for i in range(len(rest), 0, -1) if (n := ".".join(rest[:i])) in known), (rest[0], 1))
