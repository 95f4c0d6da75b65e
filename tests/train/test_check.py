"""What `check` finds before anything is trained: bad masks, dropped rows, leaks, rows that do not fit; its numbers are training's."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.common import NO_END, REWRITING
from tests.tiny import CHATML, tiny_folder
from tests.train.common import METHODS, run_file, tiny_base
from trimtab.bases.fits import available_bytes
from trimtab.bases.shapes import read_architecture
from trimtab.cost.estimate import probe_flops
from trimtab.cost.plan import plan
from trimtab.cost.room import HEAP
from trimtab.data import Row, reading
from trimtab.errors import BaseError, ConfigError, TrimtabError
from trimtab.model import load_base
from trimtab.train import RunConfig, train
from trimtab.train import overlap as comparison
from trimtab.train.check import check
from trimtab.train.findings import CheckReport, Finding
from trimtab.train.overlap import BOILERPLATE_ROWS, NGRAM, Contamination, Near, Repeats, turns, words

LORA = {"v": METHODS["lora"] | {"data": "a"}}
pytestmark = pytest.mark.usefixtures("own_cache")


def pair(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def rows_of(*records: Any) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


@pytest.fixture
def checked(tmp_path: Path, tiny_llama_folder: Path) -> Callable[..., CheckReport]:
    """Check a run on the tiny base whose training rows of data set a are these bytes; other keys replace the run file's."""

    def run_check(train_rows: bytes | None = None, test_rows: bytes | None = None, *, variants: Any = None, **keys: Any) -> CheckReport:
        content = run_file(tmp_path / "run", variants or LORA, **{"base": str(tiny_llama_folder), "dtype": "float32"} | keys)
        content["data"] = {"a": content["data"]["a"]} if "data" not in keys else keys["data"]
        for name, rows in (
            ("a.jsonl", train_rows),
            ("a-test.jsonl", test_rows if test_rows is not None else rows_of(pair("other", "yes"))),
        ):
            if rows is not None:
                (tmp_path / "run" / name).write_bytes(rows)
        return check(RunConfig.from_dict(content, root=tmp_path / "run"))

    return run_check


def one(findings: list[Finding], words: str) -> Finding:
    (found,) = [f for f in findings if words in f.message]
    return found


# ---- a run without fault ------------------------------------------------------------


def test_nothing_wrong_nothing_written(checked, tmp_path: Path, own_cache: Path) -> None:
    report = checked()
    assert report.errors == report.warnings == []
    assert not (tmp_path / "run" / "out").exists()
    assert {p.name for p in own_cache.iterdir()} - {"native"} == {"tokens"}  # with which training begins; what is compiled is kept as well
    assert (report.base_parameters, report.max_positions) == (tiny_base().spec.num_parameters, 512)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["a-test.jsonl", "a.jsonl", "b-test.jsonl", "b.jsonl"]
    json.dumps(report.to_dict())


