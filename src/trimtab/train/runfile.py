"""Reads run files. A key that occurs twice is an error, and 1e-3 is a number, unlike in plain YAML. Mistakes name the key, the value and
the nearest known spelling."""

from __future__ import annotations

import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trimtab.errors import ConfigError
from trimtab.foreign import answer

MAX_BYTES = 2**22
"""A run file that somebody wrote has some thousand bytes."""


_FIRST = {
    "run file": "name the run file; `trimtab init` writes a first one",
    "sweep file": "name the sweep file; examples/sweep.yaml of the checkout is one",
}
"""A kind of file -> what to do where there is none."""


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file. what: its kind, for the message. ConfigError where it cannot be read, is not YAML, or has a key twice."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end, and data paths start at the file's folder
            raise ConfigError(f"cannot read the {what} {path}: it is not a file", fix="write it to a file and name that")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1) if status.st_size else b""  # size 0: empty, or made up by the kernel and perhaps without end
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"the {what} {path} is longer than {MAX_BYTES:,} bytes", fix="name the YAML file; rows belong into data files"
            )
        return read_value(data.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"the {what} {path} is not UTF-8: byte 0x{data[e.start]:02x} at {e.start}", fix="save it as UTF-8") from None
    except FileNotFoundError:
        raise ConfigError(f"there is no {what} {path}", fix=_FIRST.get(what, f"name the {what}")) from None
    except OSError as e:
        raise ConfigError(f"cannot read the {what} {path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None


def read_value(text: str) -> Any:
    """One value as a run file would have it: `1e-3` is a number. yaml.YAMLError, with the line, where it is none: nothing else."""
    return _read(text, _UniqueKeys.get_single_data)


def outer_keys(text: str) -> set[str]:
    """The keys of the outermost mapping, without building what it holds; none where it is no mapping. yaml.YAMLError."""
    node = _read(text, _UniqueKeys.get_single_node)
    return {str(key.value) for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()


def _read(text: str, part: Callable[[_UniqueKeys], Any]) -> Any:
    """What is read of a text, whose scanner has errors of Python's own: for "\\U00110000", or a %YAML of 5,000 digits."""
    loader = _UniqueKeys(text)
    try:
        return part(loader)
    except (ValueError, OverflowError) as error:
        raise yaml.scanner.ScannerError(None, None, str(error), loader.get_mark()) from None
    finally:
        loader.dispose()


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 160, 160, 60


def shown(value: Any) -> str:
    """`repr` for a message, of bounded length: a file of a few lines can hold lists whose whole `repr` would fill the memory."""
    return _SHORT.repr(value)


def unknown_keys(fields: Iterable[Any], known: Iterable[str], where: str, homes: Mapping[str, str] | None = None) -> list[str]:
    """One finding for each key that is not known, with what to write instead where that can be told. homes: keys of other places -> where
    they belong."""
    known = list(known)
    return [f"{where + '.' if where else ''}{k}: unknown key{answer(k, known, homes)}" for k in fields if k not in known]


def explain(error: ValidationError, where: str) -> list[str]:
    """One finding for each of pydantic's errors: key, what is wrong, what was found."""
    return [
        f"{'.'.join([*([where] if where else []), *map(str, e['loc'])])}: {e['msg']}"
        + (f", found {shown(e['input'])}" if e["type"] != "missing" else "")
        for e in error.errors()
    ]


MERGE = "tag:yaml.org,2002:merge"


TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")}
"""YAML's core tags, and that of dates, which plain text such as 2026-01-31 gets."""
MAX_DEPTH = 50
"""How deep lists and mappings may be nested."""
MAX_DIGITS = 400


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; two variants of one name would lose the first. What is no value of its kind is a
    yaml.YAMLError with its line, whatever the constructor of the kind raises."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested too deeply: more than {MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[no-any-return]
        finally:
            self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        tag = node.tag.rpartition(":")[2] if node.tag in TAGS else str(node.tag)
        # only a scalar is shown: the nodes of a list may stand for more values than memory holds
        problem = f"{shown(node.value) if isinstance(node, yaml.ScalarNode) else 'this list or mapping'} is no {tag}"
        if node.tag not in TAGS:
            problem = f"the tag {shown(tag)} is not read: write the value without it"
        elif (tag == "map", tag == "seq") != (isinstance(node, yaml.MappingNode), isinstance(node, yaml.SequenceNode)):
            pass
        elif tag in ("int", "float") and len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value):,} characters: at most {MAX_DIGITS} are read"
        else:
            try:
                return super().construct_object(node, deep)
            except yaml.YAMLError:
                raise
            except Exception:
                pass
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if any(key.tag == MERGE for key, _ in node.value):  # a few lines of merges can make more keys than memory holds
            raise yaml.constructor.ConstructorError(
                None, None, "merge keys (<<) are not read; options that variants share stand under `defaults`", node.start_mark
            )
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        counted = Counter(k for k in keys if isinstance(k, Hashable))  # the others are refused below
        twice = sorted(str(k) for k, n in counted.items() if n > 1)
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice in one mapping", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as a string; to everybody else it is a number
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
