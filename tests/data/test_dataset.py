"""From sources to a dataset: weights, shares of dropped rows, digests, the cache, the order of epochs; real rows and the real tokenizer."""

import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.common import END, chatml_mask, learnt, write_jsonl
from tests.tiny import bundled_base, tiny_tokenizer
from trimtab.data import Dataset, Source, encode_prompt, load_examples, order, read_source, summarise_dropped
from trimtab.data import reading as reading_module
from trimtab.data.reading import Reading
from trimtab.data.token_store import LAYOUT, Examples, Tokens, token_file
from trimtab.errors import DataError
from trimtab.train.options import DataConfig

TINY = tiny_tokenizer()
TENANTS = Path(__file__).parents[3] / "shared" / "data" / "tenants"
pytestmark = pytest.mark.usefixtures("own_cache")


def pairs(n, word="row"):
    return [{"prompt": f"{word} {i}", "completion": f"answer {i}"} for i in range(n)]


def load(root, *sources, **options) -> Dataset:
    given = [s if isinstance(s, Source) else Source(s) for s in sources]
    return load_examples(given, TINY, root=root, **({"max_length": 512, "seed": 0} | options))


def test_counts_tokens(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    data = load(tmp_path, "a.jsonl")
    assert [e.origin for e in data.examples] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"] and data.dropped == [] and data.warnings == []
    assert data.tokens == sum(len(e.ids) for e in data.examples)
    assert data.supervised_tokens == 3 * (len("answer 0") + 1)


def test_weights_draw_rows_that_often(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(10))
    write_jsonl(tmp_path / "b.jsonl", pairs(10, "other"))
    data = load(tmp_path, "a.jsonl", Source("b.jsonl", weight=2.3))
    counts = Counter(e.origin for e in data.examples)
    assert [counts[f"a.jsonl:{i}"] for i in range(1, 11)] == [1] * 10
    assert sorted(counts[f"b.jsonl:{i}"] for i in range(1, 11)) == [2] * 7 + [3] * 3
    again, other = (load(tmp_path, "a.jsonl", Source("b.jsonl", weight=2.3), seed=s) for s in (0, 1))
    assert [e.origin for e in again.examples] == [e.origin for e in data.examples] != [e.origin for e in other.examples]
    assert again.digest == data.digest != other.digest
    assert len(load(tmp_path, Source("a.jsonl", weight=0.5)).examples) == 5
    assert len(load(tmp_path, Source("a.jsonl", weight=0.001)).examples) == 1


def test_dropped_rows_are_listed_and_too_many_stop(tmp_path):
    bad = [{"prompt": "x"}, {"prompt": f"{END}", "completion": "y"}, {"prompt": "z" * 600, "completion": "y"}]
    write_jsonl(tmp_path / "a.jsonl", pairs(27) + bad)
    data = load(tmp_path, "a.jsonl")
    assert [d.origin for d in data.dropped] == ["a.jsonl:28", "a.jsonl:29", "a.jsonl:30"] and len(data.examples) == 27
    assert summarise_dropped(data.dropped)[0].startswith("1 x ") and summarise_dropped([]) == []
    with pytest.raises(DataError) as stopped:
        load(tmp_path, Source("a.jsonl", max_dropped=0.09))
    text = str(stopped.value)
    assert (
        "3 of 30 rows cannot be trained on (10%; allowed are 9%)" in text and "a.jsonl:30: over-long: " in text and "1 x over-long" in text
    )


@pytest.mark.parametrize(("lost", "rows", "part"), [(29, 50, 0.58), (29, 100, 0.29), (63, 90, 0.7)])
def test_exactly_the_part_that_may_be_dropped_is_allowed(lost, rows, part, tmp_path):
    """Of all three the product as a float is a little below the whole number."""
    bad = [{"prompt": "x"}] * lost
    write_jsonl(tmp_path / "a.jsonl", [*pairs(rows - lost), *bad])
    assert len(load(tmp_path, Source("a.jsonl", max_dropped=part)).dropped) == lost
    write_jsonl(tmp_path / "a.jsonl", [*pairs(rows - lost), *bad, bad[0]])
    with pytest.raises(DataError, match=f"{lost + 1} of {rows + 1} rows"):
        load(tmp_path, Source("a.jsonl", max_dropped=part))


def test_error_lists_ten_and_says_how_to_mend_the_commonest(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "z" * 600, "completion": "y"}] * 12 + pairs(1))
    with pytest.raises(DataError) as stopped:
        load(tmp_path, "a.jsonl")
    assert len([p for p in stopped.value.problems if p.startswith("a.jsonl:")]) == 10
    assert "and 2 more" in stopped.value.problems and "12 x over-long" in stopped.value.problems and "max_length" in stopped.value.fix
    with pytest.raises(DataError, match=r"12 of 12 rows cannot be trained on\n"):
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "z" * 600, "completion": "y"}] * 12)
        load(tmp_path, Source("a.jsonl", max_dropped=1))
    with pytest.raises(DataError, match="no sources"):
        load(tmp_path)


