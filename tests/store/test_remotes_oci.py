"""Moving adapters to and from OCI registries: Debian's docker-registry, read by skopeo too, and registries that fail or lie."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.store.remote_servers import Wire, assert_nothing_arrived, contents, docker_registry, filled
from trimtab.errors import AdapterError
from trimtab.store.manifest import EMPTY_DESCRIPTOR, MANIFEST_TYPE
from trimtab.store.registry import Store, Version
from trimtab.store.remotes import fetch, oci, pull, push
from trimtab.store.remotes.address import parse_address
from trimtab.store.remotes.oci_session import MAX_REDIRECTS

Filled = tuple[Store, Version, Version]
SECRET = "$2b$04$CrcBgnkr9nEWYEAtK8Cfge3xVsewsGL9B89U05sFHNUmB90.3t7AS"
"""`secret` as bcrypt hashes it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Do not change it."""
    return filled(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Impatient, and with no credentials but those that a test gives."""
    monkeypatch.setattr(fetch, "WAIT_S", 0.001)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(tmp_path / "here", create=True)


@pytest.fixture
def url(registry: str, request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-").replace("--", "-")
    return f"oci://{registry}/acme/{name[:60].strip('-')}"


# ---- there and back, by us and by skopeo ----


def test_what_is_pulled_is_what_was_pushed(source, here, url, tmp_path):
    store, first, second = source
    sent = push(store, "acme/support@1", url)
    assert sent.there == ("1",) and sent.moved == first.size + EMPTY_DESCRIPTOR.size
    assert push(store, "acme/support@1", url).moved == 0
    later = push(store, "acme/support", url)
    assert later.there == ("2", "prod", "latest") and later.moved == second.files["README.md"].size, "the weights are shared"
    got = pull(here, f"{url}:1", "acme/support", aliases=["old"])
    assert got.version.digest == first.digest and got.version.aliases == ("old", "latest") and got.moved == first.size
    assert contents(here, "acme/support@1", tmp_path) == contents(store, "acme/support@1", tmp_path)
    assert pull(here, url, "acme/support").moved == second.files["README.md"].size
    for there in (f"{url}:prod", f"{url}:latest", f"{url}@{second.digest}"):
        assert pull(here, there, "acme/support").version.version == 2
    assert here.verify().problems == () and list((here.root / "tmp").iterdir()) == []


def test_skopeo_reads_what_was_pushed_and_its_copy_is_read_here(source, here, url, tmp_path):
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    store, first, _ = source
    push(store, "acme/support@1", url)
    image = url.replace("oci://", "docker://") + ":1"
    said = subprocess.run([skopeo, "inspect", "--raw", "--tls-verify=false", image], capture_output=True, check=True).stdout
    assert said == store.manifest(first.digest)
    layout = tmp_path / "layout"
    copy = [skopeo, "copy", "--insecure-policy", "--src-tls-verify=false", image, f"oci:{layout}:acme/support@5"]
    subprocess.run(copy, capture_output=True, check=True)
    got = pull(here, f"file://{layout}", "acme/support")
    assert got.version.digest == first.digest and got.moved == first.size


def test_skopeo_pushes_a_stores_folder_and_that_is_pulled(source, here, url):
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    store, first, _ = source
    image = url.replace("oci://", "docker://") + ":latest"
    copy = [skopeo, "copy", "--insecure-policy", "--dest-tls-verify=false", f"oci:{store.root}:acme/support@1", image]
    subprocess.run(copy, capture_output=True, check=True)
    assert pull(here, url, "acme/support").version.digest == first.digest


def test_an_empty_file_moves_too(source, here, url, tmp_path):
    folder = source[0].export("acme/support@1", tmp_path / "folder")
    (folder / "README.md").write_bytes(b"")
    version = Store(tmp_path / "own", create=True).publish(folder, "acme/support")
    push(Store(tmp_path / "own"), "acme/support", url)
    assert pull(here, url, "acme/support").version.digest == version.digest


def test_a_number_is_never_given_to_other_content(source, here, url):
    store, first, second = source
    push(store, "acme/support@1", url)
    push(store, "acme/support@1", f"{url}:2")
    with pytest.raises(AdapterError, match="tag 2 is there already, with other content"):
        push(store, "acme/support@2", url)
    with pytest.raises(AdapterError, match="tag 1 is there already, with other content") as error:
        push(store, "acme/support@2", f"{url}:1")
    assert f"{url}:1-{second.digest[7:15]}" in error.value.fix
    assert push(store, "acme/support@2", f"{url}:candidate").there == ("candidate",)
    assert pull(here, f"{url}:candidate", "acme/support").version.digest == second.digest
    with pytest.raises(AdapterError, match="a digest cannot be pushed to"):
        push(store, "acme/support@1", f"{url}@{first.digest}")


def test_an_unknown_tag_names_those_that_there_are(source, here, url):
    with pytest.raises(AdapterError, match="no tag 'latest'") as error:
        pull(here, url, "acme/support")
    assert "push one" in error.value.fix
    push(source[0], "acme/support@1", url)
    with pytest.raises(AdapterError, match="no tag '7'") as error:
        pull(here, f"{url}:7", "acme/support")
    assert error.value.fix == "tags there are: 1"


# ---- a wire that fails ----


def through(wire: Wire, url: str) -> str:
    return f"oci://{wire.address}/{url.partition('://')[2].partition('/')[2]}"


def test_a_cut_connection_is_taken_up_again(source, here, url, registry, monkeypatch):
    store, first, _ = source
    push(store, "acme/support", url)
    monkeypatch.setattr(oci, "PIECE_BYTES", 512)
    with Wire(registry, cut=14_000) as wire:
        got = pull(here, through(wire, url), "acme/support")
    assert wire.cuts == 0, "it was cut"
    assert got.moved == first.files["adapter_model.safetensors"].size + sum(
        b.size for n, b in got.version.files.items() if n != "adapter_model.safetensors"
    )
    assert got.moved == got.version.size < wire.down < got.version.size + 6_000, "the answers' headers apart, nothing came twice"


def test_an_interrupted_pull_goes_on_where_it_stopped(source, here, url, registry, monkeypatch):
    store, first, _ = source
    monkeypatch.setattr(oci, "PIECE_BYTES", 512)
    push(store, "acme/support@1", url)
    with Wire(registry, dies=18_000) as wire:
        with pytest.raises(AdapterError, match=f"does not answer as it should, {fetch.ATTEMPTS} times in a row") as error:
            pull(here, f"{through(wire, url)}:1", "acme/support")
    assert "it goes on where it stopped" in error.value.fix
    assert_nothing_arrived(here)
    there = sum(p.stat().st_size for p in (here.root / "tmp").iterdir())
    assert 12_000 < there < 18_000
    with Wire(registry) as wire:
        got = pull(here, f"{through(wire, url)}:1", "acme/support")
    assert got.version.digest == first.digest and got.moved == first.size - there
    assert wire.down < got.moved + 6_000, "only the rest came"
    assert list((here.root / "tmp").iterdir()) == []


def test_a_byte_that_flips_on_the_way_is_found(source, here, url, registry):
    push(source[0], "acme/support@1", url)
    with Wire(registry, flip=14_000) as wire:
        with pytest.raises(AdapterError, match="are not those that were promised"):
            pull(here, f"{through(wire, url)}:1", "acme/support")
    assert_nothing_arrived(here)


def test_a_registry_that_is_gone_is_given_up(source, here, monkeypatch):
    started = time.monotonic()
    with pytest.raises(AdapterError, match=f"{fetch.ATTEMPTS} times in a row"):
        pull(here, "oci://127.0.0.1:9/acme/support", "acme/support")
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_pull_that_is_killed_goes_on_where_it_stopped(source, here, url, registry, monkeypatch):
    store, first, _ = source
    push(store, "acme/support@1", url)
    monkeypatch.setattr(oci, "PIECE_BYTES", 512)
    program = "from trimtab.store.remotes import oci; oci.PIECE_BYTES = 512; from trimtab.cli import main; main()"
    with Wire(registry, dies=18_000, stalls=True) as wire:
        words = ["adapters", "pull", f"{through(wire, url)}:1", "acme/support", "--store", str(here.root)]
        child = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while wire.down < 18_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        child.kill()
        assert child.wait() == -9
    assert_nothing_arrived(here)
    there = sum(p.stat().st_size for p in (here.root / "tmp").iterdir())
    assert there > 12_000
    got = pull(here, f"{url}:1", "acme/support")
    assert got.version.digest == first.digest and got.moved == first.size - there


# ---- who may ----


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A registry that wants user `tester` with password `secret`."""
    users = tmp_path / "htpasswd"
    users.write_text(f"tester:{SECRET}\n")
    with docker_registry(tmp_path / "guarded", htpasswd=users) as host:
        yield host


def log_in(folder: Path, host: str, password: str) -> None:
    """What `docker login` writes."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"tester:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def test_credentials_come_from_dockers_file(source, here, guarded, tmp_path, monkeypatch):
    store, first, _ = source
    url = f"oci://{guarded}/acme/support"
    started = time.monotonic()
    with pytest.raises(AdapterError, match=r"the registry refuses access \(401\)") as error:
        push(store, "acme/support@1", url)
    assert "docker login" in error.value.fix
    log_in(tmp_path / ".docker", guarded, "wrong")
    with pytest.raises(AdapterError, match=r"the registry refuses access \(401\)") as error:
        push(store, "acme/support@1", url)
    assert "wrong" not in str(error.value) and time.monotonic() - started < 10
    log_in(tmp_path / "elsewhere", guarded, "secret")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "elsewhere"))
    push(store, "acme/support", url)
    assert pull(here, url, "acme/support").version.digest != first.digest


