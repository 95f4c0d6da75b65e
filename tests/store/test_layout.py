"""Stores that somebody has damaged or prepared: nothing outside them is touched, and nothing is given out that is not what was put in."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.store.stores import adapter_folder, files_of, names_of, snapshot
from trimtab.errors import AdapterError
from trimtab.store import layout as layout_module
from trimtab.store.files import digest_of
from trimtab.store.index import Index, parse_index
from trimtab.store.manifest import EMPTY
from trimtab.store.name import Entry, Name
from trimtab.store.names import NoSuchAdapter
from trimtab.store.registry import Store


@pytest.fixture
def root(tmp_path):
    """A store with two versions of one name, an alias, a name whose newest version is gone, and a second name."""
    store = Store(tmp_path / "store", create=True)
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/support", aliases=["prod"])
    for n in (2, 3):
        store.publish(adapter_folder(tmp_path / "b", n), "acme/support")
    store.remove("acme/support@3")
    store.publish(adapter_folder(tmp_path / "b", 4, {"revision": "legal"}), "acme/legal")
    store.gc(grace_seconds=0)
    return tmp_path / "store"


def edit_index(root: Path, change) -> None:
    document = json.loads((root / "index.json").read_text())
    change(document)
    (root / "index.json").write_text(json.dumps(document))


def replace_manifest(root: Path, change) -> None:
    """Rewrite acme/legal@1's manifest as a blob of its own, and let an entry without a check, as other tools write it, refer to it."""
    store = Store(root)
    document = json.loads(store.manifest(store.resolve("acme/legal@1").digest))
    changed = change(document)
    data = changed if isinstance(changed, bytes) else json.dumps(document).encode()
    digest = store.put_blob(data).digest

    def swap(index):
        entry = next(e for e in index["manifests"] if e["annotations"]["org.opencontainers.image.ref.name"] == "acme/legal@1")
        entry.update(digest=digest, size=len(data), annotations={"org.opencontainers.image.ref.name": "acme/legal@1"})

    edit_index(root, swap)


def refused(root: Path, words: str, ref: str = "acme/legal") -> None:
    """Whatever reads this version says so, and so does verify."""
    for read in (lambda s: files_of(s, ref), lambda s: s.export(ref, root.parent / "out")):
        with pytest.raises(AdapterError, match=re.escape(words)):
            read(Store(root))
    assert not (root.parent / "out").exists()
    assert any(words in p for p in Store(root).verify().problems), Store(root).verify().problems


def test_the_store_is_an_oci_layout(root):
    assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((root / "index.json").read_text())
    assert index["schemaVersion"] == 2 and index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    names = [e["annotations"]["org.opencontainers.image.ref.name"] for e in index["manifests"]]
    assert names == ["acme/legal@1", "acme/support@1", "acme/support@2", "acme/support@prod"]
    for blob in (root / "blobs" / "sha256").iterdir():
        assert digest_of(blob.read_bytes()) == f"sha256:{blob.name}" and blob.stat().st_mode & 0o777 == 0o444
    manifest = json.loads((root / "blobs" / "sha256" / index["manifests"][0]["digest"][7:]).read_text())
    assert manifest["artifactType"] == "application/vnd.trimtab.adapter.v1" and manifest["config"]["digest"] == digest_of(EMPTY)
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert titles == ["adapter_config.json", "adapter_model.safetensors"]
    assert list((root / "tmp").iterdir()) == [] and Store(root).verify().problems == ()


def test_the_index_says_the_same_after_a_round_trip():
    a, b, c = (Entry(digest_of(bytes([n])), n) for n in (1, 2, 3))
    names = [Name("acme/x", {1: a, 2: b, 9: a}, {"prod": 1, "new": 9}, 9), Name("acme/gone", {}, {}, 4), Name("b/y", {3: c}, {}, 7)]
    index = Index({n.path: n for n in names}, {"org.example": "kept \u2028 \"'"})
    found, problems = parse_index(index.to_bytes())
    assert problems == [] and found == index and found.to_bytes() == index.to_bytes()


