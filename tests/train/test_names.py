"""Names and forms that people bring from other programs: each is answered by an error that says what to write, all at once, and none is
taken for ours in silence. The expectations are written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.train.common import run_file
from trimtab.cli import main
from trimtab.errors import ConfigError
from trimtab.foreign import OURS, answer
from trimtab.methods import LoraConfig
from trimtab.train import RunConfig
from trimtab.train.config import HOMES
from trimtab.train.trials import Sweep

LORA = {"data": "a", "method": "lora"}


def refused(content: dict[str, Any], folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        (Sweep if "sweep" in content else RunConfig).from_dict(content, root=folder)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        ("learning_rate", 1e-3, "write lr"),
        ("LR", 1e-3, "write lr"),
        ("num_train_epochs", 3, "write epochs"),
        ("per_device_train_batch_size", 4, "write batch_size"),
        ("micro_batch_size", 4, "write batch_size"),
        ("gradient_accumulation", 4, "write gradient_accumulation_steps"),
        ("grad-accum-steps", 4, "write gradient_accumulation_steps"),
        ("lora_r", 8, "write r"),
        ("rank", 8, "write r"),
        ("dropout", 0.1, "write lora_dropout"),
        ("alpha", 16, "write lora_alpha"),
        ("dora", True, "write use_dora"),
        ("max_seq_length", 512, "write max_length"),
        ("lr_scheduler_type", "cosine", "write schedule"),
        ("warmup_ratio", 0.1, "write warmup_steps"),
        ("load_in_4bit", True, "write `quantize: nf4`"),
        ("load_in_8bit", False, "`quantize: int8`"),
        ("qlora", True, "write `quantize: nf4`"),
        ("bf16", True, "dtype: bfloat16"),
        ("output_dir", "x", "out belongs at the top of the run file"),
        ("num_virtual_tokens", 8, "belongs to method"),
    ],
)
def test_a_key_of_a_variant(tmp_path: Path, theirs: str, value: Any, ours: str) -> None:
    (said,) = refused(run_file(tmp_path, {"v": LORA | {theirs: value}}), tmp_path)
    assert said.startswith(f"variants.v.{theirs}: unknown key: ") and ours in said


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"epochs": 3}, "epochs: unknown key: it belongs in a variant, or under `defaults`"),
        ({"num_train_epochs": 3}, "num_train_epochs: unknown key: epochs belongs in a variant, or under `defaults`"),
        ({"learning_rate": 3}, "learning_rate: unknown key: lr belongs in a variant, or under `defaults`"),
        ({"base_model": "x"}, "base_model: unknown key: write base"),
        ({"load_in_4bit": True}, "load_in_4bit: unknown key: write `quantize: nf4` (4 bits)"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: unknown key: write activation_checkpointing"),
        ({"defaults": {"rank": 3}}, "defaults.rank: unknown key: r belongs in a variant"),
        ({"evaluate": {"max_completion_tokens": 3}}, "evaluate.max_completion_tokens: unknown key: write max_new_tokens"),
    ],
)
def test_a_key_of_the_run(tmp_path: Path, keys: dict[str, Any], ours: str) -> None:
    (said,) = refused(run_file(tmp_path, {"v": LORA}, **keys), tmp_path)
    assert said.startswith(ours)


@pytest.mark.parametrize(
    ("method", "ours"),
    [
        ("LoRA", "write lora"),
        ("LORA", "write lora"),
        ("IA3", "write ia3"),
        ("dora", "`use_dora: true`"),
        ("qlora", "write `method: lora`, and `quantize: nf4`"),
        ("prompt_tuning", "`method: prompt`"),
        ("Prefix-Tuning", "`method: prefix`"),
        (None, "one of"),
        (["lora"], "one of"),
    ],
)
def test_a_method(tmp_path: Path, method: Any, ours: str) -> None:
    said = refused(run_file(tmp_path, {"v": {"data": "a", "method": method}}), tmp_path)
    assert len(said) == 1 and said[0].startswith("variants.v.method = ") and ours in said[0]
    assert (method is not None) or "full`" not in said[0]  # who left the method out did not ask for all weights


def test_they_are_answered_in_sweep_files_and_flags(tmp_path: Path) -> None:
    content = run_file(tmp_path, {})
    del content["variants"]
    content["data"]["a"]["valid"] = "a-test.jsonl"
    said = refused(content | {"sweep": {"variant": LORA | {"rank": 8}, "search": {"learning_rate": [1]}}, "epochs": 1}, tmp_path)
    assert [s.partition(": unknown key: ")[::2] for s in said] == [
        ("sweep.variant.rank", "write r"),
        ("sweep.search.learning_rate", "write lr"),
        ("epochs", "it belongs in a variant, or under `defaults`"),
    ]
    said = refused(content | {"sweep": {"variant": {"data": "a", "method": "LoRA"}, "search": {"lr": [1e-3]}}}, tmp_path)
    assert any("write lora" in s for s in said)
    shown = CliRunner().invoke(main, ["plan", "gpt2", "--method", "LoRA"])
    assert shown.exit_code == 2 and "write lora" in shown.output
    shown = CliRunner().invoke(main, ["plan", "gpt2", "--method", "lora", "--set", "rank=8", "--set", "dropout=0"])
    assert shown.exit_code == 2 and "write r\n" in shown.output and "write lora_dropout" in shown.output


def test_names_of_modules_in_one_string(tmp_path: Path) -> None:
    said = refused(run_file(tmp_path, {"v": LORA | {"target_modules": "q_proj,v_proj", "exclude_modules": "[k_proj, o_proj]"}}), tmp_path)
    assert [s.partition("; ")[2] for s in said] == ["write a list: [q_proj, v_proj]", "write a list: [k_proj, o_proj]"]
    from tests.train.common import tiny_base

    for text, wanted in (("q_proj", "write a list: [q_proj]"), ("q_proj, v_proj", "write a list: [q_proj, v_proj]")):
        with pytest.raises(ConfigError, match=r"write a list") as caught:
            LoraConfig(target_modules=text).sites(tiny_base().spec)
        assert wanted in str(caught.value) and "did you mean" not in str(caught.value)
    # patterns stay what they are
    assert len(LoraConfig(target_modules=r".*\.[qv]_proj").sites(tiny_base().spec)) == 4
    assert len(LoraConfig(target_modules="lm_head").sites(tiny_base().spec)) == 1
    assert refused(run_file(tmp_path, {"v": LORA | {"target_modules": ".*(q|v){1,2}_proj", "x": 1}}), tmp_path) == [
        "variants.v.x: unknown key"
    ]


def test_every_answer_names_a_key_that_there_is() -> None:
    """The table cannot name what a run file does not take, nor call a key of ours by another one."""
    assert set(OURS) <= set(HOMES) | {"seed", "data"}
    for ours, theirs in OURS.items():
        for name in theirs:
            assert answer(name, [ours]) == f": write {ours}"
    theirs = {name for names in OURS.values() for name in names}
    assert theirs & set(HOMES) == {"dropout", "lora_dropout"}  # one of each is a field of another method


# ---- all findings at once ------------------------------------------------------------


def test_keys_values_methods_options_and_paths_come_together(tmp_path: Path) -> None:
    content = run_file(tmp_path, {}) | {"seed": -1, "defaults": {"batch_size": 0, "patience": "x"}, "out": 3}
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.csv").write_text("question,reply\nx,y\n")
    content["data"] = {"a": {"train": "absent.jsonl", "valid": ["empty.jsonl", {"path": "wrong.csv", "wieght": 2}], "test": {"path": 7}}}
    content["variants"] = {
        "v": {"data": "a", "method": "lora", "r": 0, "lora_dropout": 2, "target_modules": [1], "epochs": -1, "lr": 99},
        "w": {"data": "b", "method": "lroa", "rank": 3, "max_length": 1},
    }
    said = "\n".join(refused(content, tmp_path))
    for words in (
        "seed: Input",
        "out: Input",
        "defaults.batch_size: Input",
        "defaults.patience: Input",
        "data.a.valid[1]: unknown key 'wieght' (did you mean 'weight'?)",
        "data.a.test: path = 7",
        "variants.v.r = 0",
        "variants.v.lora_dropout = 2.0",
        "variants.v.target_modules = [1]",
        "variants.v.epochs: Input",
        "variants.v.lr: Input",
        "variants.w.data = 'b'",
        "variants.w.method = 'lroa' (did you mean 'lora'?)",
        "variants.w.rank: unknown key: write r",
        "variants.w.max_length: Input",
        "data.a.train: absent.jsonl does not exist",
        "data.a.valid: empty.jsonl is empty",
        "data.a.valid: wrong.csv: no training form found in its columns: question, reply",
    ):
        assert words in said, words
    assert said.count("batch_size") == 1  # once, not for each variant that it reaches


# ---- what is no run file ------------------------------------------------------------


def test_a_root_in_words_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = RunConfig.from_dict(run_file(tmp_path, {"v": LORA}), root=str(tmp_path))
    assert (run.root, run.out) == (tmp_path, tmp_path / "out")
    assert RunConfig.from_dict(run_file(tmp_path, {"v": LORA}, out="~/runs"), root="elsewhere").out == tmp_path / "runs"


def test_a_mapping_is_a_run_and_rows_alone_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab
    from tests.train.common import tiny_base

    monkeypatch.chdir(tmp_path)
    content = run_file(tmp_path, {"v": LORA | {"r": 2, "max_steps": 1}}, evaluate={"generate": False})
    report = trimtab.train(content, base=tiny_base())
    assert report.out == Path("out") and (tmp_path / "out" / "summary.json").is_file()
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigError, match=r"data\.a\.train: one row: rows stand in a list"):
        trimtab.train(content | {"out": "other", "data": {"a": {"train": rows[0]}}}, base=tiny_base())
    with pytest.raises(ConfigError, match=r"expected a mapping .* found list"):
        trimtab.train(rows, base=tiny_base())  # type: ignore[arg-type]
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    for table in (datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        with pytest.raises(ConfigError, match=f"found {type(table).__name__}"):
            trimtab.train(table, base=tiny_base())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: " + b"{a: " * 5000, "nested too deeply"),
        (b"a: " + b"9" * 5000, "is not YAML"),
        (b"a: 2026-99-99", "is not YAML"),
        (b"a: " + b"x" * 2**22, "is longer than"),
        (b"data: &a [*a]\nvariants: &b {v: *b}", "data: expected a mapping"),
        (
            b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))
            + b"data: *a11\nvariants: {v: *a11}\ndefaults: {lr: *a11}\nbase: *a11",
            "data: expected a mapping",
        ),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=words) as caught:
        RunConfig.load(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 20_000
    shown = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml")])
    assert shown.exit_code == 2 and "Traceback" not in shown.output
