"""A new objective is one file: the example of CONTRIBUTING trains from a run file, beside others and as a plain loop does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.laws.plain import plain_logits
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer
from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.errors import ConfigError, DataError
from trimtab.objectives import OBJECTIVES, Objective
from trimtab.store import Adapter
from trimtab.train import Report, RunConfig, train
from trimtab.train.check import check
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.prepare import prepare
from trimtab.train.trials import Sweep

ROOT = Path(__file__).parent.parent.parent
WORDS = ("yes", "no", "a longer answer", "42", "perhaps it is so", "é", "never", "a line")
LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lr": 1e-2, "data": "pairs", "objective": "pairwise"}
STEPS, BATCH = 4, 5


def example() -> str:
    """The file that CONTRIBUTING.md shows."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```python\n((?:(?!```).)*?class Pairwise.*?)```", text, re.DOTALL)
    return str(found)


@pytest.fixture(autouse=True)
def pairwise(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Objective]]:
    """The example and a relative of it that reads the same rows, in the registry for as long as a test runs."""
    module = ModuleType("an_objective_from_outside")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(example(), module.__dict__)

    @dataclass(frozen=True, kw_only=True)
    class AgainstBase(module.Pairwise):  # type: ignore[name-defined, misc]
        name: ClassVar[str] = "against-base"
        needs_reference: ClassVar[bool] = True

    yield module.Pairwise
    del OBJECTIVES["pairwise"], OBJECTIVES["against-base"]


