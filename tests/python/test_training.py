"""Runs from Python: the same adapters, to the byte, as the run file of the same rows; what a caller gets wrong is said by name."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer
from tests.train.common import METHODS, tiny_base
from trimtab.errors import ConfigError
from trimtab.python import training
from trimtab.train.options import RunOptions

DEFAULTS = {"max_steps": 4, "batch_size": 3, "max_length": 128, "eval_every": 2}
VARIANTS = {"lora": METHODS["lora"], "ia3": METHODS["ia3"]}


def rows(count: int, word: str = "a") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"n {i} " + "x" * (i * 7 % 23)}, {"role": "assistant", "content": f"{word} {i}"}]}
        for i in range(count)
    ]


def tensors(out: Path, name: str) -> bytes:
    return (out / "adapters" / name / "adapter_model.safetensors").read_bytes()


def kwargs(folder: Path, **more: Any) -> dict[str, Any]:
    data = {"train": rows(9), "valid": rows(3, "v")}
    quick = {"generate": False}
    return {"base": tiny_base(), "out": folder, "data": data, "defaults": DEFAULTS, "evaluate": quick, "variants": VARIANTS} | more


def test_python_trains_what_the_run_file_of_the_same_rows_trains(tmp_path: Path) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    for split, count, word in (("train", 9, "a"), ("valid", 3, "v"), ("test", 3, "t")):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(count, word)))
    keys = {"defaults": DEFAULTS, "evaluate": {"max_new_tokens": 4}, "seed": 3, "checkpoint_every": None}
    named = {name: fields | {"data": "a"} for name, fields in VARIANTS.items()}
    content = {"base": "tiny", "out": "by-file", "data": {"a": {s: f"{s}.jsonl" for s in ("train", "valid", "test")}}, "variants": named}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content | keys))
    by_file = trimtab.train(tmp_path / "run.yaml", base=tiny_base())

    tables = {"train": pandas.DataFrame(rows(9)), "valid": (r for r in rows(3, "v")), "test": datasets.Dataset.from_list(rows(3, "t"))}
    method = {k: v for k, v in METHODS["lora"].items() if k not in ("method", "lr")}
    variants = {"lora": {"method": trimtab.LoraConfig(**method), "lr": 1e-2}, "ia3": METHODS["ia3"]}
    report = trimtab.train(base=tiny_base(), data=tables, variants=variants, out=tmp_path / "python", **keys)
    assert report.out == tmp_path / "python"
    for name in VARIANTS:
        assert tensors(report.out, name) == tensors(by_file.out, name)
        assert report.summary["variants"][name]["scores"]["loss"] == by_file.summary["variants"][name]["scores"]["loss"]
    # the digests of the rows are those of the files
    content_of = [
        {k.partition(".")[2].partition(".")[2]: v for k, v in r.summary["content"].items() if "data." in k} for r in (report, by_file)
    ]
    assert content_of[0] == content_of[1] and set(content_of[0]) == {"train", "valid", "test"}


def test_columns_and_split_of_a_data_set_are_those_of_its_sources(tmp_path: Path) -> None:
    pairs = [{"q": f"n {i}", "r": f"a {i}"} for i in range(8)]
    mapped = {"columns": {"prompt": "q", "completion": "r"}, "system": "S"}
    report = trimtab.train(
        **kwargs(tmp_path / "x", data={"desk": {"train": pairs, "split": 0.25, **mapped}}, variants={"v": VARIANTS["lora"]})
    )
    by_hand = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": p["q"]}, {"role": "assistant", "content": p["r"]}]}
        for p in pairs
    ]
    run = trimtab.RunConfig.from_dict({"base": "b", "out": "o", "data": {"train": by_hand}, "variants": {"v": VARIANTS["lora"]}})
    from trimtab.train.prepare import prepare

    base = tiny_base()
    expected = {tuple(e.ids.tolist()) for e in prepare(run, base).data["data"].train.examples}
    again = trimtab.RunConfig.from_dict(
        {"base": "b", "out": "o", "data": {"desk": {"train": pairs, "split": 0.25, **mapped}}, "variants": {"v": VARIANTS["lora"]}}
    )
    splits = prepare(again, base).data["desk"].read
    assert {n: len(d.examples) for n, d in splits.items()} == {"train": 6, "valid": 2}
    assert {tuple(e.ids.tolist()) for d in splits.values() for e in d.examples} == expected
    assert report.summary["variants"]["v"]["data"] == "desk"


def test_a_loaded_model_is_a_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "base")
    by_folder = trimtab.train(**kwargs(tmp_path / "folder", base=str(folder), dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for out in ("model", "again"):  # a notebook's cell runs more than once
        report = trimtab.train(**kwargs(tmp_path / out, base=model, tokenizer=tiny_tokenizer() if out == "model" else None))
        assert tensors(report.out, "lora") == tensors(by_folder.out, "lora")
    assert report.base.path == folder and report.summary["base"] == str(folder)
    assert not any(p.requires_grad for p in model.parameters())
    loaded = trimtab.Adapter.load(report.out / "adapters" / "lora", trimtab.load_base(str(folder), dtype="float32"))
    assert loaded.verified

    changed = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    other = trimtab.load_base(changed, tokenizer=tiny_tokenizer())
    assert other.path is None and other.fingerprint != report.base.fingerprint


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": model}, "its tokenizer is missing"),
        ({"base": torch.nn.Linear(1, 1), "tokenizer": tiny_tokenizer()}, "a Linear is no model of transformers"),
        ({"base": "tiny", "tokenizer": tiny_tokenizer()}, "no loaded model"),
        ({"base": tiny_base(), "tokenizer": tiny_tokenizer()}, "beside a Base"),
        ({"base": tiny_base(), "dtype": "float32"}, "dtype: of a base that is loaded by the run"),
    ]
    for given, words in cases:
        with pytest.raises(ConfigError, match=words):
            trimtab.train(**kwargs(tmp_path / "x", **given))
    with pytest.raises(ConfigError, match="quantize: of a base that is loaded here"):
        trimtab.load_base(model, tokenizer=tiny_tokenizer(), quantize="nf4")
    assert not (tmp_path / "x").exists()


# ---- callbacks ------------------------------------------------------------


class Told(trimtab.Callback):
    """Writes down all that it hears, and fails where it is told to."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.heard = fail, list[tuple[Any, ...]]()

    def hear(self, *what: Any) -> None:
        self.heard.append(what)
        if self.fail == f"{what[0]} {what[1]}":
            raise ZeroDivisionError("mine")

    def on_start(self, steps: Mapping[str, int]) -> None:
        self.hear("start", dict(steps))

    def on_step(self, line: Mapping[str, Any]) -> None:
        self.hear("step", line["step"], line["variant"], line["loss"])

    def on_eval(self, line: Mapping[str, Any]) -> None:
        self.hear("eval", line["step"], line["variant"], line["valid_loss"])

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.hear("checkpoint", step, folder.is_dir())

    def on_end(self, report: trimtab.Report) -> None:
        self.hear("end", report.summary["variants"].keys() == VARIANTS.keys())


