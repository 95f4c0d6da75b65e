"""Paths as users write them: what no file system can have is their mistake, told as one, and not an exception of Python's."""

from __future__ import annotations

import errno
import os
import reprlib
from pathlib import Path

from trimtab.errors import TrimtabError

MAX_NAME, MAX_PATH = 255, 4095
"""Bytes of one name and of a whole path that Linux takes."""
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What `os.stat` says of a path where nothing is: for the caller to judge."""


def user_path(text: str | Path, kind: type[TrimtabError], key: str, root: Path = Path()) -> Path:
    """The path that a user wrote, "~" expanded, from `root` where it is relative.

    A `kind` that names the key and the value where it cannot be looked up. That nothing is there is no mistake here.
    """
    try:
        path = root / Path(text).expanduser()
        reason = _reason(path)
    except RuntimeError:
        reason = "there is no such user's home folder"
    if reason:
        raise kind(f"{key} = {reprlib.repr(str(text))}: {reason}", fix="write a path that this machine can have")
    return path


def real_path(path: Path, kind: type[TrimtabError], key: str) -> Path:
    """The path that links lead to, there or not. A `kind` that names the key and the value where links lead round in a ring."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        shown = reprlib.repr(str(path))
        raise kind(f"{key} = {shown}: a link to itself, or within one", fix="take the link away, or name another folder") from None


def is_url(text: object) -> bool:
    """Whether a text names something by a URL. (A Path has only one slash left of two.)"""
    return isinstance(text, str) and "://" in text


def _reason(path: Path) -> str | None:
    try:
        whole = os.fsencode(path)
        if len(whole) > MAX_PATH or any(len(os.fsencode(part)) > MAX_NAME for part in path.parts):
            return f"a path has at most {MAX_PATH:,} bytes, and each name in it at most {MAX_NAME}"
        path.stat()
    except UnicodeEncodeError:
        return "it holds a character that no file name has"
    except ValueError:
        return "it holds a zero byte, which no file name has"
    except OSError as error:
        return None if error.errno in ABSENT else (error.strerror or str(error))
    return None
