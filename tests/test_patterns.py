"""Patterns are matched in bounded time, and match what `re` matches."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from trimtab import patterns
from trimtab.errors import ConfigError
from trimtab.methods.lora import LoraConfig
from trimtab.methods.targets import key_problem, matches, pattern_value
from trimtab.patterns import occurs, regex_problem, whole

NAMES = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.3.MLP.experts.gate_up_proj",
    "transformer.h.10.attn.c_attn",
    "a\n",
]
PATTERNS = [
    r".*",
    r".*\.(q_proj|v_proj)$",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",  # peft's docs
    r"model\.layers\.(?:0|[1-3]|1[01])\..*_proj",
    r"(.*\.)?(q_proj)$",
    r"(?!.*mlp).*_proj",
    r".*(?<=q_)proj",
    r".*(?<!q_)proj",
    r"(?i).*mlp.*",
    r".*(?i:mlp).*PROJ",
    r"^model\.layers\.\d{1,2}?\.[^.]+\.\w+\Z",
    r".*?\.[^\W\d_]+_proj",
    r"(a|)*\n?",
    r"a$",
    r".*\b[A-Z]+\b.*",
    r"(?x) .* \. q _ proj  # a comment",
    r"((\w+\.){3}){1}\w+\.\w+",
    r"(?s)a.",
    r"\B",
    r"\b",
    r"[^a-z].*|lm_head|",
    r"(model|layers|\.|\d)+self_attn\.q_proj",
]


@pytest.fixture(params=[False, True], ids=["sets", "re"])
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sets of positions alone, and with `re` where that is quick."""
    if not request.param:
        monkeypatch.setattr(patterns, "QUICK", -1)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    assert regex_problem(pattern) is None
    for name in NAMES:
        assert whole(pattern, name) is (re.fullmatch(pattern, name) is not None), (pattern, name)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("flags", [0, re.DOTALL, re.MULTILINE | re.IGNORECASE])
def test_a_pattern_is_found_where_re_finds_it(pattern: str, flags: re.RegexFlag) -> None:
    for text in (*NAMES, *(f"say\n{n}\nmodel. Q" for n in NAMES)):
        assert occurs(pattern, text, flags) is (re.search(pattern, text, flags) is not None), (pattern, text)


ATOMS = ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\W", r"\b", r"\B", "^", "$", r"\Z", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "(?i:B)", "\n"]
REPEATS = ["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{2,}"]


def _drawn(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.4:
        return draw.choice(ATOMS)
    parts = [_drawn(draw, depth - 1) + draw.choice(REPEATS) for _ in range(draw.randint(1, 3))]
    return "(?:" + draw.choice(["", "|"]).join(parts) + ")"


@pytest.mark.parametrize(
    "pattern",
    [
        *("K", "k", "\u212a", "s", "\u017f", "[a-k]", "[^\u0100-\u2fff]", "[^k]", "i", "\u0130", "\u00e9", "\u00c9"),
        *(r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"[^\W\d]", r"\b", r"\B"),
    ],
)
@pytest.mark.parametrize("flags", [re.IGNORECASE, re.IGNORECASE | re.ASCII, 0])
def test_cases_and_kinds_of_a_character_are_those_of_re(pattern: str, flags: re.RegexFlag) -> None:
    for text in "aAkK\u212asS\u017fiI\u0130\u0131\u00e9\u00c95\u0663 \u2003\n":
        assert occurs(pattern, text, flags) is (re.search(pattern, text, flags) is not None), text


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "pattern",
    [r"(?a)\s", r"(?a)\S", r"(?a:\s)\s", r"(?a)[\s\d]", r"(?a)[^\s]", r"(?a)(?u:\w)", r"(?a)\w(?u:\w)", r"(?ai)(?u:k)", r"(?u:\w(?a:\w))"],
)
def test_what_ascii_takes_is_what_re_takes(pattern: str) -> None:
    """To Python \\x1c is a space, to `re` with ASCII it is not; "(?u:…)" takes other letters within "(?a)…" too."""
    for text in [*"a1 _\x1c\x1d\x1e\x1f\x0b\x85\xa0\u00e9\u212a\u0663", "\x1c\x1c", " \x1f", "a\u00e9", "\u00e9\u00e9"]:
        compiled = re.compile(pattern)  # its `search` looks for the first letter with the outer flags, and overlooks some of "(?u:…)"
        assert occurs(pattern, text) is any(compiled.match(text, at) for at in range(len(text))), (pattern, text)
        assert whole(pattern, text) is (compiled.fullmatch(text) is not None), (pattern, text)


