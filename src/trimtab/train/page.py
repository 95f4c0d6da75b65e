"""report.html: one run, or several side by side, as one self-contained page, made from run folders (`past.py`) alone.

The page loads nothing from the network. Styles, script and charts are in it, and its content security policy allows only those, by hash.
Everything that comes from data is escaped by the template.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trimtab.atomic import atomic_write
from trimtab.objectives import aimed_at
from trimtab.train.charts import COLOURS, Curve, Point, line_chart, scatter_chart, short, smooth, swatch
from trimtab.train.past import HIGHER_IS_BETTER, LOWER_IS_BETTER, PERCENT, PastRun, PastVariant, doubts, numbers, read_runs, title

COSTS = {
    "trainable": ("trainable parameters", 1.0, True),
    "adapter_bytes": ("adapter, MB", 1e-6, True),
    "seconds": ("training, s", 1.0, False),
}
"""What a variant costs: the axis' title, the unit in it, logarithmic or not."""


EVERY_STEP = {"variant", "step", "epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "seconds", "tokens_per_s"}
"""What a line of metrics.jsonl has whatever the objective."""


@dataclass(frozen=True)
class Shown:
    """A variant on the page. number: of its colour, dash and marker; anchor of everything that the legend hides together."""

    number: int
    label: str
    past: PastVariant

    @property
    def swatch(self) -> Markup:
        return swatch(self.number)

    @property
    def colour(self) -> str:
        return f"c{self.number % COLOURS}"


@dataclass(frozen=True)
class Row:
    """A row of a score table: the base (shown: None) or a variant. best: the columns in which no row is better."""

    label: str
    shown: Shown | None
    scores: dict[str, float]
    best: frozenset[str]


def write_page(folders: Sequence[Path], target: Path) -> None:
    """Write the page of one or several run folders, whole or not at all. ConfigError where a folder is not a run's."""
    text = render(read_runs(folders))
    with atomic_write(target) as file:
        file.write(text.encode())


def render(runs: Sequence[PastRun]) -> str:
    """The page's HTML."""
    environment = _environment()
    style, script = (Markup(_source(environment, f"report.{kind}")) for kind in ("css", "js"))
    every = [v for r in runs for v in r.variants]
    shown = [Shown(n, v.name if len(runs) == 1 else f"{v.run.name}/{v.name}", v) for n, v in enumerate(every)]
    sets = {d: [s for s in shown if s.past.data == d] for d in dict.fromkeys(v.data for v in every)}
    return environment.get_template("report.html.j2").render(
        name=" · ".join(r.name for r in runs),
        runs=runs,
        shown=shown,
        doubts=doubts(runs),
        tables={d: score_table(who, runs) for d, who in sets.items()},
        losses={d: _loss_charts(d, who, n, len(sets)) for n, (d, who) in enumerate(sets.items()) if any(s.past.steps for s in who)},
        small=[_small(s) for s in shown if s.past.steps],
        trades=trade_offs(sets, runs),
        samples={d: samples(who, runs) for d, who in sets.items()},
        facts=_facts(runs),
        fields=[(s, settings(s.past)) for s in shown],
        bases=list(dict.fromkeys(str(r.summary["base"]) for r in runs if r.summary.get("base"))),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
    )


@cache
def _environment() -> Environment:
    """The templates, which a process compiles once."""
    found = Environment(
        loader=PackageLoader("trimtab", "web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {"short": short, "title": title}
    return found


def score_table(who: Sequence[Shown], runs: Sequence[PastRun]) -> dict[str, Any]:
    """Of one data set: the columns, and the base's and every variant's row. Runs that measured the same base share its row."""
    data = who[0].past.data
    base: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for run in runs:
        if found := run.base_scores(data):
            base.setdefault(tuple(found.items()), []).append(run.name)
    entries: list[tuple[str, Shown | None, dict[str, float]]] = [
        ("base" if len(base) == 1 else f"base ({', '.join(names)})", None, dict(scores)) for scores, names in base.items()
    ]
    entries += [(s.label, s, s.past.scores) for s in who]
    columns = list(dict.fromkeys(c for _, _, scores in entries for c in scores))
    apart = {"loss"} if len({aimed_at(s.past.facts.get("fields") or {}) for s in who}) > 1 else set()  # by objective: these do not compare
    best = {c: None if c in apart else _best(c, [scores[c] for _, _, scores in entries if c in scores]) for c in columns}
    rows = [Row(label, s, scores, frozenset(c for c in scores if scores[c] == best[c])) for label, s, scores in entries]
    lower, percent = ([c for c in columns if c in those] for those in (LOWER_IS_BETTER, PERCENT))
    return {"columns": columns, "rows": rows, "lower": lower, "percent": percent}


def _best(column: str, values: Sequence[float]) -> float | None:
    """The best value; None where there is nothing to choose between, or nobody says which way is better."""
    if len(set(values)) < 2 or column not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        return None
    return (min if column in LOWER_IS_BETTER else max)(values)


def _loss_charts(data: str, who: Sequence[Shown], n: int, sets: int) -> list[tuple[str, Markup]]:
    """(CSS class, chart) of one data set. One that has the page's width to itself is drawn twice: for wide screens and for phones."""
    curves = []
    for s in who:
        raw = [(float(line["step"]), float(line["loss"])) for line in s.past.steps]
        dots = [(float(line["step"]), float(line["valid_loss"])) for line in s.past.valid if line["valid_loss"] is not None]
        curves.append(Curve(s.number, s.label, smooth(raw), raw if len(raw) >= 40 else (), dots, bool(s.past.facts.get("stopped"))))
    values = [y for c in curves for part in (c.points, c.dots) for _, y in part]
    log = min(values) > 0 and max(values) / min(values) > 6
    name = f"Training loss of {len(who)} variant{'s' * (len(who) > 1)} on {data}"
    y_title = "loss, nats a target" + (" (log)" if log else "")
    sizes = {"": (460, 330)} if sets > 1 else {"on-wide": (1060, 440), "on-phone": (460, 400)}
    return [
        (where, line_chart(curves, title=name, y_title=y_title, size=size, log=log, key=f"loss{n}{where}")) for where, size in sizes.items()
    ]


def _small(s: Shown) -> dict[str, Any]:
    """A variant's learning rate, gradient norm, and what its objective reports."""
    charts = {}
    told = dict.fromkeys(k for line in s.past.steps for k in line if k not in EVERY_STEP)
    for field, name in (("lr", "learning rate"), ("grad_norm", "gradient norm"), *((k, title(k)) for k in told)):
        points = [(float(line["step"]), y) for line in s.past.steps if (y := numbers(line).get(field)) is not None]
        log = field == "grad_norm"
        held = [(float(line["step"]), y) for line in s.past.valid if (y := numbers(line).get(f"valid_{field}")) is not None]
        curve = Curve(s.number, s.label, smooth(points), points if len(points) >= 40 else (), held)
        charts[name] = line_chart(
            [curve], title=f"{name} of {s.label}", y_title=name, size=(300, 130), log=log, key=f"{field.replace('/', '-')}{s.number}"
        )
    return {"shown": s, "charts": charts}


def trade_offs(sets: dict[str, list[Shown]], runs: Sequence[PastRun]) -> dict[str, list[dict[str, Any]]]:
    """score -> groups of charts, cost against score. Data sets stand apart, unless each has just one variant: then they share a chart,
    where each rises from its own base."""
    groups = list(sets.items()) if any(len(who) > 1 for who in sets.values()) else [("", [s for who in sets.values() for s in who])]
    scores = dict.fromkeys(c for who in sets.values() for s in who for c in s.past.scores)
    found: dict[str, list[dict[str, Any]]] = {}
    for i, score in enumerate(sorted(scores, key=lambda c: c not in PERCENT)):
        for j, (data, who) in enumerate(groups):
            charts = [_trade_off(score, cost, who, f"trade{i}-{j}-{cost}", data) for cost in COSTS]
            if any(charts):
                found.setdefault(score, []).append({"data": data, "charts": [c for c in charts if c]})
    return found


def _trade_off(score: str, cost: str, who: Sequence[Shown], key: str, data: str) -> Markup | None:
    x_title, unit, log = COSTS[cost]
    points = []
    for s in who:
        x, scores = s.past.facts.get(cost), s.past.scores
        if x and score in scores:
            points.append(Point(s.number, s.label, x * unit, scores[score], s.past.run.base_scores(s.past.data).get(score)))
    y_title = title(score) + (", %" if score in PERCENT else "")
    name = f"{title(score)} against {x_title}{' on ' * bool(data)}{data}"
    heading = x_title + (" (log)" if log else "")
    return scatter_chart(points, title=name, x_title=heading, y_title=y_title, size=(420, 320), log=log, key=key) if points else None


def samples(who: Sequence[Shown], runs: Sequence[PastRun]) -> list[dict[str, Any]]:
    """The first held-out rows of a data set: question where it is known, reference, and what base and variants answered. Answers to
    other rows (another test file in another run) stand apart, also where their references are the same."""
    data = who[0].past.data
    speakers: list[tuple[str, Shown | None, Any]] = [("base", None, r.summary.get("base_scores", {}).get(data)) for r in runs]
    speakers += [(s.label, s, s.past.facts.get("scores")) for s in who]
    found: list[dict[str, Any]] = []
    for label, s, scores in speakers:
        for n, sample in enumerate((scores or {}).get("samples") or []):
            reference, answer = str(sample.get("reference", "")), str(sample.get("answer", ""))
            question = sample.get("prompt")
            same = (e for e in found if (e["place"], e["reference"]) == (n, reference) and question in (None, e["question"] or question))
            if (entry := next(same, None)) is None:
                entry = {"place": n, "question": question, "reference": reference, "answers": []}
                found.append(entry)
            entry["question"] = entry["question"] or question
            said = {"label": label, "shown": s, "text": answer, "right": answer.strip() == reference.strip()}
            if said not in entry["answers"]:
                entry["answers"].append(said)
    return found


def settings(v: PastVariant) -> dict[str, str]:
    """How a variant was made: data, learning rate, and the method's fields that say something (None and {} do not)."""
    facts = v.facts
    own = {k: x for k, x in (facts.get("fields") or {}).items() if x is not None and x != {}}
    known = {"method": facts.get("method"), "data": facts.get("data"), "lr": facts.get("lr"), "steps": facts.get("steps"), **own}
    return {k: short(x) if isinstance(x, float) else str(x) for k, x in known.items() if x is not None}


def _facts(runs: Sequence[PastRun]) -> dict[str, dict[str, str]]:
    """Of each run, what was run on what."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        s = run.summary
        numbered = numbers(s)
        prints = s.get("base_fingerprint") or {}
        facts: dict[str, str | None] = {
            "base": s.get("base"),
            "base parameters": f"{numbered['base_parameters']:,.0f}" if "base_parameters" in numbered else None,
            "base size": f"{numbered['base_bytes'] / 1e6:,.0f} MB" if "base_bytes" in numbered else None,
            "fingerprint before": prints.get("before"),
            "fingerprint after": prints.get("after"),
            "dtype": s.get("dtype"),
            "device": s.get("device"),
            "tokens": f"{numbered['tokens']:,.0f}" if "tokens" in numbered else None,
            "time of the steps": f"{numbered['seconds']:,.1f} s" if "seconds" in numbered else None,
            "speed": f"{numbered['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in numbered else None,
            "peak memory": f"{numbered['peak_memory_gb']:.2f} GB" if "peak_memory_gb" in numbered else None,
        }
        found[run.name] = {k: v for k, v in facts.items() if v} or {"state": "not finished"}
    return found


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
