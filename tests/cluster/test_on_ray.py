"""Sweeps and runs on a cluster of two nodes: what one process trains, whatever happens to a node, and nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cluster.conftest import NODE, own_copies
from tests.train.common import run_file
from tests.train.test_sweep import TEMPLATE, content
from trimtab.model import load_base
from trimtab.train.groups import plan_groups
from trimtab.train.prepare import read_splits
from trimtab.train.trials import Sweep

pytestmark = pytest.mark.slow

SEARCH = {"variant": TEMPLATE, "search": {"lr": [1.0e-2, 3.0e-3, 1.0e-3, 3.0e-4], "r": [2, 4]}}
"""Eight trials, whose losses are well apart."""
WAIT_S = 300


def sweep_file(folder: Path, base: Path, steps: int = 40, bucket: bool = False, **options: Any) -> Path:
    """bucket: `out` is a URL, of the folder that it would be otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    found = content(folder, SEARCH | options, defaults={"max_steps": steps, "batch_size": 3, "max_length": 128, "eval_every": 20})
    path = folder / "sweep.yaml"
    out = {"out": f"file://{folder}/out"} if bucket else {}
    path.write_text(yaml.safe_dump(found | {"base": str(base), "dtype": "float32", "checkpoint_every": 4} | out))
    return path


