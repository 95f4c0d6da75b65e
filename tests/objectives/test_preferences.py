"""Runs of preference objectives: beside others as alone, judged by their own metrics, resumed to the bit; their rows in every form."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.objectives.test_new_objective import write_pairs
from tests.tiny import tiny_folder, tiny_tokenizer
from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.bases.template import BadRow
from trimtab.cli import main
from trimtab.data import Source, load_examples
from trimtab.data.pairs import marked, pair
from trimtab.errors import ConfigError, DataError
from trimtab.objectives import OBJECTIVES
from trimtab.train import RunConfig, train
from trimtab.train.check import check
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.page import told
from trimtab.train.past import read_runs
from trimtab.train.prepare import prepare

LORA = {"method": "lora", "r": 4, "lora_dropout": 0.1, "lr": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "dpo": LORA | {"data": "pairs", "objective": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "orpo": LORA | {"data": "pairs", "objective": "orpo", "batch_size": 4},
    "simpo": METHODS["prompt"] | {"data": "pairs", "objective": "simpo"},
    "kto": LORA | {"data": "marked", "objective": "kto", "gradient_accumulation_steps": 2},
    "whole": METHODS["full"] | {"data": "marked", "objective": "kto"},
    "sft": LORA | {"data": "a"},
}


def config(folder: Path, variants: Mapping[str, Mapping[str, Any]], **keys: Any) -> RunConfig:
    content = run_file(folder, {n: dict(v) for n, v in variants.items()}, max_tokens=150, evaluate={"generate": False}, **keys)
    for split, count, first in (("train", 7, 0), ("valid", 4, 20), ("test", 3, 30)):
        rows = write_pairs(folder / f"pairs-{split}.jsonl", count, first)
        each = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(rows)]
        (folder / f"marked-{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in each), encoding="utf-8")
    for name in ("pairs", "marked"):
        content["data"][name] = {split: f"{name}-{split}.jsonl" for split in ("train", "valid", "test")}
    content["defaults"] |= {"max_steps": 3, "batch_size": 3}
    return RunConfig.from_dict(content, root=folder)


def losses(report: Any, name: str) -> list[float]:
    return [line["loss"] for line in metrics(report)[name] if "event" not in line]


def test_any_mix_trains_as_each_does_alone_and_resumes_to_the_bit(tmp_path: Path) -> None:
    joint = train(config(tmp_path / "joint", VARIANTS), base=tiny_base())
    for name in ("dpo", "kto", "whole"):
        alone = train(config(tmp_path / name, {name: VARIANTS[name]}), base=tiny_base())
        assert losses(joint, name) == pytest.approx(losses(alone, name), rel=1e-5), name
    stop = Stop()

    class Stopping(Silent):
        def step(self, line: Mapping[str, Any]) -> None:
            if line["step"] == 2:
                stop.ask(signal.SIGTERM)

    run = config(tmp_path / "stopped", VARIANTS)
    with pytest.raises(Interrupted):
        train(run, base=tiny_base(), listener=Stopping(), stop=stop)
    resumed = train(run, base=tiny_base(), resume=True)
    for name, adapter in joint.adapters.items():
        assert all(torch.equal(adapter.params[k], p) for k, p in resumed.adapters[name].params.items()), name
    scores = {n: v["scores"] for n, v in joint.summary["variants"].items()}
    assert all({*OBJECTIVES[n].metrics} <= scores[n].keys() for n in ("dpo", "orpo", "simpo", "kto"))
    (run,) = told(read_runs([joint.out]))["runs"]
    assert run["scores"]["rewards/margins"]["better"] == "higher"
    objectives = {v["name"]: v["objective"] for v in run["variants"]}
    assert objectives["kto"] == objectives["whole"] and len(set(objectives.values())) == 5, "losses of several objectives do not compare"


def test_runs_are_judged_by_the_metrics_of_their_objective(tmp_path: Path) -> None:
    keys = {"eval_every": 1, "patience": 1, "max_steps": 4}
    judged = VARIANTS["dpo"] | {"valid_metric": "rewards/margins"} | keys
    falling = VARIANTS["kto"] | {"valid_metric": "rewards/rejected", "lr": 1e-6} | keys
    report = train(config(tmp_path, {"v": judged, "w": falling}), base=tiny_base())
    for name, best in (("v", max), ("w", min)):
        told = report.summary["variants"][name]["valid"]
        metric = told["metric"]
        assert told["best"] == best(x[metric] for x in told["history"]), name
        assert next(x for x in told["history"] if x["step"] == told["best_step"])[metric] == told["best"]
    with pytest.raises(ConfigError) as refused:
        config(tmp_path / "no", {"v": VARIANTS["simpo"] | {"valid_metric": "perplexity"}, "w": judged | {"valid_metric": "margins"}})
    assert "valid_metric = 'perplexity': no metric of objective simpo, which has rewards/accuracies" in str(refused.value)
    assert "not a metric (did you mean 'margin'?): one of loss, " in str(refused.value)


def test_learning_rates_follow_the_objective(tmp_path: Path) -> None:
    preset = {k: v for k, v in LORA.items() if k != "lr"}
    run = config(tmp_path, {"v": preset | {"data": "a"}, "w": preset | {"data": "pairs", "objective": "dpo"}})
    assert [v.lr for v in run.variants] == [1e-3, pytest.approx(2e-5)]


# ---- rows ----


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, YES, NO = said("user", "q"), said("assistant", "yes"), said("assistant", "no")
SHAREGPT = [{"from": "human", "value": "q"}], {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
FORMS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "texts": ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q", ("yes", "no")),
    "texts that are JSON": ({"prompt": "q", "chosen": "[]", "rejected": "null"}, "q", ("[]", "null")),
    "messages": ({"prompt": [ASKED], "chosen": [YES], "rejected": [NO]}, [ASKED], ([YES], [NO])),
    "text and messages": ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, [ASKED], ([YES], [NO])),
    "messages and texts": ({"prompt": [ASKED], "chosen": "yes", "rejected": "no"}, [ASKED], ([YES], [NO])),
    "implicit": ({"chosen": [ASKED, YES], "rejected": [ASKED, NO]}, [ASKED], ([YES], [NO])),
    "implicit, named twice": (
        {"prompt": "q", "messages": [ASKED, YES], "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        [ASKED],
        ([YES], [NO]),
    ),
    "implicit, named as conversations": (
        {"conversations": [ASKED], "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        [ASKED],
        ([YES], [NO]),
    ),
    "implicit text": ({"chosen": "H: q A: yes", "rejected": "H: q A: no"}, "H: q A:", (" yes", " no")),
    "openai": (
        {"input": {"messages": [ASKED], "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]},
        [ASKED],
        ([YES], [NO]),
    ),
    "llama-factory": (
        {"conversations": SHAREGPT[0], "chosen": SHAREGPT[1], "rejected": SHAREGPT[2]},
        SHAREGPT[0],
        ([SHAREGPT[1]], [SHAREGPT[2]]),
    ),
    "json in a cell": ({"prompt": json.dumps([ASKED]), "chosen": json.dumps([YES]), "rejected": json.dumps([NO])}, [ASKED], ([YES], [NO])),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_pairs(form: str) -> None:
    row, prompt, answers = FORMS[form]
    parts = pair(row | {"system": "s"})
    assert [(p["prompt"], p["completion"], p["system"]) for p in parts] == [(prompt, answer, "s") for answer in answers]
    assert [p["completion"] for p in marked(row).values()] == list(answers)


def test_an_instruction_keeps_its_input() -> None:
    row = {"instruction": "i", "input": "more", "chosen": "yes", "rejected": "no"}
    assert pair(row) == tuple({"instruction": "i", "input": "more", "output": answer} for answer in ("yes", "no"))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "q", "output": "x", "chosen": "yes", "rejected": "no"}, "output beside chosen and rejected"),
        ({"prompt": "q", "completion": "x", "chosen": "yes", "rejected": "no"}, "completion beside chosen and rejected"),
    ],
)
def test_an_answer_beside_a_pair_is_said_to_be_unused(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    found = load_examples([Source("r.jsonl")], tiny_tokenizer(), root=tmp_path, max_length=64, parts=OBJECTIVES["dpo"].parts)
    plain = {k: v for k, v in row.items() if k not in ("output", "completion")}
    (tmp_path / "p.jsonl").write_text(json.dumps(plain) + "\n")
    want = load_examples([Source("p.jsonl")], tiny_tokenizer(), root=tmp_path, max_length=64, parts=OBJECTIVES["dpo"].parts)
    assert found.notes == [f"r.jsonl: not used: {name} (1 row)"] and want.notes == []
    assert [s.ids.tolist() for s in found.examples[0].segments] == [s.ids.tolist() for s in want.examples[0].segments]


def test_marks_of_single_answers() -> None:
    assert marked({"prompt": "q", "completion": "yes", "label": "true"}) == {"desirable": {"prompt": "q", "completion": "yes"}}
    assert marked({"messages": [ASKED, NO], "kto_tag": False}) == {"undesirable": {"prompt": [ASKED], "completion": [NO]}}
    assert marked({"messages": [ASKED, NO], "conversations": SHAREGPT[:1], "label": 0}) == {
        "undesirable": {"prompt": [ASKED], "completion": [NO]}
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "yes"}, "no pair: rejected is missing"),
        ({"prompt": "q", "chosen": "yes", "rejected": " "}, "no pair: rejected is empty"),
        ({"prompt": "q", "rejected": None}, "no pair: chosen and rejected are missing"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "equal pair"),
        ({"chosen": [ASKED, YES], "rejected": [said("user", "other"), NO]}, "ask different things"),
        ({"prompt": "other", "chosen": [ASKED, YES], "rejected": [ASKED, NO]}, "prompt says something else"),
        ({"chosen": [YES], "rejected": [NO]}, "no prompt: chosen and rejected are answers alone"),
        ({"prompt": "q", "chosen": "yes", "rejected": [NO]}, "one answer is text, the other one is a list"),
        ({"prompt": "q", "chosen": ["yes"], "rejected": ["no"]}, "an answer is a list that holds text"),
        ({"preferred_output": [YES], "non_preferred_output": [NO]}, "input is null"),
        ({"messages": [ASKED, said("assistant", "x")], "chosen": [ASKED, YES], "rejected": [ASKED, NO]}, "messages says something else"),
        ({"conversations": SHAREGPT[0], "chosen": [ASKED, YES], "rejected": [ASKED, NO]}, "conversations says something else"),
        ({"instruction": "i", "messages": [ASKED, YES], "chosen": "yes", "rejected": "no"}, "messages says something else"),
    ],
)
def test_what_is_no_pair(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pair(row)


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "label": "maybe"}])
def test_an_answer_without_a_mark_is_dropped(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="label"):
        marked(row)


def test_columns_are_mapped_and_answers_are_asked_for_as_they_should_be(tmp_path: Path) -> None:
    run = config(tmp_path, {"v": VARIANTS["dpo"], "w": VARIANTS["kto"]})
    rows = [{"question": f"q {i}", "good": "yes", "bad": f"no {i}", "score": i} for i in range(3)]
    (tmp_path / "pairs-train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="no training form found in its columns: question, good, bad, score") as refused:
        prepare(run, tiny_base())
    assert "no pair: chosen and rejected are missing" in str(refused.value)
    content = run.model_dump()["data"]["pairs"] | {
        "train": [{"path": "pairs-train.jsonl", "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}}]
    }
    named = RunConfig.from_dict(
        {"base": "tiny-llama", "out": "o", "data": {"pairs": {"train": content["train"]}}, "variants": {"v": VARIANTS["dpo"]}},
        root=tmp_path,
    )
    found = prepare(named, tiny_base()).data["pairs"].train
    assert len(found.examples) == 3 and found.notes == ["pairs-train.jsonl: not used: score (3 rows)"]
    held = config(tmp_path / "b", {"w": VARIANTS["kto"]})
    from trimtab.train.finish import held_out

    prepared = prepare(held, tiny_base())
    questions = held_out(prepared, "marked", "valid").questions
    assert len(questions) == 2, "unwanted answers are no references"


def test_check_reads_pairs(tmp_path: Path) -> None:
    run = config(tmp_path, {"v": VARIANTS["dpo"], "w": VARIANTS["kto"]}).model_copy(update={"base": str(tiny_folder(tmp_path / "base"))})
    rows = write_pairs(tmp_path / "pairs-train.jsonl", 20)
    more = [rows[3], rows[4] | {"rejected": rows[4]["chosen"]}, json.loads((tmp_path / "pairs-test.jsonl").read_text().splitlines()[0])]
    with (tmp_path / "pairs-train.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in more))
    report = check(run)
    found = {(f.where, f.message) for f in report.findings}
    assert ("data.pairs.train", "1 row dropped: equal pair") in found
    assert ("data.pairs.train", "1 row repeats another row") in found
    assert ("data.pairs.test", "1 of 3 rows stands with its answer in data.pairs.train") in found
    assert not report.errors
    lengths = next(f for f in report.findings if f.where == "data.pairs.train" and "pairs: the chosen" in f.message)
    sizes = [tuple(len(s.supervised.nonzero()[0]) for s in e.segments) for e in prepare(run, tiny_base()).data["pairs"].train.examples]
    longer, shorter = sum(a > b for a, b in sizes) / len(sizes), sum(a < b for a, b in sizes) / len(sizes)
    assert 0.2 < longer < shorter < 0.8, "a note, of the share in which the chosen one is longer"
    assert lengths.level == "note" and lengths.message.endswith(f"the chosen one is longer in {longer:.0%}")
    assert ("data.marked.train", "4 answers are wanted, 3 are not") in found, "4 : 3 is what the paper wants"
    assert not any(f.where == "variants.w" for f in report.findings)
    loose = config(tmp_path / "b", {"w": VARIANTS["kto"] | {"desirable_weight": 0.5}})
    report = check(loose.model_copy(update={"base": run.base}))
    (told,) = [f for f in report.findings if f.where == "variants.w"]
    assert "is 0.67 : 1" in told.message and told.fix == "set desirable_weight: 0.75."
    alone = config(tmp_path / "c", {"w": VARIANTS["kto"] | {"batch_size": 1, "gradient_accumulation_steps": 1}})
    (told,) = [f for f in check(alone.model_copy(update={"base": run.base})).findings if f.where == "variants.w"]
    assert told.level == "warning" and "steps of one row" in told.message


def test_the_estimate_counts_references(tmp_path: Path) -> None:
    base, plain = str(tiny_folder(tmp_path / "base")), LORA | {"data": "pairs"}
    memory = {}
    for objective in ("dpo", "cpo"):
        run = config(tmp_path / objective, {"v": plain | {"objective": objective}})
        memory[objective] = check(run.model_copy(update={"base": base})).estimate.memory_bytes[0]  # type: ignore[union-attr]
    splits = prepare(run, tiny_base()).data["pairs"].read.values()
    assert memory["dpo"] - memory["cpo"] == sum(4 * s.supervised_tokens + 200 * len(s.examples) for s in splits)


def test_adapters_are_measured_by_the_objective_of_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {k: v for k, v in VARIANTS["dpo"].items() if not k.startswith("loss_")}
    report = train(config(tmp_path, {"v": fields | {"beta": 0.4}, "w": VARIANTS["orpo"]}), base=tiny_base())
    folder = tiny_folder(tmp_path / "base")
    adapters = [str(report.out / "adapters" / name) for name in "vw"]
    rows = str(tmp_path / "pairs-test.jsonl")
    told = evaluated(rows, folder, adapters[:1])
    want = report.summary["variants"]["v"]["scores"]
    for key in ("loss", "rewards/accuracies", "rewards/margins"):
        assert told["scores"]["v"][key] == pytest.approx(want[key], rel=1e-3, abs=1e-5)
    assert told["delta"]["v"]["rewards/margins"] == pytest.approx(want["rewards/margins"], rel=1e-3, abs=1e-5)
    both = evaluated(rows, folder, adapters)["scores"]
    assert "loss" not in both["base"] and both["w"]["nll_loss"] == pytest.approx(
        report.summary["variants"]["w"]["scores"]["nll_loss"], rel=1e-3
    )
    imitated = evaluated(str(tmp_path / "a-test.jsonl"), folder, adapters)["scores"]
    assert "perplexity" in imitated["v"] and "rewards/margins" not in imitated["v"]


def evaluated(data: str, base: Path, adapters: list[str]) -> Any:
    options = [x for a in adapters for x in ("--adapter", a)]
    done = CliRunner().invoke(main, ["eval", data, "--base", str(base), *options, "--dtype", "float32", "--no-generate", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)
