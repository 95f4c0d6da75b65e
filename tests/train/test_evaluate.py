"""Scores on held-out rows against what the model's own logits and a plain loop say; predictions; memory."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.data.templates import STYLES
from tests.tiny import VOCAB
from tests.train.common import METHODS, run, run_file, tiny_base
from trimtab import ops
from trimtab.data import Example, Row, Source, encode_rows, end_of_turn_id, find_labels, load_examples
from trimtab.decode.generate import Sampling
from trimtab.errors import DataError
from trimtab.forward.batch import BASE
from trimtab.methods import BY_NAME
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.evaluate import Contestant, HeldOut, Judge, Result, ask, read_held_out, write_predictions
from trimtab.train.labels import Ballot, label_likelihoods
from trimtab.train.losses import Outcome
from trimtab.train.prepare import read_splits

LABELS = ["red", "redder", "a much longer colour"]
"""One begins another, and the lengths differ."""


def write_colours(path: Path, count: int) -> Path:
    rows = [{"prompt": f"{i}: " + "y" * (i * 5 % 17), "completion": LABELS[i % 3]} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def adapters(base: Base) -> dict[str, Adapter]:
    """One of each method, moved away from the base."""
    found = {}
    for name, fields in METHODS.items():
        if name != "full":
            method = BY_NAME[fields["method"]](**{k: v for k, v in fields.items() if k not in ("method", "lr")})
            exported = method.export(Adapter.create(base, method, seed=3).params)
            generator = torch.Generator().manual_seed(7)
            found[name] = Adapter(
                base, exported[0], {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in exported[1].items()}
            )
    return found


def log_p(base: Base, adapter: Adapter | None, ids: Any, supervised: Any) -> float:
    """Σ log p of the supervised tokens, one sequence through the model's own logits."""
    log_TV = torch.log_softmax(base.logits([ids.tolist()], [adapter])[0].double(), -1)
    return sum(log_TV[t - 1, int(ids[t])].item() for t in range(1, len(ids)) if supervised[t])


def judged(base: Base, held: HeldOut, named: dict[str, Adapter], max_tokens: int = 4096, **asked: bool) -> dict[str, Result]:
    mix, members = base.mix(list(named.values()))
    field = [Contestant(n, m, **asked) for n, m in zip(["base", *named], [BASE, *members], strict=True)]
    return Judge(base.tokenizer, base.stop_ids, 4, max_tokens).judge(base.attached, mix, {"d": field}, {"d": held})["d"]


@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_every_method_beside_the_base_is_as_alone(tmp_path: Path, max_tokens: int) -> None:
    """Loss, answers and labels of one mixed pass against one sequence at a time, prefixes and a label that begins another included."""
    base = tiny_base()
    held, named = read_held_out(base, str(write_colours(tmp_path / "c.jsonl", 5)), LABELS), adapters(base)
    results = judged(base, held, named, max_tokens)
    targets = sum(e.supervised.sum() for e in held.examples)
    for name, adapter in {"base": None, **named}.items():
        scores, predictions = results[name].scores, results[name].predictions
        loss = -sum(log_p(base, adapter, e.ids, e.supervised) for e in held.examples) / targets
        assert scores["loss"] == pytest.approx(loss, rel=1e-4), name
        assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
        likelihoods = [[log_p(base, adapter, e.ids, e.supervised) for e in q.choices] for q in held.questions]
        best = [LABELS[max(range(3), key=row.__getitem__)] for row in likelihoods]
        assert [p["label"] for p in predictions] == best, name
        right = [label == q.reference for label, q in zip(best, held.questions, strict=True)]
        assert scores["label_accuracy"] == pytest.approx(100 * sum(right) / 5)
        alone = [base.generate_ids([q.prompt], [adapter], Sampling(4))[0] for q in held.questions]
        said = [base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in alone]
        assert [p["answer"] for p in predictions] == said
        member = base.mix([adapter])
        found = label_likelihoods(base.attached, member[0], [Ballot(member[1][0], q.choices) for q in held.questions], max_tokens)
        for a, b in zip(found, likelihoods, strict=True):
            assert a == pytest.approx(b, rel=1e-4), name


