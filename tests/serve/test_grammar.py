"""Grammars: what may follow, what is refused at once, limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.tiny import EOS_ID, tiny_tokenizer
from trimtab.errors import TrimtabError
from trimtab.serve import grammar as grammar_module
from trimtab.serve import grammar_pool
from trimtab.serve import grammars as grammars_module
from trimtab.serve.grammar import Compiler
from trimtab.serve.grammars import Grammars
from trimtab.serve.request import Grammar
from trimtab.serve.sampling import masks

TOKENIZER = tiny_tokenizer()
COMPILER = Compiler(TOKENIZER.backend_tokenizer.to_str(), 300, {EOS_ID, 256})


def allowed(matcher) -> set[int]:
    return set(masks([matcher], 300)[0].nonzero()[0].tolist())


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the text, and an end after it, follow the grammar."""
    matcher = COMPILER.matcher(grammar.kind, grammar.text)
    for i in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        if i not in allowed(matcher):
            return False
        assert matcher.advance(i)
    return matcher.done or EOS_ID in allowed(matcher)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (
            "json_schema",
            json.dumps(SCHEMA),
            ['{"name":"é"}', '{"name": "abc", "n": 12}'],
            ['{"n":1}', '{"name":1}', "[]", '{"name":"abcdef"}'],
        ),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", ""]),
        ("regex", "[a-c]{2,3}(x|é)", ["abx", "abcé"], ["ax", "abcdx", "ab"]),
        ("choice", '["ja", "nein", "a\\"b\\n", "/x/"]', ["ja", "nein", 'a"b\n', "/x/"], ["j", "x", "jaja", ""]),
        ("grammar", 'start: NAME ("," NAME)*\nNAME: /[a-c]+/', ["a", "abc,b"], ["", "a,", "d"]),
        ("grammar", 'root ::= name ("," name)*\nname ::= [a-c]+', ["a", "abc,b"], ["", "a,", "d"]),
    ],
)
def test_what_follows_and_what_does_not(kind, text, good, bad):
    grammar = Grammar(kind, text)
    assert [t for t in good if not takes(grammar, t)] == [] and [t for t in bad if takes(grammar, t)] == []


def test_an_end_is_allowed_where_the_grammar_may_end_and_nowhere_else():
    matcher = COMPILER.matcher("regex", "a+")
    assert allowed(matcher) == {TOKENIZER.encode("a")[0]}
    matcher.advance(TOKENIZER.encode("a")[0])
    assert allowed(matcher) == {TOKENIZER.encode("a")[0], EOS_ID, 256} and not matcher.done
    assert matcher.advance(EOS_ID) and matcher.done


def test_blanks_between_parts_are_bounded():
    assert takes(Grammar("json_object"), "{" + " " * 16 + "}") and not takes(Grammar("json_object"), "{" + " " * 40 + "}")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[1]", "a JSON schema is an object"),
        ("json_schema", '{"type": "nope"}', "cannot be followed: .*nope"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "cannot be followed"),
        ("json_schema", "[" * 60000, "not JSON"),
        ("json_schema", '{"description": "' + "x" * 70000 + '"}', "at most 65536"),
        ("regex", "a(b", "cannot be followed: .*unclosed group"),
        ("regex", r"(a)\1", "cannot be followed: .*backreferences are not supported"),
        ("regex", "a" * 4000 + "(?=b)", "cannot be followed: .*look-around"),
        ("grammar", "start: (", "cannot be followed"),
        ("grammar", "root ::= (", "cannot be read"),
        ("grammar", "root ::= " + "(" * 30000, "cannot be read"),
        ("grammar", "root ::= " + "x" * 5000, "cannot be read: Rule 'x"),
        ("grammar", "start: missing", "cannot be followed"),
        ("choice", '["a", 1]', "a JSON list of texts"),
        ("choice", "[]", "a JSON list of texts"),
        ("choice", json.dumps([str(i) for i in range(2000)]), "2000 choices, at most 1024"),
    ],
)
def test_what_cannot_be_followed_is_refused_soon(kind, text, words):
    began = time.perf_counter()
    with pytest.raises(TrimtabError, match=words) as caught:
        COMPILER.matcher(kind, text)
    assert time.perf_counter() - began < 5 and caught.value.http_status == 400 and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_schema", '{"$ref": "#"}'), ("grammar", "start: start"), ("grammar", "root ::= root"), ("regex", r"[^\s\S]")],
)
def test_a_grammar_that_no_text_follows(kind, text):
    """llguidance says so with a word of its own, and only once it is asked for the first token."""
    matcher = COMPILER.matcher(kind, text)
    assert not any(matcher.mask) and matcher.error.startswith("no text follows it")