# ---- registries that fail or lie ----


@dataclass
class Liar:
    """A registry in memory: path -> (status, headers, body), or a list of these, of which each is given once and the last for ever."""

    answers: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    host: str = ""
    ranges: bool = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    liar: Liar

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.liar.asked.append((self.command, path, dict(self.headers)))
        found = self.liar.answers.get(f"{self.command} {path}", self.liar.answers.get(path, (404, {}, b"")))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        status, headers, body = found  # type: ignore[misc]
        asked = self.headers.get("Range")
        if asked and self.liar.ranges and status == 200:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status, headers, body = 206, headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[start:]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what tests are about."""


@pytest.fixture
def liar(source: Filled) -> Iterator[Liar]:
    """A registry that holds acme/support@1 of the source as acme/support:latest, until a test changes its answers."""
    store, first, _ = source
    answers: dict[str, object] = {}
    for blob in first.files.values():
        answers[f"/v2/acme/support/blobs/{blob.digest}"] = (200, {}, store.blob_path(blob.digest).read_bytes())
    answers["/v2/acme/support/manifests/latest"] = (200, {"Content-Type": MANIFEST_TYPE}, store.manifest(first.digest))
    liar = Liar(answers)
    server = Quiet(("127.0.0.1", 0), type("OneHandler", (Handler,), {"liar": liar}))
    liar.host = f"127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield liar
    server.shutdown()
    server.server_close()


def weights_path(source: Filled) -> str:
    return f"/v2/acme/support/blobs/{source[1].files['adapter_model.safetensors'].digest}"


def body(liar: Liar, path: str) -> bytes:
    found = liar.answers[path]
    assert isinstance(found, tuple)
    return bytes(found[2])


def test_the_liar_is_believed_as_long_as_it_does_not_lie(source, here, liar):
    assert pull(here, f"oci://{liar.host}/acme/support", "acme/support").version.digest == source[1].digest


LIES = {
    "larger than promised": (lambda data: (200, {}, data + b"?" * 4096), "is larger than the 28,048 bytes that were promised"),
    "other bytes": (lambda data: (200, {}, data[:-1] + b"?"), "are not those that were promised"),
    "truncated": (lambda data: (200, {"Content-Length": str(len(data))}, data[:9000]), "does not answer as it should"),
    "shorter": (
        lambda data: (200, {}, data[:9000]),
        "does not answer as it should, 5 times in a row: the connection ended 19,048 bytes early",
    ),
    "a redirect to itself": (lambda data: (307, {"Location": "?again"}, b""), "more than 5 redirects"),
    "not there": (
        lambda data: (404, {}, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}'),
        r"answers 404 .*\(blob unknown\)",
    ),
    "gzip": (lambda data: (200, {"Content-Encoding": "gzip"}, data[:-1] + b"?"), "are not those that were promised"),
    "forbidden": (lambda data: (403, {}, b""), r"refuses access \(403\)"),
    "busy for ever": (lambda data: (503, {"Retry-After": "0"}, b""), "5 times in a row: it answers 503"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_weights_is_refused(source, here, liar, lie, monkeypatch):
    make, words = LIES[lie]
    path = weights_path(source)
    liar.answers[path], liar.ranges = make(body(liar, path)), lie != "truncated"
    with pytest.raises(AdapterError, match=words):
        pull(here, f"oci://{liar.host}/acme/support", "acme/support")
    assert_nothing_arrived(here)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"Docker-Content-Digest": f"sha256:{'0' * 64}"}, b"{}"), "the manifest that arrived is not sha256:000"),
        ((200, {}, b"{}"), "schemaVersion is None"),
        ((200, {}, b" " * (2**20 + 1)), "its manifest has more than 1,048,576 bytes"),
        ((200, {}, b"<html>"), "is not readable JSON"),
        ((301, {"Location": "latest"}, b""), "more than 5 redirects"),
    ],
)
def test_a_lie_about_the_manifest_is_refused(here, liar, answer, words):
    liar.answers["/v2/acme/support/manifests/latest"] = answer
    with pytest.raises(AdapterError, match=words):
        pull(here, f"oci://{liar.host}/acme/support", "acme/support")
    assert_nothing_arrived(here)
    assert not any("/blobs/" in path for _, path, _ in liar.asked) and len(liar.asked) <= MAX_REDIRECTS + 1


def test_a_busy_registry_is_waited_for(source, here, liar):
    path = "/v2/acme/support/manifests/latest"
    liar.answers[path] = [(429, {"Retry-After": "0"}, b""), (500, {}, b""), liar.answers[path]]
    assert pull(here, f"oci://{liar.host}/acme/support", "acme/support").version.digest == source[1].digest


def test_retry_after_is_obeyed_up_to_a_limit(here, liar, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    liar.answers["/v2/acme/support/manifests/latest"] = (503, {"Retry-After": "7000"}, b"")
    with pytest.raises(AdapterError, match="answers 503"):
        pull(here, f"oci://{liar.host}/acme/support", "acme/support")
    assert waits == [fetch.MAX_WAIT_S] * (fetch.ATTEMPTS - 1)


@pytest.mark.parametrize("knows", [True, False])
def test_a_registry_without_ranges_is_resumed_too(source, here, liar, knows):
    path = weights_path(source)
    data = body(liar, path)
    liar.answers[path], liar.ranges = [(200, {"Content-Length": str(len(data))}, data[:9000]), (200, {}, data)], knows
    assert pull(here, f"oci://{liar.host}/acme/support", "acme/support").version.digest == source[1].digest
    asked = [headers.get("Range") for _, p, headers in liar.asked if p == path]
    assert asked == [None, f"bytes=9000-{len(data) - 1}"]


def test_another_range_than_asked_for_is_refused(source, here, liar):
    path = weights_path(source)
    data = body(liar, path)
    wrong = (206, {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}, data)
    liar.answers[path] = [(200, {"Content-Length": str(len(data))}, data[:9000]), wrong]
    with pytest.raises(AdapterError, match="another range than was asked for"):
        pull(here, f"oci://{liar.host}/acme/support", "acme/support")
    assert_nothing_arrived(here)


def test_credentials_go_to_the_registry_only(source, here, liar, tmp_path):
    """Uploads may be sent elsewhere, by Location or by redirect: the blob goes there, the password does not."""
    store, first, _ = source
    log_in(tmp_path / ".docker", liar.host, "secret")
    other = Liar({"/upload": (201, {}, b"")})
    server = Quiet(("127.0.0.1", 0), type("OtherHandler", (Handler,), {"liar": other}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    elsewhere = f"http://127.0.0.1:{server.server_address[1]}"
    for blob in [EMPTY_DESCRIPTOR, *first.files.values()]:
        liar.answers[f"HEAD /v2/acme/support/blobs/{blob.digest}"] = (404, {}, b"")
    asks = (401, {"WWW-Authenticate": 'Basic realm="tests"'}, b"")
    liar.answers["/v2/acme/support/blobs/uploads/"] = [asks, (202, {"Location": f"{elsewhere}/upload?state=1"}, b"")]
    liar.answers["PUT /v2/acme/support/manifests/1"] = (201, {}, b"")
    try:
        push(store, "acme/support@1", f"oci://{liar.host}/acme/support")
        path = weights_path(source)
        data = body(liar, path)
        other.answers["/blob"] = (200, {}, data)
        liar.answers[path] = (302, {"Location": f"{elsewhere}/blob"}, b"")
        liar.answers["/v2/acme/support/manifests/latest"] = [asks, liar.answers["/v2/acme/support/manifests/latest"]]
        pull(here, f"oci://{liar.host}/acme/support", "acme/support")
    finally:
        server.shutdown()
        server.server_close()
    assert len(other.asked) == len(first.files) + 2
    assert not any("Authorization" in headers for _, _, headers in other.asked)
    assert any("Authorization" in headers for _, _, headers in liar.asked)


def test_a_token_is_fetched_and_renewed(source, here, liar, tmp_path):
    log_in(tmp_path / ".docker", liar.host, "secret")
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{liar.host}/token",service="s",scope="repository:acme/support:pull"'}
    liar.answers["/token"] = [(200, {}, b'{"token": "first"}'), (200, {}, b'{"token": "second"}')]
    manifest, weights = "/v2/acme/support/manifests/latest", weights_path(source)
    liar.answers[manifest] = [(401, challenge, b""), liar.answers[manifest]]
    liar.answers[weights] = [(401, challenge, b""), liar.answers[weights]]
    assert pull(here, f"oci://{liar.host}/acme/support", "acme/support").version.digest == source[1].digest
    said = {(path, headers.get("Authorization", "")[:6]) for _, path, headers in liar.asked}
    assert {("/token", "Basic "), (manifest, "Bearer"), (weights, "Bearer")} <= said
    assert [headers["Authorization"] for _, path, headers in liar.asked if path == weights] == ["Bearer first", "Bearer second"]


def test_credentials_are_not_sent_unencrypted():
    remote = oci.Registry(parse_address("oci://registry.example.com/acme/support"))  # type: ignore[arg-type]
    challenge = {"Www-Authenticate": 'Bearer realm="http://registry.example.com/token",service="s"'}
    with pytest.raises(AdapterError, match="unencrypted"):
        remote._authenticate(SimpleNamespace(headers=challenge, status_code=401))  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "oras.provider", None)
    with pytest.raises(AdapterError, match=r"'oras.provider' is missing") as error:
        push(source[0], "acme/support", "oci://127.0.0.1:9/acme/support")
    assert error.value.fix == "pip install 'trimtab[oci]'"
