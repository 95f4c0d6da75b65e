"""Rewards: the built-in ones, functions with TRL's signature, and what becomes of those that hang, crash or give nonsense."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import ConfigError
from trimtab.objectives.grpo import Grpo
from trimtab.rewards.asked import Call, Rewarded
from trimtab.rewards.builtin import REWARDS
from trimtab.rewards.spec import Reward

CODE = """
import time, beside

def length(prompts, completions, completion_ids, wanted, **others):
    print("what a function prints is no answer")
    assert prompts == [[{"role": "user", "content": "a"}], "b"] and completions[1] == "yes" and others["trainer_state"].global_step == 7
    return [len(completions[0][0]["content"]) + beside.MORE, len(completion_ids[1]) * 10 + int(wanted[1])]

async def later(completions, **_):
    return [1.5] * len(completions)

def hangs(completions, **_):
    time.sleep(60)

def crashes(completions, **_):
    import os
    os._exit(3)

def raises(completions, **_):
    raise ValueError("no such unit")

def few(completions, **_):
    return [1.0]

def odd(completions, **_):
    return [float("inf"), None]

def forks(completions, trainer_state, **_):
    import os
    os.fork()
    return [float(trainer_state.global_step)] * len(completions)

def untold(completions, **_):
    class Untold(Exception):
        def __str__(self):
            raise ValueError
    raise Untold
"""


def call() -> Call:
    prompts: list[Any] = [[{"role": "user", "content": "a"}], "b"]
    return Call(prompts, ["abc", "yes"], [[1], [2, 3]], {"wanted": ["4", "5"]}, ["ABC", "yes"], [[], []], 7)


def of(name: str, **more: Any) -> Reward:
    return Reward(reward=f"code.py:{name}", trusted=True, **more)


def test_functions_and_failures(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("MORE = 100\n")
    told: list[str] = []
    names = ("length", "later", "crashes", "raises", "few", "odd")
    with Rewarded(tmp_path, told.append) as rewarded:
        rewards = [*map(of, names), of("missing"), Reward(reward="exact_match", time_limit=30.0)]
        for _ in range(2):  # a process that has ended is started anew
            found = rewarded.ask(rewards, call(), 30.0)
            assert found[:2] == [[103.0, 25.0], [1.5, 1.5]] and found[-1] == [0.0, 1.0]
            assert all(map(math.isnan, [x for values in found[2:-1] for x in values]))
    assert [t.removeprefix("reward ") for t in told] == [
        "crashes, step 7: its process has ended with code 3",
        "raises, step 7: ValueError: no such unit",
        "few, step 7: it gave 1 numbers for 2 answers",
        "missing, step 7: AttributeError: module 'reward_code' has no attribute 'missing'",
    ], "each is told once"


def test_the_copy_of_a_process_that_forks_answers_nothing(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE.replace(", beside", ""))
    (tmp_path / "twice.py").write_text("import os\nos.fork()\n" + CODE.replace(", beside", ""))
    told: list[str] = []
    with Rewarded(tmp_path, told.append) as rewarded:
        rewards = [of("forks"), Reward(reward="twice.py:forks", trusted=True, name="twice"), of("untold")]
        for step in range(6):  # an answer that is told a second time would be taken for the next call's
            found = rewarded.ask(rewards, replace(call(), step=step), 30.0)
            assert found[:2] == [[step, step]] * 2
    assert told == ["reward untold, step 0: Untold"]


def test_a_reward_that_hangs_is_asked_three_times(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE.replace(", beside", ""))
    told: list[str] = []
    with Rewarded(tmp_path, told.append) as rewarded:
        for n in range(4):
            begin = time.monotonic()
            (found,) = rewarded.ask([of("hangs", time_limit=0.3)], call(), 30.0)
            assert all(map(math.isnan, found)) and (time.monotonic() - begin < 0.1) == (n == 3)
    assert len(told) == 2 and "the third time in a row" in told[1]


def test_a_pattern_that_backtracks_is_searched_for_in_bounded_time(tmp_path: Path) -> None:
    asked = replace(call(), texts=["a" * 4000 + "!", "b" + "a" * 4000])
    told: list[str] = []
    with Rewarded(tmp_path, told.append) as rewarded:
        found = rewarded.ask([Reward(reward="regex", pattern=r"(a+)+$")], asked, limit=60.0)
    assert found == [[0.0, 1.0]] and told == []


def test_a_pattern_that_only_python_reads_costs_its_own_reward_alone(tmp_path: Path) -> None:
    asked = replace(call(), texts=["a" * 4000 + "!", "bb"])
    told: list[str] = []
    rewards = [Reward(reward="regex", pattern=r"(a+)+(b)\2$", name="slow", time_limit=0.2), Reward(reward="length", max_words=1)]
    with Rewarded(tmp_path, told.append) as rewarded:
        found = rewarded.ask(rewards, asked, limit=60.0)
    assert all(math.isnan(score) for score in found[0]) and found[1] == [1.0, 1.0]
    assert told == ["reward slow, step 7: it has not answered in 0.2 s"]
    assert REWARDS["regex"](["abb", "ab"], pattern=r"(b)\1$") == [1.0, 0.0]


def test_built_in() -> None:
    texts = ['{"b": 1, "a": [2]}', " yes\n", "no", "a b c d"]
    assert REWARDS["exact_match"](texts, [{"a": [2], "b": 1}, "yes", "No", None]) == [1.0, 1.0, 0.0, None]
    assert REWARDS["regex"](texts, pattern=r"^\s*(yes|no)\s*$") == [0.0, 1.0, 1.0, 0.0]
    assert REWARDS["json_schema"](texts, schema={"type": "object", "required": ["a"]}) == [1.0, 0.0, 0.0, 0.0]
    assert REWARDS["length"](texts, min_words=2, max_words=3) == [0.75, 0.5, 0.5, 0.75]
    wanted = [{"function": {"name": "f", "arguments": '{"y": 2, "x": 1}'}}]
    calls = [['["f", {"x": 1, "y": 2}]'], [], []]
    assert REWARDS["tool_call"](texts[:3], [wanted, wanted, None], calls) == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("exact_matsch", "did you mean 'exact_match'"),
        ({"reward": "code.py:f"}, "add `trusted: true`"),
        ({"reward": "regex"}, "pattern: reward regex needs it"),
        ({"reward": "regex", "pattern": "("}, "no regular expression"),
        ({"reward": "regex", "pattern": "(" * 5000 + ")" * 5000}, "no regular expression"),
        ({"reward": "regex", "pattern": "a{99999999999999999999}"}, "no regular expression"),
        ({"reward": "length", "pattern": "x"}, "pattern: reward length does not take it"),
        ({"reward": "length", "min_words": -5}, "min_words = -5: at least 0"),
        ({"reward": "json_schema", "schema": {"type": 5}}, "schema: it is no JSON schema: 5 is not valid"),
        (["length", "length"], "two are called 'length'"),
        ([], "name at least one"),
    ],
)
def test_mistakes(reward: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Grpo(rewards=reward)
    assert words in str(error.value) + " ".join(error.value.problems)
