"""Stores with many names: `index.json` is searched, changes wait beside it, and everything is as in a small store."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.stores import adapter_folder, files_of, names_of
from trimtab.errors import AdapterError
from trimtab.store import refs as refs_module
from trimtab.store.files import Refusal, digest_of
from trimtab.store.index import Index, parse_index
from trimtab.store.name import Entry, Name
from trimtab.store.names import NoSuchAdapter
from trimtab.store.registry import Store
from trimtab.store.sorted_index import SortedIndex

paths = st.builds(
    "{}/{}".format, st.sampled_from(["a", "a-b", "a.b", "ab", "b"]), st.text("ab-.0", min_size=0, max_size=3).map("x{}".format)
)


@st.composite
def some_names(draw: st.DrawFn, least: int = 0) -> dict[str, Name]:
    found = {}
    for path in draw(st.lists(paths, unique=True, min_size=least, max_size=60)):
        numbers = draw(st.lists(st.integers(1, 30), unique=True, max_size=3))
        versions = {n: Entry(digest_of(bytes([n])), n) for n in numbers}
        aliases = {a: draw(st.sampled_from(numbers)) for a in draw(st.sets(st.sampled_from(["prod", "test"])))} if numbers else {}
        found[path] = Name(path, versions, aliases, draw(st.integers(max([1, *numbers]), 31)))
    return found


def searched(data: bytes) -> SortedIndex:
    return SortedIndex.of(lambda at, count: data[at : at + count], len(data))


@settings(max_examples=60, deadline=None)
@given(some_names(), some_names(), paths, paths)
def test_what_a_search_finds_is_what_the_whole_says(before: dict[str, Name], new: dict[str, Name], low: str, high: str) -> None:
    index = searched(Index(before, {"org.example": "x" * 3000}).to_bytes())
    for path in {*before, *new}:
        assert index.get(path) == before.get(path)
    live = sorted(p for p, n in before.items() if n.versions)
    assert [n.path for n in index.names(low, high)] == [p for p in live if low < p < high]
    assert all((n.versions, n.aliases) == (before[n.path].versions, before[n.path].aliases) for n in index.names("", "~"))
    assert sorted(index.namespaces()) == sorted({p.partition("/")[0] for p in live})
    for name in {p.partition("/")[2] for p in before}:
        assert sorted(index.namespaces_of(name)) == sorted(p.partition("/")[0] for p in live if p.partition("/")[2] == name)
    changed = b"".join(index.changed(new.values()))
    assert parse_index(changed) == (Index({**before, **new}, {"org.example": "x" * 3000}), [])
    assert changed == Index({**before, **new}, {"org.example": "x" * 3000}).to_bytes()


def many(count: int) -> dict[str, Name]:
    found = (f"ns{i % 50}/adapter-{i}" for i in range(count))
    return {p: Name(p, {1: Entry(digest_of(p.encode()), 900)}, {"prod": 1}, 1) for p in found}


def test_a_search_reads_little_and_a_flipped_bit_never_hides_a_name() -> None:
    names, read = many(3000), 0
    data = bytearray(Index(names).to_bytes())

    def counted(at: int, count: int) -> bytes:
        nonlocal read
        read += count
        return bytes(data[at : at + count])

    index = SortedIndex.of(counted, len(data))
    draw = random.Random(0)
    for path in draw.sample(sorted(names), 50):
        assert index.get(path) == names[path]
    assert read < 50 * 2 * 20 * 2**11 and len(data) > 1_500_000, "two searches of at most twenty blocks each"
    refused = 0
    for _ in range(1000):
        at, path = draw.randrange(index.begin, len(data)), draw.choice(sorted(names))
        if draw.random() < 0.5:  # near the name, where it matters
            at = data.index(f'"{path}@'.encode()) + draw.randrange(-100, 100)
        data[at] ^= 1 << (bit := draw.randrange(7))
        try:
            assert index.get(path) == names[path]
        except Refusal:
            refused += 1
        data[at] ^= 1 << bit
    assert refused > 100


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any store counts as large; three changes wait."""
    for name, value in (("WHOLE_BYTES", 0), ("SMALL_BYTES", 0), ("MOST", 3)):
        monkeypatch.setattr(refs_module, name, value)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [adapter_folder(tmp_path / f"f{i}", i) for i in range(3)]


