"""A run whose `out` is a bucket: it goes on on another machine, others read it, and a broken network loses nothing.

A machine is a folder for working copies ($TRIMTAB_RUNS). Buckets are fsspec's memory, a folder, and a server of S3 on 127.0.0.1.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.store.test_remotes_fs import memory, s3, s3_server  # noqa: F401 (fixtures)
from tests.train.common import METHODS, run_file, tiny_base
from tests.train.kill_harness import differences, results
from trimtab.cli import main
from trimtab.cluster.marker import Marker
from trimtab.errors import ConfigError, TrimtabError
from trimtab.store import Adapter
from trimtab.store.remotes import fetch, snapshot
from trimtab.store.remotes.snapshot import SNAPSHOT, Copy, Snapshot, TakenOver, brought
from trimtab.train import RunConfig, train
from trimtab.train.checkpoint import steps_of
from trimtab.train.hold import Occupied
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.mirror import Mirror
from trimtab.train.sweep import sweep
from trimtab.train.trials import Sweep

ONE = {"v": METHODS["lora"] | {"data": "a", "max_steps": 8}}
Machine = Callable[[str], None]


class Killed(BaseException):
    """The process ends here."""


class At(Silent):
    """Remembers what a run says; does something after a step."""

    def __init__(self, step: int = 0, does: Callable[[], object] = lambda: None):
        self.at, self.does, self.warnings, self.notes = step, does, list[str](), list[str]()

    def step(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.at:
            self.does()

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Go over to another machine, at first the one of name "a"."""
    monkeypatch.setattr(fetch, "WAIT_S", 0.001)

    def go(name: str) -> None:
        monkeypatch.setenv("TRIMTAB_RUNS", str(tmp_path / name / "runs"))
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / name / "cache"))

    go("a")
    return go


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "file":
        request.getfixturevalue(request.param)
    return {"file": f"file://{tmp_path}/shared/run", "memory": "memory://shared/run", "s3": "s3://models/some/run"}[request.param]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves in a folder when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    run = RunConfig.from_dict(run_file(folder, ONE, checkpoint_every=2), root=folder)
    train(run, base=tiny_base())
    return results(run.out)


def config(folder: Path, url: str, variants: dict[str, dict[str, Any]] = ONE) -> RunConfig:
    return RunConfig.from_dict(run_file(folder, variants, checkpoint_every=2) | {"out": url}, root=folder)


def interrupt(run: RunConfig, after: int, heard: At | None = None) -> None:
    stop, heard = Stop(), heard or At()
    heard.at, heard.does = after, lambda: stop.ask(15)
    with pytest.raises(Interrupted):
        train(run, base=tiny_base(), listener=heard, stop=stop)


def there(url: str) -> dict[str, bytes]:
    """What is in the bucket, read by fsspec alone."""
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    return {path.removeprefix(root).lstrip("/"): files.cat_file(path) for path in files.find(root)}


def test_a_run_goes_on_on_another_machine(tmp_path: Path, url: str, machine: Machine, whole: dict[str, Any]) -> None:
    first = config(tmp_path, url)
    interrupt(first, after=5)
    assert first.out.is_relative_to(tmp_path / "a")
    kept = there(url)
    assert {p for p in kept if p.startswith("checkpoints/")} == {
        f"checkpoints/step-00000005/{n}" for n in ("manifest.json", "state.json", "v.safetensors")
    }
    assert kept["metrics.jsonl"] == (first.out / "metrics.jsonl").read_bytes() and "summary.json" not in kept

    machine("b")
    second = config(tmp_path, url)
    with pytest.raises(ConfigError, match=r"is not empty: a run never overwrites another") as caught:
        train(second, base=tiny_base())
    assert "--resume" in caught.value.fix and not second.out.exists()
    report = train(second, base=tiny_base(), resume=True)
    assert report.url == url and report.out == second.out and report.out.is_relative_to(tmp_path / "b")
    assert differences(whole, results(second.out)) == ""
    kept, here = there(url), {p.relative_to(second.out).as_posix(): p for p in second.out.rglob("*") if p.is_file()}
    sent = {p for p in here if not p.startswith((".lock", "checkpoints/step-00000006"))}
    assert kept.keys() == sent | {SNAPSHOT} and all(kept[p] == here[p].read_bytes() for p in sent)

    machine("c")
    again = train(config(tmp_path, url), base=tiny_base(), resume=True)
    assert again.summary == report.summary and list(again.adapters) == ["v"]
    assert there(url) == kept


