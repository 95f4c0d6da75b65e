"""Thousands of damaged adapter folders: each is refused by AdapterError, or is what its files soundly describe, bit for bit.

What the files describe is read a second time in `described`; an adapter that loads must equal that in tensors, sites and logits. Nothing
else may be raised, no folder may take long, and memory stays where it was.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import pytest
import torch
from torch import Tensor

import tests.store.mutate_files  # noqa: F401 - adds its mutations
from tests.store.common import EXAMPLES, stirred, tiny_base
from tests.store.described import DESCRIBED, described, digest, fingerprint
from tests.store.mutate import CONFIG, EITHER, MUTATIONS, NOTE, REFUSED, SAME, WEIGHTS, Files, join, split, write
from trimtab.errors import AdapterError
from trimtab.methods import METHODS, BottleneckConfig, LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter

IDS = [[7, 250, 3, 90, 41], [1, 2]]
HANGS_AFTER_S = 20.0
OUTCOMES = ("refused", "the same", "another adapter")
MORE_MEMORY_BYTES = 300 * 2**20


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    ran: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def fuzz(count: int, seed: int, folder: Path) -> Tally:
    """Load `count` folders, number i of them drawn from (seed, i) alone, so that one that fails can be looked at by itself."""
    base, tally = tiny_base(), Tally()
    originals = {name: stirred(base, method) for name, method in EXAMPLES}
    clean = {name: _files(a.save(folder / "clean" / name)) for name, a in originals.items()}
    logits = {name: base.logits(IDS, [Adapter.load(folder / "clean" / name, base)] * 2) for name in clean}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _hung)
    for i in range(count):
        rng = Random(f"{seed}-{i}")
        name = rng.choice(list(clean))
        files, what, expected = _damaged(rng, dict(clean[name]), {n: f for n, f in clean.items() if n != name})
        path = folder / "x"
        write(files, path)
        started = time.perf_counter()
        try:
            signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER_S)
            found = _judge(path, base, expected, logits[name])
        except Exception as error:  # whatever it is: it must not have been raised
            found = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - started)
        tally.ran.update(what)
        tally.outcomes[found] += 1
        if found not in OUTCOMES:
            tally.wrong.append(f"case {seed}-{i}, {name}, {' + '.join(what)}: {found}")
        shutil.rmtree(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MORE_MEMORY_BYTES:
        tally.wrong.append(f"memory grew by {grown / 2**20:.0f} MiB")
    return tally


def _hung(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {HANGS_AFTER_S} s")


def _files(folder: Path) -> Files:
    return {n: (folder / n).read_bytes() for n in (CONFIG, WEIGHTS, NOTE)}


def _damaged(rng: Random, files: Files, others: dict[str, Files]) -> tuple[Files, list[str], str]:
    """One or two mutations; the note as it was, gone, or made to fit the damage as somebody would who wants it to load."""
    note = rng.choice(["kept", "gone", "restamped"])
    if note == "gone":
        del files[NOTE]
        others = {n: {k: v for k, v in f.items() if k != NOTE} for n, f in others.items()}
    digests = {n: digest(files[n]) for n in (CONFIG, WEIGHTS)}
    names = rng.choices(list(MUTATIONS), k=2 if rng.random() < 0.2 else 1)
    expected = MUTATIONS[names[0]](rng, files, others)
    if len(names) == 2:
        _on_top(names[1], rng, files, others)
    if note == "restamped" and isinstance(files.get(NOTE), bytes):
        _restamp(files, digests)
    changed = any(isinstance(files.get(n), bytes) and digest(files[n]) != d for n, d in digests.items())
    if note == "kept" and NOTE in files and changed:
        return files, names, REFUSED
    return files, names, expected if len(names) == 1 else EITHER  # one mutation may undo the other


def _on_top(name: str, rng: Random, files: Files, others: dict[str, Files]) -> None:
    """A second mutation; one that needs what the first has destroyed does nothing."""
    try:
        MUTATIONS[name](rng, files, others)
    except Exception:  # it may meet anything
        return


def _restamp(files: Files, digests: dict[str, str]) -> None:
    """Put the digests of the damaged files where the note has those of the sound ones; whatever else is wrong with it stays."""
    for name, recorded in digests.items():
        if isinstance(files.get(name), bytes):
            files[NOTE] = files[NOTE].replace(recorded.encode(), digest(files[name]).encode())


def _judge(path: Path, base: Base, expected: str, original: list[Tensor]) -> str:
    """One of `OUTCOMES`, or what is wrong with it."""
    try:
        adapter = Adapter.load(path, base)
    except AdapterError as error:
        said = str(error)
        if str(path) not in said or len(said) > 20_000:
            return f"refused without the folder's name, or with {len(said):,} characters: {said[:200]} … {said[-200:]}"
        return "refused" if expected != SAME else f"refused, though nothing that counts has changed: {said[:300]}"
    if expected == REFUSED:
        return "accepted, and must not be"
    method, params = described(path, base)
    if adapter.verified != (fingerprint(path) == base.fingerprint):
        return f"accepted with verified = {adapter.verified}"
    if set(params) != set(adapter.params) or not all(torch.equal(params[k], t) for k, t in adapter.params.items()):
        return "accepted with other tensors than the file holds"
    twin = Adapter(base, method, params)
    if {s.name: s for s in twin.sites} != {s.name: s for s in adapter.sites}:
        return "accepted with other places or scaling than the config describes"
    loaded = base.logits(IDS, [adapter] * 2)
    if not _equal(loaded, base.logits(IDS, [twin] * 2)):
        return "accepted, and computes something else than the files describe"
    same = _equal(loaded, original)
    if same or expected != SAME:
        return "the same" if same else "another adapter"
    return "accepted, but computes something else than before"


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit: values may be so large that logits are no numbers."""
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