def test_a_flipped_bit_in_the_index_is_found(root):
    """In every byte of it: either the store is refused, or what it says is what it said."""
    before, data, draw, unnoticed = names_of(Store(root)), (root / "index.json").read_bytes(), random.Random(0), 0
    for at in range(len(data)):
        flipped = data[at] ^ (1 << draw.randrange(8))
        (root / "index.json").write_bytes(data[:at] + bytes([flipped]) + data[at + 1 :])
        store = Store(root)
        if store.verify().problems:
            with pytest.raises(AdapterError):
                store.list()
        else:
            assert names_of(store) == before, f"byte {at}: {bytes([data[at]])!r} -> {bytes([flipped])!r}"
            unnoticed += 1
    assert unnoticed < len(data) // 10, "only the keys of our annotations may change without harm"


def test_a_flipped_bit_in_any_blob_is_found_and_never_served(root, tmp_path):
    refs, draw = ["acme/legal@1", "acme/support@1", "acme/support@2"], random.Random(0)
    before = {ref: files_of(Store(root), ref) for ref in refs}
    for blob in sorted((root / "blobs" / "sha256").iterdir()):
        data = blob.read_bytes()
        for at in sorted({0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(6))}):
            blob.chmod(0o644)
            blob.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
            store, harmed = Store(root), 0
            for ref in refs:
                try:
                    assert files_of(store, ref) == before[ref]
                    store.export(ref, tmp_path / "out")
                    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before[ref]
                except AdapterError as error:
                    harmed += 1
                    assert blob.name in str(error) or "its manifest" in str(error)
            found = store.verify().problems
            assert any(blob.name in p and "damaged" in p for p in found), found
            assert harmed or data == EMPTY
        blob.write_bytes(data)
    assert Store(root).verify().problems == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.unlink(), "missing"),
        (lambda b: b.chmod(0o644) or b.write_bytes(b.read_bytes() + b" "), "bytes"),
        (lambda b: b.chmod(0o644) or b.write_bytes(b.read_bytes()[:-1]), "bytes"),
        (lambda b: shutil.move(b, b.parents[3] / "kept") and b.symlink_to(b.parents[3] / "kept"), "symbolic link"),
        (lambda b: b.unlink() or os.mkfifo(b), "regular file"),
        (lambda b: b.unlink() or b.mkdir(), "regular file"),
    ],
    ids=["missing", "longer", "shorter", "link to itself", "pipe", "folder"],
)
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_blob_that_is_not_what_its_descriptor_says(root, change, words, file):
    store = Store(root)
    blob = store.blob_path(store.resolve("acme/legal").files[file].digest)
    change(blob)
    refused(root, blob.name)
    with pytest.raises(AdapterError, match=re.escape(words)):
        files_of(store, "acme/legal")
    assert files_of(store, "acme/support@1")


@pytest.mark.parametrize("part", ["blobs", "blobs/sha256", "tmp", "index.json", "oci-layout", ".lock"])
def test_a_link_in_place_of_a_part_of_the_store(root, tmp_path, part):
    """It leads to a whole and good one elsewhere, and is refused all the same; nothing is written there."""
    elsewhere = shutil.move(root / part, tmp_path / "elsewhere")
    (root / part).symlink_to(elsewhere)
    before = snapshot(tmp_path)
    for attempt in (
        lambda: Store(root),
        lambda: Store(root, create=True),
        lambda: Store(root).publish(adapter_folder(tmp_path / "b", 9), "acme/new"),
    ):
        with pytest.raises(AdapterError, match="symbolic link"):
            attempt()
    adapter_folder(tmp_path / "b", 4, {"revision": "legal"})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part", ["blobs/sha256", "tmp", "index.json", ".lock"])
