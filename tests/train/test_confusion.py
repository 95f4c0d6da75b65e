"""Which labels are taken for which, compared with a case that is counted by hand and with a plain loop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.train.past import predictions, run_folder, variant
from trimtab.train import answers
from trimtab.train.follow import RunFolders, read


def found(tmp_path: Path, **said: list[dict[str, Any]]) -> dict[str, Any] | None:
    folder = run_folder(tmp_path / "r", {name: variant() for name in said if name != "base"})
    predictions(folder, "a", **said)
    return answers.confusion(read(folder), "a")


def line(reference: str, answer: str, label: str | None = None) -> dict[str, Any]:
    return {"prompt": "p", "reference": reference, "answer": answer} | ({} if label is None else {"label": label})


def test_by_hand(tmp_path: Path):
    rows = [
        line("bug", "bug"),
        line("bug", " idea "),
        line("bug", "idea"),
        line("idea", "idea"),
        line("idea", "a thought"),
        line("idea", "x"),
    ]
    told = found(tmp_path, v=rows)
    assert told is not None and told["labels"] == ["bug", "idea"]
    assert sorted(told["of"]["v"], key=str) == sorted([[0, 0, 1], [0, 1, 2], [1, 1, 1], [1, None, 2]], key=str)


@pytest.mark.parametrize("asked", [False, True])
def test_77_labels_by_a_plain_loop(tmp_path: Path, asked: bool):
    draw = random.Random(0)
    names = [f"label {i}" for i in range(77)]
    pairs = {who: [(names[i % 77], draw.choice(names)) for i in range(400)] for who in ("base", "v", "w")}
    said = {
        who: [line(is_, "something said", given) if asked else line(is_, given) for is_, given in found] for who, found in pairs.items()
    }
    told = found(tmp_path, **said)
    assert told is not None and sorted(told["labels"]) == sorted(names)
    for who, found_pairs in pairs.items():
        cells = {(told["labels"][i], told["labels"][j]): n for i, j, n in told["of"][who]}
        assert cells == {pair: found_pairs.count(pair) for pair in found_pairs}


def test_a_label_that_no_row_has_is_one_where_labels_were_asked_for(tmp_path: Path):
    told = found(tmp_path, v=[line("bug", "…", "bug"), line("bug", "…", "other")])
    assert told == {"labels": ["bug", "other"], "of": {"v": [[0, 0, 1], [0, 1, 1]]}}


@pytest.mark.parametrize(
    "references",
    [
        ["one answer", "another", "a third", "a fourth"],  # none comes again
        ["bug"] * 9,  # one alone
        ["many words " * 20, "other words " * 20] * 4,
        ["two\nlines", "three\nlines"] * 4,
    ],
)
def test_free_answers_are_no_labels(tmp_path: Path, references: list[str]):
    assert found(tmp_path, v=[line(r, r) for r in references]) is None


def test_it_is_read_of_runs_by_their_id(tmp_path: Path):
    folder = run_folder(tmp_path / "r", {"v": variant()})
    predictions(folder, "a", v=[line("bug", "idea"), line("idea", "idea")] * 3)
    folders = RunFolders(tmp_path)
    (key,) = [run["id"] for run in folders.list()]
    assert folders.confusion(key, "a") == {"labels": ["bug", "idea"], "of": {"v": [[0, 1, 3], [1, 1, 3]]}}
    assert folders.confusion(key, "b") is None
