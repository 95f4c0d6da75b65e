"""Addresses, what a group asks of a node, how a sweep is grouped for a cluster, what a node refuses: without a cluster."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.test_on_ray import SEARCH
from tests.train.common import tiny_base
from tests.train.test_sweep import FOUR, content
from trimtab.bases.shapes import Architecture
from trimtab.cli.train_ray import names_of
from trimtab.cluster import drive, nodes
from trimtab.cluster.board import Board
from trimtab.cluster.job import PROCESS_BYTES, Asks, Job, asks, part_of_need, refuse_unplaceable
from trimtab.cluster.nodes import Node
from trimtab.cluster.sweeping import OnRay
from trimtab.cluster.worker import Ended, Told, Worker
from trimtab.cost.room import at_most
from trimtab.errors import ConfigError, TrimtabError
from trimtab.train.interrupt import Stop
from trimtab.train.listen import Silent
from trimtab.train.spread import Part, part_of
from trimtab.train.trials import Sweep

GB = 1_000_000_000


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """A port that answers whatever comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_an_address_is_one_or_is_refused() -> None:
    for wrong in ("", "head", "head:0", "head:70000", "http://head:6379", "head:6379/x", "a b:6379"):
        with pytest.raises(ConfigError, match="is no address of a cluster"):
            nodes._refuse_unreachable(wrong)
    for right in ("auto", "local"):
        nodes._refuse_unreachable(right)


def test_an_address_where_no_ray_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=f"no Ray cluster at 127.0.0.1:{port}: Connection refused"):
        nodes._refuse_unreachable(f"127.0.0.1:{port}")
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(ConfigError, match="something else listens there"):
        nodes._refuse_unreachable(f"ray://127.0.0.1:{port}")
    with listening(bytes([0, 0, 6, 4, 0, 0, 0, 0, 0])) as port:  # the settings of a gRPC server
        nodes._refuse_unreachable(f"127.0.0.1:{port}")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[ray\]'"), nodes.connected("auto"):
        pass


def swept(folder: Path, options: dict[str, Any], **keys: Any) -> Sweep:
    return Sweep.from_dict(content(folder, options, **keys), root=folder)


def shape_of(base: Any) -> Architecture:
    return Architecture(base.name, base.spec, base.spec.num_parameters, base.dtype)


def node(name: str, cpus: float, memory: int, gpus: float = 0) -> Node:
    return Node(name * 8, "10.0.0.1", cpus, gpus, memory)


def test_what_a_group_asks_for(tmp_path: Path) -> None:
    need = at_most(swept(tmp_path, SEARCH).run, shape_of(tiny_base()))
    memory = need.bytes()[1] + PROCESS_BYTES
    small, large = node("a", 4, 2 * memory), node("b", 16, 2 * memory)
    assert asks(need, [small, large], None) == Asks(4, 0, memory), "the whole of the smallest node"
    assert asks(need, [dataclasses.replace(small, memory=memory - 1), large], None).cpus == 16, "of those that have the memory"
    assert asks(need, [small, large], 2).cpus == 2
    gpus = node("c", 24, 9 * memory, 4)
    assert asks(need, [small, gpus], None) == Asks(6, 1, int(need.base.parameters * 4) + PROCESS_BYTES)
    on_cpu = dataclasses.replace(need, run=need.run.model_copy(update={"device": "cpu"}))
    assert asks(on_cpu, [small, gpus], None).gpus == 0
    half = need.run.model_copy(update={"variants": need.run.variants[:4]})
    assert asks(part_of_need(need, half), [small], None).memory < memory


