"""What a run would train on and what it would cost, without training: everything is read, and no weights are loaded.

Nothing is written but caches: of tokens, with which training then begins; of a base or data set that is fetched or unpacked for it.

    report = check("run.yaml")
    report.errors, report.warnings       # an error is what would stop the run, or train on nothing; a warning is what may spoil it

The order of the work: base, rows, masks, `overlap` of train and held-out rows, positions, `estimate` of memory and time. `findings`
holds the report.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from trimtab.bases import BUNDLED_NAMES, locate, resolve_device, resolve_dtype
from trimtab.bases.locate import HUB_ID
from trimtab.bases.progress import quiet_transformers
from trimtab.bases.recipes import GGUF, check_quantize
from trimtab.bases.shapes import Architecture, read_architecture
from trimtab.bases.spec import Spec
from trimtab.cost.estimate import estimate_run
from trimtab.cost.room import Need, virtual_tokens
from trimtab.data import (
    Dropped,
    Example,
    Row,
    Source,
    answer_of,
    prompt_and_reference,
    template_warnings,
)
from trimtab.data.labels import labels_among
from trimtab.data.reading import FIXES, Hear, Reading, tokenizer_state
from trimtab.data.token_store import Examples
from trimtab.errors import BaseError, ConfigError, DataError, Mistakes
from trimtab.paths import user_path
from trimtab.tables import counted
from trimtab.train.balance import answer_findings
from trimtab.train.config import RunConfig, unreadable
from trimtab.train.dry import DRY, reward_findings
from trimtab.train.findings import SHOWN, CheckReport, Finding, Level, Rendered, SourceCounts, Split, SplitCounts
from trimtab.train.options import DataConfig
from trimtab.train.overlap import Contamination, Repeats, turns
from trimtab.train.prepare import INVOKE, row_options, uninvoked
from trimtab.train.resume import refuse_no_folder

BAD_MASKS = ("nothing supervised", "everything supervised")

Status = Callable[[str], None]


def check(run: RunConfig | Mapping[str, Any] | str | Path, *, rows: int = 2, status: Status = lambda text: None) -> CheckReport:
    """Read everything that `run` names and report. rows: how many rows of each training source are rendered. status: hears what is read.

    TrimtabError where the run file or the base cannot be read; what is wrong with data and variants is collected as findings.
    """
    return checked(RunConfig.of(run), rows=rows, status=status)[0]


def checked(run: RunConfig, *, rows: int = 0, status: Status = lambda text: None) -> tuple[CheckReport, Need | None]:
    """(`check`'s report; what decides the run's memory, None where no variant has rows)."""
    found = read_all(run, rows=rows, status=status)
    return found.report, found.need


@dataclass(frozen=True)
class Checked:
    """What a check has read: its report, what decides the run's memory (None where no variant has rows, or nothing was estimated), the
    splits of each data set, train first, and the tokenizer."""

    report: CheckReport
    need: Need | None
    data: Mapping[str, list[Split]]
    tokenizer: Any


def read_all(run: RunConfig, *, rows: int = 0, status: Status = lambda text: None, estimate: bool = True, rewards: bool = True) -> Checked:
    """The check itself. estimate: memory and time too. rewards: try the rewards of variants that have some, which runs the functions that
    the run file names."""
    start = time.perf_counter()
    device, tokenizer, architecture = _base_of(run, status)
    report = CheckReport(run.base, architecture.parameters, architecture.spec.max_positions)
    report.findings += _template_findings(tokenizer) + _run_findings(run)
    data: dict[str, list[Split]] = {}
    for name, config in run.data.items():
        data[name], seen = _read_data(run, name, config, tokenizer, architecture.spec.vocab_size, report, status)
        splits = data[name]
        report.rendered += [_render(e, tokenizer) for e in _first(splits[0], rows)]
        report.findings += seen.findings(splits)
        report.findings += _fit(run, name, splits, tokenizer, architecture.spec) + _label_findings(run, name, config, splits)
        mine = [v for v in run.variants if v.data == name]
        report.findings += answer_findings(splits, mine, config)
        report.findings += reward_findings(run.root, splits[0].asked, mine) if rewards else []
    need = None
    if estimate:
        status("estimating memory and time")
        need = estimate_run(run, architecture, data, device, report)
    report.findings.sort(key=lambda f: ("error", "warning", "note").index(f.level))
    report.seconds = round(time.perf_counter() - start, 3)
    return Checked(report, need, data, tokenizer)


# ---- the base ------------------------------------------------------------


def _base_of(run: RunConfig, status: Status) -> tuple[torch.device, Any, Architecture]:
    """(device, tokenizer, shape). TrimtabError where they cannot be had; it then also says which data cannot be read, and whether `out` can
    be written, since there will be no report."""
    mistakes = Mistakes()
    with mistakes.noted():
        device = resolve_device(run.device)
        resolve_dtype(run.dtype, device)
    with mistakes.noted():
        status(f"reading {run.base}")
        tokenizer, architecture = read_base(run.base, status, run.quantize)
    if mistakes.errors:
        with mistakes.noted():
            refuse_no_folder(run.out)
        mistakes.errors += [error for name, data in run.data.items() for error in unreadable(name, data, run.root, run.variants)]
        mistakes.refuse("this run cannot be checked, because its base or its device cannot be had")
    return device, tokenizer, architecture


def read_base(name: str, status: Status, quantize: str | None = None) -> tuple[Any, Architecture]:
    """(tokenizer, shape) of a base without its weights. Of a hub id that is not here, only the small files are fetched. BaseError where it
    cannot be found or read."""
    check_quantize(quantize, name)
    on_hub = (
        name not in BUNDLED_NAMES
        and not user_path(name, BaseError, "base").exists()
        and HUB_ID.fullmatch(name)
        and not name.endswith(".gguf")
    )
    source = name if on_hub else str(locate(name, status, packed=quantize == GGUF))
    architecture = read_architecture(source, None if quantize == GGUF else quantize)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files can be wrong in as many ways as there are tokenizers
        raise BaseError(
            f"transformers cannot read the tokenizer of {name!r}: {type(error).__name__}: {error}",
            fix="use a base whose tokenizer transformers has built in; code that comes with a model is never run.",
        ) from error
    return tokenizer, dataclasses.replace(architecture, name=name)


def _template_findings(tokenizer: Any) -> list[Finding]:
    return [
        Finding("note" if text.startswith("note: ") else "warning", "base", text.removeprefix("note: "))
        for text in template_warnings(tokenizer)
    ]


def _run_findings(run: RunConfig) -> list[Finding]:
    used = {v.data for v in run.variants}
    found = [Finding("warning", f"data.{n}", "no variant trains on it") for n in run.data if n not in used]
    try:
        refuse_no_folder(run.out)
    except ConfigError as e:
        return [*found, Finding("error", "out", e.message, fix=e.fix)]
    if run.out.exists() and any(run.out.iterdir()):
        found.append(Finding("note", "out", f"{run.out} is not empty: a new run will be refused there", fix="name another folder in `out`"))
    return found


# ---- rows and masks ------------------------------------------------------------


class _Seen:
    """Hears the training rows of a data set as they are read: which of them repeat each other or held-out rows, and their answers."""

    def __init__(self, train: Split, held: Sequence[Split], *, labels: bool):
        self._train, self._labels = train, labels
        self._repeats, self._against = Repeats(), [Contamination(split.rows) for split in held]

    def __call__(self, row: Row) -> None:
        said = turns(row)
        self._repeats.add(row, said)
        for contamination in self._against:
            contamination.add(row, said)
        if row.asked is not None and len(self._train.asked) < DRY:
            self._train.asked.append(row.asked)
        if self._labels and (answer := answer_of(row)) is not None:
            self._train.answers.add(answer)

    def findings(self, splits: Sequence[Split]) -> Iterator[Finding]:
        train, *held = splits
        yield from self._repeats.findings(train.where, train.examples.origin)
        for split, contamination in zip(held, self._against, strict=True):
            yield from contamination.findings(train.where, split.where)


def _read_data(
    run: RunConfig, name: str, config: DataConfig, tokenizer: Any, vocab_size: int, report: CheckReport, status: Status
) -> tuple[list[Split], _Seen]:
    """The splits of a data set, train first; counts and findings go into the report. Held-out splits are read first, since training rows
    are compared with them one by one."""
    max_length, last_turn_only, parts, differ = row_options(run, name)
    if differ is not None:
        report.findings.append(Finding("error", f"data.{name}", differ.message, fix=differ.fix))

    def read(split: Split, sources: Sequence[Source], hear: Hear) -> tuple[list[Finding], SplitCounts]:
        status(f"reading {split.where}")
        turn = last_turn_only or split is not train  # held-out rows ask for their last answer
        reading = Reading(tokenizer, run.root, max_length, turn, run.seed, vocab_size, parts, state)
        return _read_split(split, sources, reading, hear)

    state = tokenizer_state(tokenizer)
    train, *held = splits = [Split(name, split) for split in config.splits]
    first, *others = config.splits.values()
    found = [read(split, sources, split.rows.append) for split, sources in zip(held, others, strict=True)]
    seen = _Seen(train, held, labels=config.labels == "auto")
    for findings, counts in [read(train, first, seen), *found]:
        report.findings += findings
        report.splits.append(counts)
    return splits, seen


def _read_split(split: Split, sources: Sequence[Source], reading: Reading, hear: Hear) -> tuple[list[Finding], SplitCounts]:
    counts, lost, notes, findings = [], list[Dropped](), list[str](), list[Finding]()
    examples, epoch = list[Examples](), list[Examples]()
    for index, source in enumerate(sources):
        try:
            found = reading.read(source, index, notes.append, hear)
        except DataError as e:
            findings.append(Finding("error", split.where, e.message, e.problems, len(e.problems), e.fix))
            continue
        split.starts.append(sum(map(len, examples)))
        examples.append(found.examples)
        epoch.append(found.epoch)
        lost += found.dropped
        rows, dropped = len(found.examples) + len(found.dropped), len(found.dropped)
        tokens, supervised = int(found.epoch.tokens.sum()), int(found.epoch.targets.sum())
        counts.append(SourceCounts(source.path, source.weight, rows, dropped, len(found.epoch), tokens, supervised))
        if (stop := found.refusal()) is not None:
            findings.append(Finding("error", split.where, stop.message, fix=stop.fix))
    split.examples, split.epoch, split.dropped = Examples.joined(examples), Examples.joined(epoch), lost
    findings += _dropped_findings(split.where, lost)
    findings += [Finding("note", split.where, note) for note in notes]
    if not split.examples and split.starts:  # what could not be read has its own finding
        fix = "mend the rows that were dropped, or name a file that has rows."
        findings.append(Finding("error", split.where, "no row is left", fix=fix))
    lengths = split.examples.tokens
    return findings, SplitCounts(split.data, split.name, tuple(counts), _quantiles(lengths), _histogram(lengths))


def _dropped_findings(where: str, lost: Sequence[Dropped]) -> Iterator[Finding]:
    """One finding for each kind of reason, the commonest first."""
    for kind, count in Counter(d.kind for d in lost).most_common():
        level: Level = "error" if kind in BAD_MASKS else "warning"
        items = [f"{d.origin}: {d.reason}" for d in lost if d.kind == kind]
        yield Finding.of(level, where, f"{counted(count, 'row')} dropped: {kind}", items, FIXES.get(kind, ""))


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Tokens of the rows that are left: min, median, p95, max; empty where none is."""
    if not len(lengths):
        return {}
    names = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: int(np.percentile(lengths, q, method="inverted_cdf")) for name, q in names.items()}


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Bins that end at powers of two, from the shortest row's to the longest's."""
    if not len(lengths):
        return ()
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return tuple((2**p, int((powers == p).sum())) for p in range(int(powers.min()), int(powers.max()) + 1))


def _first(split: Split, rows: int) -> Iterator[Example]:
    """The first rows of each source."""
    ends = [*split.starts[1:], len(split.examples)] if split.starts else []  # no start: none of the sources could be read
    for start, stop in zip(split.starts, ends, strict=True):
        yield from split.examples[start : min(start + rows, stop)]


def _render(example: Example, tokenizer: Any) -> Rendered:
    """Decoded run by run: text and mask are the ids' own, not the row's. A further segment is shown from where it differs from the one
    before it, behind its role, such as `rejected`."""
    runs: list[tuple[str, bool]] = []
    for segment in example.segments:
        if runs:
            runs.append((f"\n… {segment.role}: " if segment.role else "\n… ", False))
        marked = zip(segment.supervised[segment.shared :].tolist(), segment.ids[segment.shared :].tolist(), strict=True)
        for flag, pairs in groupby(marked, key=itemgetter(0)):
            ids = [i for _, i in pairs]
            runs.append((str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), flag))
    return Rendered(example.origin, tuple(runs))


# ---- positions ------------------------------------------------------------


def _fit(run: RunConfig, name: str, splits: Sequence[Split], tokenizer: Any, spec: Spec) -> list[Finding]:
    """Rows that do not fit the base's positions beside a variant's virtual tokens and the answers that it draws, and rows that do not call
    its aLoRA, which would stop the run at its start; and test prompts that leave little room for an answer."""
    mine = [v for v in run.variants if v.data == name]
    virtual = max(map(virtual_tokens, mine), default=0)
    taken = {v.name: virtual_tokens(v) + v.objective.answer_tokens for v in mine}
    most = max(taken.values(), default=0)
    beside = f" with the {most} more that {max(taken, key=lambda n: taken[n])} takes" if most else ""
    found = []
    for split in splits:
        long = np.flatnonzero(split.examples.longest + most > spec.max_positions)
        if len(long):
            items = tuple(f"{e.origin}: {e.longest} tokens" for e in map(split.examples.__getitem__, long[:SHOWN]))
            who = "1 row is" if len(long) == 1 else f"{len(long)} rows are"
            message = f"{who} longer than the base's {spec.max_positions} positions{beside}"
            fix = f"set max_length to {spec.max_positions - most} or less."
            found.append(Finding("error", split.where, message, items, len(long), fix))
    room = spec.max_positions - virtual - run.evaluate.max_new_tokens + 1
    for split in splits if run.evaluate.generate else ():
        asking = [row for row in split.rows[: run.evaluate.max_rows] if split.name == "test" and answer_of(row) is not None]
        prompts = [(row.origin, len(prompt_and_reference(row, tokenizer)[0])) for row in asking]
        if short := [f"{origin}: {n} tokens" for origin, n in prompts if n > room]:
            one = len(short) == 1
            who = "1 prompt leaves" if one else f"{len(short)} prompts leave"
            ends = "its answer ends" if one else "their answers end"
            message = f"{who} less room than {run.evaluate.max_new_tokens} new tokens: {ends} early"
            found.append(Finding.of("warning", split.where, message, short, "shorten them, or lower evaluate.max_new_tokens."))
    for v in mine:
        if without := uninvoked(v, splits[0].examples):
            who = "1 row lacks the invocation of its" if len(without) == 1 else f"{len(without)} rows lack the invocation of their"
            message = f"{who} aLoRA"
            found.append(Finding.of("error", f"variants.{v.name}", message, without, f"{INVOKE}."))
    return found


def _label_findings(run: RunConfig, name: str, config: DataConfig, splits: Sequence[Split]) -> list[Finding]:
    """Labels that cannot be had from the training rows, or that no held-out row has."""
    if (config.labels == "auto" and not splits[0].examples) or any(v.data == name and v.objective.reads_head for v in run.variants):
        return []  # why, is said where they should be; labels of heads are roles of rows
    try:
        labels = labels_among(splits[0].answers, f"data.{name}") if config.labels == "auto" else config.labels or []
    except DataError as e:
        return [Finding("error", f"data.{name}.labels", e.message, fix=e.fix)]
    known = {label.strip() for label in labels}
    strange = [s for s in splits[1:] if s.rows and known and not any((answer_of(row) or "").strip() in known for row in s.rows)]
    return [Finding("error", s.where, "no answer is one of the labels", fix="name the labels as the rows write them.") for s in strange]
