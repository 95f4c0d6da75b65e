"""Many rows without gradients: their losses, the log-probabilities that the base or a teacher gives them, and probes against the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Example
from trimtab.data.rows import RowId
from trimtab.data.token_store import Examples
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.train.losses import Outcome, Part, Reference, forward_loss
from trimtab.train.targets import Targets, lay_out, log_probabilities, logits_of


@torch.no_grad()
def mean_losses(attached: Attached, mix: Mix, asked: Sequence[Part], max_tokens: int, place: Place = ONE_PROCESS) -> Sequence[Outcome]:
    """The outcome of each part, all packed together into forwards of at most max_tokens tokens."""
    outcomes = [Outcome()] * len(asked)
    every = [(n, e) for n, part in enumerate(asked) for e in part.examples]
    todo = [every[i] for i in place.share([e.tokens for _, e in every])]
    for chunk in _cuts(np.array([e.tokens for _, e in todo]), max_tokens):
        own = [todo[i] for i in chunk]
        _, unread = forward_loss(attached, mix, [replace(asked[n], examples=[e]) for n, e in own])
        for (n, _), outcome in zip(own, unread.read(), strict=True):
            outcomes[n] += outcome
    return place.added(outcomes)


@torch.no_grad()
def base_log_probabilities(attached: Attached, examples: Examples, max_tokens: int, place: Place = ONE_PROCESS) -> Reference:
    """The base's log-probabilities of all segments. A function of these arguments alone, so that a resumed run has the same to the bit."""
    rows = _Once(examples)
    values = torch.zeros(rows.targets, dtype=torch.float32)
    for chunk, own in rows.cut(max_tokens, place):
        logp_R = log_probabilities_of(attached, Mix([]), [(BASE, s) for e in own for s in e.segments]).cpu()
        rows.store(chunk, logp_R, values)
    place.add(values)
    return Reference(values, rows.begins)


@torch.no_grad()
def likeliest(
    attached: Attached,
    mix: Mix,
    member: int,
    examples: Examples,
    count: int,
    vocab: int,
    max_tokens: int,
    temperature: float = 1.0,
    place: Place = ONE_PROCESS,
) -> Reference:
    """The `count` likeliest tokens of a teacher at each target, and their log-probabilities among the first `vocab` tokens, at a
    temperature. The teacher: a member of the mix, or BASE."""
    rows = _Once(examples)
    values, tokens = torch.zeros(rows.targets, count, dtype=torch.float32), torch.zeros(rows.targets, count, dtype=torch.int32)
    for chunk, own in rows.cut(max_tokens, place):
        laid, batch = lay_out(attached, mix, [(member, s, None) for e in own for s in e.segments])  # one member: rows keep their order
        targets = Targets.of([(start, s) for _, start, s in laid], attached.device)
        logps, ids = list[Tensor](), list[Tensor]()
        for _, logits in logits_of(attached, attached.forward(batch)[targets.row_R], batch, targets):
            known = logits[:, :vocab] if temperature == 1.0 else logits[:, :vocab] / temperature
            best = torch.log_softmax(known, -1).topk(count)
            logps.append(best.values.cpu())
            ids.append(best.indices.to("cpu", torch.int32))
        rows.store(chunk, torch.cat(logps), values)
        rows.store(chunk, torch.cat(ids), tokens)
    place.add(values)
    place.add(tokens)
    return Reference(values, rows.begins, tokens)


class _Once:
    """Each row of a data set once, and where its supervised tokens are among those of all. begins: by the row's identity."""

    def __init__(self, examples: Examples):
        self._examples, self._places = examples, np.unique(examples.places, return_index=True)[1]
        self._starts = np.concatenate([[0], np.cumsum(examples.targets[self._places])])
        self.targets = int(self._starts[-1])
        self.begins: dict[RowId, int] = {}

    def cut(self, max_tokens: int, place: Place) -> Iterator[tuple[list[int], list[Example]]]:
        """(numbers, rows) of one forward each, of those that this rank takes. Where rows are cut does not depend on ranks."""
        tokens = self._examples.tokens[self._places]
        chunks = list(_cuts(tokens, max_tokens))
        mine = set(place.share([float(tokens[chunk].sum()) for chunk in chunks]))
        for n, chunk in enumerate(chunks):
            rows = [self._examples[int(self._places[i])] for i in chunk]
            self.begins |= {e.row: int(self._starts[i]) for i, e in zip(chunk, rows, strict=True)}
            if n in mine:
                yield chunk, rows

    def store(self, chunk: list[int], found: Tensor, target: Tensor) -> None:
        """Write what was found of a forward's rows to their places."""
        sizes = [int(self._starts[i + 1] - self._starts[i]) for i in chunk]
        for i, own in zip(chunk, found.split(sizes), strict=True):
            target[self._starts[i] : self._starts[i + 1]] = own


