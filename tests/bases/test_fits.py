"""A base that cannot be had in memory is refused before a weight of it is read; one that could be, never is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.tiny import tiny_folder
from trimtab import memory
from trimtab.bases import fits, load
from trimtab.bases.fits import loading_bytes, refuse_too_large, weight_bytes
from trimtab.bases.weights import stored_state
from trimtab.cli import main
from trimtab.memory import OutOfMemory, machine_memory
from trimtab.places.shards import Shards

CPU = torch.device("cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_tensors_and_own_those_that_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    folder = tiny_folder(tmp_path, "qwen2", dtype=stored)
    numbers = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = numbers * dtype.itemsize
        assert weight_bytes(folder, dtype) == (whole, 0 if dtype == stored else whole)
    assert weight_bytes(folder, "auto") == (numbers * stored.itemsize, 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert weight_bytes(folder, "auto") == (2 * numbers, 2 * numbers), "transformers converts to what the config says"


def test_experts_are_put_together_and_packed(tmp_path: Path) -> None:
    """A file has each expert's matrices; the model in memory one tensor of all, a copy, or what it is packed in."""
    folder = tiny_folder(tmp_path, "mixtral", dtype=torch.bfloat16)
    experts = sum(t.nbytes for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n)
    whole, own = weight_bytes(folder, torch.bfloat16)
    assert own == experts > whole / 4
    base = load(str(folder), dtype="bfloat16", device="cpu", quantize="int8")
    stored = sum(t.nbytes for n, t in stored_state(base.model).items() if "SCB" not in n)
    whole, own = weight_bytes(folder, torch.bfloat16, "int8")
    assert whole == pytest.approx(stored, rel=0.02) and experts / 2 < own < whole


def test_what_quantising_experts_takes_for_a_while_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path, "mixtral", dtype=torch.bfloat16)
    layer = 3 * 4 * 48 * 96 * 2  # matrices, experts, sides, bytes
    assert loading_bytes(folder, torch.bfloat16, "nf4") == 4 * layer
    assert loading_bytes(folder, torch.bfloat16, None) == 0
    whole, own = weight_bytes(folder, torch.bfloat16, "nf4")
    for shards, needed in ((None, own + 4 * layer), (Shards(0, 2, 1), whole // 2 + 4 * layer)):  # each parameter is shared out once packed
        monkeypatch.setattr(fits, "obtainable_bytes", lambda needed=needed: needed - 1)
        with pytest.raises(OutOfMemory):
            refuse_too_large("b", folder, torch.bfloat16, CPU, "nf4", shards)
        monkeypatch.setattr(fits, "obtainable_bytes", lambda needed=needed: needed)
        refuse_too_large("b", folder, torch.bfloat16, CPU, "nf4", shards)


def large(folder: Path, gigabytes: int) -> Path:
    """A base whose file is one of so many GB in float32, with nothing in it. It has a tensor for each of two layers."""
    tiny_folder(folder, "llama")
    numbers = gigabytes * 10**9 // 8
    ends = {"v": [0, 4 * numbers], "w": [4 * numbers, 8 * numbers]}
    header = json.dumps({n: {"dtype": "F32", "shape": [numbers], "data_offsets": at} for n, at in ends.items()}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8 * numbers)
    return folder


def test_a_command_says_what_is_needed_what_is_free_and_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = large(tmp_path / "base", 40)
    for free, fix in ((30, "load it in bfloat16 (20 GB) or float16 (20 GB)"), (10, "use a smaller base")):
        monkeypatch.setattr(fits, "obtainable_bytes", lambda free=free: free * 10**9)
        refuse_too_large("b", folder, torch.float32, CPU)  # mapped: the system reads what is used
        refuse_too_large("b", folder, "auto", CPU)
        with pytest.raises(OutOfMemory, match=r"its weights take 80 GB in float64, and .* GB are free on cpu") as caught:
            refuse_too_large("b", folder, torch.float64, CPU)
        assert fix in caught.value.fix
    shown = CliRunner().invoke(main, ["generate", "hi", "--base", str(folder), "--dtype", "bfloat16", "--device", "cpu"])
    assert shown.exit_code == 2 and "its weights take 20 GB in bfloat16, and 10 GB are free on cpu" in shown.output


def test_what_is_mapped_loads_with_no_memory_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(fits, "obtainable_bytes", lambda: 0)
    assert load(str(folder), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(OutOfMemory, match="in float32, and 0 GB are free on cpu"):
        load(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {"a/memory.max": "5000", "a/memory.current": "4000", "a/b/memory.max": "max", "a/b/memory.current": "900"},
            (5000, 1000),
        ),
        (
            "0::/a/b\n",
            {"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": "anon 9\nactive_file 300\ninactive_file 70\n"},
            (5000, 1370),
        ),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "6000", "memory/x/memory.usage_in_bytes": "6000"}, (6000, 0)),
        ("4:memory:/outside/x\n", {"memory/memory.limit_in_bytes": "7000", "memory/memory.usage_in_bytes": "1000"}, (7000, 6000)),
    ],
    ids=["a group above", "files' pages count as free", "version 1", "a container"],
)
def test_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        if not (stat := (tmp_path / name).parent / "memory.stat").exists() and f"{Path(name).parent}/memory.stat" not in files:
            stat.write_text("anon 9\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert machine_memory() == expected
    shutil.rmtree(tmp_path)
    assert machine_memory()[0] > 10**9, "no groups, no limits"
