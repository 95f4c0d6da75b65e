"""`trimtab eval`: the table, the JSON, the folder, and mistakes."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from tests.train.common import METHODS, run_file
from trimtab.cli import main


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A folder with a.jsonl, a-test.jsonl, and the run that was trained on the first."""
    folder = tmp_path_factory.mktemp("run")
    content = run_file(folder, {n: METHODS[n] | {"data": "a", "max_steps": 2} for n in ("lora", "prompt")})
    (folder / "run.yaml").write_text(yaml.safe_dump(content | {"base": str(tiny_llama_folder), "dtype": "float32"}))
    result = call("train", folder / "run.yaml", "--json")
    assert result.exit_code == 0, result.output
    return folder


def arguments(trained: Path, base: Path, *more: str | Path) -> list[str | Path]:
    adapters = [a for n in ("lora", "prompt") for a in ("--adapter", trained / "out" / "adapters" / n)]
    return ["eval", trained / "a-test.jsonl", "--base", base, "--dtype", "float32", "--max-new-tokens", "4", *adapters, *more]


def test_it_says_what_the_run_said(trained: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The same rows, base and adapters: the same scores, the distance to the base, and the predictions."""
    result = call(*arguments(trained, tiny_llama_folder, "--json", "--out", tmp_path / "out"))
    assert result.exit_code == 0, result.output
    said, summary = json.loads(result.stdout), json.loads((trained / "out" / "summary.json").read_text())
    assert said == json.loads((tmp_path / "out" / "scores.json").read_text())
    for name in ("lora", "prompt"):
        expected = summary["variants"][name]["scores"]
        for key in ("loss", "perplexity", "exact_match", "token_f1", "rouge_l", "bleu"):
            assert said["scores"][name][key] == pytest.approx(expected[key], rel=1e-4), key
            difference = expected[key] - summary["base_scores"]["a"][key]
            assert said["delta"][name][key] == pytest.approx(difference, rel=1e-3, abs=1e-4)
    assert "base" not in said["delta"] and said["rows"] == 3
    files = sorted(p.name for p in (tmp_path / "out" / "predictions").iterdir())
    assert files == ["a-test-base.jsonl", "a-test-lora.jsonl", "a-test-prompt.jsonl"]
    again = call(*arguments(trained, tiny_llama_folder, "--out", tmp_path / "out"))
    assert again.exit_code == 2 and "is not empty" in again.output
    (tmp_path / "file").write_text("")
    for target, words in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "x", "is not a folder"),
        ("/proc/x", "cannot write"),
    ):
        refused = call(*arguments(trained, tiny_llama_folder, "--out", target))
        assert refused.exit_code == 2 and words in refused.output and "scoring" not in refused.output, refused.output


def test_the_table_has_every_score_and_the_distance(trained: Path, tiny_llama_folder: Path) -> None:
    result = call(*arguments(trained, tiny_llama_folder, "--labels", "auto", "--max-rows", "2"))
    assert result.exit_code == 0, result.output
    for word in ("loss", "ppl", "exact match", "F1", "ROUGE-L", "BLEU", "label accuracy", "lora", "prompt", "2 rows", "(+", "(-"):
        assert word in result.output, word
    assert "…" not in result.output, "a number was cut"


@pytest.mark.parametrize("room", [100, 900], ids=["predictions", "scores"])
def test_a_full_disk_leaves_nothing_that_the_next_try_stumbles_over(
    room: int, trained: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Files may have so many bytes: too few for the predictions; for those, and not for the scores."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        refused = call(*arguments(trained, tiny_llama_folder, "--out", tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.exit_code == 2 and os.strerror(errno.EFBIG) in refused.output and "make room" in refused.output, refused.output
    assert list((tmp_path / "out").iterdir()) == []
    again = call(*arguments(trained, tiny_llama_folder, "--out", tmp_path / "out"))
    assert again.exit_code == 0, again.output
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").rglob("*.json*")}
    assert max(size for name, size in sizes.items() if name != "scores.json") < 900 < sizes["scores.json"] and min(sizes.values()) > 100


def test_without_answers(trained: Path, tiny_llama_folder: Path) -> None:
    result = call(*arguments(trained, tiny_llama_folder, "--no-generate", "--json"))
    assert json.loads(result.stdout)["scores"]["lora"].keys() == {"loss", "perplexity", "rows"}
    result = call(*arguments(trained, tiny_llama_folder, "--no-generate", "--labels", "a 0,a 1,x", "--json"))
    assert json.loads(result.stdout)["scores"]["lora"].keys() == {"loss", "perplexity", "rows", "label_accuracy"}


def test_a_file_with_columns_of_its_own(trained: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The same rows under other names, in a file whose name says nothing, score the same; a system turn changes what is read."""
    rows = [json.loads(line) for line in (trained / "a-test.jsonl").read_text().splitlines()]
    other = tmp_path / "answers"
    other.write_text("".join(json.dumps({"turns": r["messages"]}) + "\n" for r in rows))
    named = ["--column", "messages=turns", "--format", "jsonl"]

    def losses(data: Path, *more: str) -> list[float]:
        rest = arguments(trained, tiny_llama_folder, "--no-generate", "--json", *more)[2:]
        result = call("eval", data, *rest)
        assert result.exit_code == 0, result.output
        return [scores["loss"] for scores in json.loads(result.stdout)["scores"].values()]

    assert losses(other, *named) == losses(trained / "a-test.jsonl") != losses(other, *named, "--system", "Be short.")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--column", "prompt"], "--column prompt: not two names"),
        (["--column", "prompt=a", "--column", "prompt=b"], "given twice, as a and b"),
        (["--column", "prompt=nothing"], "nothing"),
        (["--column", "prompt=nothing"], "with `--column prompt=question --column completion=answer`"),
        (["--split", "test"], "split"),
        (["--format", "cvs"], "csv"),
        (["--labels", "yes,no"], "no row's answer is one of the labels 'yes', 'no'"),
        (["--labels", "yes"], "at least two"),
        (["--max-rows", "0"], "--max-rows"),
    ],
)
def test_mistakes(trained: Path, tiny_llama_folder: Path, more: list[str], words: str) -> None:
    result = call(*arguments(trained, tiny_llama_folder, *more))
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output