def test_a_grammar_is_compiled_once_and_kept_for_a_while(monkeypatch):
    monkeypatch.setattr(grammar_module, "KEPT_BYTES", 10)
    monkeypatch.setattr(grammar_module, "resident_bytes", lambda: 0)
    ours, compiled = Compiler(TOKENIZER.backend_tokenizer.to_str(), 300, {EOS_ID}), []
    real = ours._compile
    monkeypatch.setattr(ours, "_compile", lambda kind, text: compiled.append(text) or real(kind, text))
    for text in ("a", "b", "a", "c", "a", "b", "a" * 20, "a", "a"):
        ours.matcher("regex", text)
    assert compiled == ["a", "b", "c", "b", "a" * 20, "a"], "by bytes: the long one was not kept, nor what was older"


def test_matchers_of_one_grammar_do_not_know_each_other():
    first, second = COMPILER.matcher("regex", "ab"), COMPILER.matcher("regex", "ab")
    first.advance(TOKENIZER.encode("a")[0])
    assert allowed(first) == {TOKENIZER.encode("b")[0]} and allowed(second) == {TOKENIZER.encode("a")[0]}
    assert masks([first, second], 300).sum() == 2


def test_a_token_off_the_grammar_leaves_a_reason_and_no_tokens():
    matcher = COMPILER.matcher("regex", "ab")
    assert not matcher.advance(5) and "grammar" in matcher.error
    assert allowed(matcher) == set() and not matcher.done


def test_without_the_library_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[serve\]'"):
        Grammars(TOKENIZER, 300, {EOS_ID}).matcher(Grammar("regex", "a"))


@pytest.mark.parametrize("regex", ["(((a{1,500}){1,500}){1,500})", "(a|b)*a(a|b){20}", ".*a.{1,200}b.*"])
def test_hard_grammars_stay_quick_or_give_up(regex):
    matcher, slowest = COMPILER.matcher("regex", regex), 0.0
    for _ in range(150):
        began = time.perf_counter()
        may = allowed(matcher)
        slowest = max(slowest, time.perf_counter() - began)
        if not may:
            assert "error" in matcher.error
            break
        matcher.advance(TOKENIZER.encode("a")[0])
    assert slowest < 1.0


# ---- in processes of their own ----

