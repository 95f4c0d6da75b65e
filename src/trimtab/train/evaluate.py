"""Scores on held-out rows: the base and every adapter side by side, in mixed batches.

Three passes, each over all data sets and contestants at once: the loss of the references, greedy answers, the likelihood of labels. Only
numbers, token ids and texts leave a forward: memory is bounded by `max_tokens`, whatever the count of rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from trimtab.atomic import atomic_write, clear_unfinished
from trimtab.data import (
    SCORES,
    Example,
    Row,
    Source,
    Written,
    answer_of,
    asked,
    find_labels,
    has_bleu,
    label_examples,
    load_examples,
    summarise_dropped,
    valid_json,
)
from trimtab.data.prompts_alone import Asked
from trimtab.decode.generate import Sampling, generate
from trimtab.errors import DataError
from trimtab.forward.attached import Attached
from trimtab.forward.packs import Mix
from trimtab.memory import release_freed
from trimtab.model import Base
from trimtab.objectives import Counts, Objective, Sft
from trimtab.objectives.base import Taught
from trimtab.objectives.grpo import Grpo
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.train.called import Called, Caller
from trimtab.train.labels import Ballot, label_likelihoods
from trimtab.train.listen import Listener, Silent
from trimtab.train.losses import Part, Reference
from trimtab.train.measure import base_log_probabilities, mean_losses, probe
from trimtab.train.rewarding import Rewarding

SAMPLES = 5


@dataclass(frozen=True)
class Contestant:
    """Who answers: the base (member BASE) or an adapter of the mix. generates, chooses: whether it answers questions, and picks labels.
    objective: by whose loss it is judged; None: by none."""

    name: str
    member: int
    generates: bool = True
    chooses: bool = True
    objective: Objective | None = field(default_factory=Sft)


@dataclass(frozen=True)
class Question:
    """A held-out row as a prompt and the answer that it should get. written: how the base writes that answer. choices: the row under each
    label of its data set. called: the calls that it should make, where it has tools."""

    prompt: Sequence[int]
    reference: str
    written: Written = field(default_factory=Written)
    choices: Sequence[Example] = ()
    called: Called | None = None


@dataclass(frozen=True)
class HeldOut:
    """A data set's held-out rows: examples to measure the loss on, questions for those of them that have an answer, and its labels.
    references: what the base or a teacher says of the examples, where an objective needs it, by `Objective.taught_by`. asked: of each
    example that is a prompt alone, what rewards are told of it."""

    examples: Sequence[Example]
    questions: Sequence[Question] = ()
    labels: Sequence[str] = ()
    references: Mapping[Taught | None, Reference] = field(default_factory=dict)
    asked: Sequence[Asked] = ()


@dataclass
class Result:
    """What one contestant reached on one data set. predictions: prompt, reference, and answer or label of every question."""

    scores: dict[str, Any]
    predictions: list[dict[str, Any]] = field(default_factory=list)


Results = dict[str, dict[str, Result]]
"""data set -> contestant -> result"""


def ask(
    examples: Sequence[Example], rows: Sequence[Row], labels: Sequence[str], tokenizer: Any, where: str, vocab_size: int | None = None
) -> HeldOut:
    """Held-out examples with the questions that their rows ask; plain text asks none. rows: those of `examples` among others. vocab_size:
    rows of the base's embedding.

    DataError where no row's answer is one of the labels: they are written otherwise. An answer that is none of them counts as wrong.
    """
    known = {label.strip() for label in labels}
    if labels and not any((answer_of(row) or "").strip() in known for row in rows):
        fix = "name the labels as the rows write them, or take them from the rows: auto"
        raise DataError(f"{where}: no row's answer is one of the labels {', '.join(map(repr, labels[:10]))}", fix=fix)
    by_id = {row.id: row for row in rows}
    assert len(by_id) == len(rows), "rows of two sources that were read under one number"
    asking = [by_id[e.row] for e in examples if answer_of(by_id[e.row]) is not None]
    choices = label_examples(asking, labels, tokenizer, vocab_size) if labels else [[] for _ in asking]
    questions = [Question(*asked(row, tokenizer), found, Called.of(row)) for row, found in zip(asking, choices, strict=True)]
    told = [row.asked for e in examples if (row := by_id[e.row]).asked is not None]
    return HeldOut(examples, questions, labels, asked=[a for a in told if a is not None])


def read_held_out(
    base: Base,
    source: Source | str,
    labels: Sequence[str] | Literal["auto"] = (),
    max_rows: int | None = None,
    listener: Listener | None = None,
    objectives: Sequence[Objective] = (),
    max_tokens: int = 4096,
) -> HeldOut:
    """The first rows of a source, or of a path, to judge by. labels: "auto" for the distinct answers of its rows. listener: hears which
    rows were left out, and what no row uses. objectives: by which contestants are judged; all read rows alike. max_tokens: of a forward
    that computes the base's log-probabilities, where one of these needs them. DataError."""
    source = source if isinstance(source, Source) else Source(source)
    path, listener = source.path, listener or Silent()
    longest, vocab = base.spec.max_positions, base.spec.vocab_size
    dataset = load_examples(
        [source],
        base.tokenizer,
        root=Path(),
        max_length=longest,
        vocab_size=vocab,
        last_turn_only=True,
        keep_rows=True,
        parts=objectives[0].parts if objectives else Objective.parts,
    )
    for note in dataset.notes:
        listener.note(note)
    if dataset.dropped:
        listener.warning(f"{path}: left out {'; '.join(summarise_dropped(dataset.dropped))}")
    found = find_labels(dataset.rows, path) if labels == "auto" else labels
    held = ask(examples := dataset.examples[:max_rows], dataset.rows, found, base.tokenizer, path, vocab)
    needed = any(o.needs_reference for o in objectives)
    return replace(held, references={None: base_log_probabilities(base.attached, examples, max_tokens)}) if needed else held


