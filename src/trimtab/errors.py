"""The one error that a user sees: what was wrong, where, and what to do about it.

Everything that a user can cause (a misspelt module, a broken file, a wrong base) raises `TrimtabError`; the command line prints it and
exits with `exit_code`, the HTTP layer answers with `http_status`. `assert` and other exceptions mean a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

MAX_LINE = 2000
"""Characters of one line of a message: a value from a hostile file may be a megabyte long."""


_HARMLESS = "\n\t\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200c\u200d\u202f\u205f\u3000"
"""Not printable to Python, but in many texts: line breaks, tabs, blanks of all widths, joiners within words and emoji."""


def printable(text: str) -> str:
    """`text` with control characters as \\x1b, so that what comes from a file or a model cannot act on the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def first_of(findings: Sequence[str], most: int) -> list[str]:
    """The first findings, and how many more there are."""
    return [*findings[:most], *([f"… and {len(findings) - most} more"] if len(findings) > most else [])]


class TrimtabError(Exception):
    """A mistake that the user can mend.

    message: what was wrong, naming the input and the value. fix: what to do instead, one sentence.
    problems: every single finding when there are several (all bad tensors, all unknown keys), shown one a line.
    """

    exit_code = 2
    http_status = 400

    def __init__(self, message: str, *, fix: str = "", problems: Iterable[str] = ()):
        self.message, self.fix, self.problems = message, fix, tuple(problems)
        super().__init__(self.render())

    def render(self) -> str:
        lines = [self.message, *(f"  - {p}" for p in self.problems)]
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in printable("\n".join(lines)).split("\n"))

    def among_others(self) -> list[str]:
        """The error as findings among others: its message with the fix, then its own findings."""
        return [self.message + (f" (fix: {self.fix})" if self.fix else ""), *(f"  {p}" for p in self.problems)]


class Mistakes:
    """Collects the mistakes of several checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[TrimtabError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A check: its TrimtabError is kept for `refuse`."""
        try:
            yield
        except TrimtabError as error:
            self.errors.append(error)

    def refuse(self, message: str) -> None:
        """Raise what was noted: the error itself where there is one, a ConfigError with all of them where there are more."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigError(message, problems=[line for e in self.errors for line in e.among_others()])


class ConfigError(TrimtabError):
    """A run file, a flag or a method's field is wrong."""


@contextmanager
def writing(failed: str, fix: str) -> Iterator[None]:
    """While what a user has named is written: ConfigError `failed`, with the system's reason, where it cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{failed}: {error.strerror}", fix=fix) from error


def writing_into(out: Path) -> AbstractContextManager[None]:
    """The same of a run's or an evaluation's folder."""
    return writing(f"cannot write into out = {str(out)!r}", fix="make room there, or name a folder that can be written")


class BaseError(TrimtabError):
    """The base model cannot be found, read or supported."""


class AdapterError(TrimtabError):
    """An adapter folder is refused: wrong base, wrong tensors, wrong values, a hostile file."""


class DataError(TrimtabError):
    """Rows cannot be read, rendered or supervised."""


class NotMergeable(TrimtabError):
    """This adapter cannot be folded into the base's weights; the message says why."""


class AuthError(TrimtabError):
    """No key, a wrong one, or one that may not do this (http_status 401 or 403)."""

    http_status = 401


class NotFoundError(TrimtabError):
    """There is no such thing, or it is not this tenant's: the two look alike."""

    http_status = 404


class LimitError(TrimtabError):
    """A tenant is over one of its own limits. retry_after: seconds after which it is worth another try."""

    http_status = 429

    def __init__(self, message: str, *, fix: str = "", retry_after: float = 1.0):
        super().__init__(message, fix=fix)
        self.retry_after = retry_after


class OverloadedError(LimitError):
    """The server is full, or is shutting down."""

    http_status = 503


def nearest(word: str, known: Iterable[str]) -> str:
    """`word`'s nearest known spelling as a hint (" (did you mean 'q_proj'?)"), or "" where nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
