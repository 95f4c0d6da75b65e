"""A new run over HTTP: who may ask, what is written where; and what forms in the process behind it, without HTTP."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.http.common import call
from trimtab.http.studio import create_studio
from trimtab.http.studio_auth import Shown
from trimtab.methods import LoraConfig
from trimtab.objectives import OBJECTIVES
from trimtab.train import RunConfig
from trimtab.train.follow import RunFolders
from trimtab.train.guided import choices, formed, guessed, text_of
from trimtab.train.initial import guess
from trimtab.train.rows_process import Answering, answer

KEY = {"authorization": "Bearer k"}
ROW = {"question": "one", "answer": "two"}


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "tickets.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    made = Shown(RunFolders(tmp_path / "root"), key="k")
    yield made
    made.close()


# ---- the run file ------------------------------------------------------------


def test_what_forms_is_a_run_file_that_trains(shown: Shown):
    root = shown.runs.root
    found = guessed("tickets.jsonl", root, "smollm2-135m-instruct")
    told = formed(found["content"], ["a guess", "of\ntwo lines"], root)
    assert told["problems"] == [] and yaml.safe_load(told["text"]) == found["content"]
    assert told["text"].startswith("# a guess\n# of\n# two lines\nbase: smollm2-135m-instruct\n")
    (root / "run.yaml").write_text(told["text"])
    run = RunConfig.load(root / "run.yaml")
    assert run.out == root / "tickets" and run.data["tickets"].train[0].columns == {"prompt": "question", "completion": "answer"}


def test_a_comment_can_hide_no_key():
    assert yaml.safe_load(text_of({"base": "a"}, ["x\rbase: evil", "y\u2028base: evil", "z\nbase: evil"])) == {"base": "a"}


def test_a_name_that_is_taken_is_not_proposed(shown: Shown):
    root = shown.runs.root
    (root / "tickets").mkdir()
    (root / "tickets-2.yaml").touch()
    assert guessed("tickets.jsonl", root, "b")["content"]["out"] == "tickets-3"


def test_each_finding_says_which_field_it_is_about(shown: Shown):
    root = shown.runs.root
    content = guessed("tickets.jsonl", root, "smollm2-135m-instruct")["content"]
    content["defaults"] |= {"batch_size": -1, "epoch": 3}
    content["variants"]["tickets-lora"]["r"] = "x"
    content["variants"]["a.b"] = {"method": "ia3", "lr": 99}
    content["variants"]["c"] = {"method": "lora", "objective": "dop", "lora_dropout": 2}
    where = [p["where"] for p in formed(content, [], root)["problems"]]
    assert sorted(where) == sorted(
        [
            "defaults.batch_size",
            "defaults.epoch",
            "variants.tickets-lora.r",
            "variants.a.b.lr",
            "variants.c.objective",
            "variants.c.lora_dropout",
        ]
    )
    content = guessed("tickets.jsonl", root, "smollm2-135m-instruct")["content"]
    (root / "tickets").mkdir()
    (root / "tickets" / "a").touch()
    assert [p["where"] for p in formed(content, [], root)["problems"]] == ["out"]


def test_the_fields_that_are_offered_are_those_of_the_classes():
    told = {m["name"]: m for m in choices()["methods"]}
    defaults = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    assert told["lora"]["lr"] == LoraConfig.preset_lr
    for field in told["lora"]["fields"]:
        assert field["default"] == defaults[field["name"]]
    assert {"r", "lora_alpha", "lora_dropout", "use_dora"} <= {f["name"] for f in told["lora"]["fields"]}
    dpo = next(o for o in choices()["objectives"] if o["name"] == "dpo")
    assert "ipo" in next(f["words"] for f in dpo["fields"] if f["name"] == "loss_type")


ASKS = [{"role": "user", "content": "How?"}]
SAYS = [{"role": "assistant", "content": "So."}]
PREFERENCES = {"dpo", "orpo", "simpo", "cpo", "kto", "reward"}
ROWS: dict[str, tuple[dict[str, Any], set[str], str | None]] = {
    "conversations": ({"messages": ASKS + SAYS}, {"sft", "distil", "grpo"}, None),
    "labels": ({"text": "Where is it?", "category": "card"}, {"sft", "distil", "classify"}, None),
    "pairs": ({"prompt": "How?", "chosen": "So.", "rejected": "No."}, PREFERENCES | {"grpo"}, "dpo"),
    "marks": ({"prompt": "How?", "completion": "So.", "label": True}, {"kto", "sft", "distil", "grpo"}, "kto"),
    "steps": ({"prompt": "1 + 1?", "completions": ["one", "two"], "labels": [True, False]}, {"stepwise", "grpo"}, "stepwise"),
    "prompts": ({"question": "How?"}, {"grpo"}, "grpo"),
}
"""Name of a file -> its rows, the objectives that docs/objectives.md says of such rows, and the one that is proposed; None: sft."""


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_decide_which_objectives_are_offered(shown: Shown, name: str):
    row, offered, proposed = ROWS[name]
    root = shown.runs.root
    (root / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    found = guessed(f"{name}.jsonl", root, "smollm2-135m-instruct")
    ((_, variant),) = found["content"]["variants"].items()
    assert set(found["objectives"]) == offered and variant.get("objective") == proposed
    assert formed(found["content"], [], root)["problems"] == []
    if name == "prompts":
        assert found["content"]["data"]["prompts"]["train"]["columns"] == {"prompt": "question"} and not found["answered"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"source": "a book", "question": "How?"}, {"prompt": "question"}),
        ({"title": "Roads", "prompt": "How?"}, {}),
        ({"input": "A road.", "instruction": "Describe it."}, {}),
    ],
)
def test_of_several_columns_the_likeliest_asks(row: dict[str, str], columns: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    found = guess("rows.jsonl", tmp_path)
    assert (found.form, found.columns) == ("grpo", columns)


def test_every_objective_is_offered_with_its_fields():
    told = {o["name"]: o for o in choices()["objectives"]}
    assert told.keys() == OBJECTIVES.keys()
    kinds = {(name, f["name"]): f["kind"] for name, o in told.items() for f in o["fields"]}
    assert kinds["grpo", "rewards"] == "rewards" and kinds["distil", "teacher"] == "text" and kinds["classify", "classes"] == "list"
    for name, cls in OBJECTIVES.items():
        assert {f["name"] for f in told[name]["fields"]} == {f.name for f in dataclasses.fields(cls)}, name
    several = [(name, f["name"]) for name, o in told.items() for f in o["fields"] if f.get("several")]
    assert several == [("dpo", "loss_type")] and kinds["dpo", "loss_weights"] == "numbers"
    assert told["sft"]["reads"] == told["distil"]["reads"] != told["grpo"]["reads"] and told["dpo"]["reads"] == told["orpo"]["reads"]
    needed = {r["name"]: [o["name"] for o in r["options"] if o["needed"]] for r in choices()["rewards"]}
    assert needed == {"exact_match": [], "regex": ["pattern"], "json_schema": ["schema"], "tool_call": [], "length": []}


def test_what_is_wrong_with_rewards_and_a_teacher_is_told_at_their_fields(shown: Shown, tmp_path: Path):
    root = shown.runs.root
    (tmp_path / "elsewhere.py").write_text("def f(completions, **_): return [1.0] * len(completions)\n")
    (root / "mine.py").write_text("raise SystemExit('it was run')\n")
    content = guessed("tickets.jsonl", root, "smollm2-135m-instruct")["content"]

    def told(**fields: Any) -> list[dict[str, str]]:
        content["variants"] = {"v": {"data": "tickets", "method": "lora", **fields}}
        found: list[dict[str, str]] = formed(content, [], root, [root])["problems"]
        return found

    def of(*rewards: Any) -> str:
        (problem,) = told(objective="grpo", rewards=list(rewards))
        assert problem["where"] == "variants.v.rewards"
        return problem["text"]

    assert told(objective="grpo", rewards=["exact_match", {"reward": "mine.py:f", "trusted": True}]) == []
    assert "name at least one" in of()
    assert "rewards[0]: pattern = '(' is no regular expression" in of({"reward": "regex", "pattern": "("})
    both = of("exact_match", {"reward": "mine.py:f"}, {"reward": "exat_match"})
    assert "rewards[1]: reward = 'mine.py:f' runs code" in both and "rewards[2]: reward = 'exat_match'" in both
    assert "is not there" in of({"reward": "gone.py:f", "trusted": True})
    for name in ("../elsewhere.py", "../gone.py", str(tmp_path / "elsewhere.py")):  # the same whether it is there
        assert of({"reward": f"{name}:f", "trusted": True}) == f"variants.v.rewards: outside of the folders that this page may show: {name}"
    assert [p["where"] for p in told(objective="distil", teacher="")] == ["variants.v.teacher"]
    assert told(objective="classify", classes=["a"])[0]["where"] == "variants.v.classes"


def told_of(message: dict[str, Any]) -> str:
    """What the process that reads rows answers."""
    return json.dumps(answer(Answering(lambda text: None), json.dumps(message)))


def test_files_outside_are_named_and_not_looked_into(shown: Shown, tmp_path: Path):
    (tmp_path / "secret.jsonl").write_text('{"s3cret": 1}\n')
    allowed = {"root": str(shown.runs.root), "allowed": [str(shown.runs.root)]}
    content = {"base": "x", "out": "o", "data": {"d": {"train": "../secret.jsonl"}}, "variants": {"v": {"method": "lora", "r": 0}}}
    for message in (
        {"do": "form", "content": content, "said": []},
        {"do": "guess", "path": "../secret.jsonl", "base": "b"},
        {"do": "check", "key": "k", "text": json.dumps(content)},
    ):
        told = told_of(message | allowed)
        assert "outside of the folders" in told and "s3cret" not in told, message["do"]


@pytest.mark.parametrize("base", ["{}/secret", "{}/absent", "../secret", ".", "{}/root/link", "there", "{}/secret/x.gguf"])
def test_no_base_is_read_outside(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str):
    """Whether it is there or not: the answer is the same. The base that the page was started with may lie anywhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("secret", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "s3cret"}')
    (shown.runs.root / "link").symlink_to(tmp_path / "secret")
    base, root = base.format(tmp_path), str(shown.runs.root)
    allowed = {"allowed": [root]}
    content = {"base": base, "out": "o", "data": {"d": {"train": "tickets.jsonl"}}, "variants": {"v": {"method": "lora"}}}
    for message in (
        {"do": "form", "content": content, "said": [], "root": root},
        {"do": "guess", "path": "tickets.jsonl", "base": base, "root": root},
        {"do": "check", "key": "k", "text": json.dumps(content), "root": root},
        {"do": "open", "key": "k", "subject": f"{root}/tickets.jsonl", "base": base},
    ):
        told = told_of(message | allowed)
        assert "outside of the folders" in told and "s3cret" not in told, message["do"]
        if message["do"] in ("form", "guess"):
            assert "outside of" not in told_of(message | allowed | {"own": base})