@dataclass(frozen=True)
class Judge:
    """How contestants are judged. max_new_tokens: of an answer. max_tokens: of a forward. on_answer(tokens so far): called at times. base:
    the frozen model, where contestants are another one's. rewarding: asks the rewards of contestants that learn from their own answers.
    place: whose ranks share the rows."""

    tokenizer: Any
    stop_ids: set[int]
    max_new_tokens: int
    max_tokens: int
    on_answer: Callable[[int], None] | None = None
    base: Attached | None = None
    rewarding: Rewarding | None = None
    place: Place = ONE_PROCESS

    def judge(self, attached: Attached, mix: Mix, fields: Mapping[str, Sequence[Contestant]], held: Mapping[str, HeldOut]) -> Results:
        """Loss, answers, labels and scores. fields: who is judged on each data set of `held`."""
        release_freed()  # what training freed lies in pieces that the answers' cache does not fit into
        who = [(d, c) for d in fields for c in fields[d]]
        judged = [(d, c, c.objective) for d, c in who if c.objective is not None and c.objective.sampled_at is None]
        parts = [
            Part(c.member, held[d].examples, o, Counts.of(held[d].examples), held[d].references.get(o.taught_by)) for d, c, o in judged
        ]
        found = zip(judged, mean_losses(attached, mix, self._probed(attached, mix, parts), self.max_tokens, self.place), strict=True)
        reported = {(d, c.name): o.report(outcome.loss, outcome.metrics) for (d, c, o), outcome in found}
        rewarded = self._rewarded(attached, mix, [(d, c, held[d]) for d, c in who if isinstance(c.objective, Grpo)])
        asking = [(c.member, q) for d, c in who if c.generates for q in held[d].questions]
        said = iter(self._answers(attached, mix, asking))
        polled = [(d, c, q) for d, c in who if c.chooses and held[d].labels for q in held[d].questions]
        ballots = [Ballot(c.member, q.choices) for _, c, q in polled]

        def vote(numbers: Sequence[int]) -> Sequence[list[float]]:
            return label_likelihoods(attached, mix, [ballots[i] for i in numbers], self.max_tokens)

        chosen = iter(self.place.each([b.longest for b in ballots], vote))
        results: Results = {d: {} for d in fields}
        for d, c in who:
            h = held[d]
            answers = [next(said) for _ in h.questions] if c.generates else []
            labels = [_likeliest(next(chosen), h.labels) for _ in h.questions] if c.chooses and h.labels else []
            scores = {**reported.get((d, c.name), {}), "rows": len(h.examples)}
            results[d][c.name] = rewarded.get((d, c.name)) or self._result(scores, h.questions, answers, labels)
        return results

    def _probed(self, attached: Attached, mix: Mix, parts: Sequence[Part]) -> list[Part]:
        """The parts with what their objectives want to know of all rows before the loss."""
        asked = {n: found for n, p in enumerate(parts) if (found := p.objective.probes(p.examples))}
        sequences = [(parts[n].member, found) for n, found in asked.items()]
        sums = probe(attached, self.base or attached, mix, sequences, self.max_tokens, self.place) if asked else []
        told = dict(zip(asked, sums, strict=True))
        return [replace(p, probes_P=told.get(n)) for n, p in enumerate(parts)]

    def _answers(self, attached: Attached, mix: Mix, questions: Sequence[tuple[int, Question]]) -> Sequence[list[int]]:
        """Greedy answers, all contestants and questions in one continuous mixed batch."""
        count = 0

        def token(_: int, __: int) -> None:
            nonlocal count
            count += 1
            if self.on_answer is not None and count % 64 == 0:
                self.on_answer(count)

        if not questions:
            return []
        members, prompts = [m for m, _ in questions], [q.prompt for _, q in questions]
        stop_ids = self.stop_ids | (self._caller.stop_ids if any(q.called for _, q in questions) else set())
        return self._generated(attached, mix, members, prompts, [Sampling(self.max_new_tokens)] * len(prompts), stop_ids, token)

    def _generated(
        self,
        attached: Attached,
        mix: Mix,
        members: Sequence[int],
        prompts: Sequence[Sequence[int]],
        how: Sequence[Sampling],
        stop_ids: set[int],
        on_token: Callable[[int, int], None] | None = None,
    ) -> Sequence[list[int]]:
        """What `generate` gives each prompt."""

        def work(numbers: Sequence[int]) -> Sequence[list[int]]:
            if not numbers:
                return []
            who, asked, each = [members[i] for i in numbers], [prompts[i] for i in numbers], [how[i] for i in numbers]
            return generate(attached, mix, who, asked, each, stop_ids, on_token)

        return self.place.each([len(p) + h.max_new_tokens for p, h in zip(prompts, how, strict=True)], work)

    def _rewarded(self, attached: Attached, mix: Mix, who: Sequence[tuple[str, Contestant, HeldOut]]) -> dict[tuple[str, str], Result]:
        """The likeliest answers to prompts alone, and the mean of their rewards."""
        if self.rewarding is None or not who:
            return {}
        asking = [(c, c.objective, e) for _, c, h in who for e in h.examples if isinstance(c.objective, Grpo)]
        prompts, how = [e.ids.tolist() for _, _, e in asking], [Sampling(o.max_completion_length) for _, o, _ in asking]
        rewarding = self.rewarding
        said = iter(self._generated(attached, mix, [c.member for c, _, _ in asking], prompts, how, rewarding.stop_ids))
        found = {}
        for d, c, h in who:
            assert isinstance(c.objective, Grpo)
            answers = [next(said) for _ in h.examples]
            scores, rewards = self.place.once(partial(rewarding.scores, c.objective, h.asked, h.examples, answers))
            texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
            rows = zip(h.examples, h.asked, texts, rewards, strict=True)
            predictions = [
                {"prompt": str(self.tokenizer.decode(e.ids.tolist())), "reference": a.reference_text, "answer": text, "reward": reward}
                for e, a, text, reward in rows
            ]
            found[d, c.name] = Result({**scores, "rows": len(h.examples)}, predictions)
        return found

    @cached_property
    def _caller(self) -> Caller:
        return Caller(self.tokenizer)

    def _result(self, scores: dict[str, Any], questions: Sequence[Question], answers: Sequence[list[int]], labels: Sequence[str]) -> Result:
        """Scores are of contents; a prediction shows the answer as it was generated, with what the chat template writes around it."""
        references = [q.reference for q in questions]
        contents = [q.written.content(ids, q.reference, self.tokenizer) for q, ids in zip(questions, answers or (), strict=bool(answers))]
        predictions: list[dict[str, Any]] = []
        if answers:
            scores |= score(contents, references)
            made = [self._caller.is_right(q.called, q.prompt, ids) for q, ids in zip(questions, answers, strict=True) if q.called]
            scores |= {"tool_calls": round(100 * sum(made) / len(made), 2)} if made else {}
        if labels:
            right = sum(label == r.strip() for label, r in zip(labels, references, strict=True))
            scores["label_accuracy"] = round(100 * right / len(labels), 2)
        for i, q in enumerate(questions if answers or labels else ()):
            prompt = str(self.tokenizer.decode(list(q.prompt), skip_special_tokens=False))  # as the model sees it
            row: dict[str, Any] = {"prompt": prompt, "reference": q.reference}
            if labels:
                row |= {"label": labels[i], "label_correct": labels[i] == q.reference.strip()}
            answer = q.written.said(answers[i], self.tokenizer) if answers else labels[i]
            given = contents[i] if answers else labels[i]
            predictions.append(row | {"answer": answer, "correct": given.strip() == q.reference.strip()})
        return Result(scores, predictions)


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Every score that texts allow, in percent: the share of valid JSON only where all references are JSON, BLEU only where sacrebleu is
    installed."""
    left_out = set() if valid_json(references, references) == 100.0 else {"valid_json"}
    left_out |= set() if has_bleu() else {"bleu"}
    return {n: round(s(predictions, references), 2) for n, s in SCORES.items() if n not in left_out}


def samples(predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first few predictions, for summaries."""
    return [{k: p[k] for k in ("prompt", "reference", "answer")} for p in predictions[:SAMPLES]]


def write_predictions(folder: Path, results: Results) -> dict[tuple[str, str], Path]:
    """One <data>-<contestant>.jsonl for every contestant that answered; returns each one's path. A second use of a name gets a number."""
    written: dict[tuple[str, str], Path] = {}
    clear_unfinished(folder)
    for data, by_name in results.items():
        for name, result in by_name.items():
            if not result.predictions:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"[^\w.@~-]+", "-", f"{data}-{name}")  # adapters of a program may be called acme/support
            path, count = folder / f"{stem}.jsonl", 1
            while path in written.values():  # data a with variant b-c, data a-b with variant c
                count += 1
                path = folder / f"{stem}~{count}.jsonl"
            with atomic_write(path) as file:
                file.writelines((json.dumps(p, ensure_ascii=False) + "\n").encode() for p in result.predictions)
            written[data, name] = path
    return written


def _likeliest(values: Sequence[float], labels: Sequence[str]) -> str:
    best = max(range(len(labels)), key=lambda i: values[i] if not math.isnan(values[i]) else -math.inf)
    return labels[best].strip()