def test_a_link_that_appears_while_the_store_is_open(root, tmp_path, part):
    store = Store(root)
    names_of(store)
    (root / part).rename(tmp_path / "elsewhere")
    (root / part).symlink_to(tmp_path / "elsewhere")
    adapter_folder(tmp_path / "b", 9)
    before = snapshot(tmp_path)
    for change in (
        lambda: store.publish(tmp_path / "b", "acme/new"),
        lambda: store.put_blob(b"x"),
        lambda: store.alias("acme/support@1", "x"),
        lambda: store.remove("acme/legal@1"),
        lambda: store.gc(grace_seconds=0),
    ):
        with pytest.raises(AdapterError, match="symbolic link"):
            change()
    assert snapshot(tmp_path) == before
    assert any("symbolic link" in p for p in store.verify().problems)


def entry(ref: str, **keys) -> dict:
    found = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + "0" * 64, "size": 2}
    return {k: v for k, v in {**found, "annotations": {"org.opencontainers.image.ref.name": ref}, **keys}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["manifests"].append(entry("../../etc/passwd@1")), "'../../etc/passwd@1' is not namespace/name"),
        (lambda d: d["manifests"].append(entry("/acme/support@1")), "is not namespace/name"),
        (lambda d: d["manifests"].append(entry("acme/support")), "is not namespace/name"),
        (lambda d: d["manifests"].append(entry("acme/x@007")), "is not namespace/name"),
        (lambda d: d["manifests"].append(entry("acme/support@2")), "acme/support@2 twice"),
        (lambda d: d["manifests"].append(entry("acme/support@prod")), "acme/support@prod"),
        (lambda d: d["manifests"].append(entry("acme/support@stray")), "acme/support@stray stands for"),
        (lambda d: d["manifests"].append(entry("acme/support@latest")), "latest is always computed"),
        (lambda d: d["manifests"].append(entry("acme/x@1", annotations=None)), "has no name: copy it again"),
        (lambda d: d["manifests"].append(entry("acme/x@1", digest="sha256:../../../../etc/passwd")), "64 hexadecimal"),
        (lambda d: d["manifests"].append(entry("acme/x@1", digest="md5:" + "0" * 32)), "64 hexadecimal"),
        (lambda d: d["manifests"].append(entry("acme/x@1", size=-1)), "size -1"),
        (lambda d: d["manifests"].append(entry("acme/x@1", size=True)), "size True"),
        (lambda d: d["manifests"].append(entry("acme/x@1", size=2.0)), "size 2.0"),
        (lambda d: d["manifests"].append(entry("acme/x@1", mediaType="application/vnd.docker.image")), "not a manifest of an adapter"),
        (lambda d: d["manifests"].append(entry("acme/x@1", artifactType="application/x")), "not a manifest of an adapter"),
        (lambda d: d["manifests"].append(entry("acme/x@1", urls=["http://evil"])), "exactly mediaType"),
        (lambda d: d["manifests"].append("acme/x@1"), "exactly mediaType"),
        (lambda d: d["manifests"][1].update(size=7), "acme/support@1 is damaged"),
        (lambda d: d["annotations"].update({"io.trimtab.last/acme/support": "9"}), "is damaged"),
        (lambda d: d["annotations"].update({"io.trimtab.last/../x": "9"}), "is damaged"),
        (lambda d: d.update(manifests={}), "no list of manifests"),
        (lambda d: d.update(annotations=[]), "not a map of strings"),
        (lambda d: d.update(schemaVersion=1), "schema version 2"),
        (lambda d: d.update(subject={}), "unknown key subject"),
    ],
)
def test_an_index_that_nobody_should_believe(root, tmp_path, change, words):
    """Nothing is read from it, changed or collected: an entry that cannot be read may be one that needs blobs."""
    edit_index(root, change)
    before = snapshot(root)
    store = Store(root)
    adapter_folder(tmp_path / "b", 9)
    for attempt in (
        store.list,
        lambda: store.resolve("acme/support"),
        lambda: store.publish(tmp_path / "b", "acme/new"),
        lambda: store.gc(grace_seconds=0),
    ):
        with pytest.raises(AdapterError) as error:
            attempt()
        assert words in str(error.value), error.value
    assert any(words in p for p in store.verify().problems)
    after = snapshot(root)
    assert {k: v for k, v in after.items() if k in before} == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"[]", "holds list"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"schemaVersion":2,"manifests":[],"manifests":[]}', "the key 'manifests' more than once"),
        (b'{"schemaVersion":2,"manifests":[],"annotations":{"a":"1","a":"2"}}', "the key 'a' more than once"),
        (b'{"schemaVersion":NaN,"manifests":[]}', "NaN"),
    ],
)
def test_an_index_that_is_no_index(root, data, words):
    (root / "index.json").write_bytes(data)
    with pytest.raises(AdapterError, match=words):
        Store(root).list()
    assert any(words in p for p in Store(root).verify().problems)


