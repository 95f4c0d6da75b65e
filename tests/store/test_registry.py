"""The store as its users see it: publishing, finding, reading, changing, collecting, and several writers at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.store.common import SEQUENCES, stirred, tiny_base, write_tensors
from tests.store.stores import LAYER, adapter_folder, blobs_there, files_of, names_of, needed_blobs, snapshot, write_weights
from trimtab.errors import AdapterError
from trimtab.methods import IA3Config, LoraConfig, PromptTuningConfig
from trimtab.store import Adapter, blobs, publisher
from trimtab.store import folder as folder_module
from trimtab.store.collect import GcReport
from trimtab.store.diff import Change
from trimtab.store.manifest import Manifest
from trimtab.store.names import NoSuchAdapter, Ref
from trimtab.store.registry import Store

HEX = "0" * 64
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", create=True)


# ---- publishing and finding ----


def test_versions_count_up_and_selectors_find_them(store, tmp_path):
    first, second = adapter_folder(tmp_path / "a", 1), adapter_folder(tmp_path / "b", 2)
    one, two = store.publish(first, "acme/support", aliases=["prod"]), store.publish(second, "acme/support")
    assert (one.ref, one.aliases, two.ref, two.aliases) == ("acme/support@1", ("prod", "latest"), "acme/support@2", ("latest",))
    for selector, number in {"": 2, "@latest": 2, "@2": 2, "@1": 1, "@prod": 1, f"@{one.digest}": 1, f"@{two.digest}": 2}.items():
        assert store.resolve(f"acme/support{selector}").version == number, selector
    assert [v.version for v in store.versions("acme/support")] == [1, 2] and store.versions("acme/support")[0].aliases == ("prod",)
    store.publish(first, "beta/x")
    assert [v.ref for v in store.list()] == ["acme/support@2", "beta/x@1"] and [v.ref for v in store.list("beta")] == ["beta/x@1"]
    assert store.namespaces() == ["acme", "beta"] and store.list("acm") == []
    assert files_of(store, "acme/support@1") == {p.name: p.read_bytes() for p in first.iterdir()}
    assert Store(store.root).resolve("acme/support@prod") == store.resolve("acme/support@1")


@pytest.mark.parametrize("ref", ["acme/suport", "acme/support@2", "acme/support@prd", f"acme/support@sha256:{HEX}", "beta/support"])
def test_what_is_not_there_is_said(store, tmp_path, ref):
    store.publish(adapter_folder(tmp_path / "a"), "acme/support", aliases=["prod"])
    for ask in (
        store.resolve,
        lambda r: store.export(r, tmp_path / "out"),
        lambda r: store.alias(r, "x"),
        lambda r: store.diff("acme/support", r),
        lambda r: store.remove(Ref.parse(r).at("7")),
    ):
        with pytest.raises(NoSuchAdapter, match="no such") as error:
            ask(ref)
        assert error.value.http_status == 404 and error.value.fix
    assert not (tmp_path / "out").exists()


def test_what_the_newest_version_holds_already_is_not_published_again(store, tmp_path):
    one, other = adapter_folder(tmp_path / "a", 1), adapter_folder(tmp_path / "b", 2)
    store.publish(one, "acme/support")
    before = snapshot(store.root)
    assert store.publish(one, "acme/support").version == 1 and snapshot(store.root) == before
    assert store.publish(one, "acme/support", aliases=["prod"]).aliases == ("prod", "latest")
    store.publish(other, "acme/support")
    again = store.publish(one, "acme/support")
    assert again.version == 3 and again.digest == store.resolve("acme/support@1").digest
    assert store.resolve(f"acme/support@{again.digest}").version == 3, "the newest of those that hold the same"
    assert store.resolve("acme/support@prod").version == 1 == Store(store.root).resolve("acme/support@prod").version


def test_equal_files_have_equal_digests_anywhere(store, tmp_path):
    other = Store(tmp_path / "other", create=True)
    a, b = adapter_folder(tmp_path / "a", 1), shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(b / "adapter_config.json", (1, 1))
    assert store.publish(a, "acme/x").digest == other.publish(b, "beta/y").digest
    assert {p.name for p in (store.root / "blobs/sha256").iterdir()} == {p.name for p in (other.root / "blobs/sha256").iterdir()}


def test_versions_that_share_weights_share_their_bytes(store, tmp_path):
    for n in range(20):
        store.publish(adapter_folder(tmp_path / "a", 1, {"revision": str(n)}), "acme/support")
    weights = {v.files["adapter_model.safetensors"].digest for v in store.versions("acme/support")}
    assert len(weights) == 1 and len(store.versions("acme/support")) == 20
    assert len(blobs_there(store)) == 1 + 1 + 20 + 20  # the empty config, the weights, twenty configs, twenty manifests


def test_a_version_says_what_its_files_say(store, base, tmp_path):
    adapter = stirred(base, LoraConfig(r=2))
    version = store.publish(adapter.save(tmp_path / "a"), "acme/support", base=base)
    note = json.loads((tmp_path / "a" / "trimtab.json").read_text())
    assert (version.method, version.base, version.fingerprint) == ("lora", "tiny-llama", "sha256:tiny")
    assert version.parameters == adapter.num_parameters and version.created == note["created"]
    assert version.size == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert list(version.files) == ["adapter_config.json", "adapter_model.safetensors", "trimtab.json", "README.md"]
    plain = store.publish(adapter_folder(tmp_path / "b"), "acme/peft")
    assert (plain.method, plain.base, plain.fingerprint, plain.parameters, plain.created) == ("lora", "tiny", "", 32, "")


@pytest.mark.parametrize("method", [LoraConfig(r=2), IA3Config(), PromptTuningConfig(num_virtual_tokens=3)], ids=lambda m: m.name)
def test_an_adapter_goes_in_and_comes_out_bit_for_bit(store, base, method, tmp_path, monkeypatch):
    adapter = stirred(base, method)
    store.publish(adapter, "acme/support", aliases=["prod"])
    for loaded in (Adapter.load("acme/support@prod", base, store=store), Adapter.load("acme/support", base, store=store.root)):
        assert loaded.verified and loaded.method == adapter.method
        assert all(torch.equal(loaded.params[k], adapter.params[k]) for k in adapter.params)
    ours, theirs = base.logits(SEQUENCES, adapters=[adapter] * 3), base.logits(SEQUENCES, adapters=[loaded] * 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    monkeypatch.setenv("TRIMTAB_STORE", str(store.root))
    assert Adapter.load("acme/support", base).method == adapter.method
    monkeypatch.chdir(tmp_path)
    stirred(base, IA3Config(), seed=9).save("acme/support")
    assert Adapter.load("acme/support", base).method == IA3Config(), "a folder that is there comes first"


def test_loading_what_is_nowhere_says_where_was_looked(store, base, tmp_path, monkeypatch):
    with pytest.raises(NoSuchAdapter, match=r"'acme/support': no such folder .* and no such adapter 'acme/support' in the store"):
        Adapter.load("acme/support", base, store=store)
    monkeypatch.setenv("TRIMTAB_STORE", str(tmp_path / "none"))
    with pytest.raises(NoSuchAdapter, match=r"no such folder .* and there is no store in"):
        Adapter.load("acme/support", base)


# ---- what is not published ----


def flip_note(folder: Path) -> None:
    note = json.loads((folder / "trimtab.json").read_text())
    note["files"]["adapter_model.safetensors"] = "sha256:" + HEX
    (folder / "trimtab.json").write_text(json.dumps(note))


def linked(folder: Path, name: str) -> None:
    shutil.move(folder / name, folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


BAD = {
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "adapter_model.bin is a pickle"),
    "other file": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is none of the files of an adapter"),
    "hidden file": (lambda f: (f / ".env").write_text("KEY=1"), ".env is none of the files"),
    "folder": (lambda f: (f / "checkpoint-7").mkdir(), "checkpoint-7 is none of the files"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "linked config": (lambda f: linked(f, "adapter_config.json"), "is a symbolic link"),
    "linked weights": (lambda f: linked(f, "adapter_model.safetensors"), "is a symbolic link"),
    "linked card": (lambda f: (f / "README.md").symlink_to("/etc/passwd"), "README.md is a symbolic link"),
    "pipe": (lambda f: os.mkfifo(f / "README.md"), "README.md is not a regular file"),
    "long card": (lambda f: (f / "README.md").write_bytes(b"x" * (2**20 + 1)), "README.md has 1,048,577 bytes"),
    "long config": (lambda f: (f / "adapter_config.json").write_bytes(b" " * (2**20 + 1)), "adapter_config.json has 1,048,577 bytes"),
    "config twice": (lambda f: (f / "adapter_config.json").write_text('{"peft_type":"LORA","peft_type":"IA3"}'), "more than once"),
    "unknown method": (lambda f: (f / "adapter_config.json").write_text('{"peft_type":"MAGIC"}'), "'MAGIC' is not a method"),
    "no method": (lambda f: (f / "adapter_config.json").write_text("{}"), "is not a method"),
    "note lies": (flip_note, "trimtab.json records sha256:000"),
    "note for another method": (lambda f: (f / "adapter_config.json").write_text('{"peft_type":"IA3"}'), "describe different adapters"),
    "note of the future": (lambda f: (f / "trimtab.json").write_text('{"format":99}'), "has format 99"),
    "archive": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"\xff" * 20), "a zip archive"),
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 200), "truncated"),
    "bytes behind": (lambda f: append(f / "adapter_model.safetensors"), "bytes behind its last tensor"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_folder_that_is_not_published(store, base, tmp_path, what):
    """The reason is said and nothing is left: no name, no blob, no unfinished file."""
    spoil, words = BAD[what]
    stirred(base, LoraConfig(r=2)).save(tmp_path / "f")
    if what not in ("long card", "linked card", "pipe"):
        (tmp_path / "f" / "README.md").write_text("a card")
    else:
        (tmp_path / "f" / "README.md").unlink()
    spoil(tmp_path / "f")
    before = snapshot(store.root)
    with pytest.raises(AdapterError) as error:
        store.publish(tmp_path / "f", "acme/support")
    assert words in str(error.value), error.value
    assert snapshot(store.root) == before and list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "all 1 tensors are zero")], ids=["nan", "infinite", "zero"]
)
def test_values_that_no_adapter_has(store, tmp_path, values, words):
    write_weights(adapter_folder(tmp_path / "f"), {f"{LAYER}.lora_A.weight": np.full((2, 8), values)})
    with pytest.raises(AdapterError, match=words):
        store.publish(tmp_path / "f", "acme/support")
    assert store.list() == []


def test_with_a_base_an_adapter_must_load_on_it(store, base, tmp_path):
    """Without one, the same folders are taken: whether they fit is then seen where they are loaded."""
    stirred(tiny_base(fingerprint="sha256:other"), LoraConfig(r=2)).save(tmp_path / "other")
    wide = adapter_folder(tmp_path / "wide")
    for folder, words in ((tmp_path / "other", "fingerprint sha256:other"), (wide, "has shape")):
        with pytest.raises(AdapterError, match=words):
            store.publish(folder, "acme/support", base=base)
        assert store.list() == [] and list((store.root / "tmp").iterdir()) == []
    store.publish(tmp_path / "other", "acme/support")
    with pytest.raises(AdapterError, match=r"acme/support@1.*does not fit this base"):
        Adapter.load("acme/support", base, store=store)


@pytest.mark.parametrize("name", ["acme", "../acme/x", "/acme/x", "acme/x@1", "acme/x@prod", "acme/..", "acme/x/y", "a" * 64 + "/x"])
def test_a_name_never_leaves_the_store(store, tmp_path, name):
    folder, before = adapter_folder(tmp_path / "f"), snapshot(tmp_path)
    for change in (lambda: store.publish(folder, name), lambda: store.adopt(b"{}", name), lambda: store.versions(name)):
        with pytest.raises(AdapterError, match="name"):
            change()
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("f/")} == {k: v for k, v in before.items() if k[:2] != "f/"}
    with pytest.raises(AdapterError, match="alias"):
        store.publish(folder, "acme/x", aliases=["prod", "../../x"])
    with pytest.raises(AdapterError, match=r"write aliases=\['prod'\]"):
        store.publish(folder, "acme/x", aliases="prod")
    assert store.list() == []


def test_what_is_validated_is_what_was_copied(store, tmp_path, monkeypatch):
    """Somebody swaps the folder's files between the copy and the check: what was checked is what is stored."""
    folder = adapter_folder(tmp_path / "f", 1)
    good, original = (folder / "adapter_model.safetensors").read_bytes(), publisher.describe

    def swapped(opened, where):
        (folder / "adapter_model.safetensors").write_bytes(b"\x80 a pickle")
        return original(opened, where)

    monkeypatch.setattr(publisher, "describe", swapped)
    store.publish(folder, "acme/support")
    assert files_of(store, "acme/support")["adapter_model.safetensors"] == good