def test_callbacks_hear_what_metrics_say_in_its_order(tmp_path: Path) -> None:
    told = Told()
    report = trimtab.train(**kwargs(tmp_path / "run", callbacks=[trimtab.Callback(), told], checkpoint_every=3))
    lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    expected = [
        ("eval", x["step"], x["variant"], x["valid_loss"]) if x.get("event") else ("step", x["step"], x["variant"], x["loss"])
        for x in lines
    ]
    assert [h for h in told.heard if h[0] in ("step", "eval")] == expected and len(expected) == 12
    assert told.heard[0] == ("start", {"lora": 4, "ia3": 4}) and told.heard[-1] == ("end", True)
    assert [h for h in told.heard if h[0] == "checkpoint"] == [("checkpoint", 3, True), ("checkpoint", 4, True)]


@pytest.mark.parametrize(("fail", "saved"), [("step 2", 2), ("eval 2", 2), ("checkpoint 2", 3)])
def test_an_exception_of_a_callback_ends_the_run_with_its_checkpoint(fail: str, saved: int, tmp_path: Path) -> None:
    whole = trimtab.train(**kwargs(tmp_path / "whole"))
    given = kwargs(tmp_path / "run", checkpoint_every=2)
    told = Told(fail)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        trimtab.train(**given, callbacks=[told])
    assert "resume=True" in caught.value.__notes__[0]
    assert told.heard[-1][0] == fail.split()[0]  # nothing is called after it
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.endswith(f"{saved}")]
    resumed = trimtab.train(**given, resume=True)
    for name in VARIANTS:
        assert tensors(resumed.out, name) == tensors(whole.out, name)
    assert (resumed.out / "metrics.jsonl").read_text().count("\n") == (whole.out / "metrics.jsonl").read_text().count("\n")


