"""report.html: what the run folder's files say, read back from it; inert, self-contained, whatever a run was.

tests/web/test_report.py looks at it in a browser.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.train.common import METHODS, run, run_file, tiny_base
from tests.train.past import HOSTILE, predictions, run_folder, variant
from trimtab.errors import ConfigError
from trimtab.train import RunConfig, train
from trimtab.train.page import POINTS, ROWS, write_page
from trimtab.train.past import doubts, read_runs


class Report(HTMLParser):
    """A report's elements and what is inline in it; nothing may be left open."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = text, list[str](), list[tuple[str, str, str]](), list[str]()
        self.inline: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.feed(text)
        assert self.open == []
        data, self.script = self.inline["script"]
        self.data: dict[str, Any] = json.loads(data)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.attributes += [(name, k, v or "") for k, v in attributes]
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inline:
            self.inline[self.open[-1]].append(data)


def report(tmp_path: Path, *folders: Path) -> Report:
    target = tmp_path / "report.html"
    write_page(folders, target)
    return Report(target.read_text(encoding="utf-8"))


def test_training_leaves_a_report_of_what_its_files_say(tmp_path: Path) -> None:
    left = run(tmp_path, {n: METHODS[n] | {"data": d} for n, d in (("lora", "a"), ("ia3", "a"), ("full", "b"))})
    found = Report((left.out / "report.html").read_text(encoding="utf-8")).data
    summary = json.loads((left.out / "summary.json").read_text())
    (told,) = found["runs"]
    assert [v["name"] for v in told["variants"]] == ["lora", "ia3", "full"] and told["state"] == "finished"
    for v in told["variants"]:
        assert v["scores"].items() <= summary["variants"][v["name"]]["scores"].items() and "exact_match" in v["scores"]
    lines = [json.loads(line) for line in (left.out / "metrics.jsonl").read_text().splitlines()]
    for name, kinds in found["metrics"]["0"].items():
        own = [line for line in lines if line["variant"] == name and "event" not in line]
        assert kinds["steps"]["loss"] == pytest.approx([line["loss"] for line in own], rel=1e-5)
        assert kinds["steps"]["step"] == [line["step"] for line in own]
    for data, by in found["answers"]["0"].items():
        for name in told["answers"][data]:
            scores = summary["base_scores"][data] if name == "base" else summary["variants"][name]["scores"]
            said = [json.loads(line)["answer"] for line in (left.out / scores["predictions"]).read_text().splitlines()]
            assert sorted(row["answers"][name]["text"] for row in by["rows"]) == sorted(said)
    assert [p.name for p in left.out.glob(".*")] == [".lock"]


def test_a_base_that_is_loaded_already_is_called_by_its_own_name(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}}) | {"base": "another one"}
    left = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    for name in ("summary.json", "run.json"):
        assert json.loads((left.out / name).read_text())["base"] == "tiny-llama", name


def test_a_report_that_was_not_written_is_made_on_resume(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}})
    ready = RunConfig.from_dict(content, root=tmp_path)
    (train(ready, base=tiny_base()).out / "report.html").unlink()
    (ready.out / ".report.html.0123456789ab.new").touch()  # what a kill leaves
    train(ready, base=tiny_base(), resume=True)
    assert (ready.out / "report.html").exists() and [p.name for p in ready.out.glob(".*")] == [".lock"]


def test_it_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    found = report(tmp_path, run_folder(tmp_path / "r", {"v": variant()}))
    (policy,) = [v for _, k, v in found.attributes if k == "content" and "default-src" in v]
    for kind, text in (("script", found.script), ("style", found.inline["style"][0])):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
    assert not {k for _, k, _ in found.attributes if k.startswith("on") or k in ("src", "href", "style", "action")}
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\(", found.text)


@pytest.mark.parametrize("where", ["answer", "reference", "prompt", "label", "field", "stopped", "base", "data", "folder"])
def test_data_are_inert(tmp_path: Path, where: str) -> None:
    """Whatever a row, an answer, a field or a name says, it is a string of the JSON, in which no `<` stands."""
    entry = variant("a" if where != "data" else HOSTILE)
    if where == "field":
        entry["fields"] = {"target_modules": HOSTILE}
    if where == "stopped":
        entry["stopped"] = HOSTILE
    keys = {"base": HOSTILE} if where == "base" else {}
    folder = run_folder(tmp_path / (HOSTILE.replace("/", "") if where == "folder" else "r"), {"v": entry}, **keys)
    line = {"prompt": "p", "reference": "r", "answer": "s", "label": "l"}
    predictions(folder, entry["data"], v=[line | ({where: HOSTILE} if where in line else {})])
    found = report(tmp_path, folder)
    plain = report(tmp_path / "r", run_folder(tmp_path / "r" / "plain", {"v": variant()}))
    assert found.tags == plain.tags and found.tags.count("script") == 2
    assert found.script == plain.script and "alert(" not in found.script
    assert (HOSTILE.replace("/", "") if where == "folder" else HOSTILE) in _texts(found.data)
    assert "<" not in found.inline["script"][0]


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for v in value.values() for text in _texts(v))]
    return [text for v in value for text in _texts(v)] if isinstance(value, list) else [str(value)]