@pytest.mark.parametrize("path", ["{}", "./secret", "../{}", "file://{}", "secret.py", "json"])
def test_no_path_is_read_as_a_dataset_of_the_hub(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str):
    pytest.importorskip("datasets")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "rows.jsonl").write_text('{"text": "s3cret"}\n')
    monkeypatch.chdir(tmp_path / "secret")
    path = f"hf:{path.format(tmp_path / 'secret')}"
    allowed = {"root": str(shown.runs.root), "allowed": [str(shown.runs.root)]}
    content = {"base": "smollm2-135m-instruct", "out": "o", "data": {"s": {"train": path}}, "variants": {"v": {"method": "lora"}}}
    for message in ({"do": "guess", "path": path, "base": "b"}, {"do": "check", "key": "k", "text": json.dumps(content)}):
        told = told_of(message | allowed)
        assert "s3cret" not in told and "without hf:" in told, told


# ---- over HTTP ------------------------------------------------------------


def test_another_page_can_do_nothing(shown: Shown):
    app = create_studio(shown)
    for path in ("guess", "form", "check", "save"):
        for headers, status in (({"origin": "http://evil.example"}, 403), ({"content-type": "text/plain"}, 415)):
            assert call(app, "POST", f"/studio/new/{path}", {"name": "a", "text": "b"}, headers=headers).status_code == status
    assert list(shown.runs.root.iterdir()) == [shown.runs.root / "tickets.jsonl"] and shown.helper._process is None