def in_index(root: Path) -> list[str]:
    """Names that a tool finds which knows OCI layouts alone."""
    return [e["annotations"]["org.opencontainers.image.ref.name"] for e in json.loads((root / "index.json").read_text())["manifests"]]


def waiting(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "changes").iterdir()) if (root / "changes").exists() else []


def test_changes_wait_and_are_folded(tmp_path: Path, folders: list[Path], large: None) -> None:
    store = Store(tmp_path / "store", create=True)
    other, root = Store(store.root), store.root
    store.publish(folders[0], "acme/a", aliases=["prod"])
    store.publish(folders[1], "acme/b")
    store.publish(folders[1], "acme/a")
    assert waiting(root) == ["acme@a.json", "acme@b.json"] and in_index(root) == []
    said = json.loads((root / "changes" / "acme@a.json").read_text())["manifests"]
    assert [e["annotations"]["org.opencontainers.image.ref.name"] for e in said] == ["acme/a@1", "acme/a@2", "acme/a@prod"]
    before = names_of(other)
    assert {p: (sorted(v), a) for p, (v, a) in before.items()} == {
        "acme/a": ([1, 2], {"prod": 1, "latest": 2}),
        "acme/b": ([1], {"latest": 1}),
    }
    store.remove("acme/b", all=True)
    store.publish(folders[2], "law/c")
    assert (
        len(waiting(root)) == 3
        and other.namespaces() == ["acme", "law"]
        and other.namespaces("b") == []
        and other.namespaces("c") == ["law"]
    )
    with pytest.raises(NoSuchAdapter, match="did you mean 'acme/a'"):
        other.resolve("acme/aa")
    store.alias("acme/a@2", "prod")
    assert len(waiting(root)) == 3, "the change of a name that waits takes its place"
    store.publish(folders[0], "acme/d")
    assert waiting(root) == [] and in_index(root) == ["acme/a@1", "acme/a@2", "acme/a@prod", "acme/d@1", "law/c@1"]
    assert store.publish(folders[0], "acme/b").version == 2, "a number does not come again, in index.json or beside it"
    assert Store(root).verify().problems == () and names_of(other) == names_of(store)
    shutil.copytree(root, tmp_path / "copy")
    assert names_of(Store(tmp_path / "copy")) == names_of(store) and Store(tmp_path / "copy").verify().problems == ()
    store.gc(dry_run=True)
    assert waiting(root) == ["acme@b.json"]
    store.gc()
    assert waiting(root) == [] and "acme/b@2" in in_index(root) and files_of(other, "acme/b")


