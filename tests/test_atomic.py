"""Writing whole or not at all: what is under the name, in which order things reach the disk, and what killed writers leave."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_floors import read
from trimtab.atomic import atomic_dir, atomic_write, clear_unfinished, is_unfinished, step_aside, write_new


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "folder") as work:
        (work / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_of_a_new_file_that_cannot_be_written_nothing_stays(tmp_path: Path):
    with pytest.raises(UnicodeEncodeError):
        write_new(tmp_path / "file", "half " * 10_000 + "\ud800")
    assert not [*tmp_path.iterdir()]
    write_new(tmp_path / "file", "whole")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", "other")
    assert (tmp_path / "file").read_text() == "whole"


def test_what_was_there_is_replaced(tmp_path):
    for text in ("old", "new"):
        with atomic_write(tmp_path / "file") as file:
            file.write(text.encode())
        with atomic_dir(tmp_path / "folder") as work:
            (work / text).write_text(text)
    assert (tmp_path / "file").read_text() == "new"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_bytes_last_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch, there, exchanged):
    done = []
    originals = os.fsync, os.replace

    def fsync(file):
        done.append(("fsync", Path(f"/proc/self/fd/{file}").readlink().name))
        originals[0](file)

    def replace(old, new):
        done.append(("name", Path(new).name))
        originals[1](old, new)

    if there:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
    if not exchanged:
        monkeypatch.setattr("trimtab.atomic._renameat2", None)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")
        new = Path(file.name).name
    assert done == [("fsync", new), ("name", "file"), ("fsync", tmp_path.name)]
    done.clear()
    with atomic_dir(tmp_path / "folder") as work:
        (work / "x").write_text("x")
    renames = [] if there and exchanged else [("name", "folder")]
    aside = [("name", work.with_suffix(".old").name)] if there and not exchanged else []
    assert done == [("fsync", "x"), ("fsync", work.name), *aside, *renames, ("fsync", tmp_path.name)]


KILLED = """
import os, signal, sys
from pathlib import Path
from trimtab.atomic import atomic_dir, atomic_write
with atomic_dir(Path(sys.argv[1]) / "folder") as work, atomic_write(Path(sys.argv[1]) / "file") as file:
    (work / "x").write_text("half")
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_is_told_apart_and_cleared(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path], timeout=60, check=False).returncode == -signal.SIGKILL
    (tmp_path / "mine.new").touch()
    (tmp_path / "done").mkdir()
    step_aside(tmp_path / "done")
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 4 and sum(map(is_unfinished, left)) == 3, "neither name is there"
    clear_unfinished(tmp_path, "file")
    assert len(list(tmp_path.iterdir())) == 3
    clear_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.new"]


def test_a_parent_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link" / "file") as file:
        file.write(b"x")
    assert (tmp_path / "real" / "file").read_bytes() == b"x"


def renames(source: str) -> list[int]:
    """Lines that rename something: os.rename, os.replace, shutil.move, Path.rename, Path.replace (one argument, unlike a string's)."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            ast.unparse(node.func) in ("os.replace", "os.rename", "shutil.move")
            or node.func.attr == "rename"
            or (node.func.attr == "replace" and len(node.args) == 1 and not node.keywords)
        )
    ]


def test_nothing_is_renamed_elsewhere():
    found = {module: len(lines) for module, source in read().items() if (lines := renames(source))}
    assert found.pop("trimtab.atomic") > 0
    assert found == {"trimtab.store.blobs": 1}, "blobs get their names one by one, and last by one fsync"
    assert renames("import os\nos.replace(a, b)\na.rename(b)\na.replace(b)\n'x'.replace('a', 'b')") == [2, 3, 4]
