"""An adapter's folder: what is written comes back bit for bit, and replacing one never leaves half of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.store.common import EXAMPLES, SEQUENCES, stirred, tiny_base
from trimtab import atomic
from trimtab.atomic import exchange
from trimtab.errors import AdapterError
from trimtab.methods import IA3Config, LoraConfig, PrefixTuningConfig
from trimtab.store import Adapter
from trimtab.store.files import AdapterFolder
from trimtab.store.folder import REPLACEABLE
from trimtab.store.staging import staged


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_law_4_save_and_load_is_bit_exact(base, name, method, tmp_path):
    adapter = stirred(base, method)
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", base)
    exported_method, exported = method.export(adapter.params)
    assert loaded.method == exported_method
    assert loaded.verified
    assert set(loaded.params) == set(exported)
    assert all(torch.equal(loaded.params[k], exported[k]) for k in exported)
    ours, theirs = base.logits(SEQUENCES, adapters=[adapter] * 3), base.logits(SEQUENCES, adapters=[loaded] * 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == (tmp_path / "b" / "adapter_config.json").read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_round_trip_on_other_families_without_the_note(family, name, method, tmp_path):
    """Without trimtab.json the method is read from adapter_config.json alone, and must act at the same places with the same scaling."""
    base = tiny_base(family)
    adapter = stirred(base, method)
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    loaded = Adapter.load(tmp_path / "a", base)
    exported_method, exported = method.export(adapter.params)
    assert not loaded.verified
    assert loaded.sites == exported_method.sites(base.spec)
    assert all(torch.equal(loaded.params[k], exported[k]) for k in exported)


def test_the_note_says_where_an_adapter_came_from(base, tmp_path):
    adapter = Adapter.create(base, IA3Config())
    adapter.save(tmp_path / "a", run={"metrics": {"loss": float("nan"), "steps": 3}, "data": {"digest": "sha256:d"}})
    note = json.loads((tmp_path / "a" / "trimtab.json").read_text())
    assert note["format"] == 1
    assert note["base"] == {"name": "tiny-llama", "fingerprint": "sha256:tiny"}
    assert note["run"] == {"metrics": {"loss": None, "steps": 3}, "data": {"digest": "sha256:d"}}
    assert note["created"].endswith("+00:00")
    assert all(note[k].startswith("sha256:") for k in ("tokenizer", "chat_template"))
    assert Adapter.load(tmp_path / "a", base).info == note


def test_run_information_that_json_lacks_is_named(base, tmp_path):
    with pytest.raises(AdapterError, match="type Tensor"):
        Adapter.create(base, IA3Config()).save(tmp_path / "a", run={"loss": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_half_precision_tensors_load_as_fp32(base, tmp_path):
    from safetensors.torch import load_file, save_file

    stirred(base, LoraConfig(r=2)).save(tmp_path / "a")
    (tmp_path / "a" / "trimtab.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    halves = {k: v.bfloat16() for k, v in load_file(file).items()}
    save_file(halves, file)
    loaded = Adapter.load(tmp_path / "a", base)
    assert all(t.dtype == torch.float32 for t in loaded.params.values())
    assert all(torch.equal(loaded.params[k.removeprefix("base_model.model.")], v.float()) for k, v in halves.items())


def test_an_adapter_replaces_one_and_nothing_else(base, tmp_path):
    old, new = stirred(base, LoraConfig(r=2)), stirred(base, IA3Config())
    old.save(tmp_path / "a")
    new.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a", base).method == IA3Config()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"notes\.txt"):
        old.save(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_a_link_or_a_file_is_not_written_through(base, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("x")
    adapter = Adapter.create(base, IA3Config())
    with pytest.raises(AdapterError, match="symbolic link"):
        adapter.save(tmp_path / "link")
    with pytest.raises(AdapterError, match="is a file"):
        adapter.save(tmp_path / "file")
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
def test_a_crash_at_any_call_leaves_a_whole_adapter_or_none(base, tmp_path, monkeypatch, call, exchanged):
    """Every system call that changes the disk fails in turn; whatever is then under the name must load."""
    if not exchanged:
        monkeypatch.setattr("trimtab.atomic._renameat2", None)
    old, new = stirred(base, IA3Config(), seed=1), stirred(base, IA3Config(), seed=2)
    for fail_at in range(8):
        target = tmp_path / f"{call}{fail_at}"
        old.save(target)
        calls, original = 0, {"replace": os.replace, "fsync": os.fsync, "write": Path.write_bytes}[call]

        def failing(*args, original=original, fail_at=fail_at):
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(28, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Path if call == "write" else os, "write_bytes" if call == "write" else call, failing)
            try:
                new.save(target)
                saved = True
            except AdapterError as error:
                saved = False
                assert "No space left" in str(error)
        loaded = Adapter.load(target, base)
        whole = [a for a in (old, new) if all(torch.equal(loaded.params[k], a.params[k]) for k in a.params)]
        assert whole, "half of one and half of the other"
        assert whole == [new] or not saved
        if saved and fail_at:
            break
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.name.endswith(".new")]


READER = """
import os, sys
root = sys.argv[1]
seen, missing, mixed = set(), 0, 0
print("ready", flush=True)
while not os.path.exists(root + "/stop"):
    try:
        folder = os.open(root + "/a", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        missing += 1
        continue
    try:
        found = {open(os.open(n, os.O_RDONLY, dir_fd=folder)).read() for n in ("adapter_config.json", "trimtab.json")}
        mixed += len(found) > 1
        seen |= found
    except FileNotFoundError:
        pass  # the old folder, removed while it was read: whoever looks again finds the new one
    os.close(folder)
print(len(seen), missing, mixed)
"""


def test_a_reader_finds_the_old_folder_or_the_new_one_and_never_none(tmp_path):
    """Another process opens the name all the time while it is replaced 300 times."""

    def write(number):
        with staged(tmp_path / "a", may_replace=REPLACEABLE) as work:
            for name in ("adapter_config.json", "trimtab.json"):
                (work / name).write_text(str(number))

    write(0)
    if not exchange(*(Path(shutil.copytree(tmp_path / "a", tmp_path / n)) for n in "xy")):
        pytest.skip("this file system exchanges no names")
    reader = subprocess.Popen([sys.executable, "-c", READER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    for number in range(1, 300):
        write(number)
    (tmp_path / "stop").touch()
    seen, missing, mixed = map(int, reader.communicate(timeout=60)[0].split())
    assert seen > 1 and (missing, mixed) == (0, 0)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".a.")]


def test_loading_goes_on_with_the_new_folder(base, tmp_path, monkeypatch):
    """The folder is replaced between two files of a load: what is loaded is whole, and the new one."""
    old, new = stirred(base, IA3Config(), seed=1), stirred(base, LoraConfig(r=2), seed=2)
    old.save(tmp_path / "a")
    original, replaced = AdapterFolder.open, []

    def interrupted(self, name):
        if name == "adapter_model.safetensors" and not replaced:
            replaced.append(new.save(tmp_path / "a"))
        return original(self, name)

    monkeypatch.setattr(AdapterFolder, "open", interrupted)
    loaded = Adapter.load(tmp_path / "a", base)
    assert loaded.method == new.method and all(torch.equal(loaded.params[k], t) for k, t in new.params.items())


def test_a_file_that_comes_at_the_last_moment_is_not_lost(tmp_path, monkeypatch):
    with staged(tmp_path / "a") as work:
        (work / "adapter_config.json").write_text("old")
    original = atomic.exchange

    def late(one, other):
        (tmp_path / "a" / "notes.txt").write_text("mine")
        return original(one, other)

    monkeypatch.setattr(atomic, "exchange", late)
    with pytest.raises(AdapterError, match=r"notes\.txt"), staged(tmp_path / "a", may_replace=REPLACEABLE) as work:
        (work / "adapter_config.json").write_text("new")
    assert {p.name: p.read_text() for p in (tmp_path / "a").iterdir()} == {"adapter_config.json": "old", "notes.txt": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_staged_leaves_nothing_when_its_block_fails(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a") as work:
        (work / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_prefix_projection_is_folded_on_saving(base, tmp_path):
    adapter = stirred(base, PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8))
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["prefix_projection"] is False
    assert list(Adapter.load(tmp_path / "a", base).params) == ["prompt_embeddings"]


def test_a_name_that_is_no_folder_says_what_was_looked_for(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=str(tmp_path / "support")):
        Adapter.load("support", base)
