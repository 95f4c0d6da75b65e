"""What the page reads of run folders, compared with the files read by a plain loop, while they grow, are cut, or lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.common import METHODS, locked, run_file, tiny_base
from tests.train.past import HOSTILE, run_folder, variant
from trimtab.errors import ConfigError, NotFoundError
from trimtab.train import RunConfig, answers, follow, run_folders, train
from trimtab.train.follow import RunFolders


def key_of(folders: RunFolders, name: str) -> str:
    (key,) = [line["id"] for line in folders.list() if line["name"] == name]
    return str(key)


def read_all(folders: RunFolders, key: str, start: int = 0, mark: str = "") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """variant -> kind -> field -> numbers, as a page that reads piece by piece puts them together; and the pieces."""
    pieces, whole = [], {}
    while True:
        piece = folders.metrics(key, start, mark)
        pieces.append(piece)
        for name, kinds in piece["variants"].items():
            for kind, columns in kinds.items():
                for field, values in columns.items():
                    whole.setdefault(name, {}).setdefault(kind, {}).setdefault(field, []).extend(values)
        start, mark = piece["next"], piece["mark"]
        if not piece["more"]:
            return whole, pieces


def plainly(path: Path) -> dict[str, Any]:
    """The same from the file, line by line."""
    whole: dict[str, Any] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        kind = "valid" if line.get("event") == "valid" else "steps"
        for field, value in line.items():
            if isinstance(value, (int, float)):
                whole.setdefault(line["variant"], {}).setdefault(kind, {}).setdefault(field, []).append(value)
    return whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one real run."""
    folder = tmp_path_factory.mktemp("runs")
    variants = {"lo.ra": METHODS["lora"] | {"data": "a", "eval_every": 2}, "ia3": METHODS["ia3"] | {"data": "b"}}
    content = run_file(folder, variants, checkpoint_every=None)
    content["data"]["a"]["valid"] = "a-test.jsonl"
    train(RunConfig.from_dict(content, root=folder), base=tiny_base())
    return folder


def test_a_real_run_is_shown_as_its_files_have_it(trained: Path):
    folders = RunFolders(trained)
    (line,) = folders.list()
    summary = json.loads((trained / "out" / "summary.json").read_text())
    assert (line["name"], line["state"], line["variants"], line["methods"]) == ("out", "finished", 2, ["ia3", "lora"])
    shown = folders.show(line["id"])
    by_name = {v["name"]: v for v in shown["variants"]}
    assert (
        by_name["lo.ra"]["settings"] | {"method": "lora", "r": 4, "lora_dropout": 0.2, "lr": 1e-2, "data": "a"}
        == by_name["lo.ra"]["settings"]
    )
    assert by_name["lo.ra"]["saved_step"] == summary["variants"]["lo.ra"]["saved_step"] and by_name["ia3"]["total_steps"] == 5
    assert by_name["ia3"]["scores"]["loss"] == summary["variants"]["ia3"]["scores"]["loss"]
    assert shown["base_scores"]["a"]["loss"] == summary["base_scores"]["a"]["loss"]
    assert shown["scores"]["loss"]["better"] == "lower" and shown["scores"]["exact_match"] == {
        "title": "exact match",
        "percent": True,
        "better": "higher",
    }
    assert not [k for k in shown["settings"] if k.startswith("variants.")]
    assert shown["answers"] == {"a": ["base", "lo.ra"], "b": ["base", "ia3"]}
    whole, _ = read_all(folders, line["id"])
    expected = plainly(trained / "out" / "metrics.jsonl")
    for name, kinds in expected.items():
        for kind, columns in kinds.items():
            for field in ("step", "loss", "lr", "tokens", "valid_loss", "best"):
                if field in columns:
                    assert whole[name][kind][field] == columns[field], (name, kind, field)
    assert whole["lo.ra"]["valid"]["step"] == [2, 4, 5]