@pytest.mark.usefixtures("_quick")
def test_drawn_patterns_match_and_are_found_as_re_says() -> None:
    draw, seen = random.Random(0), [0, 0]
    for _ in range(1500):
        pattern = _drawn(draw, 3)
        try:
            expected = re.compile(pattern, draw.choice([0, re.DOTALL, re.MULTILINE]))
        except re.error:
            continue
        text = "".join(draw.choice("abB\n ") for _ in range(draw.randint(0, 7)))
        found = expected.search(text) is not None
        assert occurs(pattern, text, expected.flags & ~re.UNICODE) is found, (pattern, text)
        assert whole(pattern, text) is (re.fullmatch(pattern, text) is not None), (pattern, text)
        seen[found] += 1
    assert min(seen) > 200


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", r"^(\w+\s?)*$", "(a|aa)+$", "(.*a){12}!", r"(?=.*!).", r"((a*)*)*!", "(?:a?){5000}a{5000}!", "(?:.{1,50}){1,50}!"]
)
def test_nothing_is_searched_for_for_ever(pattern: str) -> None:
    assert not occurs(pattern, "a" * 5000 + "?")


def _counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has called this method of `patterns._Text`: one entry a call."""
    method, calls = getattr(patterns._Text, name), list[Any]()

    def counted(*args: Any) -> Any:
        calls.append(None)
        return method(*args)

    monkeypatch.setattr(patterns._Text, name, counted)
    return calls


@pytest.mark.parametrize("repeat", ["{1,2}", "{0,3}", "{2}"])
def test_repeats_in_one_another_are_followed_once_from_each_set(repeat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted("_repeat", monkeypatch)
    pattern = "(?:" * 18 + "a?" + (")" + repeat) * 18
    assert regex_problem(pattern) is None and not whole(pattern + "!", "a" * 50)
    assert len(calls) < 3000  # (1 + 2 ** 18 times without a memory)


def test_a_repeat_that_adds_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted("ends", monkeypatch)
    assert not whole("(?:a?){20000}!", "a" * 50) and whole("(?:ab?){20000,}|(?:b?a?){20000}", "ab" * 25)
    assert len(calls) < 1000


def test_a_table_with_an_entry_for_each_module_is_left_to_re(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_Text", None)  # thirty times as slow
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(3) for e in range(4)]
    table = {re.escape(name.removeprefix("model.")): at for at, name in enumerate(names)}
    assert [pattern_value(table, name, -1) for name in names] == list(range(len(names)))
    assert matches(names[0], r"model\..*\.(up|down)_proj")


@pytest.mark.parametrize(
    "pattern", ["(.+)+!", "(?x)(.+) +!", "((.*)*)*!", "(.|.)*!", ".*" * 12 + "!", "(a?){1000000}!", "(.?){50}" * 3 + "!"]
)
def test_no_pattern_takes_for_ever(pattern: str) -> None:
    name = "model.layers.11.self_attn.q_proj.model.layers.11.self_attn.q_proj"
    assert not matches(name, pattern)
    if not pattern.startswith("(?x)"):  # no key: flags stand first
        assert key_problem(pattern) is None
        assert pattern_value({pattern: 3}, name, 8) == 8


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "is not a regular expression"),
        (r"(a)\1", "has a back reference"),
        ("(?>a+)b", "has an atomic group"),
        ("a++b", "has a possessive repeat"),
        ("(a)?(?(1)b|c)", "has a condition on a group"),
        ("a{99999999999999999999}", "is not a regular expression"),
        ("(" * 30 + "a" + ")" * 30, "in one another"),
        ("(" * 5000 + "a" + ")" * 5000, "in one another"),
        ("a" * 20_000, "has 20,000 parts"),
    ],
)
def test_what_is_wrong_with_a_pattern_is_said(pattern: str, why: str) -> None:
    assert why in str(regex_problem(pattern))
    assert not matches("a", pattern)


def test_a_key_that_is_a_pattern_only_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError) as e:
        LoraConfig(r=2, rank_pattern={"(?i)q_proj": 4})
    assert "rank_pattern: '(?i)q_proj' is not a regular expression" in str(e.value)