def recorded(monkeypatch: pytest.MonkeyPatch, each: Callable[[int, str], None]) -> list[str]:
    """What is written into memory, in its order. each: called before the n-th, from 1."""
    from fsspec.implementations.memory import MemoryFileSystem

    put, paths = MemoryFileSystem.pipe_file, list[str]()

    def pipe_file(files: Any, path: str, value: bytes, **options: Any) -> None:
        each(len(paths) + 1, path)
        paths.append(path)
        put(files, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    return paths


def test_what_names_files_is_written_after_them(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    paths = recorded(monkeypatch, lambda n, path: None)
    train(config(tmp_path, "memory://shared/run"), base=tiny_base())
    names = [p.removeprefix("/shared/run/") for p in paths]
    assert names[:2] == ["run.json", SNAPSHOT] or names[:3] == ["metrics.jsonl", "run.json", SNAPSHOT]
    for step in (2, 4, 6, 8):
        folder = f"checkpoints/step-{step:08d}"
        at = names.index(f"{folder}/manifest.json")
        assert names[at - 3 : at + 2] == [
            "metrics.jsonl",
            f"{folder}/state.json",
            f"{folder}/v.safetensors",
            f"{folder}/manifest.json",
            SNAPSHOT,
        ]
    assert names[-2:] == ["summary.json", SNAPSHOT]
    assert names.index("adapters/v/adapter_model.safetensors") < names.index("summary.json")


@pytest.mark.slow
def test_a_machine_that_dies_at_any_write_leaves_a_run_that_goes_on(
    tmp_path: Path,
    memory: Any,  # noqa: F811
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {"v": ONE["v"] | {"max_steps": 4}}
    with monkeypatch.context() as patch:
        paths, run = recorded(patch, lambda n, path: None), config(tmp_path, "memory://shared/whole", short)
        train(run, base=tiny_base())
    whole = results(run.out)
    assert len(paths) > 18
    for dies in range(1, len(paths) + 1):
        url = f"memory://shared/{dies}"

        def die(n: int, path: str, at: int = dies) -> None:
            if n == at:
                raise Killed

        machine(f"a{dies}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            recorded(patch, die)
            train(config(tmp_path, url, short), base=tiny_base())
        machine(f"b{dies}")
        run = config(tmp_path, url, short)
        train(run, base=tiny_base(), resume=True)
        assert differences(whole, results(run.out)) == "", dies


def test_a_broken_network_ends_nothing(tmp_path: Path, memory: Any, machine: Machine, whole: dict[str, Any], monkeypatch: Any) -> None:  # noqa: F811
    """It breaks after the first checkpoint and comes back before the last: what was not sent is sent then."""
    broken, tried = [False], [0]

    def each(n: int, path: str) -> None:
        if broken[0]:
            tried[0] += 1
            raise ConnectionResetError(104, "connection reset by peer")

    recorded(monkeypatch, each)
    heard = At()

    def step(line: Mapping[str, Any]) -> None:
        broken[0] = 3 <= line["step"] <= 7

    heard.step = step  # type: ignore[method-assign]
    run = config(tmp_path, "memory://shared/run")
    train(run, base=tiny_base(), listener=heard)
    assert len(heard.warnings) == 2 and all(f"is kept in {run.out}" in text for text in heard.warnings)
    assert tried == [fetch.ATTEMPTS + 1], "the second time it is asked once: a step does not wait"
    assert heard.notes == ["memory://shared/run is in reach again and has all that was kept"]
    assert differences(whole, results(run.out)) == ""
    assert there("memory://shared/run")["summary.json"] == (run.out / "summary.json").read_bytes()


def test_a_network_that_stays_broken_loses_nothing(tmp_path: Path, memory: Any, machine: Machine, whole: Any, monkeypatch: Any) -> None:  # noqa: F811
    url, broken = "memory://shared/run", [False]

    def each(n: int, path: str) -> None:
        if broken[0]:
            raise ConnectionResetError(104, "connection reset by peer")

    recorded(monkeypatch, each)
    run = config(tmp_path, url)
    with pytest.raises(TrimtabError, match=r"the run is finished and kept in .*, but could not be sent to") as caught:
        train(run, base=tiny_base(), listener=At(3, lambda: broken.__setitem__(0, True)))
    assert "--resume on this machine: it sends the rest" in caught.value.fix
    assert differences(whole, results(run.out)) == ""
    assert "checkpoints/step-00000002/manifest.json" in there(url), "what was sent before is still there"
    broken[0] = False
    machine("b")  # another machine goes on from what it finds, and comes to the same
    other = config(tmp_path, url)
    train(other, base=tiny_base(), resume=True)
    assert differences(whole, results(other.out)) == ""
    machine("a")
    again = train(run, base=tiny_base(), resume=True)
    assert again.summary["content"] == json.loads(there(url)["summary.json"])["content"]


def test_a_machine_that_was_cut_off_sends_nothing_more(tmp_path: Path, url: str, machine: Machine, whole: dict[str, Any]) -> None:
    run, left = config(tmp_path, url), dict[str, bytes]()

    def succeed() -> None:
        machine("b")
        train(config(tmp_path, url), base=tiny_base(), resume=True)
        left.update(there(url))
        machine("a")

    with pytest.raises(Occupied, match=r"has taken over out = .*, so this run ends, and sends nothing more there; it is kept in"):
        train(run, base=tiny_base(), listener=At(5, succeed))
    assert there(url) == left and [p.name for p in steps_of(run.out)][:1] == ["step-00000006"]
    machine("b")
    assert differences(whole, results(config(tmp_path, url).out)) == ""


def test_who_comes_late_takes_no_newer_checkpoint_away(tmp_path: Path, memory: Any, machine: Machine) -> None:  # noqa: F811
    """The run that was thought dead has gone on while its successor loaded the base."""
    url = "memory://shared/run"
    run = config(tmp_path, url)
    interrupt(run, after=3)
    machine("b")
    late = Mirror(url, At())
    late.fetch(resume=True)
    machine("a")
    train(run, base=tiny_base(), resume=True)
    kept = there(url)
    with pytest.raises(Occupied, match="has a checkpoint of step 8, which is newer") as caught:
        late.begin()
    assert "resume once more" in caught.value.fix and there(url) == kept


@pytest.mark.parametrize("older", [True, False], ids=["newest", "only"])
def test_a_damaged_checkpoint_is_fetched_again(older: bool, tmp_path: Path, memory: Any, whole: dict[str, Any]) -> None:  # noqa: F811
    """Of two the newest, or the only one: the bucket's is whole."""
    run, heard = config(tmp_path, "memory://shared/run"), At()
    interrupt(run, after=5)
    newest, *others = steps_of(run.out)
    assert others
    for path in [] if older else others:
        shutil.rmtree(path)
    (newest / "v.safetensors").write_bytes(b"")
    train(run, base=tiny_base(), resume=True, listener=heard)
    assert differences(whole, results(run.out)) == ""
    assert any("step-00000005" in text and "v.safetensors has 0 bytes" in text for text in heard.warnings)


def test_a_damaged_checkpoint_of_a_finished_run_takes_no_results_away(tmp_path: Path, memory: Any, monkeypatch: Any) -> None:  # noqa: F811
    """The results could not be sent; the bucket has the last checkpoint, and here it is damaged."""
    run, url = config(tmp_path, "memory://shared/run"), "memory://shared/run"
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "finish", lambda self: None)
        train(run, base=tiny_base())
    kept = (run.out / "summary.json").read_bytes()
    for path in steps_of(run.out):
        (path / "v.safetensors").write_bytes(b"")
    assert "summary.json" not in there(url)
    train(run, base=tiny_base(), resume=True)
    assert there(url)["summary.json"] == kept


def test_what_finished_here_does_not_take_anothers_name(tmp_path: Path, memory: Any, machine: Machine) -> None:  # noqa: F811
    """The run has finished here unsent, and another machine trains on from its last checkpoint: one of them must hear of the other."""
    url = "memory://shared/run"
    run, other = config(tmp_path, url), Mirror(url, At())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "finish", lambda self: None)
        train(run, base=tiny_base())
    machine("b")
    other = Mirror(url, At())
    other.fetch(resume=True)
    other.begin()
    machine("a")
    train(run, base=tiny_base(), resume=True)
    assert "summary.json" in there(url)
    machine("b")
    with pytest.raises(Occupied, match="has taken over"):
        other.saved()


def test_checkpoints_that_nobody_names_go(tmp_path: Path, url: str) -> None:
    """Of a sender that was killed before it named them, or after it named others; what is no checkpoint of the run stays."""
    run = config(tmp_path, url)
    interrupt(run, after=3)
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    for path in (
        "checkpoints/step-00000002/v.safetensors",
        "checkpoints/step-00000009/state.json",
        "group/checkpoints/step-00000001/x",
        "own",
    ):
        if "file" in url:
            files.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{root}/{path}", b"x")
    train(run, base=tiny_base(), resume=True)
    left = there(url)
    assert {p.split("/")[1] for p in left if p.startswith("checkpoints/")} == {"step-00000008"}
    assert {"own", "group/checkpoints/step-00000001/x"} <= left.keys()


def test_what_another_one_sends_meanwhile_stays(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Another machine claims the run, and has sent a file that its snapshot will name later, when the list of files comes here."""
    url, path, listed = "memory://shared/run", "checkpoints/step-00000009/v.safetensors", Copy.files
    mirror = Mirror(url, At())
    mirror.fetch(resume=False)
    mirror.folder.mkdir(parents=True, exist_ok=True)

    def files(self: Copy) -> list[str]:
        Copy(url).send(tmp_path, [], claim=True)
        fs, root = fsspec.core.url_to_fs(url)
        fs.pipe_file(f"{root}/{path}", b"x")
        return listed(self)

    monkeypatch.setattr(Copy, "files", files)
    with pytest.raises(Occupied, match="has taken over out = 'memory://shared/run'"):
        mirror.begin()
    assert there(url)[path] == b"x"


def test_a_bucket_out_of_reach_is_not_one_without_checkpoints(tmp_path: Path, memory: Any, monkeypatch: Any) -> None:  # noqa: F811
    from fsspec.implementations.memory import MemoryFileSystem

    run = config(tmp_path, "memory://shared/run")
    assert Mirror(run.url, At()).newest() == ""
    interrupt(run, after=3)
    assert Mirror(run.url, At()).newest() == "step-00000003"
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(ConfigError, match=r"out = 'memory://shared/run'.*no route") as caught:
        Mirror(run.url, At()).newest()
    assert "reached" in caught.value.fix


def test_who_brings_a_copy_waits_for_who_does(tmp_path: Path, memory: Any, monkeypatch: Any) -> None:  # noqa: F811
    """Two processes that share a cache would take each other's files away where their snapshots differ."""
    url, copy, put = "memory://shared/run", Copy("memory://shared/run"), Copy.fetch
    (source := tmp_path / "source").mkdir()
    (source / "a").write_text("a")
    copy.send(source, ["a"], claim=True)
    second, waited = list[threading.Thread](), list[bool]()

    def fetch(self: Copy, *what: Any) -> None:
        if not second:
            second.append(threading.Thread(target=brought, args=(url,)))
            second[0].start()
            second[0].join(0.3)
            waited.append(second[0].is_alive())
        put(self, *what)

    monkeypatch.setattr(Copy, "fetch", fetch)
    folder = brought(url)
    second[0].join()
    assert waited == [True] and [p.name for p in folder.iterdir()] == ["a"]


def test_what_cannot_be_written_is_named(tmp_path: Path, memory: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A file where working copies are to be, and a disk that is full when a checkpoint is fetched."""
    url = "memory://shared/run"
    interrupt(config(tmp_path, url), after=3)
    machine("b")
    (tmp_path / "b").write_text("in the way")
    with pytest.raises(ConfigError, match=r"its working copy .* cannot be made: Not a directory") as caught:
        train(config(tmp_path, url), base=tiny_base(), resume=True)
    assert "TRIMTAB_RUNS" in caught.value.fix
    machine("c")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "atomic_write", full)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        train(config(tmp_path, url), base=tiny_base(), resume=True)


def test_what_a_killed_sender_leaves_can_be_fetched(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It replaces a file that the snapshot names (a longer one, one of the same length), and one has grown."""
    here, dies, ended = tmp_path / "here", 0, False
    first = {"log": b"a", "orders": b"stop b", "plan": b"steps 4", "weights": b"0" * 100}
    then = {"log": b"ab", "orders": b"", "plan": b"steps 6", "weights": b"0" * 100, "more": b"1"}
    here.mkdir()

    def write(files: Mapping[str, bytes]) -> list[str]:
        for name, data in files.items():
            (here / name).write_bytes(data)
        return list(files)

    def die(n: int, path: str) -> None:
        if n == dies:
            raise Killed

    while not ended:
        dies += 1
        copy = Copy(f"memory://shared/{dies}")
        copy.send(here, write(first), claim=True)
        with monkeypatch.context() as patch, suppress(Killed):
            recorded(patch, die)
            copy.send(here, write(then))
            ended = True
        found = copy.read()
        assert found is not None and {"log", "weights"} <= found.files.keys()
        copy.fetch(found, there := tmp_path / f"there-{dies}", found.files)
        assert all((there / name).read_bytes() in (first.get(name), then[name]) for name in found.files)
    assert dies == 8 and found.files.keys() == then.keys()


def test_who_is_taken_over_while_it_sends_names_nothing(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (tmp_path / "weights").write_bytes(b"0")
    ours, theirs = (Copy("memory://shared/run") for _ in range(2))
    ours.send(tmp_path, [], claim=True)

    def each(n: int, path: str) -> None:
        if path.endswith("weights"):
            theirs.send(tmp_path, [], claim=True)

    recorded(monkeypatch, each)
    with pytest.raises(TakenOver):
        ours.send(tmp_path, ["weights"])
    assert ours.read() == Snapshot(theirs.sender)


def test_a_file_of_a_killed_driver_is_in_nobodys_way(tmp_path: Path, memory: Any) -> None:  # noqa: F811
    run = config(tmp_path, "memory://shared/run")
    Marker(run)
    interrupt(run, after=1)
    assert "checkpoints/step-00000001/manifest.json" in there("memory://shared/run")


def test_a_finished_run_is_extended_elsewhere(tmp_path: Path, url: str, machine: Machine) -> None:
    """At a constant learning rate it comes to what a run of that length comes to."""
    short, longer = ({"v": ONE["v"] | {"schedule": "constant", "max_steps": n}} for n in (4, 6))
    train(config(tmp_path, url, short), base=tiny_base())
    assert "summary.json" in there(url)
    machine("b")
    run, seen = config(tmp_path, url, longer), list[set[str]]()
    train(run, base=tiny_base(), resume=True, extend=True, listener=At(5, lambda: seen.append(set(there(url)))))
    assert not {p for p in seen[0] if p.startswith(("summary", "adapters"))}, "while it trains it has not finished"
    alone = RunConfig.from_dict(run_file(tmp_path / "alone", longer), root=tmp_path / "alone")
    train(alone, base=tiny_base())
    ours, theirs = (load_file(out / "adapters/v/adapter_model.safetensors") for out in (run.out, alone.out))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())
    assert json.loads(there(url)["summary.json"])["variants"]["v"]["steps"] == 6


def test_others_read_it_by_its_url(tmp_path: Path, url: str, machine: Machine, tiny_llama_folder: Path) -> None:
    report = train(config(tmp_path, url), base=tiny_base())
    machine("b")
    done = CliRunner().invoke(main, ["compare", url, "--json", "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)["variants"]
    assert (row["run"], row["variant"]) == ("run", "v") and row["scores"]["loss"] == report.summary["variants"]["v"]["scores"]["loss"]
    assert (tmp_path / "page.html").stat().st_size > 1000
    loaded = Adapter.load(f"{url}/adapters/v", tiny_base())
    assert loaded.params.keys() == report.adapters["v"].params.keys()
    assert all(torch.equal(t, loaded.params[name]) for name, t in report.adapters["v"].params.items())
    assert not list((tmp_path / "b").rglob("checkpoints")), "nobody needs them to read"
    for wrong in (f"{url}/adapters/w", f"{url}-other"):
        with pytest.raises(TrimtabError, match="there is no run or adapter"):
            brought(wrong)


def test_what_somebody_else_has_is_not_overwritten(tmp_path: Path, memory: Any) -> None:  # noqa: F811
    files, _ = fsspec.core.url_to_fs("memory://shared/run")
    files.pipe_file("/shared/run/thesis.txt", b"years of work")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not empty"):
            train(config(tmp_path, "memory://shared/run"), base=tiny_base(), resume=resume)
    assert there("memory://shared/run") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("out", "wanted"),
    [
        ("hf://me/run", "is no folder of a file system"),
        ("s3://me:secret@bucket/run", "carries a user name or password"),
        ("nonsense://bucket/run", "nonsense:// is not known"),
        ("s3://bucket/../run", "leaves it through"),
    ],
)
def test_what_is_no_bucket(tmp_path: Path, out: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        train(config(tmp_path, out), base=tiny_base())
    assert "secret" not in str(caught.value)


def test_a_damaged_copy_is_named(tmp_path: Path, memory: Any, machine: Machine) -> None:  # noqa: F811
    url = "memory://shared/run"
    interrupt(config(tmp_path, url), after=5)
    path = "/shared/run/checkpoints/step-00000005/v.safetensors"
    files, _ = fsspec.core.url_to_fs(url)
    data = bytearray(files.cat_file(path))
    data[-1] ^= 1
    files.pipe_file(path, bytes(data))
    machine("b")
    with pytest.raises(ConfigError, match=r"v\.safetensors is not what snapshot\.json says"):
        train(config(tmp_path, url), base=tiny_base(), resume=True)
    files.pipe_file(path, bytes(data[:-1]))
    with pytest.raises(ConfigError, match=r"v\.safetensors has .* bytes, and snapshot\.json says"):
        train(config(tmp_path, url), base=tiny_base(), resume=True)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "./a", ""])
def test_a_snapshot_names_files_of_its_folder_alone(path: str) -> None:
    content = {"sender": {"token": "t"}, "files": {path: {"size": 1, "sha256": "0"}}}
    with pytest.raises(ValueError, match="is no file of it"):
        Snapshot.parse(json.dumps(content).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b'{"sender": {}}', b'{"sender": {}, "files": {"a": {"size": "x", "sha256": ""}}}'])
def test_what_is_no_snapshot(data: bytes) -> None:
    with pytest.raises(ValueError):
        Snapshot.parse(data)


@pytest.mark.slow
def test_a_sweep_goes_on_on_another_machine(tmp_path: Path, memory: Any, machine: Machine) -> None:  # noqa: F811
    from tests.train.test_sweep import TEMPLATE, content

    search = {"variant": TEMPLATE, "search": {"lr": [1.0e-2, 1.0e-3]}}
    found = content(tmp_path, search, defaults={"max_steps": 6, "batch_size": 3, "max_length": 128, "eval_every": 3}) | {
        "checkpoint_every": 2
    }
    url = "memory://shared/sweep"
    alone = sweep(Sweep.from_dict(found, root=tmp_path), base=tiny_base())
    stop = Stop()
    with pytest.raises(Interrupted):
        sweep(Sweep.from_dict(found | {"out": url}, root=tmp_path), base=tiny_base(), stop=stop, listener=At(4, lambda: stop.ask(15)))
    machine("b")
    done = sweep(Sweep.from_dict(found | {"out": url}, root=tmp_path), base=tiny_base(), resume=True)
    assert done.out.is_relative_to(tmp_path / "b")
    ours, theirs = ([(t["trial"], t["valid"]) for t in r.leaderboard["trials"]] for r in (done, alone))
    assert ours == theirs and done.leaderboard["best"]["test"] == alone.leaderboard["best"]["test"]
    assert {"leaderboard.json", "sweep.json", "report.html", "group-1/summary.json", f"group-1/{SNAPSHOT}"} <= there(url).keys()
