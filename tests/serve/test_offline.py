"""A file of prompts: answers in its order, each line under its own adapter and settings, and what is wrong said before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.laws.common import noisy
from trimtab.cli import main
from trimtab.decode.generate import Sampling
from trimtab.errors import AdapterError, DataError
from trimtab.methods import IA3Config, LoraConfig, PromptTuningConfig
from trimtab.model import Base, load_base
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.offline import answer_file
from trimtab.serve.request import SamplingParams


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> Base:
    return load_base(str(tiny_llama_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def folders(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    methods = {"lora": LoraConfig(r=2), "ia3": IA3Config(), "prompt": PromptTuningConfig(num_virtual_tokens=4)}
    return {n: noisy(base, m, seed=i).save(root / n) for i, (n, m) in enumerate(methods.items())}


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def engine(base: Base):
    made = Engine(base, EngineConfig(kv_bytes=1 << 22, adapter_bytes=1 << 20, max_queued=8))
    yield made
    made.close()


def test_answers_come_in_order_under_their_adapters(base, folders, engine, tmp_path):
    from trimtab.store import Adapter

    names = ["base", *map(str, folders.values())]
    lines = [{"prompt": f"n {i}", "adapter": names[i % 4], "max_tokens": 3 + i % 5, "id": f"q{i}"} for i in range(30)]
    lines[5] = {"messages": [{"role": "user", "content": "hé"}], "adapter": names[1], "id": "q5"}
    lines[6] = {"ids": [1, 2, 3], "id": "q6"}
    summary = answer_file(
        write(tmp_path / "in.jsonl", lines),
        tmp_path / "out.jsonl",
        engine,
        defaults=SamplingParams(max_tokens=7),
        adapter=str(folders["ia3"]),
    )
    answers = read(tmp_path / "out.jsonl")
    assert [a["id"] for a in answers] == [f"q{i}" for i in range(30)] and summary.answers == 30 and summary.failed == 0
    assert summary.new_tokens == sum(a["usage"]["completion"] for a in answers) > 0
    loaded = {"base": None, **{str(p): Adapter.load(p, base) for p in folders.values()}}
    for line, answer in zip(lines, answers, strict=True):
        ids = line.get("ids") or (base.encode_messages(line["messages"]) if "messages" in line else base.encode_prompt(line["prompt"]))
        name = line.get("adapter", str(folders["ia3"]))
        want = base.generate_ids([ids], [loaded[name]], Sampling(line.get("max_tokens", 7)))[0]
        assert answer["text"] == base.tokenizer.decode(want, skip_special_tokens=True) and answer["adapter"] == name
        assert answer["usage"]["prompt"] == len(ids)
    engine.idle_check()


def test_each_line_has_its_own_settings(base, engine, tmp_path):
    same = {"prompt": "x", "temperature": 1.5, "max_tokens": 12}
    schema = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}
    lines = [
        same | {"seed": 3},
        same | {"seed": 3},
        same,
        {"prompt": "x", "json_schema": schema, "max_tokens": 60},
        {"prompt": "x", "logprobs": 2, "max_tokens": 2, "system": "be brief"},
        {
            "prompt": "x",
            "repetition_penalty": 2.0,
            "presence_penalty": 1.0,
            "frequency_penalty": 1.0,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
        },
        {"prompt": "x", "min_tokens": 5, "max_tokens": 5, "stop": ["a"]},
    ]
    answer_file(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine, defaults=SamplingParams(max_tokens=4, seed=0))
    a = read(tmp_path / "out.jsonl")
    assert a[0]["text"] == a[1]["text"] != a[2]["text"] and json.loads(a[3]["text"]) == {"n": 1}
    assert len(a[4]["logprobs"]) == a[4]["usage"]["completion"] and len(a[4]["logprobs"][0]["top"]) == 2
    assert a[4]["usage"]["prompt"] > a[5]["usage"]["prompt"] and a[6]["usage"]["completion"] == 5


def test_contents_may_be_parts_of_text_and_a_developer_speaks_for_the_system(base, engine, tmp_path):
    def asked(*messages):
        return {"messages": [{"role": role, "content": content} for role, content in messages], "max_tokens": 4}

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    lines = [
        asked(("system", "s"), ("user", "one\ntwo")),
        asked(("developer", "s"), ("user", parts)),
        asked(("user", [{"type": "image_url", "image_url": "x"}])),
    ]
    with pytest.raises(DataError, match="cannot be answered") as refused:
        answer_file(write(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl", engine, defaults=SamplingParams())
    assert all(":3: messages" in p for p in refused.value.problems)
    answer_file(write(tmp_path / "q.jsonl", lines[:2]), tmp_path / "a.jsonl", engine, defaults=SamplingParams())
    first, second = read(tmp_path / "a.jsonl")
    assert first["text"] == second["text"] and first["usage"] == second["usage"]


def test_all_that_is_wrong_is_listed_and_nothing_is_written(engine, tmp_path):
    lines = [
        {"prompt": "good"},
        "{",
        [1],
        {"prompt": "x", "temprature": 1.0},
        {"prompt": "x", "max_tokens": "7"},
        {"prompt": "x", "ids": [1]},
        {"messages": [{"role": "user"}]},
        {"adapter": "base"},
    ]
    with pytest.raises(DataError) as caught:
        answer_file(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine, defaults=SamplingParams())
    told = caught.value.problems
    assert len(told) == 7 and [p.split("in.jsonl:")[1][0] for p in told] == list("2345678")
    assert "did you mean 'temperature'" in told[2] and "max_tokens" in told[3]
    for lines, words in (([{"prompt": "x", "top_p": 0.0}, {"prompt": "<|im_end|>"}], "top_p = 0.0"), ([""], "is empty")):
        with pytest.raises(DataError) as caught:
            answer_file(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", engine, defaults=SamplingParams())
        assert words in str(caught.value)
    with pytest.raises(AdapterError):
        answer_file(
            write(tmp_path / "in.jsonl", [{"prompt": "x", "adapter": "no/such"}]), tmp_path / "o", engine, defaults=SamplingParams()
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_line_that_fails_has_its_error_and_the_others_their_answers(base, engine, tmp_path):
    long = {"ids": [1] * (base.spec.max_positions + 1)}
    summary = answer_file(write(tmp_path / "in.jsonl", [long, {"ids": [1]}]), tmp_path / "out.jsonl", engine, defaults=SamplingParams(3))
    a = read(tmp_path / "out.jsonl")
    assert summary.failed == 1 and a[0]["finish"] == "error" and "513 tokens" in a[0]["error"] and "error" not in a[1]


def test_an_answer_file_that_cannot_be_written_leaves_no_trace(engine, tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        answer_file(write(tmp_path / "in.jsonl", [{"ids": [1]}]), tmp_path / "none" / "out.jsonl", engine, defaults=SamplingParams(3))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_command(tiny_llama_folder, folders, tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "n 1"}, {"prompt": "n 2", "adapter": "base"}])
    options = ["generate", "--base", str(tiny_llama_folder), "--file", str(path), "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "o.jsonl"), "--adapter", str(folders["lora"]), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["answers"] == 2
    assert [a["adapter"] for a in read(tmp_path / "o.jsonl")] == [str(folders["lora"]), "base"]
    plain = CliRunner().invoke(main, [*options, "--out", str(tmp_path / "o.jsonl")])
    assert "2 answers, 0 of them failed" in plain.output
    for wrong in (options, [*options, "--out", "x", "a prompt"], ["generate"], ["generate", "hi", "--out", "x"]):
        assert CliRunner().invoke(main, wrong).exit_code == 2