def test_a_good_source_does_not_hide_a_bad_one(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(100))
    write_jsonl(tmp_path / "b.jsonl", [*pairs(1), {"prompt": "x"}])
    with pytest.raises(DataError, match=r"b\.jsonl: 1 of 2"):
        load(tmp_path, "a.jsonl", "b.jsonl")


def test_digest_follows_content_and_options_not_places(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    base = load(tmp_path, "a.jsonl").digest
    assert base.startswith("sha256:") and len(base) == 71
    assert load(tmp_path, "b.jsonl").digest == base == load(tmp_path, "a.jsonl", seed=7).digest
    write_jsonl(tmp_path / "c.jsonl", pairs(2) + pairs(1))
    other = tiny_tokenizer()
    other.chat_template = "Talk:\n" + TINY.chat_template
    end = tiny_tokenizer()
    end.eos_token = "<|endoftext|>"
    digests = [
        load(tmp_path, "c.jsonl").digest,
        load(tmp_path, "a.jsonl", max_length=500).digest,
        load(tmp_path, "a.jsonl", last_turn_only=True).digest,
        load(tmp_path, Source("a.jsonl", weight=2)).digest,
        load(tmp_path, Source("a.jsonl", system="S")).digest,
        *(load_examples([Source("a.jsonl")], t, root=tmp_path, max_length=512).digest for t in (other, end)),
    ]
    assert len({base, *digests}) == len(digests) + 1


def same(a, b):
    return [(e.ids.tolist(), e.supervised.tolist(), e.origin) for e in a.examples] == [
        (e.ids.tolist(), e.supervised.tolist(), e.origin) for e in b.examples
    ] and a.dropped == b.dropped


def test_cache_serves_what_was_tokenised(tmp_path, monkeypatch, own_cache):
    write_jsonl(tmp_path / "a.jsonl", [*pairs(20), {"prompt": "z" * 600, "completion": "y"}])
    fresh = load(tmp_path, "a.jsonl")
    (file,) = (own_cache / "tokens").iterdir()
    monkeypatch.setattr(reading_module, "encode_batches", None)
    assert same(load(tmp_path, "a.jsonl"), fresh) and len(fresh.dropped) == 1
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert load(tmp_path, "b.jsonl").dropped[0].origin == "b.jsonl:21"
    assert [file] == list((own_cache / "tokens").iterdir())


def test_rows_are_heard_from_the_cache_as_when_they_were_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, *pairs(3), {"prompt": "z" * 600, "completion": "y"}, *pairs(2, f"end{END}")])
    source = Source("a.jsonl", max_dropped=0.9)
    fresh, again = load(tmp_path, source, keep_rows=True), load(tmp_path, source, keep_rows=True)
    assert [r.id for r in fresh.rows] == [e.row for e in fresh.examples] == [(0, 0), (0, 1), (0, 2)]
    assert again.rows == fresh.rows and [r.id for r in again.rows] == [r.id for r in fresh.rows]
    assert again.dropped == fresh.dropped and len(fresh.dropped) == 4


