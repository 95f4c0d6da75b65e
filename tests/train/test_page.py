"""report.html: complete, inert, self-contained, whatever a run was."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.train.common import METHODS, run, run_file, tiny_base
from tests.train.past import HOSTILE, run_folder, variant
from trimtab.errors import ConfigError
from trimtab.train import RunConfig, train
from trimtab.train.charts import MAX_POINTS, Axis, Curve, line_chart, short, smooth, tag, thin
from trimtab.train.page import Shown, samples, write_page
from trimtab.train.past import doubts, read_runs


class Page(HTMLParser):
    """Elements, their attributes, and the visible text of a page; nothing may be left open."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.inline: dict[str, str] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[name] += 1
        self.attributes += [(name, k, v or "") for k, v in attributes]
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.inline[self.open[-1]] = data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, attribute: str) -> list[str]:
        return [v for _, k, v in self.attributes if k == attribute]


def page(tmp_path: Path, *folders: Path) -> Page:
    target = tmp_path / "page.html"
    write_page(folders, target)
    return Page(target.read_text(encoding="utf-8"))


def test_training_leaves_a_page(tmp_path: Path) -> None:
    report = run(tmp_path, {n: METHODS[n] | {"data": d} for n, d in (("lora", "a"), ("ia3", "a"), ("full", "b"))})
    found = Page((report.out / "report.html").read_text(encoding="utf-8"))
    assert all(word in found.text for word in ("lora", "ia3", "full", "unchanged ✓", "a 0", "exact match"))
    assert not list(report.out.glob(".*"))


def test_a_page_that_was_not_written_is_made_on_resume(tmp_path: Path) -> None:
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 1}})
    ready = RunConfig.from_dict(content, root=tmp_path)
    (train(ready, base=tiny_base()).out / "report.html").unlink()
    (ready.out / ".report.html.0123456789ab.new").touch()  # what a kill leaves
    train(ready, base=tiny_base(), resume=True)
    assert (ready.out / "report.html").exists() and not list(ready.out.glob(".*"))


def test_it_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    found = page(tmp_path, run_folder(tmp_path / "r", {"v": variant()}))
    (policy,) = [v for v in found.all("content") if "default-src" in v]
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inline[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not {k for _, k, _ in found.attributes if k.startswith("on") or k in ("src", "href", "style", "action")}
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "page.html").read_text())


@pytest.mark.parametrize("where", ["answer", "reference", "prompt", "field", "stopped", "base", "data", "folder"])
def test_data_is_inert(tmp_path: Path, where: str) -> None:
    """Whatever a row, a prediction, a field or a name says, it is text."""
    entry = variant("a" if where != "data" else HOSTILE)
    sample = {"prompt": "p", "reference": "r", "answer": "s"}
    entry["scores"]["samples"] = [sample | {where: HOSTILE}]
    if where == "field":
        entry["fields"] = {"target_modules": HOSTILE}
    if where == "stopped":
        entry["stopped"] = HOSTILE
    keys = {"base": HOSTILE} if where == "base" else {}
    name = HOSTILE.replace("/", "") if where == "folder" else "r"
    folder = run_folder(tmp_path / name, {"v": entry}, **keys)
    found = page(tmp_path, folder)
    assert (found.count["script"], found.count["img"]) == (1, 0)
    assert not [k for _, k, _ in found.attributes if k.startswith("on")]
    assert "alert(1)" in found.text
    assert "alert" not in found.inline["script"]


def test_many_variants_are_told_apart(tmp_path: Path) -> None:
    """12 variants: no two lines share colour, dash and marker; each is in the legend, has a curve and a row."""
    folder = run_folder(
        tmp_path / "r", {f"v{i}": variant(trainable=10**i, scores=variant()["scores"] | {"exact_match": i}) for i in range(12)}
    )
    found = page(tmp_path, folder)
    text = (tmp_path / "page.html").read_text()
    swatches = re.findall(r'<svg viewBox="0 0 34 16" class="(swatch c\d)"[^>]*><line [^>]*?class="line"(.*?)></line><path d="(.*?)"', text)
    assert len(set(swatches)) == 12
    assert Counter(found.all("aria-pressed")) == {"true": 12}
    for i in range(12):
        assert f'<tr data-v="{i}">' in text and f'<g class="series c{i % 8}" data-v="{i}">' in text


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    better = variant()["scores"] | {"loss": 0.4, "exact_match": 70.0}
    worse = variant()["scores"] | {"loss": 0.3, "exact_match": 30.0}
    page(tmp_path, run_folder(tmp_path / "r", {"x": variant(scores=better), "y": variant(scores=worse)}))
    text = (tmp_path / "page.html").read_text()
    best = [re.sub(r"<.*?>|\s|★", "", cell) for cell in re.findall(r'<td class="best">(.*?)</td>', text)]
    assert best == ["70.0+60.0", "60.0+40.0", "0.300-2.70", "60.0+40.0"]  # F1 is a tie; the lower loss is the better


def test_metrics_of_an_objective_have_no_best_and_are_no_percentages(tmp_path: Path) -> None:
    entries = {n: variant(scores=variant()["scores"] | {"loss": x, "a_metric": x}) for n, x in (("x", 0.251), ("y", 0.752))}
    found = page(tmp_path, run_folder(tmp_path / "r", entries))
    text = (tmp_path / "page.html").read_text()
    assert '<td class="best"><span class="star" role="img" aria-label="best">★</span> 0.251' in text
    assert "0.752" in found.text and '<td class="best"><span class="star" role="img" aria-label="best">★</span> 0.752' not in text
    assert "exact match, %" in found.text and "a_metric, %" not in found.text