@pytest.mark.parametrize("size", [180, 1000, 5000])
def test_pieces_of_any_size_add_up_to_the_file(trained: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    folders = RunFolders(trained)
    key = key_of(folders, "out")
    whole, (only,) = read_all(folders, key)
    monkeypatch.setattr(follow, "CHUNK", max(size, max(map(len, (trained / "out" / "metrics.jsonl").read_bytes().splitlines())) + 1))
    parts, pieces = read_all(folders, key)
    assert {n: {k: c["step"] for k, c in kinds.items() if c} for n, kinds in parts.items()} == {
        n: {k: c["step"] for k, c in kinds.items() if c} for n, kinds in whole.items()
    }
    assert pieces[-1]["next"] == only["next"] == (trained / "out" / "metrics.jsonl").stat().st_size
    assert len(pieces) > 1 or size == 5000


def test_only_what_is_new_is_read_and_a_torn_line_waits(tmp_path: Path):
    run_folder(tmp_path / "r", {"v": variant()}, steps=4, summary=False)
    folders, path = RunFolders(tmp_path), tmp_path / "r" / "metrics.jsonl"
    key = key_of(folders, "r")
    first = folders.metrics(key, 0, "")
    line = json.dumps({"variant": "v", "step": 5, "loss": 1.5, "note": "text", "norm": float("nan")})
    with path.open("a") as file:
        file.write(line[:20])
    torn = folders.metrics(key, first["next"], first["mark"])
    assert torn["variants"] == {} and torn["next"] == first["next"] and not torn["restart"] and not torn["more"]
    with path.open("a") as file:
        file.write(line[20:] + "\n[1]\nnot json\n" + json.dumps({"variant": "w", "step": 1, "loss": 2, "event": "other"}) + "\n")
    more = folders.metrics(key, torn["next"], torn["mark"])
    assert more["variants"] == {"v": {"steps": {"step": [5], "loss": [1.5], "norm": [None]}, "valid": {}}}


@pytest.mark.parametrize("longer", [False, True])
def test_a_file_that_was_written_anew_is_read_from_its_start(tmp_path: Path, longer: bool):
    """As a resume does, which cuts the file at the checkpoint and goes on: it may be as long as before, with other numbers."""
    run_folder(tmp_path / "r", {"v": variant()}, steps=6, summary=False)
    folders, path = RunFolders(tmp_path), tmp_path / "r" / "metrics.jsonl"
    key = key_of(folders, "r")
    first = folders.metrics(key, 0, "")
    lines = path.read_text().splitlines(keepends=True)
    changed = lines[:3] + [x.replace('"lr": 0.001', '"lr": 0.002') for x in lines[3:]]
    path.write_text("".join(changed + lines * longer))
    again = folders.metrics(key, first["next"], first["mark"])
    assert again["restart"] and again["variants"]["v"]["steps"]["lr"][:6] == [0.001] * 3 + [0.002] * 3
    path.write_text("".join(lines[:2]))
    shorter = folders.metrics(key, again["next"], again["mark"])
    assert shorter["restart"] and shorter["variants"]["v"]["steps"]["step"] == [1, 2]


def test_runs_are_found_at_any_place_and_nothing_else(tmp_path: Path):
    for name in ("a", "deep/er/b", HOSTILE.replace("/", ""), os.fsdecode(b"byte\xff")):
        run_folder(tmp_path / name, {"v": variant()})
    run_folder(tmp_path / "a" / "inside", {"v": variant()})
    run_folder(tmp_path / ".cache" / "c", {"v": variant()})
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    outside = run_folder(tmp_path.parent / f"{tmp_path.name}-linked", {"v": variant()})
    (tmp_path / "linked").symlink_to(outside)
    names = {line["name"] for line in RunFolders(tmp_path).list()}
    assert names == {"a", "deep/er/b", HOSTILE.replace("/", ""), "byte\\udcff", "linked"}
    assert json.dumps(RunFolders(tmp_path).list()).isascii()
    assert [line["name"] for line in RunFolders(tmp_path / "a").list()] == ["a"], "the folder itself may be a run"


@pytest.mark.parametrize("key", ["", ".", "..", "../x", "/etc", "0" * 16])
def test_only_a_listed_run_is_read(tmp_path: Path, key: str):
    run_folder(tmp_path / "runs" / "r", {"v": variant()})
    run_folder(tmp_path / "x", {"v": variant()})
    folders = RunFolders(tmp_path / "runs")
    for read in (folders.show, lambda k: folders.metrics(k, 0, ""), lambda k: folders.answers(k, "a", "", 0, 10)):
        with pytest.raises(NotFoundError, match="no such run"):
            read(key)


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for name in ("file", "absent"):
        with pytest.raises(ConfigError, match=name):
            RunFolders(tmp_path / name)


def answered(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """A run whose variants v and w and base have answered; files: name -> lines."""
    made = {n: variant(scores={"loss": 1.0, "predictions": f"predictions/a-{n}.jsonl"}) for n in ("v", "w")}
    base = {"a": {"loss": 3.0, "predictions": "predictions/a-base.jsonl"}}
    run_folder(folder, made, base_scores=base)
    (folder / "predictions").mkdir()
    for name, lines in files.items():
        (folder / "predictions" / f"a-{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def told(reference: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"prompt": f"what is {reference}?", "reference": reference, "answer": answer, "correct": answer == reference} | more


def test_answers_come_wrong_ones_first(tmp_path: Path):
    rows = ["0", "1", "2", "3"]
    given = {"base": ["x", "x", "x", "x"], "v": ["0", "x", "x", "3"], "w": ["0", "1", "x", "x"]}
    answered(tmp_path / "r", **{n: [told(r, a) for r, a in zip(rows, answers, strict=True)] for n, answers in given.items()})
    folders = RunFolders(tmp_path)
    key = key_of(folders, "r")
    found = folders.answers(key, "a", "", 0, 10)
    assert [row["row"] for row in found["rows"]] == [2, 1, 3, 0], "two wrong, one wrong in the order of rows, none; the base does not count"
    assert (found["total"], found["wrong"]) == (4, {"base": 4, "v": 2, "w": 2})
    assert found["rows"][0]["answers"]["v"] == {"text": "x", "right": False} and found["rows"][0]["prompt"] == "what is 2?"
    assert [r["row"] for r in folders.answers(key, "a", "", 1, 2)["rows"]] == [1, 3]
    assert [r["row"] for r in folders.answers(key, "a", "w", 0, 4)["rows"]] == [2, 3, 0, 1]
    with pytest.raises(NotFoundError):
        folders.answers(key, "b", "", 0, 10)


def test_answers_of_labels_and_rewards(tmp_path: Path):
    lines = [told("yes", "no", label="yes", label_correct=True), {"prompt": "p", "reference": None, "answer": "free", "reward": 0.25}]
    answered(tmp_path / "r", v=lines)
    folders = RunFolders(tmp_path)
    rows = {r["row"]: r["answers"]["v"] for r in folders.answers(key_of(folders, "r"), "a", "", 0, 10)["rows"]}
    assert rows == {0: {"text": "no", "right": True}, 1: {"text": "free", "right": None, "reward": 0.25}}


@pytest.mark.parametrize("path", ["../secret.jsonl", "/etc/passwd", "predictions/../../secret.jsonl", "predictions/link.jsonl"])
def test_a_summary_that_points_elsewhere_is_not_followed(tmp_path: Path, path: str):
    folder = answered(tmp_path / "r", base=[told("1", "1")])
    (tmp_path / "secret.jsonl").write_text(json.dumps(told("secret", "secret")) + "\n")
    (folder / "predictions" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    summary["variants"]["v"]["scores"]["predictions"] = path
    (folder / "summary.json").write_text(json.dumps(summary))
    folders = RunFolders(tmp_path)
    assert folders.show(key_of(folders, "r"))["answers"] == {"a": ["base"]}
    assert "secret" not in json.dumps(folders.answers(key_of(folders, "r"), "a", "", 0, 10))


@pytest.mark.skipif(not run_folders.LOCKS.exists(), reason="the system tells no locks")
def test_a_run_that_holds_its_folder_is_running(tmp_path: Path):
    """Its metrics are new all the time: once it is killed it is stopped at once."""
    folder = run_folder(tmp_path / "r", {"v": variant()}, summary=False)
    folders = RunFolders(tmp_path)
    assert [x["state"] for x in folders.list()] == ["stopped"]
    with locked(folder):
        assert [x["state"] for x in folders.list()] == ["running"]
    assert [x["state"] for x in folders.list()] == ["stopped"]
    (folder / "summary.json").write_text(json.dumps({"variants": {"v": variant()}}))
    assert [x["state"] for x in folders.list()] == ["finished"]


def test_a_lock_counts_with_its_device_and_without_a_list_of_locks_the_clock_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run_folder(tmp_path / "runs" / "r", {"v": variant()}, summary=False)
    folders, locks = RunFolders(tmp_path / "runs"), tmp_path / "locks"
    (folder / ".lock").touch()
    inode = (folder / ".lock").stat().st_ino
    monkeypatch.setattr(run_folders, "LOCKS", locks)
    assert [x["state"] for x in folders.list()] == ["running"], "no list, and metrics of just now"
    monkeypatch.setattr(run_folders, "QUIET_S", -1.0)
    assert [x["state"] for x in folders.list()] == ["stopped"]
    for device, kind, of, state in (
        ("08:1f", "FLOCK ", inode, "running"),
        ("08:20", "FLOCK ", inode, "stopped"),
        ("08:1f", "OFDLCK", inode, "running"),
        ("08:1f", "POSIX ", inode, "stopped"),
        ("08:1f", "FLOCK ", inode * 10, "stopped"),
        ("08:1f", "-> FLOCK ", inode, "running"),
    ):
        monkeypatch.setattr(run_folders, "_device", lambda _: (8, 31))
        locks.write_text(f"1: POSIX  ADVISORY  READ  7 08:1f:3 128 128\n2: {kind} ADVISORY  WRITE -1 {device}:{of} 0 EOF\n")
        assert [x["state"] for x in folders.list()] == [state], (device, kind, of)
    (folder / ".lock").write_text(json.dumps({"host": "another-machine", "pid": 7}))
    for quiet_s, state in ((-1.0, "stopped"), (60.0, "running")):  # the list has the locks of this machine alone: the clock tells
        monkeypatch.setattr(run_folders, "QUIET_S", quiet_s)
        assert [x["state"] for x in folders.list()] == [state]


def test_metrics_tell_when_facts_were_written_anew(tmp_path: Path):
    folder = run_folder(tmp_path / "r", {"v": variant()}, summary=False)
    folders = RunFolders(tmp_path)
    key, seen = key_of(folders, "r"), []
    for n, name in enumerate(("metrics.jsonl", "run.json", "run.json", "summary.json")):
        (folder / name).touch()
        os.utime(folder / name, ns=(n, n))
        seen.append(folders.metrics(key, 0, "")["written"])
    assert len(set(seen)) == 4 and folders.metrics(key, 0, "")["written"] == seen[-1]


class Seen(Exception):
    pass


class Looks:
    """A listener that looks at the run folder after the first step, and ends the run."""

    def __init__(self, root: Path):
        self.root, self.shown = root, None

    def step(self, line: Any) -> None:
        folders = RunFolders(self.root)
        self.shown = folders.show(folders.list()[0]["id"])
        raise Seen

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def test_settings_and_steps_are_known_from_the_first_step_on(tmp_path: Path):
    content = run_file(tmp_path, {"v": METHODS["lora"] | {"data": "a"}}, checkpoint_every=None)
    looks = Looks(tmp_path)
    with pytest.raises(Seen):
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), listener=looks)
    assert looks.shown is not None
    (v,) = looks.shown["variants"]
    assert looks.shown["state"] == "running" and looks.shown["base"] == "tiny-llama"
    assert (v["total_steps"], v["settings"]["r"], v["settings"]["lr"], v["method"]) == (5, 4, 1e-2, "lora")
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), resume=True)  # run.json is in nobody's way
    assert report.summary["variants"]["v"]["steps"] == 5