def test_no_weights_are_read(checked, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    assert checked().errors == []


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_training(tmp_path: Path, tiny_llama_folder: Path, method: str) -> None:
    """Steps, tokens of whole epochs and trainable parameters, against a run of two epochs with accumulation and a short last batch."""
    own = METHODS[method] | {"data": "a", "epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 3}
    content = run_file(tmp_path, {"v": own}) | {"base": str(tiny_llama_folder), "dtype": "float32"}
    del content["defaults"]["max_steps"]
    content["data"]["a"]["train"] = ["a.jsonl", {"path": "b.jsonl", "weight": 1.6}]
    run = RunConfig.from_dict(content, root=tmp_path)
    (estimate,) = check(run).variants
    done = train(run, base=tiny_base()).summary["variants"]["v"]
    assert (estimate.steps, estimate.trainable) == (done["steps"], done["trainable"])
    assert estimate.rows_per_epoch == 11 + 7 + round(0.6 * 7)
    assert estimate.tokens == pytest.approx(done["tokens"], rel=0.02)
    steps = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    largest = [max(s["tokens"] for s in steps if s["step"] in within) for within in (range(1, 5), range(5, 9))]
    assert estimate.tokens_per_step == max(largest), "of all epochs, not of the first"


def test_sources_lengths_and_supervised_tokens(checked) -> None:
    """One byte is a token, and so is each special token."""
    report = checked(rows_of(pair("ab", "yes"), pair("cd", "no"), pair("e" * 60, "no")))
    train, test = report.splits
    (source,) = train.sources
    assert (source.read, source.dropped, source.drawn) == (3, 0, 3)
    assert source.supervised == train.supervised == 4 + 3 + 3
    first = len("#user\nab#\n#assistant\nyes#\n")  # the template, # for a special token
    assert train.lengths == {"min": first - 1, "median": first, "p95": first + 57, "max": first + 57}
    assert train.tokens == 3 * first + 56
    assert train.histogram == ((32, 2), (64, 0), (128, 1))
    assert (test.split, test.sources[0].drawn) == ("test", 1)


def test_rendered_rows_are_the_ids_own(checked) -> None:
    report = checked(rows_of(*(pair(f"q{i}", f"a{i}") for i in range(5))))
    assert [r.origin for r in report.rendered] == ["a.jsonl:1", "a.jsonl:2"]
    assert report.rendered[0].runs == (
        ("<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n", False),
        ("a0<|im_end|>", True),
        ("\n", False),
    )


def test_first_rows_of_each_source(checked) -> None:
    sources = {"a": {"train": ["a.jsonl", "b.jsonl"], "test": "a-test.jsonl"}}
    assert [r.origin for r in checked(data=sources).rendered] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]


# ---- hostile rows ------------------------------------------------------------


def test_empty_answers_are_dropped_as_training_drops_them(checked) -> None:
    """A row with an empty answer among others too: an adapter would learn to say nothing there."""
    two = {"messages": [*pair("a", "")["messages"], *pair("b", "c")["messages"]]}
    report = checked(rows_of(*(pair(f"q{i}", " \n") for i in range(11)), two))
    assert [f.message for f in report.errors] == ["a.jsonl: 12 of 12 rows cannot be trained on (100%; allowed are 10%)", "no row is left"]
    found = one(report.warnings, "12 rows dropped: empty")
    assert found.items[0] == "a.jsonl:1: empty: messages[1] has no text" and (len(found.items), found.count) == (10, 12)
    report = checked(rows_of(two, *(pair(f"q{i}", "a") for i in range(20))))
    assert report.errors == [] and one(report.warnings, "1 row dropped: empty").items == ("a.jsonl:1: empty: messages[1] has no text",)


def test_what_no_row_uses_is_a_note(checked) -> None:
    report = checked(rows_of(*(pair(f"q{i}", "a") | {"ticket": i + 1} for i in range(3))))
    assert one(report.findings, "a.jsonl: not used: ticket (3 rows)").level == "note"


def test_no_row_is_left(checked) -> None:
    report = checked(rows_of(*({"messages": [{"role": "user", "content": "hello?"}]} for _ in range(3))))
    assert [f.message for f in report.errors] == [
        "a.jsonl: 3 of 3 rows cannot be trained on (100%; allowed are 10%)",
        "3 rows dropped: nothing supervised",
        "no row is left",
    ]
    assert report.estimate is None and report.variants == []


def test_one_zero_mask_among_many_is_an_error(checked) -> None:
    only_user = {"messages": [{"role": "user", "content": "hello?"}]}
    report = checked(rows_of(*(pair(f"q{i}", "a") for i in range(20)), only_user))
    assert [f.message for f in report.errors] == ["1 row dropped: nothing supervised"]
    assert report.errors[0].items == ("a.jsonl:21: nothing supervised: the row has no assistant turn to learn from",)


def test_all_ones_masks(checked, tmp_path: Path) -> None:
    bare = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    report = checked(rows_of(pair("", "b"), pair("", "d")), base=str(base_with(tmp_path, bare)))
    assert one(report.errors, "2 rows dropped: everything supervised").items[0].startswith("a.jsonl:1: everything supervised: the chat ")


def base_with(folder: Path, template: str, **fields: Any) -> Path:
    """The tiny base with another template or other tokens."""
    path = tiny_folder(folder / "base")
    config = json.loads((path / "tokenizer_config.json").read_text()) | fields
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template)
    return path


