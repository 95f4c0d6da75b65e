"""Scores and comparisons from Python, beside a plain loop over transformers and what the files say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import METHODS, tiny_base
from trimtab.errors import ConfigError, DataError

ROWS = [{"q": f"n {i}", "r": f"a {i % 3}"} for i in range(6)]
MAPPED = {"columns": {"prompt": "q", "completion": "r"}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> trimtab.Report:
    folder = tmp_path_factory.mktemp("runs")
    data = {"train": ROWS, "test": ROWS[:3], **MAPPED}
    variants = {n: METHODS[n] for n in ("lora", "ia3")}
    return trimtab.train(
        base=tiny_base(), data=data, variants=variants, defaults={"max_steps": 3}, evaluate={"max_new_tokens": 4}, out=folder / "one"
    )


def loss_by_hand(rows: list[dict[str, str]]) -> float:
    """The base's mean loss of the answers' tokens, by transformers alone."""
    model, tokenizer, losses = tiny_model("llama"), tiny_tokenizer(), list[float]()
    for row in rows:
        turns = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["r"]}]
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        ids = prompt + tokenizer(row["r"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logp[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
    return sum(losses) / len(losses)


def test_scores_of_rows_in_a_program(report: trimtab.Report, tmp_path: Path) -> None:
    def generator() -> Iterator[dict[str, Any]]:
        yield from ROWS

    found = trimtab.evaluate(
        {"rows": generator(), **MAPPED}, base=report.base, adapters=report.adapters, max_new_tokens=4, out=tmp_path / "scores"
    )
    assert found.rows == 6 and list(found.scores) == ["base", "lora", "ia3"]
    assert math.isclose(found.scores["base"]["loss"], loss_by_hand(ROWS), rel_tol=1e-4)
    assert found.delta["lora"]["loss"] == pytest.approx(found.scores["lora"]["loss"] - found.scores["base"]["loss"], abs=1e-6)
    assert [p["reference"] for p in found.predictions["ia3"]] == [r["r"] for r in ROWS]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text()) == found.to_dict()
    # by folder, from a base of the same tensors
    again = trimtab.evaluate(
        {"rows": ROWS, **MAPPED}, base=tiny_base(), adapters=[report.out / "adapters" / "lora"], generate=False, base_differs=True
    )
    assert again.scores["lora"]["loss"] == pytest.approx(found.scores["lora"]["loss"], rel=1e-5)
    assert "lora" in str(found) and found._repr_html_().count("<tr>") == 4


def test_adapters_by_names_of_a_store_have_files_of_their_own(report: trimtab.Report, tmp_path: Path) -> None:
    """Three names that are one file's, and one that would leave the folder."""
    lora, ia3 = report.adapters.values()
    named = {"acme/support": lora, "acme-support": ia3, "acme support": lora, "../../up": ia3}
    found = trimtab.evaluate({"rows": ROWS[:2], **MAPPED}, base=report.base, adapters=named, max_new_tokens=2, out=tmp_path / "scores")
    files = sorted((tmp_path / "scores" / "predictions").iterdir())
    told = ["rows-..-..-up", "rows-acme-support", "rows-acme-support~2", "rows-acme-support~3", "rows-base"]
    assert [f.name for f in files] == [f"{name}.jsonl" for name in told]
    lines = [[json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()] for f in files]
    assert lines == [found.predictions[n] for n in ("../../up", "acme/support", "acme-support", "acme support", "base")]


def test_what_cannot_be_scored_is_said(report: trimtab.Report, tmp_path: Path) -> None:
    good = {"rows": ROWS, **MAPPED}
    with pytest.raises(ConfigError, match="'base' stands for the base itself"):
        trimtab.evaluate(good, base=report.base, adapters={"base": report.adapters["lora"]})
    with pytest.raises(ConfigError, match="2 sources, and rows of one are scored"):
        trimtab.evaluate([good, good], base=report.base)
    with pytest.raises(DataError, match="no training form found in its columns: q, r"):
        trimtab.evaluate(ROWS, base=report.base)
    with pytest.raises(TypeError, match=r"adapter: unknown \(did you mean 'adapters'"):
        trimtab.evaluate(good, base=report.base, adapter="x")  # type: ignore[call-arg]
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        trimtab.evaluate(good, base=report.base, out=tmp_path / "x")


def test_runs_beside_each_other(report: trimtab.Report, tmp_path: Path) -> None:
    found = trimtab.compare(report, by="loss", html=tmp_path / "page.html")
    assert found == trimtab.compare(report.out, by="loss")
    losses = [v["scores"]["loss"] for v in found.variants]
    assert losses == sorted(losses) and {v["variant"] for v in found.variants} == {"lora", "ia3"}
    assert losses[0] == min(v["scores"]["loss"] for v in report.summary["variants"].values())
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!")
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        trimtab.compare(report, html=tmp_path)
    with pytest.raises(ConfigError, match=r"by = lss: no variant has that score \(did you mean 'loss'\?\)"):
        trimtab.compare(report.out, by="lss")
    with pytest.raises(ConfigError, match="no run was named"):
        trimtab.compare()