def test_a_run_from_before_run_json_is_shown_by_its_metrics(tmp_path: Path):
    run_folder(tmp_path / "r", {"v": variant()}, steps=7, summary=False)
    folders = RunFolders(tmp_path)
    shown = folders.show(key_of(folders, "r"))
    assert [(v["name"], v["steps"], v["total_steps"]) for v in shown["variants"]] == [("v", 7, None)]


DEEP = "[" * 100_000
BROKEN = {
    "list of variants": '{"variants": [1]}',
    "list of settings": '{"variants": {}, "settings": [1]}',
    "deep": DEEP,
    "no JSON": "{",
    "a list": "[]",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_run_is_a_line_that_says_so_and_hides_no_other(tmp_path: Path, what: str):
    run_folder(tmp_path / "good", {"v": variant()})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "summary.json").write_text(BROKEN[what])
    folders = RunFolders(tmp_path)
    lines = {line["name"]: line for line in folders.list()}
    assert (lines["good"]["error"], lines["bad"]["error"]) == (None, "cannot be read")
    assert lines["good"].keys() == lines["bad"].keys()
    with pytest.raises(ConfigError, match="bad"):
        folders.show(lines["bad"]["id"])


def test_names_and_numbers_that_cannot_be_sent_are_written_otherwise(tmp_path: Path):
    """Lone surrogates, which are no UTF-8; numbers beyond a float's range; lists within lists."""
    run_folder(tmp_path / "r", {"v\ud800": variant(scores={"loss": 10**400, "exact_match": 50.0})}, base="\ud800\x1b", x=[[[]]] * 3)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    for _ in range(200):
        summary["base_fingerprint"] = {"before": summary["base_fingerprint"]}
    (tmp_path / "r" / "summary.json").write_text(json.dumps(summary | {"seconds": float("inf")}))
    folders = RunFolders(tmp_path)
    (line,) = folders.list()
    shown = folders.show(line["id"])
    assert line["base"] == shown["base"] == "\\ud800\\x1b" and line["seconds"] is None
    assert [(v["name"], v["scores"]) for v in shown["variants"]] == [("v\\ud800", {"exact_match": 50.0})]
    assert "v\\ud800" in folders.metrics(line["id"], 0, "")["variants"]
    json.dumps([line, shown], ensure_ascii=False, allow_nan=False).encode()