def test_a_group_that_no_node_can_take_is_refused_with_what_nodes_have(tmp_path: Path) -> None:
    wanted = {"group-1": Asks(1, 0, 2 * GB), "group-2": Asks(1, 1, GB), "group-3": Asks(1, 0, 5 * GB)}
    with pytest.raises(ConfigError) as refused:
        refuse_unplaceable(wanted, [node("a", 4, 3 * GB)])
    assert refused.value.problems == (
        "group-2 asks for 1.00 GB of memory, 1 CPU, 1 GPU",
        "group-3 asks for 5.00 GB of memory, 1 CPU",
        "nodes offer: 10.0.0.1 (aaaaaa) 3.00 GB, 4 CPUs",
    )
    refuse_unplaceable(wanted, [node("a", 4, 3 * GB), node("b", 1, GB, 1), node("c", 1, 5 * GB)])
    what = swept(tmp_path, SEARCH)
    with pytest.raises(ConfigError, match="no node of the cluster can take"):
        grouped(what, node("a", 4, PROCESS_BYTES))


class Fixed:
    """A cluster of these nodes."""

    def __init__(self, *found: Node):
        self.found = list(found)

    def nodes(self) -> list[Node]:
        return self.found


def grouped(what: Sweep, *found: Node) -> list[int]:
    """How many trials train together in each group, on a cluster of these nodes."""
    base = tiny_base()
    spread = OnRay(Fixed(*found), Board())  # type: ignore[arg-type]
    spread._need = at_most(what.run, shape_of(base))
    return [len(g.trials) for g in spread.groups(what, base, 40)]


def test_a_sweep_is_grouped_by_places_and_memory(tmp_path: Path) -> None:
    what = swept(tmp_path, SEARCH)
    assert grouped(what, node("a", 4, 9 * GB)) == [8]
    assert grouped(what, node("a", 4, 9 * GB), node("b", 4, 9 * GB)) == [4, 4]
    assert grouped(what, node("a", 4, 9 * GB), node("b", 8, 9 * GB)) == [3, 3, 2], "two places on the larger one"
    need = at_most(what.run, shape_of(tiny_base()))
    most = max(
        part_of_need(need, what.run.model_copy(update={"variants": what.run.variants[i : i + 2]})).bytes()[1] for i in range(0, 8, 2)
    )
    assert grouped(what, node("a", 4, most + PROCESS_BYTES)) == [2, 2, 2, 2]


def test_trials_that_are_halved_stay_together_if_memory_allows(tmp_path: Path) -> None:
    assert grouped(swept(tmp_path, FOUR), node("a", 4, 9 * GB), node("b", 4, 9 * GB)) == [4]


def test_a_sweep_that_goes_on_keeps_its_groups(tmp_path: Path) -> None:
    what = swept(tmp_path, SEARCH)
    names = [v.name for v in what.run.variants]
    what.run.out.mkdir()
    (what.run.out / "sweep.json").write_text(json.dumps({"groups": {"group-1": names[:3], "group-2": names[3:]}}))
    assert grouped(what, node("a", 4, 9 * GB)) == [3, 5]


def test_a_node_says_what_it_cannot_read(tmp_path: Path, tiny_llama_folder: Path) -> None:
    what = swept(tmp_path, SEARCH, base=str(tiny_llama_folder), dtype="float32")
    worker = Worker(str(Path.cwd()))
    marker = tmp_path / "seen"
    marker.touch()
    assert worker.problems(what.run, str(marker), "float32") == []
    assert worker.problems(what.run, str(marker), "bfloat16") == [
        "it computes in float32 and the driver in bfloat16: set `dtype` in the file, so that all trials do the same"
    ]
    (tmp_path / "a.jsonl").unlink()
    marker.unlink()
    found = worker.problems(what.run.model_copy(update={"base": str(tmp_path / "none")}), str(marker), "float32")
    for words in (f"it does not see {tmp_path}", "a.jsonl", str(tmp_path / "none")):
        assert any(words in line for line in found), words