def test_an_exception_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    given = kwargs(tmp_path / "run")

    class Broken(trimtab.Callback):
        def on_start(self, steps: Mapping[str, int]) -> None:
            raise LookupError("at the start")

    with pytest.raises(LookupError, match="at the start") as caught:
        trimtab.train(**given, callbacks=[Broken()])
    (note,) = caught.value.__notes__
    assert "has ended before its first checkpoint; resume=True begins it again" in note
    with pytest.raises(ZeroDivisionError):
        trimtab.train(**given, callbacks=[Told("end True")], resume=True)
    assert (tmp_path / "run" / "summary.json").is_file()  # the run had finished


def test_an_interrupt_ends_the_run_after_the_step_and_signals_are_put_back(tmp_path: Path) -> None:
    class Interrupting(trimtab.Callback):
        def on_step(self, line: Mapping[str, Any]) -> None:
            if line["step"] == 2 and line["variant"] == "lora":
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    try:
        with pytest.raises(trimtab.Interrupted, match="after step 2"):
            trimtab.train(**kwargs(tmp_path / "run"), callbacks=[Interrupting()])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert trimtab.train(**kwargs(tmp_path / "run"), resume=True).summary["variants"]["lora"]["steps"] == 4


# ---- what must not pass in silence ------------------------------------------------------------