# ---- reading ----


def test_an_export_is_a_plain_folder(store, base, tmp_path):
    store.publish(stirred(base, LoraConfig(r=2)).save(tmp_path / "a"), "acme/support")
    assert store.export("acme/support", tmp_path / "out") == tmp_path / "out"
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert Adapter.load(tmp_path / "out", base).verified
    store.publish(adapter_folder(tmp_path / "b"), "acme/support")
    store.export("acme/support", tmp_path / "out")  # over an older export
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"already holds notes\.txt"):
        store.export("acme/support", tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert store.resolve("acme/support").version == 2 and store.verify().problems == (), "an export shares no file with the store"


def test_what_differs_between_versions(store, tmp_path):
    a, b = adapter_folder(tmp_path / "a", 1), adapter_folder(tmp_path / "b", 1, {"r": 4, "revision": "x"})
    ones, c = np.ones((2, 8)), adapter_folder(tmp_path / "c", 1)
    write_weights(a, {f"{LAYER}.lora_A.weight": ones, f"{LAYER}.lora_B.weight": ones, "x.old": ones, "x.zero": 0 * ones})
    shutil.copy(a / "adapter_model.safetensors", b)
    write_weights(c, {f"{LAYER}.lora_A.weight": ones * 1.5, f"{LAYER}.lora_B.weight": np.ones((4, 8)), "x.new": ones, "x.zero": ones})
    for folder in (a, b, c):
        store.publish(folder, "acme/x")
    same = store.diff("acme/x@1", "acme/x@2")
    assert same.config == (Change("r", 2, 4), Change("revision", None, "x")) and same.shared == ("adapter_model.safetensors",)
    assert set(same.tensors.values()) == {0.0} and len(same.tensors) == 4
    apart = store.diff("acme/x@1", "acme/x@3")
    assert apart.config == () and apart.shared == ("adapter_config.json",) and (apart.a, apart.b) == ("acme/x@1", "acme/x@3")
    assert apart.tensors == {f"{LAYER}.lora_A.weight": 0.5, "x.zero": float("inf")}
    assert (apart.reshaped, apart.removed, apart.added) == ((f"{LAYER}.lora_B.weight",), ("x.old",), ("x.new",))
    assert store.diff("acme/x@1", "acme/x@3", weights=False).tensors == {}


def test_a_change_by_another_process_is_seen(store, tmp_path):
    """The index is kept in memory until it changes; two changes in the same moment, of the same size, are two."""
    other = Store(store.root)
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/x")
    store.publish(adapter_folder(tmp_path / "b", 2), "acme/x")
    for n in range(30):
        other.alias(f"acme/x@{1 + n % 2}", "prod")
        assert store.resolve("acme/x@prod").version == 1 + n % 2
        assert store.resolve("acme/x@prod") == store.resolve("acme/x@prod")


# ---- changing ----


def test_an_alias_moves_and_goes(store, tmp_path):
    for n in (1, 2):
        store.publish(adapter_folder(tmp_path / "a", n), "acme/x")
    store.alias("acme/x@1", "prod")
    store.alias("acme/x@prod", "stable")
    store.alias("acme/x", "prod")
    assert names_of(store)["acme/x"][1] == {"prod": 2, "stable": 1, "latest": 2}
    store.unalias("acme/x", "stable")
    assert names_of(Store(store.root))["acme/x"][1] == {"prod": 2, "latest": 2}
    with pytest.raises(NoSuchAdapter, match="acme/x@stable"):
        store.unalias("acme/x", "stable")
    for alias in ("latest", "7"):
        with pytest.raises(AdapterError, match="alias"):
            store.alias("acme/x@1", alias)


def test_a_number_is_never_used_again(store, tmp_path):
    folders = [adapter_folder(tmp_path / str(n), n) for n in range(6)]
    for n in range(3):
        store.publish(folders[n], "acme/x")
    assert [v.ref for v in store.remove("acme/x@3")] == ["acme/x@3"]
    assert Store(store.root).publish(folders[2], "acme/x").version == 4, "not even for the same files"
    assert [v.version for v in store.remove("acme/x", all=True)] == [1, 2, 4]
    assert store.list() == [] and store.namespaces() == []
    with pytest.raises(NoSuchAdapter):
        store.resolve("acme/x")
    store.gc(grace_seconds=0)
    assert Store(store.root).publish(folders[3], "acme/x").version == 5
    assert store.publish(folders[4], "acme/x").version == 6 and store.verify().problems == ()


def test_a_version_that_an_alias_needs_is_kept(store, tmp_path):
    for n in (1, 2):
        store.publish(adapter_folder(tmp_path / "a", n), "acme/x")
    store.alias("acme/x@1", "prod")
    for ref, words in (("acme/x@1", "is what prod stands for"), ("acme/x@prod", "is what prod"), ("acme/x", "does not say what to remove")):
        with pytest.raises(AdapterError, match=words):
            store.remove(ref)
    with pytest.raises(AdapterError, match="does not say what to remove"):
        store.remove("acme/x@2", all=True)
    assert store.remove("acme/x@latest")[0].version == 2 and store.resolve("acme/x").version == 1
    store.alias("acme/x@1", "other")
    assert store.remove("acme/x", all=True)[0].aliases == ("other", "prod", "latest")
    store.publish(adapter_folder(tmp_path / "a", 3), "acme/x")
    assert names_of(store)["acme/x"][1] == {"latest": 3}, "aliases went with the name"


# ---- collecting ----


def test_collection_removes_what_nothing_needs(store, tmp_path):
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/x")
    store.publish(adapter_folder(tmp_path / "a", 1, {"revision": "b"}), "acme/y")
    assert store.gc(grace_seconds=0) == GcReport(0, 0, 0)
    needed, gone = needed_blobs(store), store.remove("acme/y@1")[0]
    (store.root / "tmp" / "left-by-a-crash").write_bytes(b"x" * 100)
    assert store.gc() == GcReport(0, 0, 0), "all of it is young"
    report = store.gc(grace_seconds=0, dry_run=True)
    assert (report.blobs, report.unfinished) == (2, 1) and blobs_there(store) == needed
    assert store.gc(grace_seconds=0) == report and blobs_there(store) == needed_blobs(store) < needed
    manifest = Manifest(gone.files, gone.annotations).to_bytes()
    assert report.bytes == 100 + gone.files["adapter_config.json"].size + len(manifest)
    assert list((store.root / "tmp").iterdir()) == [] and store.verify().problems == ()


def test_collection_keeps_every_version_with_and_without_an_alias(store, tmp_path):
    for n in range(3):
        store.publish(adapter_folder(tmp_path / f"{n}", n, {"revision": f"{n}"}), "acme/x", aliases=["prod"] if n == 1 else [])
    before = snapshot(store.root)
    assert store.gc(grace_seconds=0) == GcReport(0, 0, 0)
    assert snapshot(store.root) == before and store.verify().problems == ()


def test_collection_goes_by_age(store):
    old, young, again = (store.put_blob(data) for data in (b"old", b"young", b"again"))
    for blob in (old, again):
        os.utime(store.blob_path(blob.digest), (time.time() - 7200,) * 2)
    store.put_blob(b"again")
    assert store.gc().blobs == 1
    assert [store.has_blob(b.digest) for b in (old, young, again)] == [False, True, True]
    os.utime(store.blob_path(young.digest), (time.time() - 7200,) * 2)
    assert store.has_blob(young.digest) and store.gc().blobs == 0, "asking for a blob makes it young: a pull relies on the answer"


def test_collection_between_copy_and_commit_takes_nothing_away(store, tmp_path, monkeypatch):
    """A publish finds its blobs in place, old and needed by nothing, and they are collected before it commits: it still has its copies."""
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/old")
    store.remove("acme/old", all=True)
    for blob in (store.root / "blobs" / "sha256").iterdir():
        os.utime(blob, (0, 0))
    original, collected = Store._commit, []

    def interrupted(self, *arguments):
        collected.append(Store(store.root).gc().blobs)
        return original(self, *arguments)

    monkeypatch.setattr(Store, "_commit", interrupted)
    assert store.publish(tmp_path / "a", "acme/new").ref == "acme/new@1"
    assert collected == [3], "config, weights and manifest"
    assert store.verify().problems == () and files_of(store, "acme/new") == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_collection_leaves_a_living_writers_files_alone(store, tmp_path, monkeypatch):
    """However short the grace is; what a dead writer has left, a folder too, goes."""
    original, found = Store._commit, []
    (store.root / "tmp" / "left").write_bytes(b"xyz")
    (store.root / "tmp" / "pull-of-old").mkdir()
    (store.root / "tmp" / "pull-of-old" / "file").write_bytes(b"x")

    def interrupted(self, *arguments):
        found.append((len(list((store.root / "tmp").iterdir())), Store(store.root).gc(grace_seconds=-60).unfinished))
        return original(self, *arguments)

    monkeypatch.setattr(Store, "_commit", interrupted)
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/new")
    assert found == [(5, 2)], "the copies of two files, the manifest, and what was left"
    assert store.verify().problems == () and list((store.root / "tmp").iterdir()) == []


def test_a_publish_that_cannot_clean_up_leaves_its_files_to_collection(store, tmp_path, monkeypatch):
    """A file that cannot be removed at the end, a disk that fails: the process lives on, and holds none of its copies locked."""
    folder, unlink, refused = adapter_folder(tmp_path / "a", 1), os.unlink, []

    def failing(path, *arguments, **options):
        if Path(path).parent == store.root / "tmp":
            refused.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return unlink(path, *arguments, **options)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        patch.setattr(Store, "_commit", full)
        with pytest.raises(AdapterError, match="cannot publish"):
            store.publish(folder, "acme/new")
    left = list((store.root / "tmp").iterdir())
    assert len(left) == 3 and set(left) == set(refused), "two files and the manifest; the end of one does not keep the others from theirs"
    assert Store(store.root).gc(grace_seconds=-60).unfinished == 3 and list((store.root / "tmp").iterdir()) == []


WRITER = """
import sys
from trimtab.store.registry import Store
from trimtab.store.remotes import pull

store = Store(sys.argv[1])
for source in sys.argv[2:]:
    if source.startswith("file:"):
        pull(store, source, "acme/pulled")
    else:
        store.publish(source, "acme/published")
"""


@pytest.mark.slow
def test_writers_beside_a_collection_without_grace(store, tmp_path):
    """Two processes: one publishes and pulls, this one collects as fast as it can."""
    folders = [adapter_folder(tmp_path / f"{n}", n, {"revision": f"{n}"}) for n in range(8)]
    source = Store(tmp_path / "source", create=True)
    refs = [source.publish(f, "acme/x").ref for f in folders[:4]]
    what = [str(f) for f in folders[4:]] + [f"file://{source.root}#{ref}" for ref in refs]
    command, environment = [sys.executable, "-c", WRITER, str(store.root), *what], os.environ | {"PYTHONPATH": str(ROOT / "src")}
    writer, rounds, until = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment), 0, time.monotonic() + 120
    while writer.poll() is None and time.monotonic() < until:
        store.gc(grace_seconds=0)
        rounds += 1
        time.sleep(0.001)
    writer.kill()
    said = writer.communicate()[1]
    assert writer.returncode == 0, said[-3000:]
    assert rounds > 8 and [len(store.versions(f"acme/{n}")) for n in ("published", "pulled")] == [4, 4]
    assert store.verify().problems == ()


