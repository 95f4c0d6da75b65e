"""Rows as training reads them, for people: decoded run by run with their mask, what was dropped and why, how long they are.

Everything comes from what `check` has read: ids and masks are those that training gets, from the same cache. Rows are decoded when they are
asked for, so 10⁵ of them cost what their index costs.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from trimtab.bases.template import BadRow, Message, Template
from trimtab.cost.room import refuse_without_room
from trimtab.data import Example
from trimtab.data.reading import FIXES
from trimtab.errors import DataError, NotFoundError, printable
from trimtab.memory import OutOfMemory
from trimtab.train.check import Checked, Status, read_all
from trimtab.train.config import RunConfig
from trimtab.train.findings import Split, SplitCounts
from trimtab.train.prepare import row_options

LEARNT, TEMPLATE = 1, 2
"""Bits of a run of text: its tokens are supervised; the chat template wrote it."""
MAX_TEXT = 20_000
"""Characters of a row that are shown; more are left out of its middle."""
BINS = 32
ORDERS = ("file", "longest", "shortest")
OVER = re.compile(r"over-long: (\d+) tokens")
MARK = re.compile(r"Zq\dqZ")
TALKS = (("user", "assistant", "user"), ("system", "user", "assistant", "user"), ("system", "user", "assistant", "tool"))
"""Roles of conversations on which it is seen what the template writes around contents."""

Run = tuple[str, int]


class RowsOfRun:
    """What a run reads. estimate: memory and time are told too, as `trimtab check` does; what a run's rewards say of rows is not."""

    def __init__(self, run: RunConfig, *, estimate: bool = False, status: Status = lambda text: None):
        self.run = run
        self.checked: Checked = read_all(run, rows=0, status=status, estimate=estimate, rewards=False)
        self._decoder = Decoder(self.checked.tokenizer)
        self._orders: dict[tuple[str, str, str], np.ndarray] = {}

    def overview(self) -> dict[str, Any]:
        """Counts, lengths, dropped rows by reason, findings, and what was estimated."""
        report = self.checked.report
        told = report.to_dict()
        counts = {(s.data, s.split): s for s in report.splits}
        return {
            "room": self._room(),
            **{key: told[key] for key in ("base", "base_parameters", "max_positions", "variants", "estimate", "findings", "seconds")},
            "data": [
                {
                    "name": name,
                    "max_length": row_options(self.run, name)[0],
                    "splits": [self._split(split, counts.get((name, split.name)), row_options(self.run, name)[0]) for split in splits],
                }
                for name, splits in self.checked.data.items()
            ],
        }

    def _room(self) -> str | None:
        """What would fit, where the run does not fit the memory, or may not; None where it does, or nothing was estimated."""
        need, said = self.checked.need, list[str]()
        if need is None:
            return None
        try:
            refuse_without_room(need, lambda: need, said.append, loaded=False)
        except OutOfMemory as error:
            return error.render()
        return said[0] if said else None

    def rows(self, data: str, split: str, start: int, count: int, order: str = "file") -> dict[str, Any]:
        """Rows from `start` on in one of `ORDERS`. Each has its number in the file's order, its origin, and runs of (text, bits)."""
        found = self._found(data, split)
        places = self._order(found, order)
        chosen = places[start : start + count].tolist()
        return {"total": len(places), "rows": [self._row(found.examples[i], i) for i in chosen]}

    def dropped(self, data: str, split: str, kind: str, start: int, count: int) -> dict[str, Any]:
        """Rows that were dropped, each with file and line; kind: for this reason alone."""
        lost = [d for d in self._found(data, split).dropped if kind in ("", d.kind)]
        return {"total": len(lost), "rows": [{"origin": d.origin, "reason": _short(d.reason)} for d in lost[start : start + count]]}

    def _found(self, data: str, split: str) -> Split:
        for found in self.checked.data.get(data, ()):
            if found.name == split:
                return found
        raise NotFoundError(f"data.{data}.{split}: there are no such rows", fix=f"there are: {', '.join(self._names())}")

    def _names(self) -> list[str]:
        return [s.where for splits in self.checked.data.values() for s in splits]

    def _order(self, split: Split, order: str) -> np.ndarray:
        if order not in ORDERS:
            raise DataError(f"order = {order!r}", fix=f"one of {', '.join(ORDERS)}")
        key = split.data, split.name, order
        if key not in self._orders:
            sizes = split.examples.tokens
            by = {"file": np.arange(len(sizes)), "longest": -sizes, "shortest": sizes}[order]
            self._orders[key] = np.argsort(by, kind="stable")
        return self._orders[key]

    def _row(self, example: Example, number: int) -> dict[str, Any]:
        return {
            "number": number,
            "origin": example.origin,
            "tokens": sum(len(s.ids) - s.shared for s in example.segments),
            "targets": sum(int(s.supervised.sum()) for s in example.segments),
            "segments": [{"role": s.role, "goes_on": s.shared > 0, "runs": self._decoder.runs(s)} for s in example.segments],
        }

    def _split(self, split: Split, counts: SplitCounts | None, cut: int) -> dict[str, Any]:
        kinds = Counter(d.kind for d in split.dropped).most_common()
        sources = counts.sources if counts else ()
        return {
            "name": split.name,
            "rows": len(split.examples),
            "tokens": sum(s.tokens for s in sources),
            "supervised": sum(s.supervised for s in sources),
            "sources": [dataclasses.asdict(s) for s in sources],
            "quantiles": dict(counts.lengths) if counts else {},
            "lengths": lengths(split, cut),
            "dropped": [{"kind": kind, "count": n, "fix": FIXES.get(kind, "")} for kind, n in kinds],
        }