def test_resume_refuses_changed_rows_and_takes_equal_ones(tmp_path: Path) -> None:
    finished = trimtab.train(**kwargs(tmp_path / "run"))
    again: Iterator[dict[str, Any]] = (r for r in rows(9))
    same = trimtab.train(**kwargs(tmp_path / "run", data={"train": again, "valid": rows(3, "v")}), resume=True)
    assert same.summary == finished.summary
    with pytest.raises(ConfigError, match=r"base or its data have changed[\s\S]*data\.data\.train: was"):
        trimtab.train(**kwargs(tmp_path / "run", data={"train": rows(9, "b"), "valid": rows(3, "v")}), resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        trimtab.train(**kwargs(tmp_path / "run"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 3}, r"epochs: unknown: it belongs in a variant, or under `defaults`"),
        ({"learning_rate": 3}, r"learning_rate: unknown: lr belongs in a variant"),
        ({"varaints": {}}, r"varaints: unknown \(did you mean 'variants'\?\)"),
        ({"defaults": {"lrr": 1}}, r"defaults\.lrr: unknown key \(did you mean 'lr'\?\)"),
        ({"data": {"train": rows(3), "vaild": rows(1)}}, r"data\.data\.vaild: unknown key \(did you mean 'valid'\?\)"),
        ({"variants": {"v": {"method": "lroa"}}}, r"variants\.v\.method = 'lroa' \(did you mean 'lora'\?\)"),
        ({"variants": {"v": {"method": trimtab.LoraConfig(), "rank": 3}}}, r"variants\.v\.rank: unknown key: write r"),
        ({"data": {"a": {"train": rows(3)}, "b": {"train": rows(3)}}}, r"variants\.lora\.data = None: one of a, b"),
        ({"variants": None}, r"variants: expected a mapping"),
        ({"out": None}, r"out: Field required"),
        ({"run": {"base": "x"}}, r"data, variants, defaults, evaluate given beside a run"),
        ({"changes": ["seed=3"]}, r"changes: of a run file"),
        (
            {"run": {"base": "x"}, "data": None, "variants": None, "defaults": None, "evaluate": None, "checkpoint_every": None},
            "^trimtab.train: checkpoint_every given beside a run",
        ),
    ],
)
def test_a_wrong_argument_is_said_by_name(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        trimtab.train(**kwargs(tmp_path / "x") | given)
    assert not (tmp_path / "x").exists()


def test_an_unknown_keyword_is_a_type_error_too() -> None:
    for function in (trimtab.train, trimtab.check, trimtab.sweep):
        with pytest.raises(TypeError, match="varaints"):
            function(varaints={})


@pytest.mark.parametrize("function", [training.train, training.check, training.sweep])
def test_arguments_are_the_keys_of_a_run_file_with_their_defaults(function: Any) -> None:
    """`train`, `check` and `sweep` name each key, so that people and editors see them."""
    found = inspect.signature(function).parameters
    fields = {n: f for n, f in RunOptions.model_fields.items() if n != "root"}
    left_out = {"variants", "store"} if function is training.sweep else set()
    assert {"defaults", *fields} - left_out <= found.keys()
    for name, field in fields.items():
        if name in found and not field.is_required() and name != "evaluate":
            expected = field.get_default(call_default_factory=True)
            assert (list(found[name].default) if expected == [] else found[name].default) == expected, name
            assert name not in training.KEYS or training.KEYS[name] == found[name].default


def test_the_package_shows_the_functions_signature() -> None:
    assert inspect.signature(trimtab.train) == inspect.signature(training.train)
    assert isinstance(trimtab.train, type(trimtab)) and "variants" in str(inspect.signature(trimtab.train))
    assert inspect.getdoc(trimtab.train) == inspect.getdoc(training.train) and "one frozen base" in str(inspect.getdoc(trimtab.train))


# ---- check and sweep ------------------------------------------------------------


def test_check_reads_rows_and_trains_nothing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    data = {"train": [*rows(20), {"messages": []}], "test": rows(3)}
    report = trimtab.check(base=str(folder), out=tmp_path / "out", data=data, variants={"v": trimtab.LoraConfig(r=2)}, rows=1)
    (counts, _) = report.splits
    assert (counts.sources[0].path, counts.sources[0].read, counts.sources[0].dropped) == ("rows", 21, 1)
    assert any(f.where == "data.data.train" and f.items and f.items[0].startswith("rows[20]: ") for f in report.findings)
    assert report.rendered[0].origin == "rows[0]" and report.rendered[0].runs[-2] == ("a 0<|im_end|>", True)
    assert not (tmp_path / "out").exists()


def test_a_sweep_from_python_is_that_of_the_file(tmp_path: Path) -> None:
    for split, word in (("train", "a"), ("valid", "v")):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(6, word)))
    search = {"variant": {"method": "lora", "lr": 1e-2}, "search": {"r": [2, 4]}}
    content = {"base": "tiny", "out": "file", "data": {"a": {"train": "train.jsonl", "valid": "valid.jsonl"}}, "defaults": {"max_steps": 2}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | {"sweep": search}))
    by_file = trimtab.sweep(tmp_path / "sweep.yaml", base=tiny_base())
    data = {"train": (r for r in rows(6)), "valid": rows(6, "v")}
    report = trimtab.sweep(base=tiny_base(), out=tmp_path / "python", data=data, defaults={"max_steps": 2}, sweep=search)
    figures = [[(t["trial"], t["valid"]) for t in r.leaderboard["trials"]] for r in (report, by_file)]
    assert figures[0] == figures[1] and len(figures[0]) == 2
    with pytest.raises(ConfigError, match=r"sweep\.serach: unknown key \(did you mean 'search'"):
        trimtab.sweep(base=tiny_base(), out=tmp_path / "no", data=data, sweep={"serach": {}, **search})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_base_beside_a_file_is_the_one_that_is_used(kind: type, tmp_path: Path) -> None:
    """The file's own is not there at all."""
    base = tiny_folder(tmp_path / "base")
    for split, word in (("train", "a"), ("valid", "v")):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(4, word)))
    data = {"a": {"train": "train.jsonl", "valid": "valid.jsonl"}}
    content = {"base": str(tmp_path / "none"), "out": "out", "data": data, "dtype": "float32", "evaluate": {"generate": False}}
    content |= {"defaults": {"max_steps": 1}}
    variants = {"v": VARIANTS["lora"] | {"data": "a"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content | {"variants": variants}))
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(content | {"sweep": {"variant": {"method": "lora", "lr": 1e-2}, "search": {"r": [2, 4]}}})
    )
    assert trimtab.check(tmp_path / "run.yaml", base=kind(base)).base == str(base)
    assert trimtab.train(tmp_path / "run.yaml", base=kind(base), out=tmp_path / "run").summary["base"] == str(base)
    board = trimtab.sweep(tmp_path / "sweep.yaml", base=kind(base), out=tmp_path / "swept").leaderboard
    assert board["base"] == str(base) and yaml.safe_load(board["best"]["run_file"])["base"] == str(base)
    mapping = content | {"variants": variants, "data": {"a": {"train": rows(4)}}}
    assert trimtab.check(mapping, base=kind(base)).base == str(base)