def test_a_template_that_rewrites_earlier_turns(checked, tmp_path: Path) -> None:
    two = {"messages": [*pair("a", "b")["messages"], *pair("c", "d")["messages"]]}
    report = checked(rows_of(two, two | {}), base=str(base_with(tmp_path, REWRITING)))
    assert one(report.findings, "each answer is trained as a segment of its own").where == "base" and not report.errors
    shown = "".join(f"[{text}]" if learnt else text for text, learnt in report.rendered[0].runs)
    assert [r.origin for r in report.rendered] == ["a.jsonl:1", "a.jsonl:2"], "each row once, whatever its segments"
    assert "[<think></think>b<|im_end|>]" in shown and shown.endswith("[<think></think>d<|im_end|>]\n")


def test_a_pair_is_shown_once_with_both_answers(checked) -> None:
    rows = rows_of({"prompt": "which one?", "chosen": "good", "rejected": "bad"})
    report = checked(rows, rows, variants={"v": METHODS["lora"] | {"data": "a", "objective": "dpo"}})
    (row,) = [r for r in report.rendered if r.origin == "a.jsonl:1"]
    shown = "".join(f"[{text}]" if learnt else text for text, learnt in row.runs)
    assert [shown.count(text) for text in ("which one?", "[good<|im_end|>]", "… rejected:", "[bad<|im_end|>]")] == [1, 1, 1, 1]


def test_a_template_without_an_end_of_turn_and_a_pad_that_is_the_end(checked, tmp_path: Path) -> None:
    report = checked(base=str(base_with(tmp_path, NO_END, pad_token="<|im_end|>")))
    assert one(report.warnings, "no end-of-turn token")
    assert [f.level for f in report.findings if "padding token is the end token" in f.message] == ["note"]


def test_byte_order_marks_and_other_encodings(checked) -> None:
    good = rows_of(*(pair(f"q{i}", "a") for i in range(30)))
    report = checked(b"\xef\xbb\xbf" + good + '{"prompt": "caf\xe9", "completion": "x"}\n'.encode("latin-1") + b'{"prompt": \n')
    assert report.errors == []
    assert one(report.warnings, "1 row dropped: not UTF-8").items == ("a.jsonl:31: not UTF-8: byte 0xe9 at column 16",)
    assert one(report.warnings, "1 row dropped: not JSON").items[0].startswith("a.jsonl:32: not JSON: ")
    assert report.splits[0].sources[0].read == 32 and report.splits[0].sources[0].dropped == 2


def test_wrong_columns_say_which_exist_and_do_not_hide_the_rest(checked) -> None:
    sources = {"a": {"train": ["a.jsonl", "b.jsonl", "absent.jsonl"], "test": "a-test.jsonl"}}
    report = checked(rows_of({"question": "x", "reply": "y"}), data=sources)
    assert "question, reply" in one(report.errors, "no training form found").message
    assert one(report.errors, "absent.jsonl does not exist")
    assert [s.path for s in report.splits[0].sources] == ["b.jsonl"] and report.splits[0].sources[0].drawn == 7


def test_over_long_rows(checked) -> None:
    report = checked(rows_of(*(pair(f"q{i}", "a") for i in range(9)), pair("x" * 200, "y")))
    assert one(report.warnings, "1 row dropped: over-long").items == ("a.jsonl:10: over-long: 222 tokens, max_length is 128",)
    assert report.errors == []