def write_pairs(path: Path, count: int, first: int = 0) -> list[dict[str, str]]:
    rows = [
        {"prompt": f"n {i} " + "x" * (5 * i % 17), "chosen": WORDS[i % 8], "rejected": f"{WORDS[(3 * i + 1) % 8]} {i}"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def config(folder: Path, variants: Mapping[str, Mapping[str, Any]], **keys: Any) -> RunConfig:
    """Pairs beside the data sets of `run_file`; forwards that hold a few rows, so that every optimizer step takes several."""
    content = run_file(folder, {n: dict(v) for n, v in variants.items()}, max_tokens=150, evaluate={"generate": False}, **keys)
    for split, count, first in (("train", BATCH, 0), ("valid", 3, 20), ("test", 3, 30)):
        write_pairs(folder / f"pairs-{split}.jsonl", count, first)
    content["data"]["pairs"] = {split: f"pairs-{split}.jsonl" for split in ("train", "valid", "test")}
    content["defaults"] |= {"max_steps": STEPS, "batch_size": BATCH, "weight_decay": 0.0, "warmup_steps": 0, "max_grad_norm": 9.0}
    content["defaults"] |= {"schedule": "constant", "eval_every": 2, "keep_best": False}
    return RunConfig.from_dict(content, root=folder)


def trained(folder: Path, variants: Mapping[str, Mapping[str, Any]], **keys: Any) -> Report:
    return train(config(folder, variants, **keys), base=tiny_base())


# ---- plainly ----


def encoded(prompt: str, answer: str) -> tuple[list[int], int]:
    """ChatML by hand: (ids up to the end of the answer, where the answer begins)."""
    pieces = ["<|im_start|>user\n", f"{prompt}<|im_end|>", "\n", "<|im_start|>assistant\n", f"{answer}<|im_end|>"]
    ids = [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in pieces]
    return [i for piece in ids for i in piece], sum(map(len, ids[:-1]))


def logp(logits: Tensor, ids: list[int], start: int) -> Tensor:
    return torch.log_softmax(logits[start - 1 : len(ids) - 1], -1).gather(1, torch.tensor(ids[start:])[:, None]).sum()


def plain_loss(logits_of: Any, rows: list[dict[str, str]], beta: float, reference: bool) -> tuple[Tensor, float]:
    """(mean over rows of −log σ(β margin), the share of rows with a margin above 0), a sequence at a time."""
    base, losses, right = tiny_model("llama"), [], 0
    for row in rows:
        values = []
        for role in ("chosen", "rejected"):
            ids, start = encoded(row["prompt"], row[role])
            value = logp(logits_of(ids), ids, start)
            if reference:
                value = value - logp(base(torch.tensor([ids])).logits[0].detach(), ids, start)
            values.append(value)
        margin = values[0] - values[1]
        losses.append(-F.logsigmoid(beta * margin))
        right += int(margin > 0)
    return torch.stack(losses).mean(), right / len(rows)


def plainly(adapter: Adapter, rows: list[dict[str, str]], beta: float, reference: bool, lr: float) -> list[tuple[float, float]]:
    """Train an adapter's tensors in place with torch's AdamW; (loss, accuracy) of each step."""
    model, params = tiny_model("llama").requires_grad_(False), list(adapter.params.values())
    optimizer, found = torch.optim.AdamW(params, lr=lr, weight_decay=0.0), []
    for _ in range(STEPS):
        loss, right = plain_loss(lambda ids: plain_logits(model, adapter, ids), rows, beta, reference)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((loss.item(), right))
    return found


# ---- training ----

VARIANTS = {
    "toy": LORA | {"beta": 0.3},
    "base": LORA | {"objective": "against-base", "beta": 0.2, "lr": 2e-3, "seed": 5},
    "head": LORA | {"objective": "against-base", "target_modules": ["lm_head", "v_proj"], "lr": 5e-3},
}


def test_it_trains_as_a_plain_loop_does_and_beside_others_as_alone(tmp_path: Path) -> None:
    """An epoch is one step, so the order of rows plays no part. `base` is no name of a variant, so it is called otherwise."""
    variants = {f"v-{n}": v for n, v in VARIANTS.items()} | {
        "imitates": METHODS["lora"] | {"data": "a"},
        "full": METHODS["full"] | {"data": "b"},
        "whole": METHODS["full"] | {"data": "pairs", "objective": "against-base", "lr": 1e-3},
    }
    report = trained(tmp_path / "joint", variants)
    lines = {n: [line for line in found if "event" not in line] for n, found in metrics(report).items()}
    rows = write_pairs(tmp_path / "rows.jsonl", BATCH)
    for name, fields in VARIANTS.items():
        adapter, got = report.adapters[f"v-{name}"], lines[f"v-{name}"]
        mine = Adapter.create(tiny_base(), adapter.method, seed=fields.get("seed", 0))
        mine.params = {k: p.clone().requires_grad_() for k, p in mine.params.items()}
        want = plainly(mine, rows, fields.get("beta", 0.5), fields["objective"] == "against-base", fields["lr"])
        assert [line["loss"] for line in got] == pytest.approx([loss for loss, _ in want], rel=1e-4), name
        # before the first step an adapter is the base, and its margin against it 0 but for rounding
        assert [line["accuracy"] for line in got[1:]] == pytest.approx([right for _, right in want[1:]]), name
        assert got[0]["loss"] > got[-1]["loss"]
        for key, tensor in mine.params.items():
            torch.testing.assert_close(adapter.params[key], tensor.detach(), rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    for name in ("v-toy", "v-head", "imitates", "whole"):
        fields = variants[name]
        alone = trained(tmp_path / f"alone-{name}", {name: fields})
        found = [line["loss"] for line in metrics(alone)[name] if "event" not in line]
        assert [line["loss"] for line in lines[name]] == pytest.approx(found, rel=1e-5), name


def test_held_out_rows_get_what_the_objective_reports(tmp_path: Path) -> None:
    report = trained(tmp_path, {"v": LORA | {"beta": 0.3}, "w": LORA | {"objective": "against-base"}, "s": METHODS["lora"] | {"data": "a"}})
    valid = [json.loads(line) for line in (tmp_path / "pairs-valid.jsonl").read_text().splitlines()]
    test = [json.loads(line) for line in (tmp_path / "pairs-test.jsonl").read_text().splitlines()]
    model = tiny_model("llama").requires_grad_(False)
    for name, beta, reference in (("v", 0.3, False), ("w", 0.5, True)):
        last = [line for line in metrics(report)[name] if "event" in line][-1]
        assert last["step"] == STEPS
        for key, rows, adapter in (
            ("valid", valid, report.adapters[name]),
            ("base_valid", valid, None),
            ("test", test, report.adapters[name]),
        ):
            want, right = plain_loss(lambda ids, a=adapter: plain_logits(model, a, ids).detach(), rows, beta, reference)
            got = report.summary["variants"][name]["scores"] if key == "test" else {k: last[f"{key}_{k}"] for k in ("loss", "accuracy")}
            assert (got["loss"], got["accuracy"]) == pytest.approx((want.item(), right), rel=1e-4, abs=1e-6), (name, key)
            assert "perplexity" not in got
    base_scores = report.summary["base_scores"]
    assert "loss" not in base_scores["pairs"], "its variants have different objectives"
    assert {"loss", "perplexity"} <= base_scores["a"].keys()
    fields = {n: report.summary["variants"][n]["fields"] for n in "vws"}
    assert [(f.get("objective"), f.get("beta")) for f in fields.values()] == [("pairwise", 0.3), ("against-base", 0.5), (None, None)]
    told = json.loads((report.out / "adapters" / "v" / "trimtab.json").read_text())
    assert "pairwise" in json.dumps(told) and "objective" not in (report.out / "adapters" / "s" / "trimtab.json").read_text()


def test_a_pair_is_in_one_forward_and_one_loss(tmp_path: Path, pairwise: type[Objective], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget: even one token a forward leaves a pair whole. Every row counts once a step."""
    seen: list[tuple[str, ...]] = []
    original = pairwise.loss

    def spy(self: Any, logp_R: Tensor, ref_R: Tensor | None, segments: Any) -> Any:
        assert len(logp_R) == sum(segments.targets)
        seen.append(segments.roles)
        return original(self, logp_R, ref_R, segments)

    monkeypatch.setattr(pairwise, "loss", spy)
    run = config(tmp_path, {"v": LORA | {"batch_size": 3, "gradient_accumulation_steps": 2}, "w": LORA})
    train(run.model_copy(update={"max_tokens": 64}), base=tiny_base())
    assert all(roles == ("chosen", "rejected") * (len(roles) // 2) for roles in seen)
    assert len(seen) > 2 * STEPS, "steps were cut"


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """The base's log-probabilities are no part of a checkpoint: they come out alike."""
    variants = {"v": VARIANTS["base"], "w": VARIANTS["toy"], "s": METHODS["lora"] | {"data": "a"}}
    expected = trained(tmp_path / "whole", variants)
    run, stop = config(tmp_path / "stopped", variants), Stop()

    class Stopping(Silent):
        def step(self, line: Mapping[str, Any]) -> None:
            if line["step"] == 2:
                stop.ask(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(run, base=tiny_base(), listener=Stopping(), stop=stop)
    resumed = train(run, base=tiny_base(), resume=True)
    for name, adapter in expected.adapters.items():
        assert all(torch.equal(adapter.params[k], p) for k, p in resumed.adapters[name].params.items()), name


# ---- names and rows ----


def test_names_and_fields_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config(
            tmp_path, {"v": LORA | {"objective": "pairwize", "bta": 1}, "w": LORA | {"beta": "steep"}, "x": METHODS["lora"] | {"beta": 1}}
        )
    text = str(refused.value)
    assert "variants.v.objective = 'pairwize' (did you mean 'pairwise'?): one of sft, " in text and "pairwise, against-base" in text
    assert "variants.v.bta: unknown key (did you mean 'beta'?)" in text
    assert "variants.w.beta = 'steep'" in text
    assert "variants.x.beta: unknown key" in text, "sft has no such field"


def test_a_sweep_searches_its_fields(tmp_path: Path) -> None:
    content = run_file(tmp_path, {})
    write_pairs(tmp_path / "pairs.jsonl", 4)
    content["data"] = {"pairs": {"train": "pairs.jsonl", "valid": "pairs.jsonl"}}
    del content["variants"]
    content["sweep"] = {"variant": LORA, "search": {"beta": {"min": 0.1, "max": 0.9}}, "kind": "random", "trials": 3}
    found = {v.objective.beta for v in Sweep.from_dict(content, root=tmp_path).run.variants}  # type: ignore[attr-defined]
    assert len(found) == 3 and all(0.1 <= beta <= 0.9 for beta in found)
    content["sweep"] = {"variant": LORA | {"objective": "pairwize"}, "search": {"objective": ["sft"], "bta": [1.0]}}
    with pytest.raises(ConfigError) as refused:
        Sweep.from_dict(content, root=tmp_path)
    assert "sweep.search.objective: cannot be searched: losses of different objectives do not compare" in str(refused.value)
    assert "sweep.search.bta: unknown key (did you mean 'beta'?)" in str(refused.value)


def test_rows_without_its_columns_are_named(tmp_path: Path) -> None:
    run = config(tmp_path, {"v": LORA})
    (tmp_path / "pairs-train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="no training form found in its columns: prompt, completion"):
        train(run, base=tiny_base())
    rows = write_pairs(tmp_path / "pairs-train.jsonl", 40)
    with (tmp_path / "pairs-train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": "b"}) + "\n" + json.dumps(rows[0] | {"rejected": "z" * 400}) + "\n")
    report = check(run.model_copy(update={"base": str(tiny_folder(tmp_path / "base"))}))
    found = {f.message: f.items for f in report.findings if "dropped" in f.message}
    assert found["1 row dropped: no column 'rejected'"] and found["1 row dropped: over-long"]
    (counts,) = [s for s in report.splits if (s.data, s.split) == ("pairs", "train")]
    assert (counts.sources[0].read, counts.sources[0].dropped) == (42, 2)


def test_a_row_of_no_segments_is_dropped_by_name(tmp_path: Path, pairwise: type[Objective], monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective that reads as many segments as a row has answers may find none."""
    read = pairwise.parts
    monkeypatch.setattr(pairwise, "parts", staticmethod(lambda record: read(record) if record["chosen"] else {}))
    run = config(tmp_path, {"v": LORA})
    rows = write_pairs(tmp_path / "pairs-train.jsonl", 20)
    text = "".join(json.dumps(row) + "\n" for row in [rows[0] | {"chosen": ""}, *rows])
    (tmp_path / "pairs-train.jsonl").write_text(text, encoding="utf-8")
    found = prepare(run, tiny_base()).data["pairs"].train
    assert len(found.examples) == 20
    assert [(d.origin, d.kind) for d in found.dropped] == [("pairs-train.jsonl:1", "nothing supervised")]


def test_variants_of_one_data_set_read_its_rows_alike(tmp_path: Path) -> None:
    run = config(tmp_path, {"v": LORA, "w": METHODS["lora"] | {"data": "a"}})
    variants = [v.model_copy(update={"data": "pairs"}) for v in run.variants]
    with pytest.raises(ConfigError, match="in how their objectives read a row"):
        train(run.model_copy(update={"variants": variants}), base=tiny_base())


def test_pairs_are_still_nothing_to_imitate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a pair of a better and a worse answer is not something to imitate"):
        trained(tmp_path, {"v": METHODS["lora"] | {"data": "pairs"}})


def test_the_example_is_an_objective_once_its_file_is_there(tmp_path: Path) -> None:
    package = shutil.copytree(ROOT / "src" / "trimtab", tmp_path / "trimtab", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "objectives" / "pairwise.py").write_text(example(), encoding="utf-8")
    code = "import sys; from trimtab.objectives import OBJECTIVES; print(*OBJECTIVES, 'torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert {"sft", "pairwise"} <= set(done.stdout.split()) and done.stdout.split()[-1] == "False", done.stderr