SLOW = json.dumps({"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(300)}})


@pytest.fixture
def grammars(monkeypatch):
    monkeypatch.setattr("trimtab.serve.grammars.OPEN_S", 0.3)
    made = Grammars(TOKENIZER, 300, {EOS_ID, 256})
    yield made
    made.shutdown()


def ready(grammars, *matchers) -> None:
    grammars.wait(matchers, 60)
    assert all(m.ready for m in matchers)


def test_a_matcher_in_a_process_says_what_one_here_says(grammars):
    for kind, text in (("json_schema", json.dumps(SCHEMA)), ("regex", "(ab|ac)+"), ("choice", '["ja", "nein"]'), ("json_object", "")):
        here, there = COMPILER.matcher(kind, text), grammars.matcher(Grammar(kind, text))
        for _ in range(30):
            ready(grammars, there)
            assert (there.mask, there.done, there.error) == (b"" if here.done else here.mask, here.done, "")
            if here.done:
                break
            token = min(allowed(here))
            here.advance(token)
            there.advance(token)
        there.close()


def test_what_is_wrong_is_heard_later(grammars):
    wrong = grammars.matcher(Grammar("regex", "a(b"))
    off = grammars.matcher(Grammar("regex", "ab"))
    off.advance(5)
    ready(grammars, wrong, off)
    assert "cannot be followed" in wrong.error and "grammar" in off.error
    assert masks([wrong, off], 300).sum() == 0
    with pytest.raises(TrimtabError, match="at most 65536"):
        grammars.matcher(Grammar("regex", "a" * 70000))


def test_a_grammar_that_takes_too_long_ends_alone(grammars):
    """Its neighbours in the process go on where they were; another tenant has a process of its own and does not even wait."""
    fine, here = grammars.matcher(Grammar("regex", "(ab|ac)+"), "a"), COMPILER.matcher("regex", "(ab|ac)+")
    ready(grammars, fine)
    for letter in "aba":
        fine.advance(TOKENIZER.encode(letter)[0])
        here.advance(TOKENIZER.encode(letter)[0])
    ready(grammars, fine)
    slow = grammars.matcher(Grammar("json_schema", SLOW), "a")
    behind = grammars.matcher(Grammar("regex", "x+"), "a")
    other = grammars.matcher(Grammar("regex", "y+"), "b")
    assert other.process is not fine.process and slow.process is fine.process is behind.process
    ready(grammars, slow, fine, behind, other)
    assert "more than 0.3 s of processor time" in slow.error
    assert not fine.error and fine.mask == here.mask
    assert allowed(behind) == {TOKENIZER.encode("x")[0]} and allowed(other) == {TOKENIZER.encode("y")[0]}
    again = grammars.matcher(Grammar("json_schema", SLOW), "b")
    assert again.ready and again.error == slow.error, "it is known, and costs nothing"
    again.close()
    fine.advance(TOKENIZER.encode("c")[0])
    here.advance(TOKENIZER.encode("c")[0])
    ready(grammars, fine)
    assert fine.mask == here.mask and len(grammars._processes) == 2


def test_a_grammar_behind_slow_ones_is_not_blamed_for_them(grammars):
    """Else one tenant could have another's grammar refused: what is too slow is known for all."""
    slow = [grammars.matcher(Grammar("json_schema", SLOW.replace("^a", f"^{letter}")), "a") for letter in "xyz"]
    behind = grammars.matcher(Grammar("regex", "xyx"), "a")
    ready(grammars, *slow, behind)
    assert all("processor time" in m.error and m.fault().http_status == 400 for m in slow)
    assert "because of others" in behind.error and behind.fault().http_status == 503
    again = grammars.matcher(Grammar("regex", "xyx"), "b")
    ready(grammars, again)
    assert not again.error


def test_a_grammar_that_takes_too_much_memory_ends_alone(grammars, monkeypatch):
    monkeypatch.setattr("trimtab.serve.grammars.OPEN_S", 20.0)
    monkeypatch.setattr("trimtab.serve.grammars.ROOM_BYTES", 4 << 20)
    fine = grammars.matcher(Grammar("regex", "x+"), "a")
    vast = grammars.matcher(Grammar("json_schema", SLOW), "a")
    ready(grammars, fine, vast)
    assert "too much memory" in vast.error and not fine.error and allowed(fine) == {TOKENIZER.encode("x")[0]}
    again = grammars.matcher(Grammar("json_schema", SLOW), "a")
    assert again.error == vast.error, "at once; it may have been too much because of the tenant's others, so only for this tenant"
    assert not grammars.matcher(Grammar("json_schema", SLOW), "b").error


def test_a_process_that_is_killed_is_made_anew_for_those_who_were_there(grammars):
    fine = grammars.matcher(Grammar("regex", "xyx"))
    ready(grammars, fine)
    fine.advance(TOKENIZER.encode("x")[0])
    ready(grammars, fine)
    fine.process.popen.kill()
    for _ in range(600):
        if fine.lost:
            break
        time.sleep(0.01)
    ready(grammars, fine)
    assert allowed(fine) == {TOKENIZER.encode("y")[0]}


def test_a_process_killed_while_it_works_is_made_anew_once(grammars, monkeypatch):
    """Who asked just then is not to blame; the second time he may be."""
    matcher = grammars.matcher(Grammar("regex", "xyxyxy"))
    ready(grammars, matcher)
    for letter, lost in (("x", 1), ("y", 2)):
        stopped = matcher.process.popen
        stopped.send_signal(signal.SIGSTOP)
        matcher.advance(TOKENIZER.encode(letter)[0])
        stopped.kill()
        ready(grammars, matcher)
        assert matcher.lost == lost
        assert matcher.error == "" or lost == 2
    assert "killed 2 times" in matcher.error


class NoMore(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        raise OSError(24, "Too many open files")


def test_where_no_process_can_be_started_answers_end_and_later_ones_begin(grammars, monkeypatch):
    first, second = (grammars.matcher(Grammar("regex", "xyx"), tenant) for tenant in "ab")
    ready(grammars, first, second)
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", NoMore)
        shares = grammars.matcher(Grammar("regex", "xyx"), "c")
        ready(grammars, shares)
        assert not shares.error and shares.process in (first.process, second.process), "better than none"
        other = first.process if shares.process is second.process else second.process
        for process in (other, shares.process):
            of_it = list(process.matchers)
            process.popen.kill()
            for _ in range(600):
                if all(m.process is not process for m in of_it):
                    break
                time.sleep(0.01)
            ready(grammars, *of_it)
        for matcher in (first, second, shares):
            assert "cannot be followed here: [Errno 24]" in matcher.error and matcher.fault().http_status == 503
        none = grammars.matcher(Grammar("regex", "xyx"), "d")
        ready(grammars, none)
        assert "Too many open files" in none.error and none.fault().http_status == 503
    later = grammars.matcher(Grammar("regex", "xyx"), "d")
    ready(grammars, later)
    assert not later.error and grammars._thread.is_alive()


def test_the_first_process_that_cannot_be_started(grammars, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", NoMore)
        first = grammars.matcher(Grammar("regex", "xyx"))
        ready(grammars, first)
    assert "Too many open files" in first.error and first.fault().http_status == 503
    later = grammars.matcher(Grammar("regex", "xyx"))
    ready(grammars, later)
    assert not later.error


def test_a_fault_of_the_thread_does_not_end_it(grammars, monkeypatch):
    first = grammars.matcher(Grammar("regex", "xyx"))
    ready(grammars, first)
    faults = iter([ZeroDivisionError(), ZeroDivisionError()])
    real = grammars._changed

    def changed():
        if (fault := next(faults, None)) is not None:
            raise fault
        real()

    monkeypatch.setattr(grammars, "_changed", changed)
    for letter in "xy":
        first.advance(TOKENIZER.encode(letter)[0])
        ready(grammars, first)
    assert allowed(first) == {TOKENIZER.encode("x")[0]} and not first.error


def test_the_tokenizer_is_written_out_on_no_thread_of_the_caller(grammars, monkeypatch):
    real, threads = grammars._first_words, []
    monkeypatch.setattr(grammars, "_first_words", lambda: threads.append(threading.current_thread().name) or real())
    gone = grammars.matcher(Grammar("regex", "x"))
    gone.close()
    first, second = grammars.matcher(Grammar("regex", "xyx")), grammars.matcher(Grammar("regex", "yxy"))
    first.advance(TOKENIZER.encode("x")[0])
    ready(grammars, first, second)
    assert allowed(first) == allowed(second) == {TOKENIZER.encode("y")[0]}
    assert threads == ["trimtab-grammars"]


def test_processes_are_started_without_the_lock(grammars, monkeypatch):
    """The engine's step takes the lock for each token under a grammar."""
    started, free = grammar_pool.subprocess.Popen, []

    def popen(*args, **kwargs):
        taken = grammars._news.acquire(blocking=False)
        free.append(taken)
        if taken:
            grammars._news.release()
        return started(*args, **kwargs)

    monkeypatch.setattr(grammar_pool.subprocess, "Popen", popen)
    matchers = [grammars.matcher(Grammar("regex", "xyx"), tenant) for tenant in "ab"]
    ready(grammars, *matchers)
    matchers[0].process.popen.kill()
    while not matchers[0].lost:
        time.sleep(0.01)
    ready(grammars, *matchers)
    assert free == [True] * 3 and not any(m.error for m in matchers)


def test_processes_are_few_and_end_when_nobody_needs_them(grammars, monkeypatch):
    monkeypatch.setattr(grammar_pool, "MAX_PROCESSES", 2)
    monkeypatch.setattr(grammar_pool, "IDLE_S", 0.05)
    monkeypatch.setattr(grammars_module, "IDLE_S", 0.05)
    matchers = [grammars.matcher(Grammar("regex", "xyx"), tenant) for tenant in "abc"]
    ready(grammars, *matchers)
    first, second, third = (m.process for m in matchers)
    assert first is not second and third in (first, second) and len(grammars._processes) == 2
    for matcher in matchers:
        matcher.close()
    for _ in range(600):
        if len(grammars._processes) == 1:
            break
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(grammars._processes) == 1, "the last one stays"
    again = grammars.matcher(Grammar("regex", "xyx"), "d")
    ready(grammars, again)
    assert not again.error and again.process in (first, second)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux's")
def test_a_process_has_the_lowest_priority_in_the_session_of_the_server(grammars):
    """Linux shares the cores among sessions before it looks at priorities. A process group of its own keeps Ctrl-C from it."""
    matcher = grammars.matcher(Grammar("regex", "xyx"))
    ready(grammars, matcher)
    pid = matcher.process.popen.pid
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert os.getsid(pid) == os.getsid(0) and os.getpgid(pid) != os.getpgid(0)


def test_a_tokenizer_that_cannot_be_used_is_said(grammars, monkeypatch):
    monkeypatch.setattr(grammars, "_stop_ids", [-5])
    matcher = grammars.matcher(Grammar("regex", "a"))
    ready(grammars, matcher)
    assert "cannot be followed here" in matcher.error


def test_the_process_imports_neither_torch_nor_transformers():
    code = "import trimtab.serve.grammar_process, sys; print({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_who_comes_while_the_processes_end_writes_to_none_of_them(monkeypatch):
    """Between the end of a process and that of `shutdown`, its pipes are closed, and their numbers may be somebody else's."""
    made, late, trouble = Grammars(TOKENIZER, 300, {EOS_ID}), list[threading.Thread](), list[BaseException]()
    first = made.matcher(Grammar("regex", "a+"))
    assert made.wait([first], 20.0)
    real = grammar_pool.Process.end

    def come() -> None:
        try:
            made.matcher(Grammar("regex", "b+")).close()
            first.advance(97)
        except BaseException as error:
            trouble.append(error)

    def end(process) -> int:
        code = real(process)
        late.append(threading.Thread(target=come))
        late[-1].start()
        late[-1].join(0.5)  # it gets so long to use what is gone
        return code

    monkeypatch.setattr(grammar_pool.Process, "end", end)
    made.shutdown()
    for thread in late:
        thread.join(20.0)
    assert late and not trouble
