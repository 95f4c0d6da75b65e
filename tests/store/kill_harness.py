"""A store's writers, killed or with a full disk at each call that changes the disk; then the store is looked at, and the change made again.

A server process imports everything once and forks for each change, as in tests/train/kill_harness.py; SIGKILL ends a fork as it would any
process. A fork that is killed in a write has written half of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.store.stores import CHANGES, adapter_folder, blobs_there, files_of, names_of, needed_blobs

ROOT = Path(__file__).parents[2]
ROOM = ("fsync", "replace", "rename", "mkdir", "write")
"""Those of CHANGES that may find the disk full."""
Change = list[Any]
"""A method of Store and its arguments, such as ["alias", "acme/a@1", "prod"]; ["create"] makes the store."""
Names = dict[str, tuple[dict[int, str], dict[str, int]]]


@dataclass
class Outcome:
    """code: 0, 2 for an error of ours, 70 for a bug, negative for a signal. calls: how many of CHANGES and of ROOM it made."""

    code: int
    output: str
    calls: dict[str, int]


@dataclass
class Tally:
    """cases: faults that struck. committed: those after which the change was there all the same. bad: what should not be, one line each."""

    cases: int = 0
    committed: int = 0
    bad: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.cases + other.cases, self.committed + other.committed, self.bad + other.bad)


class Server:
    """most: every store counts as large, and so many changes wait beside its index; None: a store is as large as it is."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        command = [sys.executable, "-m", "tests.store.kill_harness"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True)

    def run(self, root: Path, change: Change, kind: str = "", at: int = 0) -> Outcome:
        """Make a change in a fork, with a fault at the `at`-th call of CHANGES ("kill") or ROOM ("enospc")."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"root": str(root), "change": change, "kind": kind, "at": at, "most": self.most}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


@contextmanager
def server(most: int | None = None) -> Iterator[Server]:
    found = Server(most)
    try:
        yield found
    finally:
        assert found.process.stdin is not None and found.process.stdout is not None
        found.process.stdin.close()
        found.process.stdout.close()
        found.process.wait()


def count_as_large(most: int | None) -> None:
    from trimtab.store import refs

    if most is not None:
        refs.WHOLE_BYTES = refs.SMALL_BYTES = 0
        refs.MOST = most


def template(folder: Path) -> dict[str, Change]:
    """A store under `folder`, with two names, aliases, and garbage that is old; and what is done to copies of it."""
    from trimtab.store.registry import Store

    store = Store(folder / "store", create=True)
    for n in range(4):
        store.publish(adapter_folder(folder / f"f{n}", n % 2, {"revision": str(n)}), "acme/a", aliases=[f"v{n}"] if n < 2 else [])
    store.publish(adapter_folder(folder / "f4", 4), "acme/b", aliases=["prod"])
    store.publish(adapter_folder(folder / "f5", 5), "acme/gone")
    store.remove("acme/gone", all=True)
    store.put_blob(b"a blob that nothing needs")
    (store.root / "tmp" / "left").write_text("by a writer that was killed")
    for blob in store.root.rglob("*"):
        os.utime(blob, (0, 0))
    adapter_folder(folder / "f6", 6, {"revision": "6"})
    adapter_folder(folder / "f7", 1, {"revision": "7"})
    return {
        "publish": ["publish", str(folder / "f6"), "acme/a", ["v0", "new"]],
        "publish, weights shared": ["publish", str(folder / "f7"), "acme/b", []],
        "publish, blobs there but not needed": ["publish", str(folder / "f5"), "acme/new", ["prod"]],
        "alias": ["alias", "acme/a@3", "v0"],
        "unalias": ["unalias", "acme/b", "prod"],
        "remove": ["remove", "acme/a@3"],
        "remove a name": ["remove_all", "acme/a"],
        "collect": ["gc"],
    }


def strike(workers: Server, folder: Path, change: Change, kind: str) -> Tally:
    """The fault at every call of a change, on a copy of the template each; returns what came of it."""
    from trimtab.store.registry import Store

    tally, before = Tally(), _contents(Store(folder / "store"))
    counted = _copy(folder, "counted")
    whole = workers.run(counted, change)
    assert whole.code == 0, whole.output
    after = _contents(Store(counted))
    for at in range(1, whole.calls[kind] + 1):
        root = _copy(folder, "struck")
        outcome = workers.run(root, change, kind, at)
        expected = (-signal.SIGKILL,) if kind == "kill" else (0, 2)
        what = f"{change[0]}, {kind} at {at}"
        if outcome.code not in expected or (outcome.code == 2 and "No space left" not in outcome.output):
            tally.bad.append(f"{what}: code {outcome.code}, {outcome.output}")
        tally += _examine(workers, root, change, outcome, before, after, what)
    return tally


def _examine(workers: Server, root: Path, change: Change, outcome: Outcome, before: Names, after: Names, what: str) -> Tally:
    """After a fault: all is whole, and is as before or as after; done again, it is as after; and nothing is left over."""
    from trimtab.store.registry import Store

    store, bad = Store(root), []
    bad += [f"{what}: {p}" for p in store.verify().problems]
    found = _contents(store)
    if found not in (before, after) or (outcome.code == 0 and found != after):
        bad.append(f"{what}: neither as before nor as after: {found}")
    committed = found == after != before
    if not committed:
        again = workers.run(root, change)
        bad += [f"{what}: again: {again.output}"] if again.code else []
    if _contents(Store(root)) != after:
        bad.append(f"{what}: done again, it is not as it should be")
    Store(root).gc(grace_seconds=-1)
    if blobs_there(store) != needed_blobs(Store(root)) or list((root / "tmp").iterdir()) or Store(root).verify().problems:
        bad.append(f"{what}: collection leaves too much or too little")
    return Tally(1, committed, bad)


def _contents(store: Any) -> Any:
    """Names, versions, aliases, and every byte of every version."""
    names = names_of(store)
    return names, {f"{name}@{n}": files_of(store, f"{name}@{n}") for name, (versions, _) in names.items() for n in versions}


def _copy(folder: Path, name: str) -> Path:
    shutil.rmtree(folder / name, ignore_errors=True)
    return shutil.copytree(folder / "store", folder / name)


def serve() -> None:
    """One order a line, one answer a line."""
    import torch

    import trimtab.store.registry  # noqa: F401 - imported once, before any fork

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(_change(order, writer))
        os.close(writer)
        with os.fdopen(reader) as answer:
            said = answer.read().partition("\n")
        status = os.waitpid(pid, 0)[1]
        calls = json.loads(said[0]) if said[0] else {}
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "output": said[2], "calls": calls}), flush=True)


def _change(order: dict[str, Any], writer: int) -> int:
    """In the fork: the change, with the fault planted."""
    from trimtab.errors import TrimtabError
    from trimtab.store.registry import Store

    count_as_large(order["most"])
    real_write, count, code, output = os.write, _plant(order["kind"], order["at"]), 0, ""
    name, *arguments = order["change"]
    try:
        store = Store(order["root"], create=name == "create")
        if name == "publish":
            store.publish(arguments[0], arguments[1], aliases=arguments[2])
        elif name == "remove_all":
            store.remove(arguments[0], all=True)
        elif name == "gc":
            store.gc()
        elif name != "create":
            getattr(store, name)(*arguments)
    except TrimtabError as error:
        code, output = 2, str(error)
    except BaseException as error:
        code, output = 70, repr(error)
    real_write(writer, f"{json.dumps(count)}\n{output}".encode())
    return code


def _plant(kind: str, at: int) -> dict[str, int]:
    """Count calls, and let the fault strike at one of them."""
    count = {"kill": 0, "enospc": 0}

    def counting(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            count["kill"] += 1
            count["enospc"] += name in ROOM
            if kind == "kill" and count["kill"] == at:
                if name == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "enospc" and name in ROOM and count["enospc"] == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **options)

        return call

    for name in CHANGES:
        setattr(os, name, counting(name, getattr(os, name)))
    return count


if __name__ == "__main__":
    serve()