@pytest.mark.parametrize(("method", "room"), [("lora", 512), ("prompt", 509), ("prefix", 508)])
def test_rows_longer_than_the_positions(checked, tmp_path: Path, method: str, room: int) -> None:
    """What is reported is what training refuses; one token less passes both."""

    def length(n: int) -> dict[str, Any]:
        return pair("x" * (n - 22), "y")

    long = {"v": METHODS[method] | {"data": "a", "max_length": 1000}}
    report = checked(rows_of(length(room), length(room + 1)), variants=long)
    found = one(report.errors, "longer than the base's 512 positions")
    assert found.items == (f"a.jsonl:2: {room + 1} tokens",)
    assert found.fix == f"set max_length to {room} or less."
    content = run_file(tmp_path / "t", {"v": long["v"] | {"max_steps": 1}}, evaluate={"generate": False})
    content["data"] = {"a": {"train": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "rows.jsonl").write_bytes(rows_of(length(room)))
    train(RunConfig.from_dict(content, root=tmp_path / "t"), base=tiny_base())
    (tmp_path / "rows.jsonl").write_bytes(rows_of(length(room + 1)))
    with pytest.raises(TrimtabError, match="the 512 positions"):
        train(RunConfig.from_dict(content | {"out": "other"}, root=tmp_path / "t"), base=tiny_base())


def test_prompts_are_checked_with_the_answers_that_are_drawn(checked, tmp_path: Path) -> None:
    """As training refuses them."""
    drawing = METHODS["lora"] | {"data": "a", "objective": "grpo", "rewards": "exact_match", "max_completion_length": 500}
    rows = rows_of(pair("x" * 20, "y"))
    train_rows, test_rows = checked(rows, rows, variants={"v": drawing}).errors
    assert "512 positions with the 500 more that v takes" in train_rows.message and "more that v takes" in test_rows.message
    assert train_rows.items[0].startswith("a.jsonl:1: ")
    content = run_file(tmp_path / "t", {"v": drawing | {"max_steps": 1}}, evaluate={"generate": False})
    content["data"] = {"a": {"train": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "rows.jsonl").write_bytes(rows)
    with pytest.raises(TrimtabError, match="the 512 positions"):
        train(RunConfig.from_dict(content, root=tmp_path / "t"), base=tiny_base())
    fits = checked(rows, rows, variants={"v": drawing | {"max_completion_length": 400}})
    assert not any("positions" in f.message for f in fits.errors)


def test_rows_that_do_not_call_their_alora(checked) -> None:
    called = METHODS["lora"] | {"data": "a", "alora_invocation_tokens": tiny_base().encode("call")}
    report = checked(rows_of(pair("call me", "y"), pair("x", "y")), variants={"v": called})
    assert one(report.errors, "1 row lacks the invocation of its aLoRA").items == ("a.jsonl:2",)


def test_prompts_that_leave_no_room_to_answer(checked) -> None:
    report = checked(test_rows=rows_of(pair("x" * 80, "y")), evaluate={"max_new_tokens": 415})
    assert one(report.warnings, "1 prompt leaves less room than 415 new tokens").items == ("a-test.jsonl:1: 99 tokens",)
    for fits in ({"max_new_tokens": 414}, {"max_new_tokens": 415, "generate": False}):
        assert not any("less room" in w.message for w in checked(test_rows=rows_of(pair("x" * 80, "y")), evaluate=fits).warnings)


# ---- the same row twice ------------------------------------------------------------

LONG = "please tell me how the number on the third invoice of last spring can be changed before it is sent"


def test_test_rows_copied_into_train(checked) -> None:
    train = rows_of(pair("Who?", "me"), pair("When is it?", "now"), pair("Why  not", "so"), pair("Where", "here"), pair(LONG, "so"))
    test = rows_of(
        pair("Who?", "me"),
        pair("when is IT", "Now."),
        pair("Why  not", "other"),
        pair("where?", "there"),
        pair(LONG + " to them", "no"),
        pair("new", "x"),
    )
    report = checked(train, test, variants={"v": LORA["v"] | {"max_length": 512}})
    assert [(f.message.partition(" train")[0], f.items) for f in report.warnings] == [
        ("1 of 6 rows stands with its answer in data.a.train", ("a-test.jsonl:1: as a.jsonl:1",)),
        ("1 of 6 rows stands with its answer, but for case, blanks or punctuation, in data.a.train", ("a-test.jsonl:2: as a.jsonl:2",)),
        ("1 of 6 rows asks what is asked, with another answer, in data.a.train", ("a-test.jsonl:3: as a.jsonl:3",)),
        (
            "1 of 6 rows asks, but for case, blanks or punctuation, what is asked, with another answer, in data.a.train",
            ("a-test.jsonl:4: as a.jsonl:4",),
        ),
        ("1 of 6 rows shares at least 50% of its 13-word runs with data.a.train", ("a-test.jsonl:5: 80%, most of it in a.jsonl:5",)),
    ]
    assert report.errors == []


def test_valid_rows_are_compared_too(checked) -> None:
    data = {"a": {"train": "a.jsonl", "valid": "a.jsonl"}}
    assert one(checked(data=data).warnings, "11 of 11 rows stand with their answers").where == "data.a.valid"


def overlap(train: list[Row], held: list[Row]) -> list[Finding]:
    found = Contamination(held)
    for row in train:
        found.add(row, turns(row))
    return found.findings("train", "test")


def repeats(rows: list[Row]) -> list[Finding]:
    found = Repeats()
    for row in rows:
        found.add(row, turns(row))
    return found.findings("train", lambda i: rows[i].origin)


def test_every_turn_of_a_conversation_is_known_to_train() -> None:
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    train = [Row("t:1", messages=(*talk, {"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}))]
    (found,) = overlap(train, [Row("s:1", messages=talk)])
    assert found.items == ("s:1: as t:1",)


class Counted(int):
    """Counts with how many others it is compared."""

    compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other


def test_long_conversations_cost_what_their_length_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = tuple({"role": role, "content": "a"} for _ in range(200) for role in ("user", "assistant"))
    monkeypatch.setattr(Row, "answers", property(lambda self: [Counted(i) for i in range(1, len(talk), 2)]))
    assert len(turns(Row("s:1", messages=talk))) == 200
    assert Counted.compared <= 4 * len(talk)


def test_boilerplate_is_no_overlap_and_what_differs_is() -> None:
    """An instruction of every row tells nothing; it tells of a copy as long as few rows have it."""
    near = Near([(Row("s:1", text=""), words(f"{LONG} something else"))])
    for i in range(10):
        near.add(Row(f"t:{i}", text=""), words(f"{LONG} {i}"))
    assert near.found([0])[0][0].startswith("s:1: 80%")
    near.add(Row("t:10", text=""), words(f"{LONG} 10"))
    assert near.found([0]) == ([], 0.0)


def test_ngrams_of_few_words_are_found_as_by_comparing_all() -> None:
    """Texts of three words hold many runs whose marks are those of another run, and some that are the same."""
    rng = random.Random(0)
    held, train = ([tuple(rng.choices("abc", k=rng.randint(5, 60))) for _ in range(n)] for n in (20, 300))
    train[::30] = [held[i][1:-1] for i in range(10)]
    near = Near([(Row(f"s:{i}", text=""), text) for i, text in enumerate(held)])
    for i, text in enumerate(train):
        near.add(Row(f"t:{i}", text=""), text)
    runs = [{text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)} for text in train]
    for i, text in enumerate(held):
        mine = {text[k : k + NGRAM] for k in range(len(text) - NGRAM + 1)}
        counts = [n for run in mine if (n := sum(run in others for others in runs)) <= BOILERPLATE_ROWS]
        share = sum(n > 0 for n in counts) / len(counts) if counts else 0.0
        found, most = near.found([i])
        assert [line.split(", ")[0] for line in found] == ([f"s:{i}: {share:.0%}"] if share >= 0.5 else []) and (found or most == share)


def test_words_are_those_of_each_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever texts were cut before, and whether their words are still known."""
    monkeypatch.setattr(comparison, "KEPT_WORDS", 50)
    rng = random.Random(0)
    texts = ["".join(rng.choices("aB1.,;(\"'…»ä \n_-", k=rng.randint(0, 90))) for _ in range(2000)] + [f"({'x' * 500})"]
    for text in texts:
        cut = [piece.strip(".,;:!?\"'`()[]{}«»“”‘’…。、！？") for piece in unicodedata.normalize("NFKC", text).casefold().split()]
        assert words(text) == tuple(piece for piece in cut if piece), text
    assert max(map(len, comparison._STRIPPED)) <= comparison.KEPT_LENGTH


def test_rows_of_signs_alone_are_not_taken_for_each_other() -> None:
    rows = [Row("t:1", prompt="?", completion="!"), Row("t:2", prompt="!!", completion="?")]
    assert overlap(rows[:1], rows[1:]) == repeats(rows) == []


def test_prompts_alone_and_what_a_head_reads_are_compared_whole(checked) -> None:
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in ("which one is it", "and now", "Which one is it?")]
    drawing = METHODS["lora"] | {"data": "a", "objective": "grpo", "rewards": {"reward": "length", "max_words": 3}}
    report = checked(rows_of(*asked), rows_of(asked[1], {"prompt": "other"}), variants={"v": drawing})
    assert one(report.warnings, "1 of 2 rows stands with its answer in data.a.train").items == ("a-test.jsonl:1: as a.jsonl:2",)
    assert one(report.warnings, "1 row repeats another row but for case").items == ("a.jsonl:3: as a.jsonl:1",)
    marked = [r | {"messages": r["prompt"], "label": str(i)} for i, r in enumerate(asked)]
    marked = [{k: v for k, v in r.items() if k != "prompt"} for r in marked]
    report = checked(rows_of(*marked), rows_of(marked[2]), variants={"v": METHODS["lora"] | {"data": "a", "objective": "classify"}})
    assert one(report.warnings, "1 of 1 row ").items == ("a-test.jsonl:1: as a.jsonl:3",)


def test_words() -> None:
    assert words("Don’t  STOP, “now”!") == ("don’t", "stop", "now")
    assert words("a + b") != words("a - b")
    assert words("東京へ ﬁne") == ("東", "京", "へ", "fine")
    assert [turn.words for turn in turns(Row("t:1", text="x y"))] == [["x", "y"]]
    assert [turn.words[: turn.asked] for turn in turns(Row("t:1", prompt="A", completion="b"))] == [["a"]]


def test_turns_are_the_same_where_their_joined_texts_and_words_are() -> None:
    """Compared with the texts and words themselves, whatever way they are cut into messages."""
    contents, said = ["a", "A", "a\nb", "a b", "", "ﬁ", "fi", "?", "e\u0301", "é", "東京"], {}
    rng = random.Random(0)
    for _ in range(400):
        messages = [{"role": role, "content": rng.choice(contents)} for role in ("system", "user", "assistant", "user", "assistant")]
        messages = messages[rng.choice((0, 1)) :]
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for i, turn in zip(places, turns(Row("t:1", messages=tuple(messages))), strict=True):
            prompt, answer = "\n".join(m["content"] for m in messages[:i]), messages[i]["content"]
            plain = {"exact": (prompt, answer), "words": (words(prompt), words(answer)), "prompt": prompt, "prompt words": words(prompt)}
            kept = {kind: key for kind, key in plain.items() if words(prompt) or "words" not in kind}
            assert turn.keys.keys() == kept.keys() and list(turn.words[: turn.asked]) == list(words(prompt))
            for kind, key in kept.items():
                assert said.setdefault((kind, turn.keys[kind]), key) == key  # one digest, one text
    assert len(said) == len({(kind, key) for (kind, _), key in said.items()})  # one text, one digest


def test_duplicates_inside_train(checked) -> None:
    sources = {"a": {"train": ["a.jsonl", "b.jsonl"], "test": "a-test.jsonl"}}
    report = checked(rows_of(pair("q", "a"), pair("q", "a"), pair("Q?", "A"), pair("q", "b")), data=sources)
    assert one(report.warnings, "1 row repeats another row but for case").items == ("a.jsonl:3: as a.jsonl:1",)
    assert [f.items for f in report.warnings if f.message == "1 row repeats another row"] == [("a.jsonl:2: as a.jsonl:1",)]


def test_pairs_repeat_each_other_where_both_answers_do() -> None:
    rows = [
        Row(f"t:{i}", prompt="q", completion="a", role="chosen", others=(Row(f"t:{i}", prompt="q", completion=bad, role="rejected"),))
        for i, bad in enumerate(("b", "c", "B!", "b"))
    ]
    assert [f.items for f in repeats(rows)] == [("t:3: as t:0",), ("t:2: as t:0",)]


def test_training_takes_the_rows_as_check_tokenised_them(checked, tmp_path: Path, tiny_llama_folder: Path, monkeypatch) -> None:
    tokenised, encode = [], reading.encode_batches

    def counted(batches, *rest, **options):
        return encode((tokenised.append(len(rows)) or rows for rows in batches), *rest, **options)

    monkeypatch.setattr(reading, "encode_batches", counted)
    report = checked()
    assert sum(tokenised) == sum(s.read for split in report.splits for s in split.sources)
    timed = {"seconds": 0, "estimate": 0, "variants": 0}
    assert checked().to_dict() | timed == report.to_dict() | timed
    variants = {"v": LORA["v"] | {"max_steps": 1}}
    content = run_file(tmp_path / "t", variants, base=str(tiny_llama_folder), dtype="float32", evaluate={"generate": False})
    content["data"] = {"a": {"train": str(tmp_path / "run" / "a.jsonl"), "test": str(tmp_path / "run" / "a-test.jsonl")}}
    train(RunConfig.from_dict(content, root=tmp_path / "t"))
    assert sum(tokenised) == sum(s.read for split in report.splits for s in split.sources)


# ---- the run file against the base ------------------------------------------------------------


def test_methods_that_do_not_fit_are_collected(checked) -> None:
    variants = {
        "bad": {"data": "a", "method": "lora", "r": 2, "target_modules": ["q_porj"]},
        "long": {"data": "a", "method": "prompt", "num_virtual_tokens": 600},
        "good": LORA["v"],
    }
    report = checked(variants=variants)
    assert {f.where for f in report.errors} >= {"variants.bad", "variants.long"}
    assert [v.name for v in report.variants] == ["good"]


def test_variants_that_read_one_data_set_differently_are_refused_as_by_training(checked, tmp_path: Path) -> None:
    variants = {"v": LORA["v"], "w": LORA["v"] | {"max_length": 99}}
    (found,) = checked(variants=variants).errors
    with pytest.raises(ConfigError) as caught:
        train(RunConfig.from_dict(run_file(tmp_path / "t", variants), root=tmp_path / "t"), base=tiny_base())
    assert caught.value.message == f"{found.where}: {found.message}"


def test_labels_that_cannot_be_had(checked) -> None:
    def data(labels: Any) -> Any:
        return {"a": {"train": "a.jsonl", "test": "a-test.jsonl", "labels": labels}}

    assert one(checked(rows_of(pair("q", "yes"), pair("r", "yes")), data=data("auto")).errors, "found 1 distinct answers")
    assert one(checked(data=data(["ja", "nein"])).errors, "no answer is one of the labels").where == "data.a.test"
    assert checked(data=data(["yes", "no"])).errors == []


def test_unused_data_and_a_full_out_folder(checked, tmp_path: Path) -> None:
    (tmp_path / "run" / "out").mkdir(parents=True)
    (tmp_path / "run" / "out" / "x").touch()
    report = checked(data={"a": {"train": "a.jsonl"}, "b": {"train": "b.jsonl"}})
    assert [(f.where, f.message) for f in report.warnings] == [("data.b", "no variant trains on it")]
    assert one(report.findings, "is not empty").level == "note"


def test_a_base_that_is_not_there_and_one_whose_tokenizer_is_broken(checked, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="there is no base 'nowhere'"):
        checked(base="nowhere")
    with pytest.raises(BaseError, match="no/such-base"):
        checked(base="no/such-base")
    base = base_with(tmp_path, CHATML)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match="cannot read the tokenizer"):
        checked(base=str(base))


def test_a_base_that_cannot_be_quantised_is_refused_as_by_loading(checked, tmp_path: Path, tiny_llama_folder: Path) -> None:
    shutil.copytree(tiny_llama_folder, packed := tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for base, quantize in ((packed, "nf4"), (packed, "gguf"), (tiny_llama_folder, "gguf")):
        with pytest.raises(ConfigError) as loaded:
            load_base(str(base), dtype="float32", quantize=quantize)
        with pytest.raises(ConfigError) as refused:
            checked(base=str(base), quantize=quantize)
        assert loaded.value.message in str(refused.value), (base, quantize)


def test_a_hub_base_needs_no_weights(checked, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / "0"
    shutil.copytree(tiny_llama_folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert checked(base="acme/tiny").errors == []


# ---- memory and time ------------------------------------------------------------


def test_memory_counts_the_base_once_and_every_variant(checked, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {n: METHODS[n] | {"data": "a"} for n in ("lora", "prefix", "full")}
    report = checked(variants=variants)
    e, base = report.estimate, read_architecture(str(tiny_llama_folder))
    assert e is not None
    longest = next(s for s in report.splits if s.split == "train").lengths["max"]
    methods = [v.method for v in RunConfig.from_dict(run_file(tiny_llama_folder / "..", variants), root=tiny_llama_folder.parent).variants]
    plans = [plan(base, m, dtype="float32", batch_tokens=e.forward_tokens, sequence_length=longest) for m in methods]
    own = sum(p.weight_bytes + p.gradient_bytes + p.optimizer_bytes for p in plans)
    full = tiny_base().spec.num_parameters * 4  # its copy of the model
    packed = sum(p.serve_adapter_bytes for p in plans[:2])  # as they are judged
    held, activations = plans[0].base_bytes + own + full + packed, max(p.activation_bytes for p in plans)
    least, most = e.memory_bytes
    assert held + int(HEAP[0] * activations) <= least <= held + int(2 * HEAP[0] * activations)
    assert held + int(HEAP[1] * activations) <= most <= held + int(2 * HEAP[1] * activations)
    monkeypatch.setattr("trimtab.cost.room.reuse_blocks", lambda: (False, "no compiler"))  # torch's own allocator stays
    e = checked(variants=variants).estimate
    assert e is not None
    assert held + int(1.2 * activations) <= e.memory_bytes[0] <= held + int(2.4 * activations)
    assert held + int(1.7 * activations) <= e.memory_bytes[1] <= held + int(3.4 * activations)
    by_name = {v.name: v for v in report.variants}
    assert e.forward_tokens == by_name["lora"].tokens_per_step + by_name["prefix"].tokens_per_step
    assert e.answers == 4


def test_memory_counts_validation_and_scores(checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the KV cache of the answers takes, by hand, and the best tensors that are kept."""
    monkeypatch.setattr("trimtab.cost.estimate.probe_flops", lambda *_: 1e9)
    spec = tiny_base().spec
    slot = 2 * 2 * (2 * 12) * 4  # keys and values, layers, kv heads of 12, fp32: bytes of a token
    assert slot == 2 * spec.num_layers * spec.kv_width * 4
    tests = rows_of(*(pair(f"q{i}", "a" * 40) for i in range(40)))
    none, some, many = (
        checked(test_rows=tests, evaluate=asked).estimate
        for asked in ({"generate": False}, {"max_new_tokens": 100, "max_rows": 1}, {"max_new_tokens": 400})
    )
    assert none and some and many
    longest = 22 + 1 + 40
    cache = min(64, 40 * 2) * (longest + 400) * slot  # base and variant answer every row
    assert many.memory_bytes[0] >= cache and many.memory_bytes[1] - none.memory_bytes[1] > 0.5 * cache
    assert max(none.memory_bytes[1], some.memory_bytes[1]) < many.memory_bytes[1]
    assert none.judging_seconds[0] < many.judging_seconds[0] and none.answers == 0
    data = {"a": {"train": "a.jsonl", "valid": "a-test.jsonl", "test": "a-test.jsonl"}}
    quiet = {"v": LORA["v"] | {"keep_best": False}}
    kept, dropped = (checked(data=data, variants=v, test_rows=tests).estimate for v in (LORA, quiet))
    assert kept and dropped
    trainable = checked().variants[0].trainable
    assert kept.memory_bytes[0] - dropped.memory_bytes[0] == 4 * trainable


def test_forwards_are_bounded_by_max_tokens(checked) -> None:
    report = checked(max_tokens=64)
    assert report.estimate is not None and report.estimate.forward_tokens == 64
    report = checked(rows_of(pair("x" * 80, "y")), max_tokens=64)
    assert report.estimate is not None and report.estimate.forward_tokens == 102


def test_too_little_memory_is_a_warning(checked, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.cost.estimate as module

    monkeypatch.setattr(module, "available_bytes", lambda _: 1000)
    assert one(checked().warnings, "are needed and 0.0 GB are free").where == "memory"


def test_time_follows_the_probe(checked, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path) -> None:
    import trimtab.cost.estimate as module

    assert probe_flops(read_architecture(str(tiny_llama_folder)).spec, torch.float32, torch.device("cpu")) > 1e6
    assert available_bytes(torch.device("cpu")) > 1e6
    monkeypatch.setattr(module, "probe_flops", lambda *_: 1e6)
    report = checked()
    (v,), e = report.variants, report.estimate
    assert e is not None
    low, high = e.efficiency
    assert v.seconds == e.seconds == pytest.approx((v.flops / 1e6 / high, v.flops / 1e6 / low))
