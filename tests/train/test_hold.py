"""Who may write into a run folder: two processes, and one that has lost its lock without noticing."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.common import METHODS, locked, run_file, tiny_base
from tests.train.kill_harness import differences, results
from trimtab.train import RunConfig, hold, train
from trimtab.train.checkpoint import steps_of
from trimtab.train.hold import LOCK, SIZE, Occupied, held, holder
from trimtab.train.listen import Silent

ONE = {"v": METHODS["lora"] | {"data": "a", "max_steps": 8}}


def never(text: str) -> None:
    raise AssertionError(text)


def config(folder: Path, **keys: Any) -> RunConfig:
    return RunConfig.from_dict(run_file(folder, ONE, checkpoint_every=2, **keys), root=folder)


class At(Silent):
    """Does something after a step."""

    def __init__(self, step: int, does: Callable[[], object]):
        self.at, self.does, self.warnings = step, does, list[str]()

    def step(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.at:
            self.does()

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves when nobody disturbs it."""
    run = config(tmp_path_factory.mktemp("whole"))
    train(run, base=tiny_base())
    return results(run.out)


def test_one_process_holds_a_folder_and_says_who_it_is(tmp_path: Path) -> None:
    with held(tmp_path, never) as ours:
        said = holder(tmp_path)
        assert (said["host"], said["pid"], said["token"]) == (socket.gethostname(), os.getpid(), ours.token)
        with locked(tmp_path) as answer:  # the file has been read and closed: a lock of POSIX would be gone
            assert answer == "held by another"
        ours.check()
    with locked(tmp_path) as answer:
        assert answer == "held"
        with pytest.raises(Occupied, match=f"another process is training into .*: process {os.getpid()} on"), held(tmp_path, never):
            pass
    with held(tmp_path, never) as later:
        assert later.token != ours.token
    assert (tmp_path / LOCK).stat().st_size == SIZE


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    code = "import sys, pathlib; from trimtab.train.hold import held\n"
    code += "with held(pathlib.Path(sys.argv[1]), print): print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        with pytest.raises(Occupied, match=f"process {process.pid} on"), held(tmp_path, never):
            pass
        process.kill()
    with held(tmp_path, never):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path: Path, whole: dict[str, Any]) -> None:
    """A server of files gives up the lock of a machine that it does not hear of; here its file goes, and a successor makes it anew. The
    successor trains to the end, then the first goes on from its fifth step."""
    run, left = config(tmp_path), dict[str, int]()

    def succeed() -> None:
        (run.out / LOCK).unlink()
        train(run, base=tiny_base(), resume=True)
        left.update({str(p): p.stat().st_mtime_ns for p in run.out.rglob("*")})

    with pytest.raises(Occupied, match=f"process {os.getpid()} on .* has taken over out"):
        train(run, base=tiny_base(), listener=At(5, succeed))
    assert {str(p): p.stat().st_mtime_ns for p in run.out.rglob("*")} == left
    assert differences(whole, results(run.out)) == ""


def test_a_run_that_was_taken_over_at_its_end_saves_no_adapters(tmp_path: Path) -> None:
    """Between the last checkpoint and the adapters; another process has the lock, and has not written yet."""
    run = config(tmp_path)

    def lose() -> None:
        (run.out / LOCK).write_text(json.dumps({"token": "another", "host": "far-away", "pid": 7}))

    class Late(Silent):
        def saved(self, step: int, folder: Path) -> None:
            if step == 8:
                lose()

    with pytest.raises(Occupied, match="process 7 on far-away has taken over"):
        train(run, base=tiny_base(), listener=Late())
    assert list((run.out / "adapters").iterdir()) == [] and not (run.out / "summary.json").exists()


def test_a_checkpoint_gets_no_name_when_the_folder_is_lost_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train import checkpoint

    run, write = config(tmp_path), checkpoint._write

    def write_and_lose(path: Path, chunks: Any) -> dict[str, Any]:
        if path.name == checkpoint.MANIFEST and "step-00000004" in str(path):
            (run.out / LOCK).unlink()
        return write(path, chunks)

    monkeypatch.setattr(checkpoint, "_write", write_and_lose)
    with pytest.raises(Occupied, match=r"\.lock has been removed or overwritten"):
        train(run, base=tiny_base())
    assert [p.name for p in steps_of(run.out)] == ["step-00000002"]


def test_without_locks_a_run_says_so_and_has_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(hold, "_lock", refuse)
    run, heard = config(tmp_path), At(0, lambda: None)
    train(run, base=tiny_base(), listener=heard)
    assert len(heard.warnings) == 1 and "has no locks (No locks available)" in heard.warnings[0]
    with held(run.out, heard.warning) as ours, held(run.out, heard.warning) as theirs:
        theirs.check()
        with pytest.raises(Occupied, match="has taken over"):
            ours.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 600, None])
def test_any_lock_file_can_be_looked_at(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        os.mkfifo(tmp_path / LOCK)
    else:
        (tmp_path / LOCK).write_bytes(content)
    assert holder(tmp_path) == {}


@pytest.mark.slow
def test_a_machine_that_was_cut_off_does_not_disturb_its_successor(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """Real processes: the first is stopped (SIGSTOP) amid its steps, loses its lock, and wakes up when the second has finished."""
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a", "max_steps": 400}}, checkpoint_every=5, base=str(tiny_llama_folder))
    for name in ("run", "alone"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content | {"dtype": "float32", "device": "cpu", "out": name}))
    command = [sys.executable, "-m", "trimtab", "train", "--json"]
    first = subprocess.Popen([*command, str(tmp_path / "run.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not steps_of(tmp_path / "run"):
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    (tmp_path / "run" / LOCK).unlink()
    try:
        subprocess.run([*command, str(tmp_path / "run.yaml"), "--resume"], check=True, stdout=subprocess.DEVNULL)
    finally:
        first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 2 and "has taken over out" in said
    subprocess.run([*command, str(tmp_path / "alone.yaml")], check=True, stdout=subprocess.DEVNULL)
    assert differences(results(tmp_path / "alone"), results(tmp_path / "run")) == ""