def test_every_chart_has_a_title_and_a_description(tmp_path: Path) -> None:
    found = page(tmp_path, run_folder(tmp_path / "r", {"x": variant(), "y": variant("b")}))
    labelled = [v.split() for v in found.all("aria-labelledby") if " " in v]
    identities = found.all("id")
    assert len(labelled) == found.all("role").count("img") - found.all("aria-label").count("best")
    assert len(set(identities)) == len(identities)
    assert all(i in identities for pair in labelled for i in pair)
    assert found.count["caption"] >= 4 and "col" in found.all("scope") and "row" in found.all("scope")


@pytest.mark.parametrize("kind", ["no scores", "no steps", "stopped at once", "nan", "unfinished", "torn", "stray summary values"])
def test_odd_runs_have_a_page(tmp_path: Path, kind: str) -> None:
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
    found = page(tmp_path, folder)
    assert "v" in found.text
    assert "nan" not in " ".join(found.all("points") + found.all("transform")).lower()
    if kind == "no scores":
        assert "No test scores on a" in found.text
    if kind == "unfinished":
        assert "has not finished" in found.text
    if "stopped" in kind:
        assert "v has stopped: step 1: nan" in found.text


def test_thousands_of_steps_stay_small(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()}, steps=20_000)
    found = page(tmp_path, folder)
    assert max(len(p.split()) for p in found.all("points")) <= MAX_POINTS + 2
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    one, two = (run_folder(tmp_path / n, {"v": variant(), "w": variant()}) for n in ("one", "two"))
    found = page(tmp_path, one, two)
    assert all(f"{r}/{v}" in found.text for r in ("one", "two") for v in "vw")
    assert found.text.count("base says") == 1  # the same answer of the same base stands once
    assert "not comparable" not in found.text


def test_what_does_not_compare_is_said(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", {"v": variant()}, content={"data.a.train": "sha256:1"})
    two = run_folder(tmp_path / "two", {"v": variant()}, base_fingerprint={"before": "sha256:bb"}, content={"data.a.train": "sha256:2"})
    summary = json.loads((two / "summary.json").read_text())
    summary["base_scores"]["a"]["rows"] = 4
    (two / "summary.json").write_text(json.dumps(summary))
    said = " ".join(doubts(read_runs([one, two])))
    assert "different bases (tiny sha256:aa: one; tiny sha256:bb: two)" in said
    assert "'a' has different training rows (one / two)" in said and "'a' has different test rows (one / two)" in said
    assert doubts(read_runs([one])) == []


def test_bases_rows_and_questions_are_told_apart_by_what_they_are(tmp_path: Path) -> None:
    """Not by what is shown of them: one base may have two names, and test rows and questions may begin with the same references."""
    digests = [{"data.a.test": f"sha256:{n}"} for n in (1, 1, 2)]
    asked = [{"scores": variant()["scores"] | {"samples": [{"prompt": p, "reference": "bug", "answer": f"to {p}"}]}} for p in "ppq"]
    names = ("tiny", "/models/tiny", "tiny")
    runs = [
        run_folder(tmp_path / f"r{n}", {"v": variant(**a)}, base=name, content=c)
        for n, (name, c, a) in enumerate(zip(names, digests, asked, strict=True))
    ]
    assert doubts(read_runs(runs[:2])) == []
    assert [d for d in doubts(read_runs(runs)) if "different test rows (r0, r1 / r2)" in d]
    past = read_runs(runs)
    found = samples([Shown(n, r.name, r.variants[0]) for n, r in enumerate(past)], past)
    told = {e["question"]: [a["text"] for a in e["answers"] if a["shown"]] for e in found if e["reference"] == "bug"}
    assert told == {"p": ["to p", "to p"], "q": ["to q"]}


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()}, steps=5)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"variant": "v", "step": 4, "loss": 0.125}\n')
    (past,) = read_runs([folder])[0].variants
    assert [s["step"] for s in past.steps] == [1, 2, 3, 4, 5]
    assert past.steps[3]["loss"] == 0.125
    assert len(past.valid) == 2


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", {"v": variant()})
    for text, word in (("{", "cannot read"), ("[]", "is not a run's summary")):
        (folder / "summary.json").write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_runs([folder])


def test_smoothing_and_thinning_by_hand() -> None:
    points = [(float(i), float(i == 50)) for i in range(80)]
    assert smooth(points)[50] == (50.0, 0.2) and smooth(points)[45] == (45.0, 0.0)  # 80 points: two to each side
    assert smooth(points)[0] == points[0] and smooth(points)[-1] == points[-1]
    long = [(float(i), float(i == 5001)) for i in range(10_000)]
    assert (5001.0, 1.0) in thin(long) and long[0] in thin(long) and long[-1] in thin(long)


def test_axes_by_hand() -> None:
    log = Axis.over([0.1, 10], 0, 100, log=True)
    assert (log(0.1), log(1), log(10)) == (0, 50, 100)
    assert log.ticks() == [0.1, 0.3, 1, 3, 10]
    assert Axis.over([0, 10], 0, 100).ticks() == [0, 2, 4, 6, 8, 10]
    assert not Axis.over([0, 5], 0, 1, log=True).log  # nought has no logarithm
    flat = Axis.over([3, 3], 0, 100)
    assert flat(3) == 50
    assert [short(v) for v in (0, 4_884_480, 57_600, 1234, 0.05, 2e-5)] == ["0", "4.88 M", "57.6 k", "1,234", "0.05", "2e-05"]


def test_markup_is_escaped_where_it_is_made() -> None:
    assert tag("text", "<b>", x='"') == '<text x="&#34;">&lt;b&gt;</text>'
    drawn = line_chart([Curve(0, HOSTILE, [(1, 2), (2, 1)])], title=HOSTILE, y_title=HOSTILE, size=(500, 300), key="k")
    assert "<script" not in drawn and "<img" not in drawn