def test_label_accuracy_alone_and_an_adapter_that_knows(tmp_path: Path) -> None:
    """A trained adapter tells its labels apart; the likelihood says so without an answer being generated."""
    rows = [{"prompt": "x" if i % 2 else "o", "completion": "yes" if i % 2 else "no"} for i in range(8)]
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a", "max_steps": 40, "lora_dropout": 0.0, "weight_decay": 0.0}})
    for split in ("a", "a-test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    content["data"]["a"]["labels"] = "auto"
    content["evaluate"]["generate"] = False
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    scores = report.summary["variants"]["v"]["scores"]
    assert scores["label_accuracy"] == 100.0
    assert "exact_match" not in scores
    assert report.summary["base_scores"]["a"]["label_accuracy"] < 100.0


def test_predictions_are_saved(tmp_path: Path) -> None:
    report = run(tmp_path, {"v": METHODS["ia3"] | {"data": "a"}, "full": METHODS["full"] | {"data": "a"}})
    for name, scores in {
        "base": report.summary["base_scores"]["a"],
        **{n: v["scores"] for n, v in report.summary["variants"].items()},
    }.items():
        path = report.out / scores["predictions"]
        assert path == report.out / "predictions" / f"a-{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == 3
        assert lines[0].keys() == {"prompt", "reference", "answer", "correct"}
        assert lines[1]["prompt"].startswith("<|im_start|>user\nn 1 ") and lines[1]["reference"] == "a 1"
        assert scores["exact_match"] == pytest.approx(100 * sum(p["correct"] for p in lines) / 3, abs=0.01)


@pytest.mark.parametrize("style", STYLES)
def test_a_model_that_knows_the_answers_by_heart_matches_exactly(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the template writes around an answer was trained, so it is generated; the scores are of what stands within."""
    tokenizer = STYLES[style].tokenizer()
    rows = [Row(f"r:{i}", prompt=f"ask {i}", completion=text, id=(0, i)) for i, text in enumerate(("red", "final", "s", "a b"))]
    examples = [e for e in encode_rows(rows, tokenizer, 512) if isinstance(e, Example)]
    stops = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    learnt = [e.ids[e.supervised].tolist() for e in examples]
    heart = [ids[: next(i for i, token in enumerate(ids) if token in stops)] for ids in learnt]
    monkeypatch.setattr("trimtab.train.evaluate.generate", lambda *_: heart)
    monkeypatch.setattr("trimtab.train.evaluate.mean_losses", lambda *_: [Outcome(1.0)])
    held = ask(examples, rows, (), tokenizer, "r")
    field = [Contestant("base", BASE, chooses=False)]
    found = Judge(tokenizer, stops, 64, 64).judge(None, None, {"d": field}, {"d": held})["d"]["base"]  # type: ignore[arg-type]
    assert found.scores["exact_match"] == 100.0 and found.scores["token_f1"] == 100.0
    assert [p["correct"] for p in found.predictions] == [True] * 4
    heart[0] = tokenizer.encode("blue", add_special_tokens=False)
    assert Judge(tokenizer, stops, 64, 64).judge(None, None, {"d": field}, {"d": held})["d"]["base"].scores["exact_match"] == 75.0  # type: ignore[arg-type]


def test_prediction_files_of_like_names_stay_apart(tmp_path: Path) -> None:
    one = {"prompt": "p", "reference": "r", "answer": "a", "correct": False}
    results = {"a": {"b-c": Result({}, [one])}, "a-b": {"c": Result({}, [one | {"answer": "other"}]), "none": Result({})}}
    paths = write_predictions(tmp_path, results)
    assert len({*paths.values()}) == 2
    assert json.loads(paths["a-b", "c"].read_text())["answer"] == "other"


def test_plain_text_has_a_loss_and_no_questions(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "some words"}\n')
    base = tiny_base()
    (result,) = judged(base, read_held_out(base, str(tmp_path / "t.jsonl")), {}).values()
    assert result.scores["loss"] > 0 and result.scores["rows"] == 1
    assert "exact_match" not in result.scores and not result.predictions


def test_labels_that_cannot_be(tmp_path: Path) -> None:
    rows = [Row(f"f:{i}", prompt="p", completion=str(i)) for i in range(101)]
    with pytest.raises(DataError, match="found 101 distinct answers"):
        find_labels(rows, "f")
    with pytest.raises(DataError, match="found 1 distinct"):
        find_labels(rows[:1], "f")
    with pytest.raises(DataError, match="no row's answer is one of the labels 'yes', 'no'"):
        read_held_out(tiny_base(), str(write_colours(tmp_path / "c.jsonl", 3)), ["yes", "no"])


class _LogitsAlive(TorchDispatchMode):
    """The largest count of rows of logits (tensors whose last size is the vocabulary) alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def _gone(self, rows: int) -> None:
        self.alive -= rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == VOCAB:
            rows = out.numel() // VOCAB
            self.alive += rows
            self.peak = max(self.peak, self.alive)
            weakref.finalize(out, self._gone, rows)
        return out


@pytest.mark.slow
def test_no_logits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers#7158: the rows of logits alive at a time do not grow with the rows that are scored."""
    monkeypatch.setattr(ops.loss, "LOSS_ROWS", 16)
    base, peaks = tiny_base(), []
    for count in (6, 24):
        held = read_held_out(base, str(write_colours(tmp_path / f"{count}.jsonl", count)), LABELS)
        with _LogitsAlive() as logits:
            judged(base, held, adapters(base), max_tokens=128, generates=False)
        peaks.append(logits.peak)
    assert 0 < peaks[1] <= max(peaks[0], 4 * 16), peaks


def test_ask_takes_the_rows_of_its_examples() -> None:
    base = tiny_base()
    rows = [Row(f"f:{i}", prompt=f"p{i}", completion=f"c{i}") for i in range(3)]
    examples = [e for e in encode_rows(rows, base.tokenizer, 64) if hasattr(e, "ids")]
    held = ask([examples[2], examples[0], examples[2]], rows, [], base.tokenizer, "f")
    assert [q.reference for q in held.questions] == ["c2", "c0", "c2"]


def test_each_example_asks_its_own_row_whatever_the_display_names(tmp_path: Path) -> None:
    """A JSON array on one line gives all its rows one origin; one file as two sources has every origin twice, once a system prompt."""
    base = tiny_base()
    pairs = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]
    (tmp_path / "line.json").write_text(json.dumps(pairs), encoding="utf-8")
    twice = [Source("line.json", system="calm"), Source("line.json", system="rude", weight=2)]
    data = load_examples(twice, base.tokenizer, root=tmp_path, max_length=128, last_turn_only=True, keep_rows=True)
    held = ask(data.examples, data.rows, [], base.tokenizer, "f")
    said = [(base.tokenizer.decode(q.prompt), q.reference) for q in held.questions]
    wanted = [("calm", i) for i in range(4)] + [("rude", i) for i in range(4)] * 2
    assert len(said) == len(wanted) == 12
    for (prompt, reference), (system, i) in zip(said, wanted, strict=True):
        assert reference == f"answer {i}" and f"question {i}<" in prompt and system in prompt
    for q, example in zip(held.questions, data.examples, strict=True):  # the question is the example's own tokens up to the answer
        assert list(q.prompt) == example.ids[: int(example.supervised.argmax())].tolist()


def test_labels_that_are_found_among_training_rows_need_no_rows_of_them(tmp_path):
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a"}})
    content["data"] = {"a": content["data"]["a"] | {"labels": "auto"}}
    config = RunConfig.from_dict(content, root=tmp_path)
    splits = read_splits(config, "a", config.data["a"], tiny_base())
    assert splits.train.rows == [] and splits.answers == {f"a {i}" for i in range(11)}