def test_adapters_of_one_name(trained: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Two folders with the same last name are told apart; one given twice is a mistake."""
    folder = trained / "out" / "adapters" / "lora"
    (tmp_path / "lora").mkdir()
    for path in folder.iterdir():
        (tmp_path / "lora" / path.name).write_bytes(path.read_bytes())
    more = ["--adapter", tmp_path / "lora", "--no-generate", "--json"]
    named = json.loads(call(*arguments(trained, tiny_llama_folder, *more)).stdout)["scores"]
    assert len(named) == 4 and "prompt" in named and all("/" not in name for name in named)
    twice = call(*arguments(trained, tiny_llama_folder, "--adapter", folder))
    assert twice.exit_code == 2 and "is given twice" in twice.output


def test_scoring_that_has_no_room_is_refused_and_what_is_said_to_fit_does(
    trained: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [0]
    monkeypatch.setattr("trimtab.bases.fits.most_bytes", lambda device: free[0])
    wide = arguments(trained, tiny_llama_folder, "--max-new-tokens", "90")
    refused = call(*wide)
    assert refused.exit_code == 2 and "scoring does not fit: it needs" in refused.output and "make memory free." in refused.output
    free[0] = int(0.6e9 * float(refused.output.split("it needs ")[1].split()[0]))
    said = " ".join(call(*wide).output.split()).split("give ")[1].partition(";")[0].split(" or ")
    assert said[-1] == "--no-generate" and len(said) > 1
    for options in said:
        result = call(*wide, *options.split())
        assert result.exit_code == 0, result.output