@pytest.mark.parametrize("kind", ["no scores", "no steps", "stopped at once", "nan", "unfinished", "torn", "stray summary values"])
def test_odd_runs_have_a_report(tmp_path: Path, kind: str) -> None:
    entry, keys, steps = variant(), {}, 60
    if kind == "no scores":
        entry["scores"] = {}
    if kind in ("no steps", "stopped at once"):
        steps, entry = 0, variant(steps=0, seconds=0.0, tokens_per_s=None, losses={"first": None, "last": None}, stopped="step 1: nan")
    if kind == "stray summary values":
        entry, keys = variant(scores={"loss": math.nan, "rows": 3, "exact_match": None, "samples": []}), {"tokens_per_s": None}
    folder = run_folder(tmp_path / "r", {"v": entry}, steps=steps, summary=kind != "unfinished", **keys)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write({"nan": '{"variant": "v", "step": 61, "loss": NaN}\n', "torn": '{"variant": "v", "step": 6'}.get(kind, ""))
    found = report(tmp_path, folder)
    (told,) = found.data["runs"]
    assert [v["name"] for v in told["variants"]] == ["v"]
    assert "NaN" not in found.inline["script"][0]
    assert told["state"] == ("stopped" if kind == "unfinished" else "finished")
    assert len(found.data["metrics"]["0"]["v"]["steps"].get("step", [])) == steps
    if "stopped" in kind:
        assert told["variants"][0]["stopped"] == "step 1: nan"


def test_thousands_of_steps_stay_small_and_keep_spikes_and_sums(tmp_path: Path) -> None:
    steps = 20_000
    folder = run_folder(tmp_path / "r", {"v": variant()}, steps=0)
    lines = [{"variant": "v", "step": s, "loss": 9.5 if s == 7_777 else 1.0, "tokens": s % 7, "seconds": 0.25} for s in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(tmp_path, folder)
    kept = found.data["metrics"]["0"]["v"]["steps"]
    assert len(kept["step"]) <= POINTS + 3 and kept["step"][-1] == steps and found.data["thinned"]
    assert kept["loss"][kept["step"].index(7_777)] == 9.5
    stands = [b - a for a, b in zip([0, *kept["step"]], kept["step"], strict=False)]
    for field in ("tokens", "seconds"):
        whole = sum(float(line[field]) for line in lines)
        assert sum(n * v for n, v in zip(stands, kept[field], strict=True)) == pytest.approx(whole, rel=1e-4)
    assert len(found.inline["script"][0]) < 120_000


def test_many_variants_share_the_room(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {f"v{i}": variant() for i in range(32)}, steps=1500)
    found = report(tmp_path, folder)
    counts = {len(kinds["steps"]["step"]) for kinds in found.data["metrics"]["0"].values()}
    assert min(counts) > 200 and max(counts) < 400


def test_answers_are_cut_and_it_is_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()})
    right = {"prompt": "p", "reference": "4", "answer": "4", "correct": True}
    predictions(folder, "a", v=[right if i % 2 else right | {"answer": "5", "correct": False} for i in range(3 * ROWS)])
    told = report(tmp_path, folder).data["answers"]["0"]["a"]
    assert (len(told["rows"]), told["total"], told["answered"], told["wrong"]) == (ROWS, ROWS, 3 * ROWS, {"v": 3 * ROWS // 2})
    assert all(row["answers"]["v"]["right"] is False for row in told["rows"])


def test_several_runs_share_a_report(tmp_path: Path) -> None:
    one, two = (run_folder(tmp_path / n, {"v": variant(), "w": variant()}) for n in ("one", "two"))
    found = report(tmp_path, one, two)
    assert [r["name"] for r in found.data["runs"]] == ["one", "two"] and found.inline["title"] == ["one · two · trimtab"]
    assert set(found.data["metrics"]) == {"0", "1"} and found.data["doubts"] == []


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", {"v": variant()}, content={"data.a.train": "sha256:1"})
    two = run_folder(tmp_path / "two", {"v": variant()}, base_fingerprint={"before": "sha256:bb"}, content={"data.a.train": "sha256:2"})
    summary = json.loads((two / "summary.json").read_text())
    summary["base_scores"]["a"]["rows"] = 4
    (two / "summary.json").write_text(json.dumps(summary))
    said = " ".join(report(tmp_path, one, two).data["doubts"])
    assert "different bases (tiny sha256:aa: one; tiny sha256:bb: two)" in said
    assert "'a' has different training rows (one / two)" in said and "'a' has different test rows (one / two)" in said
    assert doubts(read_runs([one])) == []


def test_bases_and_rows_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    """Not by what is shown of them: one base may have two names."""
    digests = [{"data.a.test": f"sha256:{n}"} for n in (1, 1, 2)]
    names = ("tiny", "/models/tiny", "tiny")
    runs = [
        run_folder(tmp_path / f"r{n}", {"v": variant()}, base=name, content=c)
        for n, (name, c) in enumerate(zip(names, digests, strict=True))
    ]
    assert doubts(read_runs(runs[:2])) == []
    assert [d for d in doubts(read_runs(runs)) if "different test rows (r0, r1 / r2)" in d]


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()}, steps=5)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"variant": "v", "step": 4, "loss": 0.125}\n')
    kinds = report(tmp_path, folder).data["metrics"]["0"]["v"]
    assert kinds["steps"]["step"] == [1, 2, 3, 4, 5]
    assert kinds["steps"]["loss"][3] == 0.125
    assert len(kinds["valid"]["step"]) == 2


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()})
    for text, word in (("{", "cannot read"), ("[]", "is not a run's summary")):
        (folder / "summary.json").write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_runs([folder])