def test_a_large_store_and_a_small_one_come_to_the_same_index(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = []
    for i, (whole, small, most) in enumerate([(2**16, 2**21, 512), (0, 0, 1), (0, 0, 99)]):
        for name, value in (("WHOLE_BYTES", whole), ("SMALL_BYTES", small), ("MOST", most)):
            monkeypatch.setattr(refs_module, name, value)
        store = Store(tmp_path / f"store{i}", create=True)
        for n, path in enumerate(["b/x", "a/x", "a/y", "a-b/x", "a/x", "b/x"]):
            store.publish(folders[n % 3], path, aliases=["prod"] if n % 2 else [])
        store.unalias("a/x", "prod")
        store.remove("a/x@1")
        store.alias("b/x@1", "prod")
        store.remove("b/x@2")
        store.remove("a/y", all=True)
        store.gc()
        indexes.append((store.root / "index.json").read_bytes())
    assert indexes[0] == indexes[1] == indexes[2] and b"io.trimtab.last/a/y" in indexes[0]


def test_an_index_that_another_tool_has_written(tmp_path: Path, folders: list[Path], large: None) -> None:
    """It is sorted in another process, and with the next change on disk."""
    store = Store(tmp_path / "store", create=True)
    for i in range(3):
        store.publish(folders[i], f"acme/n{i}")
    store.gc()
    file = store.root / "index.json"
    document = json.loads(file.read_text())
    document["manifests"].append(document["manifests"][0] | {"annotations": {"org.opencontainers.image.ref.name": "acme/new@7"}})
    file.write_text(json.dumps(document))
    other = Store(store.root)
    assert [n.path for n in other.names()] == ["acme/n0", "acme/n1", "acme/n2", "acme/new"] and other.resolve("acme/new").version == 7
    assert other.namespaces("new") == ["acme"]
    store.alias("acme/new@7", "prod")
    assert in_index(store.root)[-2:] == ["acme/new@7", "acme/new@prod"] and waiting(store.root) == [] and file.read_text().count("\n") > 5
    document["manifests"].append(document["manifests"][0])
    file.write_text(json.dumps(document))
    with pytest.raises(AdapterError, match="acme/n0@1 twice"):
        Store(store.root).resolve("acme/n1")


def test_a_change_that_is_damaged_or_strange(tmp_path: Path, folders: list[Path], large: None) -> None:
    store = Store(tmp_path / "store", create=True)
    for name in ("acme/a", "acme/b"):
        store.publish(folders[0], name)
    file = store.root / "changes" / "acme@a.json"
    data = file.read_bytes()
    file.chmod(0o644)
    for damage in (
        data.replace(b"acme/a@1", b"acme/c@1"),
        data[:-5],
        data.replace(b"sha256:", b"sha512:"),
        (file.parent / "acme@b.json").read_bytes(),
    ):
        file.write_bytes(damage)
        with pytest.raises(AdapterError, match=r"changes/acme@a\.json"):
            Store(store.root).resolve("acme/a")
        assert Store(store.root).resolve("acme/b").version == 1 and any("acme@a.json" in p for p in Store(store.root).verify().problems)
        with pytest.raises(AdapterError, match=r"acme@a\.json"):
            store.gc()
    file.write_bytes(data)
    (file.parent / "notes.txt").write_text("mine")
    assert store.verify().problems == ("changes/notes.txt does not belong in a store",)
    (file.parent / "notes.txt").unlink()
    shutil.move(file.parent, tmp_path / "elsewhere")
    file.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="symbolic link"):
        Store(store.root)


def test_a_change_that_comes_just_after_it_was_looked_for_is_no_damage(
    tmp_path: Path, folders: list[Path], large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store", create=True)
    store.publish(folders[0], "acme/a")
    file, aside, real = store.root / "changes" / "acme@a.json", tmp_path / "aside", os.open
    file.rename(aside)

    def late(path: str | Path, *arguments: Any, **options: Any) -> int:
        if path != file or file.exists():
            return real(path, *arguments, **options)
        aside.rename(file)
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "open", late)
    assert store.get("acme/a") is None and store.resolve("acme/a").version == 1


def test_a_full_disk_in_a_fold_takes_no_change_back(
    tmp_path: Path, folders: list[Path], large: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store", create=True)
    with monkeypatch.context() as patch:
        patch.setattr(refs_module.Refs, "fold", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for i in range(6):
            assert store.publish(folders[i % 3], f"acme/n{i}").version == 1
    assert "No space left" in caplog.text and len(waiting(store.root)) == 6
    store.alias("acme/n0", "prod")
    assert waiting(store.root) == [] and len(in_index(store.root)) == 7


def test_names_are_read_as_they_are_asked_for(tmp_path: Path, folders: list[Path], large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", create=True)
    entry = Entry(store.publish(folders[0], "acme/first").digest, 1)
    store.gc()
    names = {f"acme/n{i:05d}": Name(f"acme/n{i:05d}", {1: entry}, {}, 1) for i in range(5000)}
    (store.root / "index.json").write_bytes(Index(names).to_bytes())
    lines, real = 0, SortedIndex._lines

    def counting(self: SortedIndex, at: int, block: int = 2**16) -> Iterator[object]:
        nonlocal lines
        for line in real(self, at, block):
            lines += 1
            yield line

    monkeypatch.setattr(SortedIndex, "_lines", counting)
    found = Store(store.root).names("acme", "acme/n02500")
    assert [next(found).path for _ in range(3)] == ["acme/n02501", "acme/n02502", "acme/n02503"] and lines < 50