def test_a_run_need_not_name_what_is_given_beside_it(tmp_path: Path) -> None:
    """base and out, of a mapping, a run file, and a sweep file; without them the run is refused as before."""
    base = tiny_folder(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(4)))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(4, "v")))
    data = {"a": {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "valid.jsonl")}}
    content = {"data": data, "evaluate": {"generate": False}, "defaults": {"max_steps": 1}}
    run = content | {"variants": {"v": VARIANTS["lora"] | {"data": "a"}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | {"sweep": {"variant": {"method": "lora"}, "search": {"r": [2]}}}))
    assert trimtab.check(run, base=str(base), out=tmp_path / "c").base == str(base)
    of_file = trimtab.train(tmp_path / "run.yaml", base=str(base), out=tmp_path / "file")
    report = trimtab.train(run, base=tiny_base(), out=tmp_path / "mapping")
    assert (report.out, report.summary["base"]) == (tmp_path / "mapping", tiny_base().name)
    assert (of_file.out, of_file.summary["base"]) == (tmp_path / "file", str(base))
    assert trimtab.sweep(tmp_path / "sweep.yaml", base=str(base), out=tmp_path / "swept").leaderboard["base"] == str(base)
    with pytest.raises(ConfigError, match=r"base: Field required"):
        trimtab.train(run, out=tmp_path / "no")


@pytest.mark.parametrize(
    ("rows_in_file", "base_in_file", "why"),
    [(True, True, ""), (False, True, "its rows"), (True, False, "its base"), (False, False, "its base and its rows")],
)
def test_a_winner_has_a_run_file_where_one_can_name_all(rows_in_file: bool, base_in_file: bool, why: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    data: dict[str, Any] = {"train": rows(4), "valid": rows(3, "v")}
    if rows_in_file:
        for split, found in list(data.items()):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
            data[split] = str(tmp_path / f"{split}.jsonl")
    search = {"variant": {"method": "lora", "lr": 1e-2}, "search": {"r": [2]}}
    base = trimtab.load_base(str(folder), dtype="float32") if base_in_file else tiny_base()
    report = trimtab.sweep(
        base=base, data=data, sweep=search, out=tmp_path / "out", defaults={"max_steps": 1}, evaluate={"generate": False}
    )
    best = json.loads((tmp_path / "out" / "leaderboard.json").read_text())["best"]
    if why:
        assert best["run_file"] is None and best["why_no_run_file"].startswith(f"{why} stand in the memory of a program")
        assert f"no run file trains it alone: {why} stand" in str(report) and f"{why} stand" in report._repr_html_()
    else:
        again = trimtab.RunConfig.from_dict(yaml.safe_load(best["run_file"]))
        assert (again.base, best["why_no_run_file"]) == (str(folder), None) and "no run file" not in str(report)


def test_a_sweep_refuses_what_rows_cannot_have(tmp_path: Path) -> None:
    search = {"variant": {"method": "lora"}, "search": {"r": [2]}}
    for key, value in (("format", "csv"), ("split", "validation")):
        with pytest.raises(ConfigError, match=f"{key}: of files"):
            data = {"train": {"rows": rows(3), key: value}, "valid": rows(3)}
            trimtab.sweep(base=tiny_base(), out=tmp_path / "no", data=data, sweep=search)
