"""Reading what people write: YAML without its traps, and mistakes in words that name the key, the value and the nearest known spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimtab.errors import ConfigError, nearest


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file. what: its kind, for the message. ConfigError where it cannot be read, is not YAML, or has a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the {what} {path}: {e}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None


def unknown_keys(fields: Iterable[Any], known: Iterable[str], where: str) -> list[str]:
    """One finding for each key that is not known, with the nearest that is."""
    known = list(known)
    return [f"{where + '.' if where else ''}{k}: unknown key{nearest(str(k), known)}" for k in fields if k not in known]


def explain(error: ValidationError, where: str) -> list[str]:
    """One finding for each of pydantic's errors: key, what is wrong, what was found."""
    return [
        f"{'.'.join([*([where] if where else []), *map(str, e['loc'])])}: {e['msg']}"
        + (f", found {e['input']!r}" if e["type"] != "missing" else "")
        for e in error.errors()
    ]


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; two variants of one name would lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice in one mapping", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as a string; to everybody else it is a number
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