def test_a_worker_tells_what_a_run_tells(tmp_path: Path, tiny_llama_folder: Path) -> None:
    what = swept(tmp_path, SEARCH, base=str(tiny_llama_folder), dtype="float32")
    run = what.run.model_copy(update={"variants": what.run.variants[:1]})
    worker, events, told = Worker(str(Path.cwd())), list[tuple[str, tuple[Any, ...]]](), None
    worker.start(Job("group-1", run, Asks(1, 0, 0)))
    while told is None or told.ended is None:
        told = worker.told(1.0)
        events += told.events
    assert told.ended.how == "finished" and told.ended.summary is not None, told.ended
    assert [v[0]["step"] for kind, v in events if kind == "step"] == [1, 2, 3, 4, 5, 6]
    assert [v[0] for kind, v in events if kind == "begin"] == [{run.variants[0].name: 6}]
    again = Worker(str(Path.cwd()))
    again.start(Job("group-1", run, Asks(1, 0, 0)))
    while (ended := again.told(1.0).ended) is None:
        pass
    assert ended.how == "failed" and "is not empty" in ended.text and ended.fix


def test_a_group_is_trained_as_the_sweep_says(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rungs, dtype and what is begun go with the group; a worker ends the trials that lose at a rung."""
    what, given = swept(tmp_path, FOUR, base=str(tiny_llama_folder), dtype="float32"), list[Job]()
    monkeypatch.setattr("trimtab.cluster.sweeping.drive", lambda cluster, jobs, board, stop: given.extend(jobs) or iter(()))
    spread = OnRay(Fixed(node("a", 4, 9 * GB)), Board())  # type: ignore[arg-type]
    base = tiny_base()
    spread._need = at_most(what.run, shape_of(base))
    parts = [Part(group, part_of(what.run, group), n == 1) for n, group in enumerate(spread.groups(what, base, 40))]
    assert list(spread.train(parts, base, Silent(), Stop(), what.options.halving)) == []
    ((job,), halving) = given, what.options.halving
    assert (job.halving, job.dtype, job.resume, job.again().resume) == (halving, "float32", False, True) and halving is not None
    worker = Worker(str(Path.cwd()))
    worker.start(job)
    while (ended := worker.told(1.0).ended) is None:
        pass
    assert ended.summary is not None
    early = [v["valid"]["finished_early"] for v in ended.summary["variants"].values()]
    assert [e is not None and "halved at step 2" in e for e in early].count(True) == 2


def line(name: str, step: int, value: float, metric: str = "loss") -> dict[str, Any]:
    return {"variant": name, "step": step, "metric": metric, f"valid_{metric}": value, f"base_valid_{metric}": 9.0}


def test_the_board_ranks_by_the_best_validation() -> None:
    changed = list[tuple[str, str]]()
    board = Board(on_change=lambda group, kind, values: changed.append((group, kind)))
    board.begin({"g": ["a", "b"], "h": ["c", "d"]})
    board.note("g", "placed", "node 1")
    for name, value in (("a", 2.0), ("b", 1.5), ("a", 1.0), ("b", 1.7)):
        board.note("g", "valid", line(name, 2, value))
    board.note("h", "valid", line("c", 2, 1.2))
    assert [(v.name, v.valid) for v in board.ranked()] == [("a", 1.0), ("c", 1.2), ("b", 1.5), ("d", None)]
    board.note("g", "lost", "node 1", "killed")
    assert (board.groups["g"].state, board.groups["g"].losses) == ("waiting", 1)
    assert changed[:2] == [("", "begin"), ("g", "placed")] and changed[-1] == ("g", "lost")
    up = Board()
    up.begin({"g": ["a", "b"]})
    for name, value in (("a", 10.0), ("b", 30.0), ("b", 20.0)):
        up.note("g", "valid", line(name, 2, value, "exact_match"))
    assert [(v.name, v.valid) for v in up.ranked()] == [("b", 30.0), ("a", 10.0)], "of this metric the higher is the better"


class Call:
    """What Ray gives for an actor's method: calls are kept, and answer with the name of what is awaited."""

    def __init__(self, made: list[str], name: str):
        self.made, self.name = made, name

    def remote(self, *_: Any) -> str:
        self.made.append(self.name)
        return self.name


def driven(folder: Path, made: list[str], notes: list[tuple[Any, ...]], *names: str) -> Any:
    """A driver of groups that train already, with actors that only keep what they are asked."""
    run, board = swept(folder, SEARCH).run, Board(on_change=lambda group, kind, values: notes.append((group, kind, *values)))
    board.begin({name: [] for name in names})
    actors = {n: SimpleNamespace(stop=Call(made, f"{n}.stop"), told=Call(made, f"{n}.told")) for n in names}
    placed = [drive.Placed(Job(n, run, Asks(1, 0, 0)), actors[n], asked=n, question="told", node=f"node of {n}") for n in names]
    return drive._Driver(Fixed(), board, placed)  # type: ignore[arg-type]


def test_a_group_that_fails_while_all_are_stopped_does_not_keep_others_from_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, notes = list[str](), list[tuple[Any, ...]]()

    def got(asked: str) -> Told:
        if asked == "a":
            raise TrimtabError("the worker has failed, which is a bug: x")
        if asked == "c":
            raise drive.Lost("killed")
        return Told([], Ended("interrupted") if asked == "b.told" else None)

    monkeypatch.setattr(drive, "_got", got)
    driver = driven(tmp_path, made, notes, "a", "b", "c")
    driver._stop(2)
    assert [p.ended and p.ended.how for p in driver.placed] == ["failed", "interrupted", "interrupted"]
    assert made == ["a.stop", "b.stop", "c.stop", "b.told", "b.told"] and ("a", "ended", "failed") in notes
    with pytest.raises(TrimtabError, match="a on node node of a: the worker has failed"):
        driver.refuse_failed()


def test_a_group_that_is_given_up_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'trimtab[ray]'")
    made, notes = list[str](), list[tuple[Any, ...]]()

    def got(asked: str) -> Told:
        raise drive.Lost("killed")

    monkeypatch.setattr(drive, "_got", got)
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(ray, "kill", lambda actor, **_: None)
    monkeypatch.setattr(drive._Driver, "_begin", lambda self, p: None)
    driver = driven(tmp_path, made, notes, "a")
    assert list(driver.run(Stop())) == []
    assert [n[1:] for n in notes if n[0] == "a"] == [*[("lost", n, "killed") for n in ("node of a", "")], ("ended", "failed")]
    with pytest.raises(TrimtabError, match="its process has ended 3 times"):
        driver.refuse_failed()


def test_a_group_whose_bucket_is_out_of_reach_is_not_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it has a checkpoint is not known: it neither starts from the beginning nor counts as one that saves nothing."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'trimtab[ray]'")
    made, notes, begun = list[str](), list[tuple[Any, ...]](), list[str]()

    def got(asked: str) -> Told:
        raise drive.Lost("killed")

    def newest(job: Any) -> str:
        raise ConfigError("out = 's3://gone/run': does not answer", fix="see whether it can be reached")

    monkeypatch.setattr(drive, "_got", got)
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(ray, "kill", lambda actor, **_: None)
    monkeypatch.setattr(drive, "_newest", newest)
    driver = driven(tmp_path, made, notes, "a")
    monkeypatch.setattr(driver, "_begin", lambda p: begun.append(p.job.name))
    list(driver.run(Stop()))
    assert begun == ["a"], "once, and not again"
    with pytest.raises(TrimtabError, match=r"a on node node of a: .*killed.*cannot be looked up: out = 's3://gone/run'") as caught:
        driver.refuse_failed()
    assert "--resume" in caught.value.fix


def test_run_files_have_names_of_their_own() -> None:
    assert names_of([Path("a/x.yaml"), Path("b/y.yaml")]) == ["x", "y"]
    assert names_of([Path("a/x.yaml"), Path("b/x.yaml")]) == ["a/x.yaml", "b/x.yaml"]