@torch.no_grad()
def probe(
    attached: Attached,
    base: Attached,
    mix: Mix,
    asked: Sequence[tuple[int, Sequence[Example]]],
    max_tokens: int,
    place: Place = ONE_PROCESS,
) -> list[Tensor]:
    """For each (member, sequences): log p of each sequence's targets, summed, less the base's [P]. Members and base share forwards where
    they are one model, and what several members ask of the base is computed once. Sequences end where positions do."""
    room = min(a.spec.max_positions for a in (attached, base)) - max((a.virtual_tokens for a in mix.adapters), default=0)
    wanted = [[_shortened(e, room) for e in sequences] for _, sequences in asked]
    alike = {(e.ids.tobytes(), e.supervised.tobytes()): e for sequences in wanted for e in sequences}
    of_base = {key: (BASE, e) for key, e in alike.items()}
    todo = [(member, e) for (member, _), sequences in zip(asked, wanted, strict=True) for e in sequences]
    if attached is base:
        sums = _sums(attached, mix, [*todo, *of_base.values()], max_tokens, place)
        own, reference = sums[: len(todo)], sums[len(todo) :]
    else:
        own = _sums(attached, mix, todo, max_tokens, place)
        reference = _sums(base, Mix([]), list(of_base.values()), max_tokens, place)
    number = {key: i for i, key in enumerate(of_base)}
    of_own = [reference[number[e.ids.tobytes(), e.supervised.tobytes()]] for _, e in todo]
    return list((own - torch.stack(of_own).to(own.device)).split([len(w) for w in wanted]))


def _shortened(e: Example, room: int) -> Example:
    return e if len(e.ids) <= room else replace(e, ids=e.ids[:room], supervised=e.supervised[:room])


def _sums(attached: Attached, mix: Mix, todo: Sequence[tuple[int, Example]], max_tokens: int, place: Place) -> Tensor:
    """[n]: log p of the targets of each sequence, summed."""
    found = torch.zeros(len(todo), dtype=torch.float32, device=attached.device)
    lengths = np.array([len(e.ids) for _, e in todo])
    mine = np.array(place.share(lengths.tolist()), dtype=np.int64)
    for some in _cuts(lengths[mine], max_tokens):
        chunk = mine[some].tolist()
        own = [todo[i] for i in chunk]
        runs = log_probabilities_of(attached, mix, own).split([int(e.supervised.sum()) for _, e in own])
        found[chunk] = torch.stack([r.sum() for r in runs])
    place.add(found)
    return found


def log_probabilities_of(attached: Attached, mix: Mix, segments: Sequence[tuple[int, Example]], temperature: float = 1.0) -> Tensor:
    """log p [R] of the targets of (member, segment) in one forward: in the order of `segments`, whatever theirs in the batch."""
    laid, batch = lay_out(attached, mix, [(member, s, None) for member, s in segments])
    targets = Targets.of([(start, s) for _, start, s in laid], attached.device)
    logp_R = log_probabilities(attached, attached.forward(batch), batch, targets, temperature)
    parts = sorted(zip((i for i, _, _ in laid), targets.runs, strict=True))
    return torch.cat([logp_R[a:b] for _, (a, b) in parts])


def _cuts(tokens: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Numbers of the rows of one forward each, the longest first."""
    chunk, held = list[int](), 0
    for i in np.argsort(-tokens, kind="stable").tolist():
        if chunk and held + tokens[i] > max_tokens:
            yield chunk
            chunk, held = [], 0
        chunk.append(i)
        held += int(tokens[i])
    if chunk:
        yield chunk