def test_collection_refuses_where_what_is_needed_cannot_be_read(store, tmp_path):
    version = store.publish(adapter_folder(tmp_path / "a", 1), "acme/x")
    store.publish(adapter_folder(tmp_path / "b", 2), "acme/y")
    store.blob_path(version.digest).unlink()
    before = snapshot(store.root)
    with pytest.raises(AdapterError, match="acme/x@1 is refused"):
        Store(store.root).gc(grace_seconds=0)
    assert snapshot(store.root) == before
    removed = Store(store.root).remove("acme/x@1")
    assert [(v.ref, dict(v.files)) for v in removed] == [("acme/x@1", {})], "what is damaged can be removed"
    assert Store(store.root).gc(grace_seconds=0).blobs == 1 and store.verify().problems == ()  # its weights; the config is shared


def test_publishing_again_mends_a_damaged_blob(store, tmp_path):
    version = store.publish(adapter_folder(tmp_path / "a", 1), "acme/x")
    before = snapshot(store.root)
    for digest in {version.digest, *(b.digest for b in version.files.values())}:
        path = store.blob_path(digest)
        path.chmod(0o644)
        path.write_bytes(b"!" + path.read_bytes()[1:])
    assert len(store.verify().problems) >= 3
    assert Store(store.root).publish(tmp_path / "a", "acme/x").version == 1
    assert store.verify().problems == () and snapshot(store.root) == before