def test_examples_are_as_lists_of_them(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(5))
    write_jsonl(tmp_path / "b.jsonl", pairs(4, "other"))
    examples = load(tmp_path, "a.jsonl", Source("b.jsonl", weight=2)).examples
    listed = [examples[i] for i in range(13)]
    assert len(examples) == 13 and listed == list(examples) and listed[5] is listed[9] is examples[-4]
    assert [e.tokens for e in listed] == examples.tokens.tolist() and [e.longest for e in listed] == examples.longest.tolist()
    assert [e.targets for e in listed] == examples.targets.tolist() and [e.origin for e in listed] == [*map(examples.origin, range(13))]
    assert list(examples[3:7]) == listed[3:7] and examples[3:7].tokens.tolist() == examples.tokens[3:7].tolist()
    assert not Examples.joined([]) and list(Examples.joined([examples[4:6], examples[:1]])) == [*listed[4:6], listed[0]]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    encode = reading_module.encode_batches

    def meanwhile(*rest, **options):
        write_jsonl(tmp_path / "a.jsonl", pairs(4))
        return encode(*rest, **options)

    monkeypatch.setattr(reading_module, "encode_batches", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        load(tmp_path, "a.jsonl")


def test_a_source_that_changes_while_its_rows_are_heard_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    load(tmp_path, "a.jsonl")
    reading = Reading(TINY, tmp_path, 512)
    with pytest.raises(DataError, match="changed while it was read"):
        reading.read(Source("a.jsonl"), 0, print, lambda row: write_jsonl(tmp_path / "a.jsonl", pairs(4)))


def replaced(file, raw):
    """Another file under the same name: whoever has loaded the old one keeps it."""
    file.unlink()
    file.write_bytes(raw)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "foreign", "layout"])
