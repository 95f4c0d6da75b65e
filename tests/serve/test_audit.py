"""The audit log: what is in it, what never is, and what happens when it cannot be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trimtab.serve import audit as module
from trimtab.serve.audit import MAX_LINES, MAX_TEXT, Audit, AuditError, audit_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.audit.jsonl"


@pytest.fixture
def log(path: Path):
    with Audit(path, clock=lambda: 12.5) as found:
        yield found


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_lies_beside_the_database_and_is_its_owners_alone(log: Audit, path: Path) -> None:
    assert audit_path("/x/tenants.db") == Path("/x/tenants.audit.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_act_is_written_before_it_is_done_and_how_it_ended_after(log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", lambda file: synced.append(len(lines(path))))
    with log.act("tenant.add", "cli:uid=0", "acme", {"weight": 2.0}) as learnt:
        assert lines(path) == [
            {"time": 12.5, "event": "tenant.add", "actor": "cli:uid=0", "target": "acme", "details": {"weight": 2.0}, "stage": "begin"}
        ]
        assert synced == [1], "on the disk before anything is done"
        learnt["key"] = "abc"
    assert lines(path)[1] == lines(path)[0] | {"key": "abc", "stage": "done"}
    with pytest.raises(ZeroDivisionError), log.act("tenant.remove", "cli:uid=0", "acme"):
        raise ZeroDivisionError
    assert [line["stage"] for line in lines(path)] == ["begin", "done", "begin", "failed"]


def test_refusals_are_written_without_waiting_for_them(path: Path) -> None:
    with Audit(path, write_seconds=0.01) as log:
        log.refused("tokens", tenant="acme", route="/v1/completions", request_id="r1", client="127.0.0.1")
        for _ in range(500):
            if path.read_text():
                break
            threading.Event().wait(0.01)
        (line,) = lines(path)
    assert {k: v for k, v in line.items() if k != "time"} == {
        "event": "refused",
        "reason": "tokens",
        "tenant": "acme",
        "route": "/v1/completions",
        "request": "r1",
        "client": "127.0.0.1",
    }


def test_a_flood_is_summed_up(log: Audit, path: Path) -> None:
    for i in range(10_000):
        log.refused("auth" if i % 2 else "full", tenant="" if i % 2 else "acme")
    log.flush()
    found = lines(path)
    assert len(found) == MAX_LINES + 2
    assert sum(int(str(line.get("more", 1))) for line in found) == 10_000
    assert path.stat().st_size < 10_000


def test_hostile_texts_stay_in_their_line_and_are_cut(log: Audit, path: Path) -> None:
    log.refused("auth", tenant='x"}\n{"event": "tenant.add"', client="\ud800\0" + "y" * 10_000)
    log.flush()
    (line,) = lines(path)
    assert line["event"] == "refused" and len(str(line["client"])) == MAX_TEXT


def full_disk(monkeypatch: pytest.MonkeyPatch, room: list[int]) -> None:
    """os.write takes room[0] more bytes to the log, then says that the disk is full."""
    real = os.write

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(file, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(module.os, "write", write)


def test_while_the_disk_is_full_acts_are_refused_and_serving_goes_on(
    log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with log.act("tenant.add", "a", "before"):
        pass
    room = [30]
    full_disk(monkeypatch, room)
    with pytest.raises(AuditError, match=r"tenant\.add is not carried out") as caught, log.act("tenant.add", "a", "acme"):
        pytest.fail("the act was carried out")
    assert caught.value.http_status == 503
    for _ in range(3):
        log.refused("auth")
        log.flush()  # must not raise
    assert log.lost == 4 and "No space" in log.problem
    assert sum("cannot be written" in r.getMessage() for r in caplog.records) == 1, "said once"
    assert [line["target"] for line in lines(path)] == ["before", "before"], "no torn line is left"
    room[0] = 10**6
    with caplog.at_level("INFO"), log.act("tenant.add", "a", "after"):
        pass
    assert log.problem == "" and log.lost == 4 and [line["target"] for line in lines(path)][2:] == ["after", "after"]
    assert sum("can be written again" in r.getMessage() for r in caplog.records) == 1


def test_a_real_limit_of_the_systems(path: Path) -> None:
    """The kernel itself cuts the line off: RLIMIT_FSIZE, in a process of its own."""
    script = f"""
import resource, signal, sys
from trimtab.serve.audit import Audit, AuditError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = Audit({str(path)!r})
with log.act("one", "a"): pass
size = __import__("os").stat({str(path)!r}).st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
try:
    with log.act("two", "a"): sys.exit("the act was carried out")
except AuditError: pass
assert log.problem and log.lost == 1, (log.problem, log.lost)
log.refused("auth"); log.close()
assert log.lost == 2
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert [line["event"] for line in lines(path)] == ["one", "one"]


def test_an_act_that_is_done_stays_done_where_its_end_cannot_be_written(log: Audit, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    with log.act("tenant.remove", "a", "acme"):
        full_disk(monkeypatch, [0])
        done.append(True)
    assert done and log.lost == 1 and log.problem


def test_a_torn_line_of_a_killed_writer_spoils_no_other(path: Path) -> None:
    path.write_text('{"event": "tor')
    with Audit(path) as log, log.act("tenant.add", "a"):
        pass
    text = path.read_text().splitlines()
    assert text[0] == '{"event": "tor' and [json.loads(x)["event"] for x in text[1:]] == ["tenant.add"] * 2


def test_a_log_that_was_moved_away_is_begun_anew(log: Audit, path: Path) -> None:
    with log.act("one", "a"):
        pass
    moved = path.rename(path.with_suffix(".1"))
    with log.act("two", "a"):
        pass
    assert {line["event"] for line in lines(moved)} == {"one"} and {line["event"] for line in lines(path)} == {"two"}


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path, tmp_path / "link", tmp_path / "no" / "folder"):
        with pytest.raises(AuditError, match="cannot be opened"):
            Audit(path)
    assert not (tmp_path / "elsewhere").exists()


WRITER = """
import sys
from trimtab.serve.audit import Audit
with Audit(sys.argv[1]) as log:
    for i in range(200):
        if i % 20 == 0:
            with log.act("x" * 150, sys.argv[2], str(i)): pass
        log.refused("auth")
        log.flush()
"""


def test_two_processes_never_tear_each_others_lines(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [w.wait(timeout=60) for w in writers] == [0, 0]
    found = lines(path)
    assert len(found) == 2 * (200 + 10 * 2)
    for name in "ab":
        assert [line["target"] for line in found if line.get("actor") == name and line["stage"] == "done"] == [
            str(i) for i in range(0, 200, 20)
        ]


def test_nobody_is_kept_waiting_by_a_held_lock(path: Path, log: Audit) -> None:
    """A refusal is noted while another process holds the file."""
    other = os.open(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    finished = threading.Event()
    thread = threading.Thread(target=lambda: (log.refused("auth"), finished.set()))
    thread.start()
    assert finished.wait(5)
    os.close(other)
    thread.join()