def test_a_link_to_itself_hides_no_run(tmp_path: Path):
    run_folder(tmp_path / "r", {"v": variant()})
    (tmp_path / "x").symlink_to("x")
    run_folder(tmp_path / "half", {"v": variant()}, summary=False)
    (tmp_path / "half" / "summary.json").symlink_to("summary.json")
    assert {line["name"]: line["error"] for line in RunFolders(tmp_path).list()} == {"r": None, "half": "cannot be read"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_hides_no_run(tmp_path: Path):
    run_folder(tmp_path / "r", {"v": variant()})
    run_folder(tmp_path / "closed", {"v": variant()})
    (tmp_path / "closed").chmod(0o400)
    try:
        assert [line["name"] for line in RunFolders(tmp_path).list()] == ["r"]
    finally:
        (tmp_path / "closed").chmod(0o700)


READS = """
import os, sys
from pathlib import Path
from trimtab.errors import TrimtabError
from trimtab.train.follow import RunFolders
folders = RunFolders(Path(sys.argv[1]))
for line in folders.list():
    for read in (lambda k: folders.show(k), lambda k: folders.metrics(k, 0, ""), lambda k: folders.answers(k, "a", "", 0, 10)):
        try:
            read(line["id"])
            print(line["name"], "read")
        except TrimtabError as error:
            print(line["name"], "refused")
"""


def test_pipes_and_devices_are_waited_for_by_nobody(tmp_path: Path):
    """In a process that can be ended: a reader that waits for a pipe's writer never comes back."""
    for name in ("summary.json", "metrics.jsonl", "run.json"):
        for kind in ("pipe", "device"):
            folder = answered(tmp_path / f"{kind}-{name}", v=[told("1", "1")])
            (folder / name).unlink(missing_ok=True)
            if name == "run.json":
                (folder / "summary.json").unlink()
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).symlink_to("/dev/zero")
    run = subprocess.run([sys.executable, "-c", READS, tmp_path], capture_output=True, text=True, timeout=60, check=True)
    found = [line.split() for line in run.stdout.splitlines()]
    assert len(found) == 18, "six runs, each read three ways"
    assert [how for name, how in found if name.endswith("metrics.jsonl")] == ["read", "refused", "read"] * 2
    assert [how for name, how in found if name.endswith("run.json")] == ["read", "read", "refused"] * 2