# ---- what must be on disk, and when ----


def test_bytes_last_before_names_and_names_before_the_index(store, tmp_path, monkeypatch):
    """The order of fsync and rename in a publish, as a machine that loses power would need it."""
    done: list[tuple[str, str]] = []
    originals = {"fsync": os.fsync, "replace": os.replace}

    def fsync(file):
        done.append(("fsync", str(Path(f"/proc/self/fd/{file}").readlink())))
        originals["fsync"](file)

    def replace(old, new):
        done.append(("replace", str(new)))
        names[str(old)] = str(new)
        originals["replace"](old, new)

    names: dict[str, str] = {}
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    store.publish(adapter_folder(tmp_path / "a", 1), "acme/x")
    blobs_folder, index = str(store.root / "blobs" / "sha256"), str(store.root / "index.json")
    moved = [new for what, new in done if what == "replace"]
    assert len(moved) == 5 and moved[-1] == index, "config, weights, the empty config, the manifest; then the index"
    for old, new in names.items():
        assert done.index(("fsync", old)) < done.index(("replace", new)), f"{new} has its name before its bytes"
    committed = done.index(("replace", index))
    last_blob = max(done.index(("replace", new)) for new in moved[:-1])
    assert last_blob < done.index(("fsync", blobs_folder)) < committed, "the blobs' names last before the index needs them"
    assert ("fsync", str(store.root)) in done[committed:], "the commit lasts before it is reported"
    done.clear()
    store.alias("acme/x@1", "prod")
    assert [what for what, _ in done] == ["fsync", "replace", "fsync"] and done[2][1] == str(store.root)