def layer(document: dict, at: int = 0) -> dict:
    return document["layers"][at]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: layer(d)["annotations"].update({"org.opencontainers.image.title": "../../escape.json"}), "titled '../../escape.json'"),
        (lambda d: layer(d)["annotations"].update({"org.opencontainers.image.title": "/etc/passwd"}), "titled '/etc/passwd'"),
        (lambda d: layer(d)["annotations"].update({"org.opencontainers.image.title": "adapter_model.bin"}), "titled 'adapter_model.bin'"),
        (lambda d: layer(d).pop("annotations"), "titled ''"),
        (lambda d: layer(d).update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip"), "has the media type"),
        (lambda d: layer(d).update(size=2**30), "at most 1,048,576 are read"),
        (lambda d: layer(d).update(size=layer(d)["size"] + 1), "its descriptor says"),
        (lambda d: layer(d).update(digest="sha256:" + "0" * 64), "0" * 64),
        (lambda d: layer(d).update(data="e30="), "exactly mediaType"),
        (lambda d: d["layers"].append(layer(d)), "the file adapter_config.json twice"),
        (lambda d: d["layers"].pop(), "has no adapter_model.safetensors"),
        (lambda d: d.update(layers=None), "has no adapter_config.json"),
        (lambda d: d["config"].update(mediaType="application/vnd.oci.image.config.v1+json"), "not the empty descriptor"),
        (lambda d: d.update(artifactType="application/vnd.unknown"), "artifactType is"),
        (lambda d: d.pop("mediaType"), "mediaType is"),
        (lambda d: d.update(schemaVersion=True), "schemaVersion is"),
        (lambda d: d.update(subject={}), "unknown key subject"),
        (lambda d: d["annotations"].update({"io.trimtab.method": 7}), "not a map of strings"),
        (lambda d: d["annotations"].update({"io.trimtab.method": "\x1b[2J"}), "control characters"),
        (lambda d: d["annotations"].update({"x": "y" * 5000}), "longer than"),
        (lambda d: b'{"schemaVersion":2,"schemaVersion":2}', "more than once"),
        (lambda d: b"PK\x03\x04", "not readable JSON"),
        (lambda d: b" " * (2**20 + 1), "at most 1,048,576"),
    ],
)
def test_a_manifest_that_asks_for_what_no_adapter_has(root, change, words):
    """Its bytes are those of its digest, so only what it says can be refused."""
    replace_manifest(root, change)
    refused(root, words)
    assert files_of(Store(root), "acme/support@1"), "one that is bad does not take the others with it"


def test_files_that_are_no_blobs_are_named_and_left_alone(root):
    for name in ("blobs/sha256/note", "blobs/sha256/" + "F" * 64, "blobs/md5", "readme"):
        (root / name).write_text("x")
    problems = Store(root).verify().problems
    assert len(problems) == 4 and all(any(Path(n).name in p for p in problems) for n in ("note", "F" * 64, "md5", "readme"))
    Store(root).gc(grace_seconds=0)
    assert Store(root).verify().problems == problems


