"""Moving adapters to and from the Hugging Face hub: `huggingface_hub`'s own client against a small server that keeps its protocol.

What the real hub does beyond that (its chunk store, quotas, reviews) is not seen here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.hub_server import FakeHub, fake_hub
from tests.store.remote_servers import assert_nothing_arrived, contents, filled
from trimtab.errors import AdapterError
from trimtab.store.registry import Store, Version
from trimtab.store.remotes import fetch, pull, push

# how huggingface_hub calls its HTTP library; the warning names that library's file, which pyproject.toml does not list
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Filled = tuple[Store, Version, Version]
WEIGHTS, CONFIG, NOTE = "adapter_model.safetensors", "adapter_config.json", "trimtab.json"
URL = "hf://acme/support-lora"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Do not change it."""
    return filled(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def files(source: Filled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """acme/support@1 as a folder."""
    return contents(source[0], "acme/support@1", tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "WAIT_S", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(tmp_path / "here", create=True)


# ---- pushing ----


def test_what_is_pulled_is_what_was_pushed(source, here, hub, files):
    store, first, _ = source
    sent = push(store, "acme/support@1", URL)
    commit = sent.there[0]
    assert hub.repos["acme/support-lora"][commit] == files and sent.moved == first.size
    assert hub.private == {"acme/support-lora"}, "a new repository shows itself to nobody"
    got = pull(here, URL, "acme/support", aliases=["prod"])
    assert got.version.digest == first.digest and got.there == (commit,) and got.moved == first.size
    assert got.version.aliases == ("prod", "latest") and got.version.fingerprint == "sha256:tiny"
    assert list((here.root / "tmp").iterdir()) == [] and here.verify().problems == ()


def test_what_is_there_is_not_moved_again(source, here, hub, files):
    store, first, second = source
    commit = push(store, "acme/support@1", URL).there
    again = push(store, "acme/support@1", URL)
    assert again.there == commit and again.moved == 0 and again.skipped == first.size
    later = push(store, "acme/support@2", URL)
    assert later.there != commit and later.moved == second.files["README.md"].size
    uploads = [line for line in hub.log if line.startswith("PUT /lfs/")]
    assert len(uploads) == 1, "the weights went once"
    pull(here, f"{URL}@{commit[0]}", "acme/support")
    hub.sent.clear()
    got = pull(here, URL, "acme/support")
    assert got.version.digest == second.digest and WEIGHTS not in hub.sent and got.skipped == len(files[WEIGHTS])


def test_a_branch_is_made_and_pulled_from(source, here, hub):
    store, first, second = source
    push(store, "acme/support@1", URL)
    push(store, "acme/support@2", f"{URL}@candidate")
    assert pull(here, URL, "acme/support").version.digest == first.digest
    assert pull(here, f"{URL}@candidate", "acme/support").version.digest == second.digest
    with pytest.raises(AdapterError, match="a commit cannot be pushed to"):
        push(store, "acme/support@1", f"{URL}@{'a' * 40}")


def test_other_files_of_a_repository_stay_and_a_stale_note_goes(source, here, hub, files, tmp_path):
    """trimtab.json of the adapter that was there before would contradict the new one's files."""
    hub.add("acme/support-lora", {**files, "notes/eval.md": b"ours", "adapter_config.json": b"{}"})
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in (CONFIG, WEIGHTS):
        (plain / name).write_bytes(files[name])
    own = Store(tmp_path / "own", create=True)
    version = own.publish(plain, "acme/plain")
    commit = push(own, "acme/plain", URL).there[0]
    assert hub.repos["acme/support-lora"][commit] == {
        CONFIG: files[CONFIG],
        WEIGHTS: files[WEIGHTS],
        "README.md": files["README.md"],
        "notes/eval.md": b"ours",
    }
    assert set(version.files) == {CONFIG, WEIGHTS}


def test_a_card_that_the_hub_does_not_take_is_named(source, hub, files, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in (files | {"README.md": b"no front matter"}).items():
        (folder / name).write_bytes(data)
    store = Store(tmp_path / "own", create=True)
    store.publish(folder, "acme/support")
    with pytest.raises(AdapterError, match="the hub does not take it") as error:
        push(store, "acme/support", URL)
    assert "README.md" in str(error.value) and "no front matter" in str(error.value)
    assert not any("/commit/" in line for line in hub.log)


def test_the_token_goes_along_and_is_never_shown(source, here, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    push(source[0], "acme/support@1", URL)
    pull(here, URL, "acme/support")
    assert hub.tokens == {"hub": {"Bearer hf_topsecret"}, "lfs": {""}}, "where large files go is not the hub itself"
    with pytest.raises(AdapterError) as error:
        pull(here, "hf://acme/missing", "acme/support")
    assert "topsecret" not in str(error.value)


# ---- pulling ----


def test_a_plain_peft_folder_is_kept_as_unverified(here, hub, files):
    hub.add("them/plain", {CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS], "adapter_model.bin": b"\x80pickle", "run.py": b"import os"})
    got = pull(here, "hf://them/plain", "them/plain")
    assert got.version.fingerprint == "" and set(got.version.files) == {CONFIG, WEIGHTS}
    assert set(hub.sent) == {CONFIG, WEIGHTS}, "only known names are fetched"


def test_the_commit_is_pinned_while_files_are_fetched(here, hub, files, source):
    """What is pushed between two files does not mix with what was asked for."""
    first = hub.add("acme/support-lora", files)
    seen: list[str] = []

    def begin(name: str, size: int, there: int):  # the branch moves before every file
        seen.append(name)
        hub.add("acme/support-lora", dict.fromkeys(files, b"other"))
        return lambda count: None

    got = pull(here, f"{URL}@main", "acme/support", begin=begin)
    assert got.version.digest == source[1].digest and got.there == (first,) and len(seen) == len(files)
    assert all(f"/resolve/{first}/" in line for line in hub.log if "/resolve/" in line)


def test_a_cut_connection_is_taken_up_again(here, hub, files, source):
    hub.add("acme/support-lora", files)
    hub.cut = 9000
    got = pull(here, URL, "acme/support")
    assert hub.cut is None, "it was cut"
    assert got.version.digest == source[1].digest and got.moved == source[1].size
    assert hub.sent == {n: len(d) for n, d in files.items()}, "nothing came twice"


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_pull_goes_on_where_it_stopped(here, hub, files, source, monkeypatch, ranges):
    hub.add("acme/support-lora", files)
    hub.cut, hub.ranges = 9000, ranges
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "ATTEMPTS", 1)
        with pytest.raises(AdapterError, match="does not answer as it should"):
            pull(here, URL, "acme/support")
    assert_nothing_arrived(here)
    there = sum(p.stat().st_size for p in (here.root / "tmp").iterdir())
    got = pull(here, URL, "acme/support")
    assert got.version.digest == source[1].digest and got.skipped == there >= 9000 and list((here.root / "tmp").iterdir()) == []
    if ranges:
        assert hub.sent == {n: len(d) for n, d in files.items()}, "only the rest came"


def test_a_busy_hub_is_waited_for(here, hub, files, source):
    hub.add("acme/support-lora", files)
    hub.busy = 2
    assert pull(here, URL, "acme/support").version.digest == source[1].digest
    hub.busy = 10**6
    with pytest.raises(AdapterError, match="5 times in a row: the hub answers 503"):
        pull(here, URL, "acme/support")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda data: data[:-3] + b"?" + data[-2:], "are not those that were promised"),
        (lambda data: data + b"?", r"is larger than the [\d,]+ bytes that were promised"),
        (lambda data: data[:-1], "does not answer as it should"),
    ],
)
def test_other_bytes_are_refused(here, hub, files, name, lie, words):
    hub.add("acme/support-lora", files)
    hub.lies[name] = lie(files[name])
    with pytest.raises(AdapterError, match=words):
        pull(here, URL, "acme/support")
    assert_nothing_arrived(here)


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({WEIGHTS: {"size": 2**40}}, r"it claims 1,099,511,\d{3},\d{3} bytes; at most 17,179,869,184 are fetched"),
        ({CONFIG: {"size": 2**21}}, "adapter_config.json has 2,097,152 bytes; at most 1,048,576 are read"),
        ({CONFIG: {"size": None}}, "adapter_config.json has no size"),
        ({CONFIG: {"blobId": "../../x"}}, "adapter_config.json has no digest"),
        ({WEIGHTS: {"lfs": {"sha256": "zz", "size": 1, "pointerSize": 1}}}, "adapter_model.safetensors has no digest"),
    ],
)
def test_claims_are_bounded_before_anything_is_fetched(here, hub, files, claims, words):
    hub.add("acme/support-lora", files)
    hub.claims = claims
    with pytest.raises(AdapterError, match=words):
        pull(here, URL, "acme/support")
    assert hub.sent == {}
    assert_nothing_arrived(here)