# ---- sizes before bytes ----


def sparse_weights(folder: Path, size: int) -> None:
    """A sound header that promises one tensor of `size` bytes, and as many bytes that take no room."""
    header = {f"{LAYER}.lora_A.weight": {"dtype": "F32", "shape": [2, size // 8], "data_offsets": [0, size]}}
    write_tensors(folder / "adapter_model.safetensors", header)
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size + size)


@pytest.mark.parametrize("size", [2**40, 2**34])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_huge_file_is_refused_before_a_byte_is_copied(store, base, tmp_path, monkeypatch, size, with_base):
    folder = adapter_folder(tmp_path / "a")
    sparse_weights(folder, size)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 2**30))
    monkeypatch.setattr(blobs.Staging, "write", lambda *a, **k: pytest.fail("it copies"))
    said = r"at most 17,179,869,184" if not with_base else "at most 17,179,869,184|has shape"
    with pytest.raises(AdapterError, match=said):
        store.publish(folder, "acme/x", base=base if with_base else None)
    sparse_weights(folder, 2**32)
    with pytest.raises(AdapterError, match="has shape" if with_base else "are free in"):
        store.publish(folder, "acme/x", base=base if with_base else None)


@pytest.mark.parametrize("at", [0, 7, 31])
def test_values_are_looked_at_piece_by_piece(store, tmp_path, monkeypatch, at):
    """A value that is not finite is found in whichever piece it lies; and a tensor is not zero where only its last piece is not."""
    monkeypatch.setattr(folder_module, "PIECE_BYTES", 16)
    names = (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight")
    values = {n: np.zeros((4, 8)) for n in names}
    values[names[1]].flat[at] = 1.0
    store.publish(publishable(tmp_path / "a", values), "acme/x")
    values[names[1]].flat[at] = np.nan
    with pytest.raises(AdapterError, match=r"lora_B\.weight has values that are not finite"):
        store.publish(publishable(tmp_path / "b", values), "acme/x")
    with pytest.raises(AdapterError, match="all 2 tensors are zero"):
        store.publish(publishable(tmp_path / "c", {n: np.zeros((4, 8)) for n in names}), "acme/x")


def publishable(folder: Path, values: dict[str, np.ndarray]) -> Path:
    adapter_folder(folder, config={"r": 4})
    write_weights(folder, values)
    return folder


@pytest.mark.parametrize("limit", [0, 2**28])
def test_blobs_are_given_out_whole_in_memory_or_on_disk(store, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(blobs, "MEMORY_BYTES", limit)
    folder = adapter_folder(tmp_path / "a", 1)
    store.publish(folder, "acme/x")
    assert files_of(store, "acme/x") == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert list((store.root / "tmp").iterdir()) == []
    with store.open("acme/x") as opened, opened.open("adapter_config.json") as (file, _):
        assert (os.fstat(file).st_dev == (store.root / "tmp").stat().st_dev) == (limit == 0) and os.fstat(file).st_nlink == 0


def test_adopted_files_must_be_what_the_manifest_says(store, tmp_path):
    """Every one of them, the card too, which nothing else reads; then nothing is moved, and nothing published."""
    source = Store(tmp_path / "source", create=True)
    folder = adapter_folder(tmp_path / "a", 1)
    (folder / "README.md").write_text("a card")
    version = source.publish(folder, "acme/x")
    for wrong in version.files:
        given = {b.digest: store.root / "tmp" / f"pull-{i}" for i, b in enumerate(version.files.values())}
        for name, blob in version.files.items():
            shutil.copy(source.blob_path(blob.digest), given[blob.digest])
            if name == wrong:
                given[blob.digest].write_bytes(given[blob.digest].read_bytes()[:-1] + b"?")
        before = snapshot(store.root)
        with pytest.raises(AdapterError, match=f"blob {version.files[wrong].digest} is damaged"):
            store.adopt(source.manifest(version.digest), "acme/x", blobs=given)
        assert snapshot(store.root) == before and all(p.exists() for p in given.values())
    shutil.copy(source.blob_path(version.files[wrong].digest), given[version.files[wrong].digest])
    assert store.adopt(source.manifest(version.digest), "acme/x", blobs=given).digest == version.digest
    assert store.verify().problems == () and files_of(store, "acme/x")["README.md"] == b"a card"


def test_devices_and_pipes_are_no_blobs(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for source in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(AdapterError, match=r"not a regular file|symbolic link"):
            store.put_blob(source)


# ---- blobs one by one ----


def test_blobs_and_a_manifest_from_elsewhere(store, base, tmp_path):
    """What a pull does."""
    source = Store(tmp_path / "source", create=True)
    version = source.publish(stirred(base, LoraConfig(r=2)), "acme/x")
    manifest = source.manifest(version.digest)
    with pytest.raises(AdapterError, match="is missing"):
        store.adopt(manifest, "acme/x")
    for blob in version.files.values():
        data = source.blob_path(blob.digest).read_bytes()
        with pytest.raises(AdapterError, match="the bytes hash to"):
            store.put_blob(data + b"x", blob.digest)
        assert not store.has_blob(blob.digest)
        with source.blob_path(blob.digest).open("rb") as stream:
            found = store.put_blob(stream, blob.digest)
        assert (found.digest, found.size) == (blob.digest, blob.size) and store.has_blob(blob.digest)
        assert store.put_blob(source.blob_path(blob.digest), blob.digest) == found == store.put_blob(data)
    adopted = store.adopt(manifest, "beta/y", aliases=["prod"])
    assert adopted.digest == version.digest and adopted.ref == "beta/y@1" and adopted.aliases == ("prod", "latest")
    assert store.verify().problems == () and Adapter.load("beta/y@prod", base, store=store).verified
    assert store.adopt(manifest, "beta/y").version == 1


def test_a_manifest_from_elsewhere_must_not_lie(store, base, tmp_path):
    source = Store(tmp_path / "source", create=True)
    version = source.publish(stirred(base, LoraConfig(r=2)), "acme/x")
    for blob in version.files.values():
        store.put_blob(source.blob_path(blob.digest))
    for key, value in (("io.trimtab.base.fingerprint", "sha256:fake"), ("io.trimtab.parameters", "1"), ("io.trimtab.method", "ia3")):
        document = json.loads(source.manifest(version.digest))
        document["annotations"][key] = value
        with pytest.raises(AdapterError, match=f"its manifest says {key} = '{value}'"):
            store.adopt(json.dumps(document).encode(), "acme/x")
    document = json.loads(source.manifest(version.digest))
    document["layers"][0]["digest"], document["layers"][2]["digest"] = (document["layers"][n]["digest"] for n in (2, 0))
    document["layers"][0]["size"], document["layers"][2]["size"] = (document["layers"][n]["size"] for n in (2, 0))
    with pytest.raises(AdapterError):
        store.adopt(json.dumps(document).encode(), "acme/x")
    assert store.list() == []
    with pytest.raises(AdapterError, match="no digest"):
        store.manifest("sha256:../../x")
    with pytest.raises(AdapterError, match="missing"):
        store.manifest("sha256:" + HEX)


# ---- several at once ----


def test_threads_and_stores_that_publish_at_once(store, tmp_path):
    """Two threads share a Store, two have their own, and one collects: every publish has a number of its own and none is lost."""
    folders = {(t, n): adapter_folder(tmp_path / f"{t}-{n}", 100 * t + n, {"revision": f"{t}.{n}"}) for t in range(4) for n in range(5)}
    numbers: dict[tuple[int, int], int] = {}
    errors: list[BaseException] = []

    def work(t: int) -> None:
        mine = store if t < 2 else Store(store.root)
        try:
            for n in range(5):
                numbers[t, n] = mine.publish(folders[t, n], "acme/x", aliases=[f"t{t}"]).version
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        Store(store.root).gc(grace_seconds=5)
        store.list()
    assert errors == [] and sorted(numbers.values()) == list(range(1, 21))
    for key, number in numbers.items():
        assert files_of(store, f"acme/x@{number}") == {p.name: p.read_bytes() for p in folders[key].iterdir()}
    assert names_of(store)["acme/x"][1] == {**{f"t{t}": numbers[t, 4] for t in range(4)}, "latest": 20}
    assert store.verify().problems == () and list((store.root / "tmp").iterdir()) == []


FORKS = """
import os, sys, time
from pathlib import Path
from trimtab.store.registry import Store

def work(root, folder):
    store, numbers = Store(root, create=True), []
    Path(folder + ".ready").touch()
    while len(list(Path(folder).parent.glob("*.ready"))) < 2:
        time.sleep(0.001)
    for n in range(20):
        (Path(folder) / "README.md").write_text(f"{folder} {n}")
        numbers.append(store.publish(folder, "acme/support").version)
    Path(folder + ".numbers").write_text(" ".join(map(str, numbers)))
    os._exit(0)

root, *folders = sys.argv[1:]
children = [pid for folder in folders if (pid := os.fork() or work(root, folder))]
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


def test_two_processes_that_publish_one_name_at_once(tmp_path):
    """They make the store together, too."""
    folders = [adapter_folder(tmp_path / "work" / name, n) for n, name in enumerate("ab")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FORKS, str(tmp_path / "store"), *map(str, folders)], env=environment, timeout=300)
    assert done.returncode == 0
    numbers = [[int(n) for n in Path(f"{folder}.numbers").read_text().split()] for folder in folders]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 41)) and all(found == sorted(found) for found in numbers)
    store = Store(tmp_path / "store")
    assert [v.version for v in store.versions("acme/support")] == list(range(1, 41)) and store.verify().problems == ()
    for folder, found in zip(folders, numbers, strict=True):
        assert [files_of(store, f"acme/support@{v}")["README.md"].decode() for v in found] == [f"{folder} {n}" for n in range(20)]


# ---- other tools ----

needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")


def skopeo(*arguments: str) -> str:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_skopeo
def test_skopeo_reads_and_copies_a_store(store, base, tmp_path):
    version = store.publish(stirred(base, LoraConfig(r=2)), "acme/support", aliases=["prod"])
    store.publish(adapter_folder(tmp_path / "a"), "acme/support")
    for selector in ("1", "prod"):
        assert skopeo("inspect", "--raw", f"oci:{store.root}:acme/support@{selector}").encode() == store.manifest(version.digest)
        skopeo("copy", f"oci:{store.root}:acme/support@{selector}", f"oci:{tmp_path / 'other'}:acme/support@{selector}")
    other = Store(tmp_path / "other")
    assert other.resolve("acme/support@prod").digest == version.digest and other.verify().problems == ()
    assert Adapter.load("acme/support@prod", base, store=other).verified
    assert files_of(other, "acme/support@1") == files_of(store, "acme/support@1")
    assert other.publish(adapter_folder(tmp_path / "a"), "acme/support").version == 2, "a copy is a store like any other"
    assert skopeo("inspect", "--raw", f"oci:{other.root}:acme/support@2")


@needs_skopeo
def test_skopeo_writes_into_a_store(store, tmp_path):
    """It keeps what is there: aliases, numbers that are gone, names that never had a version of this tool's."""
    for n in (1, 2):
        store.publish(adapter_folder(tmp_path / "a", n), "acme/support", aliases=[f"v{n}"])
    store.publish(adapter_folder(tmp_path / "a", 3), "acme/support")
    store.remove("acme/support@3")
    before = names_of(store)
    skopeo("copy", f"oci:{store.root}:acme/support@v1", f"oci:{store.root}:beta/copy@1")
    assert names_of(store) == before | {"beta/copy": ({1: before["acme/support"][0][1]}, {"latest": 1})}
    assert store.publish(tmp_path / "a", "acme/support").version == 4 and store.verify().problems == ()
    skopeo("copy", f"oci:{store.root}:acme/support@1", f"oci:{tmp_path / 'nameless'}")
    with pytest.raises(AdapterError, match="has no name: copy it again to oci:FOLDER:namespace/name@1"):
        Store(tmp_path / "nameless").list()