def test_answers_are_read_up_to_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "ANSWER_LINE", 2000)
    folder = answered(tmp_path / "r", v=[told("1", "1"), told("2", "2"), told("3", "x" * 2000), told("4", "4")], w=[told("1", "1")] * 9)
    folders = RunFolders(tmp_path)
    key = key_of(folders, "r")
    assert folders.answers(key, "a", "v", 0, 10)["total"] == 2, "up to the line that is too long"
    size = (folder / "predictions" / "a-w.jsonl").stat().st_size // 9
    monkeypatch.setattr(answers, "ANSWER_BYTES", 4 * size + 1)
    assert folders.answers(key, "a", "w", 0, 10)["total"] == 4


def test_a_summary_beyond_its_limit_is_not_read(tmp_path: Path):
    run_folder(tmp_path / "r", {"v": variant()})
    with (tmp_path / "r" / "summary.json").open("r+b") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no place
    assert [line["error"] for line in RunFolders(tmp_path).list()] == ["cannot be read"]


def test_metrics_of_a_stranger_make_no_large_answer(tmp_path: Path):
    folder = run_folder(tmp_path / "r", {"v": variant()}, summary=False)
    lines = [{"variant": "v", "step": n, "loss": 1.5, f"own{n}": 1} for n in range(2000)]
    odd = ['{"variant": "v", "step": 2000, "loss": 1' + "0" * 400 + "}", DEEP, '{"variant": "v", "step": 2001, "loss": 2.5, "\\ud800": 1}']
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), *odd, ""]))
    folders = RunFolders(tmp_path)
    part = folders.metrics(key_of(folders, "r"), 0, "")
    columns = part["variants"]["v"]["steps"]
    assert columns["step"] == list(range(2002)) and columns["loss"] == [1.5] * 2000 + [None, 2.5]
    assert len(columns) == 256
    json.dumps(part, ensure_ascii=False).encode()