def test_a_run_file_is_saved_beside_the_runs_and_writes_over_none(shown: Shown, tmp_path: Path):
    app, root = create_studio(shown), shown.runs.root

    def save(name: str, text: str = "base: x\n", key: str = "k") -> Any:
        return call(app, "POST", "/studio/new/save", {"name": name, "text": text}, headers={"authorization": f"Bearer {key}"})

    assert call(app, "POST", "/studio/new/save", {"name": "a", "text": "b"}).status_code == 401 == save("a", key="").status_code
    assert save("a", key="other").status_code == 401 and not (root / "a.yaml").exists()
    found = save("mine", "base: ä\n")
    assert found.status_code == 201 and found.json() == {"path": str(root / "mine.yaml"), "file": "mine.yaml"}
    assert (root / "mine.yaml").read_text(encoding="utf-8") == "base: ä\n"
    assert save("mine").status_code == 400 and (root / "mine.yaml").read_text(encoding="utf-8") == "base: ä\n"
    (root / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    for name in ("../up", "a/b", "", ".", "/etc/x", "A", "x" * 64, "a\x00", "link"):
        assert save(name).status_code == 400, name
    assert (
        save("big", "x" * 200_001).status_code == 400
        and call(app, "POST", "/studio/new/save", b'{"name": "bad", "text": "\\ud800"}', headers=KEY).status_code == 400
    )
    assert not (tmp_path / "elsewhere.yaml").exists() and sorted(p.name for p in root.iterdir()) == [
        "link.yaml",
        "mine.yaml",
        "tickets.jsonl",
    ]


@pytest.mark.slow
def test_names_keep_their_order(shown: Shown):
    """Which a JavaScript object would not: it has "10" and "2" before all others, and 2 before 10."""
    app = create_studio(shown)
    content = call(app, "POST", "/studio/new/guess", {"path": "tickets.jsonl"}).json()["content"]
    assert [name for name, _ in content["variants"]] == ["tickets-lora"] and [name for name, _ in content["data"]] == ["tickets"]
    fields = content["variants"][0][1]
    content["variants"] = [["b", fields], ["10", fields], ["2", fields]]
    told = call(app, "POST", "/studio/new/form", {"content": content}).json()
    assert told["problems"] == [] and list(yaml.safe_load(told["text"])["variants"]) == ["b", "10", "2"]
    for wrong, why in (
        ([["b", fields], ["b", fields]], "two called 'b'"),
        ([["b"]], "pairs of a name"),
        ([[1, fields]], "pairs of a name"),
        ([None], "pairs"),
    ):
        answer = call(app, "POST", "/studio/new/form", {"content": content | {"variants": wrong}})
        assert answer.status_code == 400 and why in answer.json()["error"]["message"]
    strange = call(app, "POST", "/studio/new/form", {"content": content | {"variants": [["v", "x"]]}}).json()
    assert strange["problems"]


@pytest.mark.slow
def test_from_data_to_its_cost(shown: Shown, tiny_llama_folder: Path, own_cache: Path):
    from tests.http.test_rows import until_read

    app = create_studio(dataclasses.replace(shown, base=str(tiny_llama_folder)))
    assert "lora" in [m["name"] for m in call(app, "GET", "/studio/new/choices").json()["methods"]]
    found = call(app, "POST", "/studio/new/guess", {"path": "tickets.jsonl", "base": str(tiny_llama_folder)}).json()
    assert found["rows"] == 3
    assert call(app, "POST", "/studio/new/guess", {"path": "../tickets.jsonl"}).status_code == 404
    told = call(app, "POST", "/studio/new/form", {"content": found["content"], "said": found["said"]}).json()
    assert told["problems"] == []
    report = until_read(app, call(app, "POST", "/studio/new/check", {"text": told["text"]}).json()["key"])["report"]
    (variant,) = report["variants"]
    assert variant["rows_per_epoch"] == 3 and variant["flops"] > 0 and report["estimate"]["available_bytes"] > 0
    assert report["estimate"]["memory_bytes"][0] > variant["adapter_bytes"] and report["room"] is None
    failed = until_read(app, call(app, "POST", "/studio/new/check", {"text": "a: ["}).json()["key"])
    assert failed["state"] == "failed" and "YAML" in failed["error"]