def test_a_repository_without_an_adapter_is_refused(here, hub):
    hub.add("them/model", {"pytorch_model.bin": b"?", "config.json": b"{}"})
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not there"):
        pull(here, "hf://them/model", "acme/x")
    hub.add("them/old", {CONFIG: b"{}", "adapter_model.bin": b"\x80pickle"})
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        pull(here, "hf://them/old", "acme/x")
    assert hub.sent == {}


def test_what_the_stores_checks_refuse_is_not_published(here, hub, files):
    config = json.loads(files[CONFIG]) | {"peft_type": "ADALORA"}
    hub.add("them/plain", {CONFIG: json.dumps(config).encode(), WEIGHTS: files[WEIGHTS]})
    with pytest.raises(AdapterError, match="ADALORA"):
        pull(here, "hf://them/plain", "acme/x")
    assert_nothing_arrived(here)


def test_what_does_not_exist_is_named(here, hub, files):
    with pytest.raises(AdapterError, match="no such repository, or none that you may see") as error:
        pull(here, "hf://acme/missing", "acme/x")
    assert "hf auth login" in error.value.fix
    hub.add("acme/support-lora", files)
    with pytest.raises(AdapterError, match="no such revision"):
        pull(here, f"{URL}@missing", "acme/x")


def test_a_redirect_loop_ends(here, hub, files):
    hub.add("acme/support-lora", files)
    hub.loop = True
    with pytest.raises(AdapterError, match="too many redirects"):
        pull(here, URL, "acme/support")
    assert_nothing_arrived(here)


def test_offline_means_offline(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set"):
        pull(here, URL, "acme/support")
