"""Moving adapters to and from folders that fsspec reaches: this disk, memory, and an S3 server on 127.0.0.1."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.store.remote_servers import Wire, assert_nothing_arrived, contents, filled
from trimtab.errors import AdapterError
from trimtab.store.files import digest_of
from trimtab.store.index import Index, parse_index
from trimtab.store.manifest import EMPTY_DESCRIPTOR
from trimtab.store.name import Entry, Name
from trimtab.store.registry import Store, Version
from trimtab.store.remotes import bucket, fetch, fs, pull, push
from trimtab.store.remotes.source import Source

Filled = tuple[Store, Version, Version]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Do not change it."""
    return filled(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "WAIT_S", 0.001)


@pytest.fixture
def here(tmp_path: Path) -> Store:
    """The store into which adapters are pulled."""
    return Store(tmp_path / "here", create=True)


@pytest.fixture
def memory() -> Iterator[dict[str, Any]]:
    """fsspec's memory: path -> file."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server with an empty bucket `models`; its host:port."""
    import boto3

    for name, value in {"ENDPOINT_URL": f"http://{s3_server}", "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = boto3.resource("s3").Bucket("models")
    bucket.create()
    bucket.objects.all().delete()
    return s3_server


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return _url(request, tmp_path)


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return _url(request, tmp_path)


def _url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    request.getfixturevalue(request.param)
    return {"memory": "memory://shared/adapters", "s3": "s3://models/some/where"}[request.param]


def blob_file(digest: str) -> str:
    return f"/shared/blobs/sha256/{digest.removeprefix('sha256:')}"


# ---- there and back ----


def test_what_is_pulled_is_what_was_pushed(source, here, anywhere, tmp_path):
    (store, first, _), url = source, anywhere
    sent = push(store, "acme/support@1", url)
    assert sent.there == ("acme/support@1",) and sent.moved == first.size + EMPTY_DESCRIPTOR.size and sent.skipped == 0
    got = pull(here, url, "acme/support", aliases=["prod"])
    assert got.version.digest == first.digest and got.version.ref == "acme/support@1" and got.version.aliases == ("prod", "latest")
    assert got.moved == first.size
    assert contents(here, "acme/support@1", tmp_path) == contents(store, "acme/support@1", tmp_path)
    assert here.verify().problems == () and list((here.root / "tmp").iterdir()) == []


def test_what_is_there_is_not_moved_again(source, here, anywhere):
    (store, first, second), url = source, anywhere
    push(store, "acme/support@1", url)
    again = push(store, "acme/support@1", url)
    assert again.moved == 0 and again.skipped == first.size + EMPTY_DESCRIPTOR.size
    assert push(store, "acme/support@2", url).moved == second.files["README.md"].size, "the weights are shared"
    pull(here, f"{url}#acme/support@1", "acme/support")
    got = pull(here, url, "acme/support")
    assert got.version.digest == second.digest and got.version.version == 2
    assert got.moved == second.files["README.md"].size
    same = pull(here, url, "acme/support")
    assert same.moved == 0 and same.version.version == 2, "what the newest version holds is not published again"


def test_s3_there_and_back(source, here, s3):
    store, first, _ = source
    assert push(store, "acme/support@1", "s3://models/a").moved == first.size + EMPTY_DESCRIPTOR.size
    assert pull(here, "s3://models/a", "acme/support").version.digest == first.digest


def test_one_folder_holds_many_adapters_and_their_aliases(source, here, url):
    store, first, second = source
    for ref in ("acme/support@1", "acme/support", "acme/legal"):
        push(store, ref, url)
    assert pull(here, f"{url}#acme/support@prod", "a/prod").version.digest == second.digest
    assert pull(here, f"{url}#acme/support@1", "a/first").version.digest == first.digest
    assert pull(here, f"{url}#acme/support@{first.digest}", "a/digest").version.digest == first.digest
    assert pull(here, f"{url}#acme/support", "a/newest").version.digest == second.digest
    assert pull(here, url, "acme/legal").version.digest == store.resolve("acme/legal").digest
    with pytest.raises(AdapterError, match=r"holds no acme/legal@7") as error:
        pull(here, f"{url}#acme/legal@7", "a/none")
    assert "acme/legal@1, acme/support@2" in error.value.fix


def test_a_stores_own_folder_can_be_pulled_from(source, here):
    store, _, second = source
    assert pull(here, f"file://{store.root}", "acme/support").version.digest == second.digest


def test_a_large_file_is_whole_or_not_there(source, here, anywhere, monkeypatch):
    """What has more than one range goes in parts to an object store; an upload that fails leaves none of them to be seen."""
    (store, first, _), url = source, anywhere
    monkeypatch.setattr(bucket, "RANGE_BYTES", 4096)
    monkeypatch.setattr("trimtab.store.remotes.source.CHUNK_BYTES", 4096)
    real = Source.__iter__

    def breaks(source: Source) -> Iterator[bytes]:
        for number, piece in enumerate(real(source)):
            if number == 3:
                raise ConnectionResetError(104, "connection reset by peer")
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(Source, "__iter__", breaks)
        with pytest.raises(AdapterError, match="does not answer as it should"):
            push(store, "acme/support@1", url)
    files, root = fsspec.core.url_to_fs(url)
    weights = first.files["adapter_model.safetensors"].digest
    assert not files.exists(f"{root}/blobs/sha256/{weights.removeprefix('sha256:')}")
    assert push(store, "acme/support@1", url).skipped < first.size
    assert pull(here, url, "acme/support").version.digest == first.digest


def test_an_empty_file_moves_too(source, here, anywhere, tmp_path):
    folder = source[0].export("acme/support@1", tmp_path / "folder")
    (folder / "README.md").write_bytes(b"")
    version = Store(tmp_path / "own", create=True).publish(folder, "acme/support")
    push(Store(tmp_path / "own"), "acme/support", anywhere)
    assert pull(here, anywhere, "acme/support").version.digest == version.digest


# ---- a push that fails ----


def test_names_are_written_last(source, here, url, monkeypatch):
    store, first, _ = source
    with monkeypatch.context() as patch:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(fs.FolderRemote, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            push(store, "acme/support@1", url)
    with pytest.raises(AdapterError, match="holds no acme/support"):
        pull(here, url, "acme/support")
    assert push(store, "acme/support@1", url).moved == 0
    assert pull(here, url, "acme/support").version.digest == first.digest


def test_a_number_is_never_given_to_other_content(source, here, url):
    store, first, second = source
    push(store, "acme/support@1", url)
    with pytest.raises(AdapterError, match=r"has acme/support@1 already, with other content") as error:
        push(store, "acme/support@2", f"{url}#acme/support@1")
    assert f"{url}#acme/support-other@1" in error.value.fix
    assert pull(here, url, "acme/support").version.digest == first.digest
    push(store, "acme/support@2", f"{url}#acme/support@9")
    assert pull(here, f"{url}#acme/support@9", "acme/nine").version.digest == second.digest
    with pytest.raises(AdapterError, match="a number is missing behind '#'"):
        push(store, "acme/support@2", f"{url}#acme/support@prod")


def test_a_damaged_blob_is_not_pushed(tmp_path, memory):
    store, first, _ = filled(tmp_path)
    weights = first.files["adapter_model.safetensors"]
    path = store.blob_path(weights.digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=f"blob {weights.digest} is damaged"):
        push(store, "acme/support@1", "memory://shared")
    assert blob_file(weights.digest) not in memory and "/shared/index.json" not in memory


def test_a_misspelt_bucket_is_not_made(source, s3):
    import boto3

    with pytest.raises(AdapterError, match="bucket does not exist"):
        push(source[0], "acme/support", "s3://modles/adapters")
    assert [b.name for b in boto3.resource("s3").buckets.all()] == ["models"]


def test_missing_credentials_are_named(source, s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(AdapterError, match="access is refused") as error:
        push(source[0], "acme/support", "s3://models/adapters")
    assert "AWS_ACCESS_KEY_ID" in error.value.fix


def test_pushes_at_the_same_time_keep_each_others_names(tmp_path):
    """On a disk there is a lock."""
    stores = []
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        stores.append(filled(tmp_path / str(number))[0])
    jobs = [(store, ref, f"#team{n}/{ref.partition('/')[2].replace('@', '-')}@1") for n, store in enumerate(stores) for ref in REFS]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(push, store, ref, f"file://{tmp_path}/shared{there}") for store, ref, there in jobs]:
            done.result()
    index, problems = parse_index((tmp_path / "shared" / "index.json").read_bytes())
    assert problems == [] and len(index.live) == len(jobs) == 12


REFS = ("acme/support@1", "acme/support@2", "acme/legal@1")


def test_names_that_another_push_has_overwritten_are_written_anew(source, here, memory, monkeypatch):
    """An object store has no lock: whoever loses sees it when it looks again."""
    store, first, _ = source
    push(store, "acme/legal", "memory://shared")
    old, real, lost = bytes(memory["/shared/index.json"].getvalue()), fs.FolderRemote._put_small, []

    def put(folder: fs.FolderRemote, path: str, data: bytes) -> None:
        real(folder, path, data)
        if path.endswith("index.json") and not lost:
            lost.append(path)
            real(folder, path, old)

    monkeypatch.setattr(fs.FolderRemote, "_put_small", put)
    push(store, "acme/support@1", "memory://shared")
    assert lost and pull(here, "memory://shared", "acme/support").version.digest == first.digest
    assert pull(here, "memory://shared", "acme/legal").version.version == 1


# ---- a pull that is interrupted ----


def failing(monkeypatch: pytest.MonkeyPatch, after: int, times: int) -> Callable[[], int]:
    """Memory that breaks off once `after` bytes of files were read, `times` times; gives how many bytes of blobs were read."""
    from fsspec.implementations.memory import MemoryFileSystem

    real, state = MemoryFileSystem.cat_file, {"read": 0, "failed": 0}

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = real(self, path, start, end, **options)
        if "/blobs/" not in path or len(data) < 1024:
            return data
        if state["read"] + len(data) > after and state["failed"] < times:
            state["failed"] += 1
            raise ConnectionResetError(104, "connection reset by peer")
        state["read"] += len(data)
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return lambda: state["read"]


def test_a_cut_connection_is_taken_up_again(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    monkeypatch.setattr(bucket, "RANGE_BYTES", 4096)
    failing(monkeypatch, after=12_000, times=2)
    assert pull(here, "memory://shared", "acme/support").moved == first.size, "nothing is moved twice"


def test_an_interrupted_pull_goes_on_where_it_stopped(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    monkeypatch.setattr(bucket, "RANGE_BYTES", 4096)
    weights = first.files["adapter_model.safetensors"]
    with monkeypatch.context() as patch:
        read = failing(patch, after=12_000, times=10**6)
        with pytest.raises(AdapterError, match=rf"adapter_model.safetensors, does not answer as it should, {fetch.ATTEMPTS} times"):
            pull(here, "memory://shared", "acme/support")
    assert_nothing_arrived(here)
    there = sum(p.stat().st_size for p in (here.root / "tmp").iterdir())
    assert there >= 4096 and read() > 12_000 - 4096  # a range that was read may not have been written yet; the last one is shorter
    got = pull(here, "memory://shared", "acme/support")
    assert got.version.digest == first.digest and got.moved == first.size - there and got.skipped == there + EMPTY_DESCRIPTOR.size
    assert weights.size - got.moved > 0 and list((here.root / "tmp").iterdir()) == []


def test_a_full_disk_is_named_and_the_pull_goes_on_later(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "write", lambda file, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(AdapterError, match="the store cannot be written: No space left on device"):
            pull(here, "memory://shared", "acme/support")
    assert_nothing_arrived(here)
    assert pull(here, "memory://shared", "acme/support").version.digest == first.digest


def test_a_partial_file_that_went_bad_is_thrown_away(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    monkeypatch.setattr(bucket, "RANGE_BYTES", 4096)
    with monkeypatch.context() as patch:
        failing(patch, after=12_000, times=10**6)
        with pytest.raises(AdapterError):
            pull(here, "memory://shared", "acme/support")
    partial = max((here.root / "tmp").iterdir(), key=lambda p: p.stat().st_size)
    partial.write_bytes(b"?" * partial.stat().st_size)
    with pytest.raises(AdapterError, match="are not those that were promised"):
        pull(here, "memory://shared", "acme/support")
    assert_nothing_arrived(here)
    assert pull(here, "memory://shared", "acme/support").version.digest == first.digest


@pytest.mark.slow
def test_s3_over_a_wire_that_breaks_moves_only_the_rest(source, here, s3, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "s3://models/a")
    monkeypatch.setattr(bucket, "RANGE_BYTES", 2048)
    with Wire(s3, dies=24_000) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{wire.address}")
        with monkeypatch.context() as patch, pytest.raises(AdapterError, match="does not answer"):
            patch.setattr(fetch, "ATTEMPTS", 1)
            pull(here, "s3://models/a", "acme/support")
    assert_nothing_arrived(here)
    there = sum(p.stat().st_size for p in (here.root / "tmp").iterdir())
    assert there > 0
    with Wire(s3) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{wire.address}")
        got = pull(here, "s3://models/a", "acme/support")
    assert got.version.digest == first.digest and got.moved == first.size - there
    assert wire.down < got.moved + 40_000, "headers, index and manifest apart, only the rest has come"


def test_two_pulls_of_the_same_fetch_it_once(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    barrier, real = threading.Barrier(2, timeout=20), fs.FolderRemote.manifest

    def together(folder: fs.FolderRemote) -> bytes:
        barrier.wait()
        return real(folder)

    monkeypatch.setattr(fs.FolderRemote, "manifest", together)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(pull, Store(here.root), "memory://shared#acme/support@1", name) for name in ("acme/one", "acme/two")]
        reports = [j.result() for j in jobs]
    assert {r.version.digest for r in reports} == {first.digest}
    assert sum(r.moved for r in reports) == first.size
    assert here.verify().problems == () and list((here.root / "tmp").iterdir()) == []


def test_a_damaged_blob_of_the_store_is_fetched_anew(source, here, memory):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    pull(here, "memory://shared", "acme/support")
    weights = first.files["adapter_model.safetensors"]
    path = here.blob_path(weights.digest)
    path.chmod(0o644)
    path.write_bytes(b"!" * weights.size)
    assert pull(here, "memory://shared#acme/support@1", "acme/other").moved == weights.size
    assert here.verify().problems == ()


# ---- a side that lies ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "are not those that were promised"),
        (lambda data: data + b"?", "has 28,049 bytes, not 28,048"),
        (lambda data: data[:-1], "has 28,047 bytes, not 28,048"),
        (lambda data: None, "is missing"),
    ],
)
def test_other_bytes_are_refused(source, here, memory, change, words):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    path = blob_file(first.files["adapter_model.safetensors"].digest)
    data = change(memory.pop(path).getvalue())
    if data is not None:
        fsspec.filesystem("memory").pipe_file(path, data)
    with pytest.raises(AdapterError, match=words):
        pull(here, "memory://shared", "acme/support")
    assert_nothing_arrived(here)


def with_manifest(memory: dict[str, Any], version: Version, edit: Callable[[dict[str, Any]], None]) -> None:
    """Put another manifest, with its own digest, where the index points."""
    document = json.loads(memory[blob_file(version.digest)].getvalue())
    edit(document)
    data = json.dumps(document).encode()
    digest = digest_of(data)
    index = Index().with_name(Name("acme/support", {1: Entry(digest, len(data))}, {}, 1))
    fsspec.filesystem("memory").pipe_file(blob_file(digest), data)
    fsspec.filesystem("memory").pipe_file("/shared/index.json", index.to_bytes())


def layer(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        weights = document["layers"][1]
        (weights["annotations"] if name == "org.opencontainers.image.title" else weights)[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (layer("org.opencontainers.image.title", "../../../evil"), r"titled '\.\./\.\./\.\./evil'"),
        (layer("org.opencontainers.image.title", "/etc/passwd"), "titled '/etc/passwd'"),
        (layer("mediaType", "application/x-python-pickle"), "media type 'application/x-python-pickle'"),
        (layer("digest", "sha256:../../../../etc/passwd"), "is not sha256: and 64 hexadecimal digits"),
        (layer("digest", "md5:abc"), "is not sha256: and 64 hexadecimal digits"),
        (layer("size", -1), "size -1 is none"),
        (layer("size", 2**39), r"it claims 549,755,8\d\d,\d{3} bytes; at most 17,179,869,184 are fetched"),
        (layer("size", 28_000), "has 28,048 bytes, not 28,000"),
        (lambda d: d.update(artifactType="application/x-thing"), "artifactType is 'application/x-thing'"),
        (lambda d: d.update(mediaType="application/vnd.oci.image.index.v1+json"), "mediaType is"),
        (lambda d: d.update(subject={}), "unknown key subject"),
        (lambda d: d["layers"].pop(1), "has no adapter_model.safetensors"),
        (lambda d: d["annotations"].update({"io.trimtab.base.fingerprint": "sha256:other"}), "its files say 'sha256:tiny'"),
    ],
)
def test_a_hostile_manifest_is_refused(source, here, memory, edit, words):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    with_manifest(memory, first, edit)
    with pytest.raises(AdapterError, match=words):
        pull(here, "memory://shared", "acme/support")
    assert here.list() == [] and sum(p.stat().st_size for p in (here.root / "tmp").iterdir()) < 10_000, "the weights were not fetched"


def test_nothing_is_fetched_that_the_disk_cannot_hold(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    usage = shutil.disk_usage(here.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=first.size))
    with pytest.raises(AdapterError, match=rf"{first.size:,} bytes are to be fetched, and {first.size:,} are free"):
        pull(here, "memory://shared", "acme/support")
    assert_nothing_arrived(here)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"not JSON", "is not readable JSON"),
        (b'{"schemaVersion":2,"schemaVersion":2,"manifests":[]}', "more than once"),
        (b'{"schemaVersion":2,"manifests":[{"mediaType":"x"}]}', "does not have exactly mediaType, digest, size"),
    ],
)
def test_a_hostile_index_is_refused_and_never_written_over(source, here, memory, index, words):
    fsspec.filesystem("memory").pipe_file("/shared/index.json", index)
    with pytest.raises(AdapterError, match=words):
        pull(here, "memory://shared", "acme/support")
    with pytest.raises(AdapterError, match=words):
        push(source[0], "acme/support@1", "memory://shared")
    assert memory["/shared/index.json"].getvalue() == index


def test_a_change_of_a_large_store_is_of_its_name_and_may_be_folded_meanwhile(source, here, memory, monkeypatch):
    store, _, second = source
    push(store, "acme/support", "memory://shared")
    files, file = fsspec.filesystem("memory"), "/shared/changes/acme@support.json"
    files.pipe_file(file, Index({"acme/legal": Name("acme/legal", {1: Entry(second.digest, 1)}, {}, 1)}).to_bytes())
    with pytest.raises(AdapterError, match=r"changes/acme@support\.json is refused"):
        pull(here, "memory://shared", "acme/support")
    real = type(files).cat_file
    monkeypatch.setattr(type(files), "cat_file", lambda self, path, **at: (memory.pop(file, None), real(self, path, **at))[1])
    assert pull(here, "memory://shared", "acme/support").version.digest == second.digest


def test_an_endless_index_is_not_read(here, memory, monkeypatch):
    monkeypatch.setattr(fs, "MAX_INDEX_BYTES", 1000)
    fsspec.filesystem("memory").pipe_file("/shared/index.json", b" " * 1001)
    with pytest.raises(AdapterError, match="at most 1,000 are read"):
        pull(here, "memory://shared", "acme/support")


# ---- what is missing ----


def test_a_missing_package_names_the_extra(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    loaded = sys.modules["fsspec.registry"]._registry
    for name in [n for n in ("s3", "s3a") if n in loaded]:
        monkeypatch.delitem(loaded, name)
    with pytest.raises(AdapterError, match="needs a package that is missing") as error:
        push(source[0], "acme/support", "s3://bucket/x")
    assert "pip install 'trimtab[s3]'" in error.value.fix


def test_a_bad_alias_or_name_is_refused_before_anything_moves(here):
    with pytest.raises(AdapterError, match="is no alias"):
        pull(here, "memory://nothing", "acme/support", aliases=["3"])
    with pytest.raises(AdapterError, match="a name without a version is expected"):
        pull(here, "memory://nothing", "acme/support@3")


# ---- an overall time limit ----


def test_a_source_that_trickles_is_ended_and_the_next_pull_goes_on(source, here, memory, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    original = fs.FolderRemote.read

    def trickle(self, blob, start):
        for piece in original(self, blob, start):
            for at in range(len(piece)):
                time.sleep(0.01)
                yield piece[at : at + 1]

    with monkeypatch.context() as patch:
        patch.setattr(fs.FolderRemote, "read", lambda self, blob, start: (trickle if blob.size > 10_000 else original)(self, blob, start))
        with pytest.raises(AdapterError, match=r"not done within 0\.6 seconds") as error:
            pull(here, "memory://shared", "acme/support", timeout_s=0.6)
    assert "goes on where it stopped" in error.value.fix
    there = max(p.stat().st_size for p in (here.root / "tmp").iterdir())
    assert here.list() == [] and there > 0
    got = pull(here, "memory://shared", "acme/support")
    assert got.version.digest == first.digest and got.skipped >= there
    assert list((here.root / "tmp").iterdir()) == [] and here.verify().problems == ()


def test_a_read_that_never_returns_is_left_behind_and_commits_nothing(source, here, memory, monkeypatch):
    push(source[0], "acme/support@1", "memory://shared")
    original, go_on, ended = fs.FolderRemote.read, threading.Event(), threading.Event()

    def stuck(self, blob, start):
        go_on.wait(60)
        yield from original(self, blob, start)
        ended.set()

    monkeypatch.setattr(fs.FolderRemote, "read", stuck)
    with pytest.raises(AdapterError, match=r"not done within 0\.2 seconds"):
        pull(here, "memory://shared", "acme/support", timeout_s=0.2)
    go_on.set()
    assert ended.wait(10)
    for thread in threading.enumerate():
        if thread.name == "transfer":
            thread.join(10)
    assert here.list() == []


def test_what_is_refused_leaves_no_partial_files(source, here, memory):
    """They are whole: there is nothing to go on from."""
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    with_manifest(memory, first, lambda d: d["annotations"].update({"io.trimtab.base.fingerprint": "sha256:other"}))
    with pytest.raises(AdapterError, match="its files say"):
        pull(here, "memory://shared", "acme/support")
    assert list((here.root / "tmp").iterdir()) == [] and len(list((here.root / "blobs" / "sha256").iterdir())) <= 1


def test_blobs_that_are_collected_while_a_pull_runs_are_fetched(source, here, memory, monkeypatch):
    """They were here and needed by nothing, so that they were not fetched; a collection takes them before the commit."""
    store, first, _ = source
    push(store, "acme/support@1", "memory://shared")
    for name in ("adapter_config.json", "trimtab.json"):
        here.put_blob(store.blob_path(first.files[name].digest))
    original, collected = Store.adopt, []

    def late(self, *arguments, **options):
        if not collected:
            collected.append(self.gc(grace_seconds=0).blobs)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Store, "adopt", late)
    assert pull(here, "memory://shared", "acme/support").version.digest == first.digest
    assert collected == [2] and here.verify().problems == ()