def board(path: Path) -> list[tuple[Any, ...]]:
    """What a leaderboard says of each trial, without what depends on the clock or the grouping."""
    found = json.loads((path.parent / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    return [tuple(t[k] for k in ("rank", "trial", "step", "steps", "state")) for t in found["trials"]]


def valid(path: Path) -> dict[str, float]:
    found = json.loads((path.parent / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    return {t["trial"]: t["valid"] for t in found["trials"]}


def adapters(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {f.parent.name: load_file(f) for f in sorted((path.parent / "out").glob("group-*/adapters/*/adapter_model.safetensors"))}


def refuse_difference(path: Path, alone: Path, exactly: bool = True) -> None:
    """The same leaderboard and the same adapters, to the bit where the same trials are grouped. Otherwise a row's sums are added in another
    order, beside other rows."""
    assert board(path) == board(alone)
    assert valid(path) == pytest.approx(valid(alone), rel=0 if exactly else 1e-5)
    ours, theirs = adapters(path), adapters(alone)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for name, tensors in ours.items():
        for key, t in tensors.items():
            off = (t - theirs[name][key]).abs().max() / theirs[name][key].abs().max()
            assert off <= (0 if exactly else 1e-5), (name, key, off)


def workers() -> list[int]:
    """Processes of groups, on any node of this machine."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(a.startswith("ray::Worker") for a in p.info["cmdline"] or [])]


def eventually(what: Callable[[], Any], wait_s: float = WAIT_S) -> None:
    end = time.monotonic() + wait_s
    while not what():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def memory_gb(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> float:
    """Memory for four of the trials, so that one process makes the groups that two nodes take."""
    what = Sweep.load(sweep_file(tmp_path_factory.mktemp("planned"), tiny_llama_folder))
    base = load_base(str(tiny_llama_folder), dtype="float32", device="cpu")
    longest = int(read_splits(what.run, "a", what.run.data["a"], base).train.examples.tokens.max())
    first, second = plan_groups(what.run, base, longest, None, 2)
    return max(first.estimated_bytes, second.estimated_bytes) / 1e9 * 1.001


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, memory_gb: float, trimtab: list[str], environment: dict[str, str]
) -> Path:
    """The sweep, trained by one process in two groups: its file."""
    path = sweep_file(tmp_path_factory.mktemp("alone"), tiny_llama_folder, memory_gb=memory_gb)
    subprocess.run([*trimtab, "sweep", str(path), "--json"], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert len(list(path.parent.glob("out/group-*"))) == 2
    return path


def saved(group: Path) -> bool:
    """Whether a group has a checkpoint, which in a bucket its snapshot names."""
    if list(group.glob("checkpoints/step-*")):
        snapshot = group / "snapshot.json"
        return not snapshot.exists() or "checkpoints/" in snapshot.read_text()
    return False


def start(path: Path, cluster: Any, trimtab: list[str], environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [*trimtab, "sweep", str(path), "--ray", cluster.address, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_sweep_is_what_one_process_trains(
    tmp_path: Path, tiny_llama_folder: Path, alone: Path, cluster: Any, trimtab: list[str], environment: dict[str, str]
) -> None:
    path = sweep_file(tmp_path, tiny_llama_folder)
    _, said = (process := start(path, cluster, trimtab, environment)).communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert "2 groups: group-1 (4), group-2 (4)" in said and said.count("is placed on") == 2
    nodes = {line.partition("placed on ")[2] for line in said.splitlines() if "is placed on" in line}
    assert len(nodes) == 2, "each node has one core and takes one group"
    assert "leading by valid loss: lr0.01-r4" in said
    refuse_difference(path, alone)
    assert not list(path.parent.glob("out/.seen*"))
    eventually(lambda: not workers())


@pytest.mark.parametrize("bucket", [False, True], ids=["folder", "bucket"])
def test_a_lost_node_costs_a_resume(
    tmp_path: Path,
    tiny_llama_folder: Path,
    memory_gb: float,
    alone: Path,
    cluster: Any,
    trimtab: list[str],
    environment: dict[str, str],
    bucket: bool,
) -> None:
    """The node is killed once its group has a checkpoint, and the other node takes the group too. The group's process is stopped first, so
    that it does not finish in the meantime. With a bucket, driver and nodes have working copies of their own, and share nothing else."""
    path = sweep_file(tmp_path, tiny_llama_folder, bucket=bucket, memory_gb=memory_gb)
    environment = environment | {"TRIMTAB_RUNS": str(tmp_path / "driver")}
    lost = next(n for n in cluster.list_all_nodes() if not n.head)
    raylet = lost.all_processes["raylet"][0].process.pid
    process, said = start(path, cluster, trimtab, environment), list[str]()
    assert process.stderr is not None
    reader = threading.Thread(target=said.extend, args=(process.stderr,))
    reader.start()
    try:

        def group() -> str | None:
            placed = (text.split() for text in said if f"({lost.node_id[:6]})" in text and "is placed on" in text)
            return next((words[0] for words in placed), None)

        eventually(lambda: (name := group()) and saved(path.parent / "out" / name))
        (worker,) = [p for p in map(psutil.Process, workers()) if p.ppid() == raylet]
        worker.suspend()
        cluster.remove_node(lost, allow_graceful=False)
        eventually(lambda: any("is lost" in text for text in said))
        with suppress(psutil.NoSuchProcess):  # it has gone with its node
            worker.kill()
        assert process.wait(WAIT_S) == 0, said
    finally:
        process.kill()
        reader.join()
        process.stderr.close()
        cluster.add_node(**NODE, env_vars=own_copies(tmp_path))
    text = "".join(said)
    assert f"{group()}: the node" in text and "is lost; it goes on from its newest checkpoint elsewhere" in text
    refuse_difference(path, alone)


def test_ctrl_c_leaves_nothing_running(
    tmp_path: Path, tiny_llama_folder: Path, cluster: Any, trimtab: list[str], environment: dict[str, str]
) -> None:
    path = sweep_file(tmp_path, tiny_llama_folder, steps=100_000)
    process = start(path, cluster, trimtab, environment)
    eventually(lambda: all((path.parent / f"out/group-{n}/checkpoints").is_dir() for n in (1, 2)))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, said
    assert f"go on with: trimtab sweep {path} --ray {cluster.address} --resume" in said
    eventually(lambda: not workers(), 10)
    for n in (1, 2):
        lines = [json.loads(t) for t in (path.parent / f"out/group-{n}/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        saved = sorted((path.parent / f"out/group-{n}/checkpoints").glob("step-*"))[-1]
        assert saved.name == f"step-{max(x['step'] for x in lines):08d}", "the checkpoint is that of the last step"


def test_run_files_train_on_nodes_and_memory_is_asked_for(
    tmp_path: Path, tiny_llama_folder: Path, cluster: Any, trimtab: list[str], environment: dict[str, str]
) -> None:
    files = []
    for name, lr in (("first", 1e-2), ("second", 1e-3)):
        run = run_file(tmp_path, {"v": {"data": "a", "method": "lora", "lr": lr}}, base=str(tiny_llama_folder), out=f"out-{name}")
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(run | {"dtype": "float32"}))
    command = [*trimtab, "train", *map(str, files), "--ray", cluster.address]
    huge = subprocess.run([*command, "--cpus", "2"], env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert huge.returncode == 2 and "no node of the cluster can take these groups" in huge.stderr and "2 CPUs" in huge.stderr
    assert not (tmp_path / "out-first").exists()
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["first", "second"]
    for name in found:
        assert found[name] == json.loads((tmp_path / f"out-{name}" / "summary.json").read_text(encoding="utf-8"))
    assert found["first"]["variants"]["v"]["scores"] != found["second"]["variants"]["v"]["scores"]