def lengths(split: Split, cut: int) -> dict[str, Any]:
    """How many rows are how long: bins of `width` tokens, of rows that are left and of those that are too long. What is longer than the
    last bin is counted in it."""
    kept = split.examples.longest
    over = np.array([int(m[1]) for d in split.dropped if (m := OVER.match(d.reason))], dtype=np.int64)
    everything = np.concatenate([kept, over])
    if not len(everything):
        return {"width": 1, "kept": [], "over": [], "cut": cut}
    top = min(int(everything.max()), 2 * cut if len(over) else cut)
    width = max(1, -(-top // BINS))
    bins = -(-top // width)

    def counted(sizes: np.ndarray) -> list[int]:
        return np.bincount(np.minimum((sizes - 1) // width, bins - 1), minlength=bins).tolist() if len(sizes) else [0] * bins

    return {"width": width, "kept": counted(kept), "over": counted(over), "cut": cut}


class Decoder:
    """Ids as text, in runs of tokens that are alike: supervised or not, written by the template or not."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        self._special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))

    def runs(self, segment: Example) -> list[Run]:
        """A segment's runs. One that goes on from the segment before it is shown from where they differ."""
        ids, learnt = segment.ids[segment.shared :].tolist(), segment.supervised[segment.shared :].tolist()
        marked = [(LEARNT * flag | TEMPLATE * (i in self._special), i) for i, flag in zip(ids, learnt, strict=True)]
        found, before = list[Run](), ""
        for bits, group in groupby(marked, key=lambda pair: pair[0]):
            of_run = [i for _, i in group]
            text = self._decoded(of_run)
            header = next((h for h in self._written.get(before, ()) if text.startswith(h)), "")
            found += [(header, bits | TEMPLATE)] if header else []
            found += [(text[len(header) :], bits)] if text[len(header) :] else []
            before = self._special.get(of_run[-1], "")
        return _shortened([("".join(text for text, _ in group), bits) for bits, group in groupby(found, key=lambda run: run[1])])

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _written(self) -> Mapping[str, Sequence[str]]:
        """The text of a special token -> what the template writes behind it that is no content: names of roles, line breaks, a system turn
        of its own. Longest first."""
        specials, found = self._template.specials, dict[str, set[str]]()
        for text in self._rendered():
            for literal in MARK.split(text):
                for token, after in zip(specials.findall(literal), specials.split(literal)[1:], strict=True):
                    if after:
                        found.setdefault(token, set()).add(after)
        return {token: sorted(texts, key=len, reverse=True) for token, texts in found.items()}

    def _rendered(self) -> Iterator[str]:
        """What the template writes for contents that are marks."""
        if not self._template.exists or not self._template.special_texts:
            return
        for roles in TALKS:
            talk: list[Message] = [{"role": role, "content": f"Zq{i}qZ"} for i, role in enumerate(roles)]
            for generate in (False, True):
                try:
                    yield self._template.render(talk, generate=generate)
                except (BadRow, DataError):  # it does not know these roles
                    continue


def _shortened(runs: Sequence[Run]) -> list[Run]:
    """At most MAX_TEXT characters of them, half from either end."""
    if sum(len(text) for text, _ in runs) <= MAX_TEXT:
        return [(printable(text), bits) for text, bits in runs]
    front, back = _front(runs, MAX_TEXT // 2), _front([(text[::-1], bits) for text, bits in reversed(runs)], MAX_TEXT // 2)
    middle = [(f"\n[… {sum(len(text) for text, _ in runs) - MAX_TEXT:,} characters …]\n", TEMPLATE)]
    return [(printable(text), bits) for text, bits in [*front, *middle, *((text[::-1], bits) for text, bits in reversed(back))]]


def _front(runs: Sequence[Run], most: int) -> list[Run]:
    found = list[Run]()
    for text, bits in runs:
        if most <= 0:
            break
        found.append((text[:most], bits))
        most -= len(text)
    return found


def _short(text: str) -> str:
    return printable(text if len(text) <= 600 else text[:600] + "…")