def test_answers_in_a_folder_that_is_a_link_are_not_followed(tmp_path: Path):
    folder = answered(tmp_path / "runs" / "r")
    (folder / "predictions").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a-v.jsonl").write_text(json.dumps(told("secret", "secret")) + "\n")
    (folder / "predictions").symlink_to(tmp_path / "elsewhere")
    folders = RunFolders(tmp_path / "runs")
    assert folders.show(key_of(folders, "r"))["answers"] == {}
    with pytest.raises(NotFoundError):
        folders.answers(key_of(folders, "r"), "a", "", 0, 10)


def test_limits_are_told_and_the_nearest_runs_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a/b/c/one", "z", "y/two"):
        run_folder(tmp_path / name, {"v": variant()})
    whole = RunFolders(tmp_path)
    assert len(whole.list()) == 3 and not whole.cut
    monkeypatch.setattr(run_folders, "MAX_RUNS", 2)
    folders = RunFolders(tmp_path)
    assert {x["name"] for x in folders.list()} == {"z", "y/two"} and folders.cut
    monkeypatch.setattr(run_folders, "MAX_FOLDERS", 4)
    folders = RunFolders(tmp_path)
    assert {x["name"] for x in folders.list()} == {"z"} and folders.cut


def test_a_list_reads_again_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("r", "s"):
        run_folder(tmp_path / name, {"v": variant()}, base="old")
    read, load = [], follow.load
    monkeypatch.setattr(follow, "load", lambda path: (read.append(path.parent.name), load(path))[1])
    folders = RunFolders(tmp_path)
    assert {x["base"] for x in folders.list()} == {"old"} and sorted(read) == ["r", "s"]
    (tmp_path / "r" / "summary.json").write_text(json.dumps({"variants": {}, "base": "newer"}))
    assert {x["name"]: x["base"] for x in folders.list()} == {"r": "newer", "s": "old"} and sorted(read) == ["r", "r", "s"]
    run_folder(tmp_path / "t", {"v": variant()})
    monkeypatch.setattr(follow, "WALK_S", 0.0)
    assert len(folders.list()) == 2, "what was found counts for a while"
    folders._until = 0.0
    assert len(folders.list()) == 3


def test_runs_on_other_rows_or_bases_are_doubted(tmp_path: Path):
    rows = {"base_scores": {"a": {"loss": 3.0, "rows": 3}}}
    for name, digest, base in (
        ("one", "x", "sha256:aa"),
        ("same", "x", "sha256:aa"),
        ("rows", "y", "sha256:aa"),
        ("base", "x", "sha256:bb"),
    ):
        more = {"content": {"data.a.test": digest, "data.a.train": "t"}, "base_fingerprint": {"before": base, "after": base}}
        run_folder(tmp_path / "of" / name, {"v": variant()}, **rows, **more)
    run_folder(tmp_path / "of" / "live", {"v": variant()}, summary=False)
    folders = RunFolders(tmp_path)
    keys = {line["name"].removeprefix("of/"): line["id"] for line in folders.list()}
    assert folders.doubts([keys["one"], keys["same"], keys["live"]]) == [] == folders.doubts([keys["one"], keys["one"]])
    (of_rows,) = folders.doubts([keys["one"], keys["rows"]])
    assert "different test rows (of/one / of/rows)" in of_rows
    (of_base,) = folders.doubts([keys["one"], keys["base"]])
    assert "different bases" in of_base
    with pytest.raises(NotFoundError):
        folders.doubts([keys["one"], "nothing"])