def test_where_a_store_can_be_made(tmp_path):
    with pytest.raises(NoSuchAdapter, match="there is no store in"):
        Store(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, words in ((tmp_path / "full", r"holds other things \(thesis.txt\)"), (tmp_path / "file", "cannot create a store")):
        with pytest.raises(AdapterError, match=words):
            Store(path, create=True)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.txt"]
    Store(tmp_path / "made", create=True).publish(adapter_folder(tmp_path / "a"), "acme/x")
    assert Store(tmp_path / "made", create=True).resolve("acme/x").version == 1
    (tmp_path / "link").symlink_to(tmp_path / "made")
    assert Store(tmp_path / "link").root == tmp_path / "made", "the user's own link to the whole store is the user's business"
    (tmp_path / "made" / "oci-layout").write_text('{"imageLayoutVersion":"9.0.0"}')
    with pytest.raises(AdapterError, match=r"9\.0\.0"):
        Store(tmp_path / "made")


def test_a_writer_that_waits_too_long_says_for_what(root, monkeypatch):
    monkeypatch.setattr(layout_module, "LOCK_SECONDS", 0.05)
    one, two = Store(root), Store(root)
    with one.lock():
        one.alias("acme/support@2", "held")
        with pytest.raises(AdapterError, match=r"another process has held .*\.lock"):
            two.alias("acme/support@1", "held")
        assert two.resolve("acme/support@held").version == 2, "readers need no lock"
    two.alias("acme/support@1", "held")
    assert one.resolve("acme/support@held").version == 1
    (root / ".lock").unlink()
    (root / ".lock").mkdir()
    with pytest.raises(AdapterError, match=r"\.lock"):
        one.lock().__enter__()


def test_every_state_of_the_index_has_a_time_of_its_own(root, monkeypatch):
    """So that none is taken for another that has the same size, and maybe the same inode: even if the clock stands still."""
    monkeypatch.setattr(layout_module.time, "time_ns", lambda: 10**18)
    store, times = Store(root), []
    for n in range(5):
        store.alias(f"acme/support@{1 + n % 2}", "prod")
        times.append((root / "index.json").stat().st_mtime_ns)
    store.alias("acme/support@1", "prod")
    assert times[1:] == sorted(set(times[1:])) and (root / "index.json").stat().st_mtime_ns == times[-1], "no change, no new state"


def test_a_reader_in_the_middle_of_a_file_is_not_disturbed(root, tmp_path):
    """Index and blobs are replaced, never written in place."""
    store = Store(root)
    blob = store.blob_path(store.resolve("acme/legal").files["adapter_config.json"].digest)
    blob.chmod(0o644)
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    before = {path: path.read_bytes() for path in (root / "index.json", blob)}
    with (root / "index.json").open("rb", buffering=0) as index, blob.open("rb", buffering=0) as damaged:
        halves = {root / "index.json": (index, index.read(100)), blob: (damaged, damaged.read(5))}
        store.publish(adapter_folder(tmp_path / "b", 4, {"revision": "legal"}), "acme/legal", aliases=["mended"])
        assert store.verify().problems == () and all(path.read_bytes() != data for path, data in before.items())
        assert {path: half + file.read() for path, (file, half) in halves.items()} == before


def test_a_store_that_can_only_be_read_is_read(root, tmp_path):
    before = snapshot(root)
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in (copy / "tmp", copy / ".lock"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    store = Store(copy)
    assert names_of(store) == names_of(Store(root)) and files_of(store, "acme/legal") and store.verify().problems == ()
    assert snapshot(copy) == before and not (copy / "tmp").exists() and not (copy / ".lock").exists()
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
