"""`trimtab.evaluate` and `trimtab.compare`: scores on rows of one's own, and runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.sources import Source, parse_sources
from trimtab.errors import ConfigError
from trimtab.model import Base, load_base
from trimtab.python import progress as shown
from trimtab.python.adapters import by_name
from trimtab.python.arguments import with_known_keywords
from trimtab.store import Adapter
from trimtab.train.comparison import Comparison
from trimtab.train.comparison import compare as compare_runs
from trimtab.train.loop import Report
from trimtab.train.page import write_named
from trimtab.train.past import run_folder
from trimtab.train.scoring import Asked, Evaluation, Labels, reader, refuse_occupied
from trimtab.train.scoring import evaluate as score


@with_known_keywords
def evaluate(
    data: Any,
    *,
    base: Base | Any | str,
    tokenizer: Any = None,
    adapters: Mapping[str, Adapter | str | Path] | Sequence[str | Path] = (),
    labels: Labels | None = None,
    max_rows: int | None = None,
    max_new_tokens: int = 96,
    max_tokens: int = 4096,
    generate: bool = True,
    out: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    base_differs: bool = False,
    store_root: str | Path | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Score the base and any adapters on rows, all in one pass of mixed batches, as `trimtab eval` does.

        trimtab.evaluate(rows, base=report.base, adapters=report.adapters)

    data: rows, a path, or one source with its options, such as {"rows": table, "columns": {"prompt": "question"}}. Each row asks for its
    last answer. base: a name, a folder, a `Base`, or a model of transformers with its `tokenizer`. adapters: by name, or a list of folders
    and of names in the store (store_root, else the default one). labels: of a classification, judged by their likelihoods; "auto": the
    distinct answers. generate: False for losses alone. out: a new folder for scores.json and predictions/. The result has `scores`, `delta`
    and `predictions`, and shows itself as a table. TrimtabError where base, adapters or rows are at fault.
    """
    (source,) = _one(parse_sources(data, where="data"))
    folder = None if out is None else Path(out)
    refuse_occupied(folder)
    reader(source)
    loaded = (
        base
        if isinstance(base, Base)
        else load_base(base, tokenizer=tokenizer, dtype=dtype, device=device, quantize=quantize, base_differs=base_differs)
    )
    named = by_name(adapters)
    found = {n: a if isinstance(a, Adapter) else Adapter.load(a, loaded, store=store_root) for n, a in named.items()}
    asked = Asked(source, labels or (), max_rows, max_new_tokens, max_tokens, generate)
    with shown.of(progress, None) as listener:
        return score(loaded, found, asked, listener, called=loaded.name, out=folder)


@with_known_keywords
def compare(*runs: str | Path | Report, by: str | None = None, html: str | Path | None = None) -> Comparison:
    """Every variant of several runs beside each other: how it was made, what it cost, what it scored.

    runs: their folders, or what `trimtab.train` has returned. by: a score or a cost to sort by, best first; None: the first score of
    answers, else the training loss. html: a file for the page of all runs. The result has `variants` and `notes`, what to know before
    comparing, and shows itself as tables. ConfigError where a folder is no run's, or no variant has that score.
    """
    if not runs:
        raise ConfigError("no run was named", fix="give run folders: trimtab.compare('runs/a', 'runs/b')")
    folders = [run.out if isinstance(run, Report) else run_folder(run) for run in runs]
    found = compare_runs(folders, by)
    if html is not None:
        write_named(folders, Path(html))
    return found


def _one(sources: list[Source]) -> list[Source]:
    if len(sources) != 1:
        raise ConfigError(f"data: {len(sources)} sources, and rows of one are scored", fix="score them one after the other")
    return sources
