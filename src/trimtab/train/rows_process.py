"""The process that reads rows for the page: `python -m trimtab.train.rows_process`, talked to by `http/reader.py`.

A line of JSON comes in, lines go out: what is being read meanwhile (`status`), then an answer or an error. Rows, run files and bases may be
anybody's, so they are read here: whatever they do to this process, the page goes on. Its memory has a limit, it gives way to training, and
it ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from trimtab.errors import BaseError, ConfigError, TrimtabError, printable
from trimtab.memory import free_bytes

KEPT = 2
"""Runs whose rows are at hand."""
LEAST_BYTES = 2 << 30
"""Memory that reading may take at least, beside what Python and its packages hold; else half of what is free."""
GONE = 410
Asked = dict[str, Any]


class NotAtHand(TrimtabError):
    """Others have been read since."""

    http_status = GONE


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    os.nice(5)
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    answering = Answering(lambda text: _send(out, {"status": printable(text)}))
    while True:
        _send(out, answer(answering, asked.get()))


def _listen(asked: queue.SimpleQueue[str]) -> None:
    """Passes lines on. With the input's end nobody waits for an answer any more, whatever is being read."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _send(out: TextIO, message: Asked) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def answer(answering: Answering, line: str) -> Asked:
    """What is sent for one line: {"answer": …} or {"error": {message, status}}."""
    try:
        said = json.loads(line)
        return {"answer": getattr(answering, said.pop("do"))(**said)}
    except TrimtabError as error:
        return {"error": {"message": error.render(), "status": error.http_status}}
    except MemoryError:
        return {"error": {"message": "reading this takes more memory than is free", "status": 400}}
    except Exception as error:  # a bug of ours, or a library's that a hostile file has found: told, and the page goes on
        return {"error": {"message": f"this cannot be read: {type(error).__name__}: {printable(str(error))[:500]}", "status": 400}}


class Answering:
    """The calls, each a method named as in `do`."""

    def __init__(self, status: Callable[[str], None]):
        self._status = status
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._limited = False

    def open(self, key: str, subject: str, base: str, allowed: list[str], own: str = "") -> Asked:
        """Read what a run folder, or data, is trained on. base: of data. allowed: folders in which its files may lie, and the base that is
        asked for. own: the page's base, which may lie anywhere, as that of a run may."""
        from trimtab.train.subject import content_of, refuse_base_outside, refuse_outside

        refuse_base_outside(base, [Path(folder) for folder in allowed], own)
        content, root = content_of(Path(subject), base)
        refuse_outside(content, root, [Path(folder) for folder in allowed])
        return self._read(key, content, root, subject, estimate=False)

    def check(self, key: str, text: str, root: str, allowed: list[str], own: str = "") -> Asked:
        """Read what a run file's text names, and tell what the run would cost."""
        from trimtab.train.subject import refuse_base_outside, refuse_outside

        content = parsed(text)
        refuse_base_outside(content.get("base"), [Path(folder) for folder in allowed], own)
        refuse_outside(content, Path(root), [Path(folder) for folder in allowed])
        return self._read(key, content, Path(root), "run file", estimate=True)

    def choices(self) -> Asked:
        """What can be chosen for a new run."""
        from trimtab.train.guided import choices

        return choices()

    def guess(self, path: str, root: str, base: str, allowed: list[str], own: str = "") -> Asked:
        """A first run file for data."""
        from trimtab.train.guided import guessed
        from trimtab.train.subject import refuse_base_outside, refuse_outside

        refuse_base_outside(base, [Path(folder) for folder in allowed], own)
        refuse_outside({"data": {"rows": {"train": path}}}, Path(root), [Path(folder) for folder in allowed])
        return guessed(path, Path(root), base)

    def form(self, content: Asked, said: list[str], root: str, allowed: list[str], own: str = "") -> Asked:
        """The text of a run file, and what is wrong with it. None of its rows is read, though files are looked into."""
        from trimtab.train.guided import formed, text_of
        from trimtab.train.subject import refuse_base_outside, refuse_outside

        folders = [Path(folder) for folder in allowed]
        try:
            refuse_outside(content, Path(root), folders)
            refuse_base_outside(content.get("base"), folders, own)
        except TrimtabError as error:
            where = "base" if isinstance(error, BaseError) else "data"
            return {"text": text_of(content, said), "problems": [{"where": where, "text": error.render()}]}
        return formed(content, said, Path(root), folders)

    def rows(self, key: str, **which: Any) -> Asked:
        found: Asked = self._at_hand(key).rows(**which)
        return found

    def dropped(self, key: str, **which: Any) -> Asked:
        found: Asked = self._at_hand(key).dropped(**which)
        return found

    def _read(self, key: str, content: Any, root: Path, where: str, *, estimate: bool) -> Asked:
        self._status("starting to read")
        from trimtab.train.config import RunConfig
        from trimtab.train.shown_rows import RowsOfRun

        self._limit_memory()
        run = RunConfig.from_dict(content, root=root, where=where)
        self._open.pop(key, None)
        while len(self._open) >= KEPT:
            self._open.popitem(last=False)
        self._open[key] = RowsOfRun(run, estimate=estimate, status=self._status)
        found: Asked = self._open[key].overview()
        return found

    def _at_hand(self, key: str) -> Any:
        if key not in self._open:
            raise NotAtHand("these rows are not at hand any more", fix="open them again")
        self._open.move_to_end(key)
        return self._open[key]

    def _limit_memory(self) -> None:
        """Once torch is there, whose libraries take gigabytes of addresses and none of this."""
        if self._limited:
            return
        self._limited = True
        limit = max(LEAST_BYTES, free_bytes() // 2)
        held = _data_bytes()
        if held:
            resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def parsed(text: str) -> Any:
    """A run file's content. ConfigError where it is no YAML."""
    import yaml

    from trimtab.train.runfile import read_value

    try:
        content = read_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the run file is not YAML: {error}", fix="docs/run-file.md shows its shape") from None
    if not isinstance(content, dict):
        raise ConfigError("the run file is no mapping", fix="docs/run-file.md shows its shape")
    return content


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    except (OSError, StopIteration, ValueError):
        return 0


if __name__ == "__main__":
    main()