def test_damaged_cache_is_written_anew(tmp_path, own_cache, damage):
    write_jsonl(tmp_path / "a.jsonl", pairs(20))
    fresh = load(tmp_path, "a.jsonl")
    (file,) = (own_cache / "tokens").iterdir()
    raw = file.read_bytes()
    if damage == "other":
        write_jsonl(tmp_path / "b.jsonl", pairs(20, "other"))
        load(tmp_path, "b.jsonl")
        (other,) = set((own_cache / "tokens").iterdir()) - {file}
        replaced(file, other.read_bytes())
    elif damage == "foreign":
        np.savez(tmp_path / "odd.npz", lengths=np.array([{}], dtype=object))
        replaced(file, (tmp_path / "odd.npz").read_bytes() + bytes(8))
    elif damage == "layout":
        body = raw[:-4].replace(LAYOUT, b"tokens 1")
        replaced(file, body + zlib.crc32(body).to_bytes(4, "little"))
    else:
        flipped = bytearray(raw)
        flipped[len(raw) // 3] ^= 1
        replaced(file, {"cut": raw[: len(raw) // 2], "flip": bytes(flipped), "empty": b""}[damage])
    assert same(load(tmp_path, "a.jsonl"), fresh)
    assert file.read_bytes() == raw
    assert same(load(tmp_path, "a.jsonl"), fresh)


def test_no_damaged_byte_goes_unseen(tmp_path, own_cache):
    write_jsonl(tmp_path / "a.jsonl", pairs(2))
    load(tmp_path, "a.jsonl")
    (file,) = (own_cache / "tokens").iterdir()
    raw, digest = file.read_bytes(), f"sha256:{file.stem}"
    assert Tokens.load(digest, "a.jsonl", 0) is not None
    for at in range(len(raw)):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        assert Tokens.load(digest, "a.jsonl", 0) is None, at
    for length in range(0, len(raw), 7):
        file.write_bytes(raw[:length])
        assert Tokens.load(digest, "a.jsonl", 0) is None, length


def test_a_file_that_is_cut_off_while_it_is_used_is_named(tmp_path, own_cache):
    """A mapped file would end the process with SIGBUS."""
    write_jsonl(tmp_path / "a.jsonl", pairs(300))
    examples = load(tmp_path, "a.jsonl").examples
    (file,) = (own_cache / "tokens").iterdir()
    os.truncate(file, 4096)
    assert examples[0].origin == "a.jsonl:1"
    with pytest.raises(DataError, match="was cut off while it was used") as caught:
        examples[299]
    assert str(file) in caught.value.message


def test_a_full_disk_costs_the_cache_alone(tmp_path, own_cache):
    """Rows are heard once, though the source is read twice."""
    write_jsonl(tmp_path / "a.jsonl", pairs(1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        data = load(tmp_path, "a.jsonl", keep_rows=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((own_cache / "tokens").iterdir()) == []
    assert [r.id for r in data.rows] == [e.row for e in data.examples] == [(0, i) for i in range(1000)]
    again = load(tmp_path, "a.jsonl", keep_rows=True)
    assert same(again, data) and again.digest == data.digest and again.rows == data.rows


def test_two_may_write_the_same_file_at_once(tmp_path, monkeypatch, own_cache):
    write_jsonl(tmp_path / "a.jsonl", pairs(5))
    encode, inner = reading_module.encode_batches, []

    def meanwhile(*rest, **options):
        monkeypatch.setattr(reading_module, "encode_batches", encode)
        inner.append(load(tmp_path, "a.jsonl"))
        return encode(*rest, **options)

    monkeypatch.setattr(reading_module, "encode_batches", meanwhile)
    outer = load(tmp_path, "a.jsonl")
    assert same(outer, inner[0]) and len(list((own_cache / "tokens").iterdir())) == 1


def test_what_killed_writers_have_left_is_removed_but_not_what_is_being_written(tmp_path, own_cache):
    (own_cache / "tokens").mkdir(parents=True)
    left, alive = (own_cache / "tokens" / f".x.tokens.{digit * 12}.new" for digit in "0a")
    left.touch()
    alive.touch()
    os.utime(left, (0, 0))
    write_jsonl(tmp_path / "a.jsonl", pairs(1))
    load(tmp_path, "a.jsonl")
    assert alive.exists() and not left.exists()


def test_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    assert len(load(tmp_path, "a.jsonl").examples) == 3
    assert not token_file("sha256:00").exists()


def test_template_that_reads_the_clock_is_not_cached(tmp_path, own_cache):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    load_examples([Source("a.jsonl")], tokenizer, root=tmp_path, max_length=512)
    assert not (own_cache / "tokens").exists()


def test_order_is_the_same_everywhere():
    assert order(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert order(8, 0, 1).tolist() == [3, 7, 4, 2, 1, 6, 5, 0] and order(8, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    assert order(8, 0, 0).dtype == np.int64
    assert order(0, 0, 0).tolist() == [] and order(1, 3, 2).tolist() == [0]
    np.random.seed(5)
    assert sorted(order(1000, 3, 1).tolist()) == list(range(1000))
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    code = "from trimtab.data import order; print(order(50, 9, 4).tolist())"
    env = os.environ | {"PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert json.loads(other.stdout) == order(50, 9, 4).tolist()


@pytest.mark.slow
@pytest.mark.skipif(not TENANTS.is_dir(), reason="shared/data/tenants is not there")
@pytest.mark.parametrize("tenant", ["support", "legal", "finance"])
def test_real_rows_with_the_real_tokenizer(tenant, monkeypatch, tmp_path):
    monkeypatch.delenv("TRIMTAB_CACHE")
    tokenizer = bundled_base().tokenizer
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    rows, dropped = read_source(Source(f"{tenant}/train.jsonl"), TENANTS)
    write_jsonl(tmp_path / "few.jsonl", [{"messages": list(r.messages)} for r in rows[:150]])
    data = load_examples([Source("few.jsonl")], tokenizer, root=tmp_path, max_length=2048)
    assert not dropped and not data.dropped and len(data.examples) == 150
    for row, example in zip(rows, data.examples, strict=False):
        messages = list(row.messages)
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        answers = [m["content"] for m in messages[: last + 1] if m["role"] == "assistant"]
        assert learnt(example, tokenizer) == "".join(a + END for a in answers)
        assert np.array_equal(example.supervised, chatml_mask(example.ids, tokenizer))
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        assert example.ids[: int(example.supervised.argmax())].tolist() == encode_prompt(messages[:first], tokenizer)


def test_a_data_set_says_what_its_sources_may_lose(tmp_path):
    """A source's own number goes first; what a file says of it decides, and nothing else of the run."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "z" * 600, "completion": "y"}, *pairs(3)])
    with pytest.raises(DataError, match=r"\(25%; allowed are 0.5%\)"):
        load(tmp_path, Source("a.jsonl", max_dropped=0.005))
    data = DataConfig(train=[Source("a.jsonl"), Source("a.jsonl", max_dropped=0.2)], max_dropped=0.25)
    assert len(load(tmp_path, data.train[0]).examples) == 3
    with pytest.raises(DataError, match=r"1 of 4 rows .*\(25%; allowed are 20%\)"):
        load(tmp_path, data.train[1])
    with pytest.raises(DataError, match="max_dropped"):
        load(tmp_path, "a.jsonl")
    with pytest.raises(ValueError, match=r"max_dropped = 25.0: not a part of the rows"):
        DataConfig(train=[Source("a.jsonl")], max_dropped=25)