# ---- the tests ----


def check(tally: Tally, count: int) -> None:
    assert not tally.wrong, f"{len(tally.wrong)} of {count}:\n" + "\n".join(tally.wrong[:20])
    assert tally.slowest_s < HANGS_AFTER_S
    o = tally.outcomes
    assert o["refused"] > 0.4 * count and o["the same"] > 0.1 * count and o["another adapter"] > 0.01 * count, o
    assert set(tally.ran) == set(MUTATIONS), "every mutation has run"


def test_the_second_reader_knows_every_method():
    assert set(DESCRIBED) == set(METHODS)


@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[n for n, _ in EXAMPLES])
def test_the_second_reader_agrees_on_sound_folders(name, method, tmp_path):
    base = tiny_base()
    saved = stirred(base, method).save(tmp_path / "a")
    loaded = Adapter.load(saved, base)
    again, params = described(saved, base)
    assert Adapter(base, again, params).sites == loaded.sites
    assert all(torch.equal(params[k], t) for k, t in loaded.params.items())


@pytest.fixture
def silent(caplog):
    """Warnings are no findings, and thousands of them hide what is one."""
    caplog.set_level("CRITICAL", logger="trimtab")


def test_three_hundred_damaged_folders(tmp_path, silent):
    check(fuzz(300, 1, tmp_path), 300)


@pytest.mark.slow
def test_ten_thousand_damaged_folders(tmp_path, silent):
    check(fuzz(10_000, 2, tmp_path), 10_000)


def test_headers_are_split_as_they_are_joined(tmp_path):
    data = stirred(tiny_base(), LoraConfig(r=2)).save(tmp_path / "a") / WEIGHTS
    header, values = split(data.read_bytes())
    assert sum(e["data_offsets"][1] - e["data_offsets"][0] for k, e in header.items() if k != "__metadata__") == len(values)


# ---- what it has found ----


def test_a_note_that_changes_what_the_config_says(tmp_path):
    """The note is no file of its own digests; of a method that peft lacks, places alone do not say what it computes."""
    base = tiny_base()
    folder = stirred(base, BottleneckConfig(reduction_factor=4, non_linearity="relu")).save(tmp_path / "a")
    for field_name, value in (("non_linearity", "gelu"), ("scaling", 3.0)):
        note = json.loads((folder / NOTE).read_text())
        note["fields"][field_name] = value
        shutil.copytree(folder, tmp_path / field_name)
        (tmp_path / field_name / NOTE).write_text(json.dumps(note))
        with pytest.raises(AdapterError, match="describe different adapters"):
            Adapter.load(tmp_path / field_name, base)


@pytest.mark.parametrize(
    ("field_name", "value"),
    [("use_rslora", "no"), ("use_rslora", 1), ("lora_alpha", "8"), ("lora_alpha", True), ("r", 2.0), ("alpha_pattern", {"q_proj": "3"})],
)
@pytest.mark.parametrize("where", [CONFIG, NOTE])
def test_json_values_of_another_type(tmp_path, field_name, value, where):
    """peft takes the text "no" for true; what was trained depends on who reads it."""
    base = tiny_base()
    folder = stirred(base, LoraConfig(r=2)).save(tmp_path / "a")
    if where == CONFIG:
        (folder / NOTE).unlink()
    content = json.loads((folder / where).read_text())
    (content if where == CONFIG else content["fields"])[field_name] = value
    (folder / where).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=field_name):
        Adapter.load(folder, base)


def test_a_huge_value_does_not_make_a_huge_message(tmp_path):
    base = tiny_base()
    folder = stirred(base, LoraConfig(r=2)).save(tmp_path / "a")
    header, values = split((folder / WEIGHTS).read_bytes())
    for entry in header.values():
        entry["shape"] = [None] * 2000
    (folder / WEIGHTS).write_bytes(join(header, values))
    with pytest.raises(AdapterError) as caught:
        Adapter.load(folder, base)
    assert len(str(caught.value)) < 30_000
