"""The engine end to end on tiny bases: answers equal solo generation, and every request ends, whatever happens to it."""

import logging
import sys
import threading
import time

import pytest
import torch

from tests.laws.common import CASES, base_of, tokens
from tests.serve.common import AtOnce, ByHand, Clock, Heard, Held, ask, engine_of, finish, held, solo, without_end
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from trimtab.errors import ConfigError, OverloadedError, TrimtabError
from trimtab.forward.attached import Attached
from trimtab.memory import OutOfMemory
from trimtab.model import Base
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.request import Grammar, Request, SamplingParams
from trimtab.serve.sequence import ServingError


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_mixed_equal_solo_generation(family):
    engine = engine_of(family, max_step_rows=64)
    cases = [None, *CASES]
    heard = [ask(engine, f"{i}", 3 + (7 * i) % 40, c and held(c, family), tenant=f"t{i % 3}", max_tokens=10) for i, c in enumerate(cases)]
    finish(engine)
    for i, (case, h) in enumerate(zip(cases, heard, strict=True)):
        prompt = tokens(3 + (7 * i) % 40, sum(map(ord, f"{i}")))
        ids = without_end(engine, h.ids)
        assert ids == solo(family, prompt, case and held(case, family), 10), case
        assert h.text == engine.base.tokenizer.decode(ids, skip_special_tokens=True)
        assert h.deltas[-1].usage.prompt == len(prompt) and h.deltas[-1].usage.completion == len(h.ids)
        assert h.finish == ("stop" if len(ids) < len(h.ids) else "length")


@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
def test_prompts_in_chunks_equal_prompts_at_once(chunk):
    engine = engine_of(max_step_rows=chunk, max_running=1)
    adapter = held("prefix-0")
    heard = ask(engine, "a", tokens(70, 1), adapter, max_tokens=6)
    steps = finish(engine)
    assert without_end(engine, heard.ids) == solo("llama", tokens(70, 1), adapter, 6)
    assert steps == -(-70 // chunk) + len(heard.ids) - 1


def test_a_prompt_that_came_before_is_found_but_for_its_last_token():
    engine = engine_of()
    first = ask(engine, "a", tokens(64, 5), max_tokens=4)
    finish(engine)
    again = ask(engine, "b", tokens(64, 5), max_tokens=4)
    finish(engine)
    longer = ask(engine, "c", [*tokens(64, 5), *first.ids, 1, 2], max_tokens=4)
    finish(engine)
    assert first.deltas[-1].usage.cached == 0
    assert again.deltas[-1].usage.cached == 48, "the last block would leave no token to compute"
    assert longer.deltas[-1].usage.cached == 64
    assert first.ids == again.ids
    assert without_end(engine, longer.ids) == solo("llama", [*tokens(64, 5), *first.ids, 1, 2], None, 4)
    assert engine.stats().prefix_hit_tokens == 48 + 64


def test_without_a_prefix_cache_nothing_is_found():
    engine = engine_of(prefix_cache=False)
    for name in "ab":
        heard = ask(engine, name, tokens(64, 5), max_tokens=4)
        finish(engine)
    assert heard.deltas[-1].usage.cached == 0 and engine.stats().kv_blocks_cached == 0


@pytest.mark.parametrize(
    ("kind", "shared", "cached"),
    [("same", False, 48), ("tenant", False, 0), ("tenant", True, 48), ("adapter", True, 0), ("salt", True, 0), ("base", True, 0)],
)
def test_what_parts_the_prefix_cache(kind, shared, cached):
    engine = engine_of(share_prefix_across_tenants=shared)
    ask(engine, "a", tokens(64, 5), held("lora-0"), tenant="acme", max_tokens=2)
    finish(engine)
    adapter = {"adapter": held("ia3-0"), "base": None}.get(kind, held("lora-0"))
    tenant, salt = "other" if kind == "tenant" else "acme", "x" if kind == "salt" else ""
    heard = ask(engine, "b", tokens(64, 5), adapter, tenant=tenant, cache_salt=salt, max_tokens=2)
    finish(engine)
    assert heard.deltas[-1].usage.cached == cached


def test_the_base_has_no_positions_left():
    engine = engine_of()
    longest = engine.base.spec.max_positions
    heard, full = ask(engine, "a", longest - 3, max_tokens=20, ignore_eos=True), ask(engine, "b", longest, max_tokens=20, ignore_eos=True)
    finish(engine)
    assert (heard.finish, len(heard.ids)) == ("length", 4) and (full.finish, len(full.ids)) == ("length", 1)


def test_requests_that_can_never_run_are_refused_at_once():
    engine = engine_of(blocks=4)
    with pytest.raises(TrimtabError, match="65 tokens; at most 64 fit"):
        ask(engine, "a", 65)
    with pytest.raises(TrimtabError, match="the prompt is empty"):
        ask(engine, "a", [])
    with pytest.raises(TrimtabError, match=r"outside 0\.\.299"):
        ask(engine, "a", [300])
    with pytest.raises(TrimtabError, match="weight = 0"):
        ask(engine, "a", 3, weight=0.0)
    ask(engine, "a", 3)
    with pytest.raises(ValueError, match="'a' is running"):
        ask(engine, "a", 3)
    finish(engine)


def test_virtual_tokens_count_against_the_length():
    engine = engine_of()
    adapter = held("prefix-0")
    heard = ask(engine, "a", engine.base.spec.max_positions, adapter)
    other = ask(engine, "b", 5, adapter, max_tokens=3)
    finish(engine)
    assert heard.finish == "error" and "virtual ones" in str(heard.error) and other.finish in ("length", "stop")


def test_a_load_that_fails_fails_its_requests_alone():
    engine = engine_of()
    refused = Held("sha256:refused", error=TrimtabError("wrong base"))
    broken = Held("sha256:broken", error=OSError("disk gone"))
    a, b, c, d = ask(engine, "a", 5, refused), ask(engine, "b", 5, broken), ask(engine, "c", 5, held("lora-0")), ask(engine, "d", 5)
    finish(engine)
    assert a.finish == "error" and a.error is refused.error
    assert b.finish == "error" and "OSError: disk gone" in str(b.error)
    assert c.finish in ("stop", "length") and d.finish in ("stop", "length")
    assert engine.stats().load_failures == 2


def test_an_adapter_that_gives_no_numbers_ends_its_own_requests_alone():
    from tests.laws.common import method_of, noisy

    base = base_of("llama")
    bad = noisy(base, method_of("lora-0", base.spec))
    bad.params = {k: t * float("nan") for k, t in bad.params.items()}
    engine = engine_of()
    a, b, c = (
        ask(engine, "a", 5, Held("sha256:nan", bad)),
        ask(engine, "b", 40, max_tokens=5),
        ask(engine, "c", 5, held("ia3-0"), max_tokens=5),
    )
    drawn = ask(engine, "d", 5, Held("sha256:nan", bad), temperature=1.0)
    finish(engine)
    assert a.finish == drawn.finish == "error" and "not finite" in str(a.error) and isinstance(a.error, ServingError)
    assert a.error.http_status == 500
    assert without_end(engine, b.ids) == solo("llama", tokens(40, ord("b")), None, 5) and c.finish in ("length", "stop")


def test_a_forward_that_fails_ends_its_step_and_the_engine_goes_on(caplog, monkeypatch):
    engine = engine_of()
    a, b = ask(engine, "a", 20, held("prompt-0"), max_tokens=50, ignore_eos=True), ask(engine, "b", 20, max_tokens=50)
    engine.step()

    def broken(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m, caplog.at_level(logging.ERROR, "trimtab.serve.engine"):
        m.setattr(engine.runner, "_mix_of", broken)
        assert engine.step()
    assert a.finish == b.finish == "error" and "out of memory" in str(a.error) and "a step of 2 sequences failed" in caplog.text
    engine.idle_check()
    after = ask(engine, "c", tokens(20, 9), max_tokens=5)
    finish(engine)
    assert without_end(engine, after.ids) == solo("llama", tokens(20, 9), None, 5) and engine.stats().step_errors == 1


def test_text_that_cannot_be_made_ends_one_request_alone(caplog):
    engine = engine_of()
    a, b = ask(engine, "a", 5, max_tokens=5), ask(engine, "b", 5, max_tokens=5)
    engine.step()

    def broken(token):
        raise RuntimeError("no text")

    engine.requests.by_id["a"].text.push = broken
    finish(engine)
    assert a.finish == "error" and "no text" in str(a.error) and b.finish in ("stop", "length")


def test_cancelling_at_any_moment_frees_everything():
    loader = ByHand()
    engine = engine_of(loader=loader, max_running=2, max_step_rows=16)
    queued = [ask(engine, f"q{i}", 8, max_tokens=40, ignore_eos=True) for i in range(3)]
    loading, prefill = ask(engine, "l", 8, held("lora-0"), tenant="x"), ask(engine, "p", 100, max_tokens=30)
    engine.cancel("q2")
    engine.step()
    assert queued[2].finish == "cancelled" and queued[2].deltas[-1].usage.completion == 0
    engine.cancel("l")
    engine.step()
    assert loading.finish == "cancelled" and engine.stats().loading == 0
    engine.cancel("q0")
    engine.step()
    engine.step()
    assert queued[0].finish == "cancelled" and queued[0].deltas[-1].usage.completion > 0 and prefill.deltas == []
    engine.cancel("p")
    engine.cancel("p")
    engine.cancel("unknown")
    loader.run()  # nobody waits for it any more
    finish(engine)
    assert prefill.finish == "cancelled" and queued[1].finish == "length" and engine.stats().adapters_resident == 1


def test_deadlines_end_a_request_wherever_it_is():
    clock, loader = Clock(), ByHand()
    engine = engine_of(clock=clock, loader=loader, max_running=1)
    running = ask(engine, "a", 5, deadline=110.0, max_tokens=50, ignore_eos=True)
    waiting = ask(engine, "b", 5, deadline=105.0)
    loading = ask(engine, "c", 5, held("lora-0"), deadline=120.0, tenant="other")
    engine.step()
    clock.now = 105.0
    engine.step()
    assert (running.finish, waiting.finish, loading.finish) == (None, "deadline", None)
    clock.now = 121.0
    engine.step()
    assert running.finish == "deadline" and len(running.ids) == 2 and loading.finish == "deadline"
    engine.idle_check()


def test_a_deadline_does_not_outlive_its_request():
    clock = Clock()
    engine = engine_of(clock=clock)
    ask(engine, "a", 5, deadline=110.0, max_tokens=1)
    finish(engine)
    again = ask(engine, "a", 5, max_tokens=5, ignore_eos=True)
    clock.now = 111.0
    finish(engine)
    assert again.finish == "length"


def test_a_full_queue_and_a_draining_engine_refuse():
    engine = engine_of(max_queued=2)
    ask(engine, "a", 5, max_tokens=3), ask(engine, "b", 5, max_tokens=3)
    with pytest.raises(OverloadedError, match="2 requests are waiting") as caught:
        ask(engine, "c", 5)
    assert caught.value.http_status == 503 and caught.value.retry_after > 0
    assert engine.drain(10.0) and engine.stats().draining
    with pytest.raises(OverloadedError, match="shutting down"):
        ask(engine, "c", 5)
    engine.idle_check()


def test_a_refused_request_leaves_no_grammar_behind():
    engine = engine_of(max_queued=1)
    ask(engine, "a", 5, max_tokens=3)
    grammar = Grammar("choice", '["ja"]')
    with pytest.raises(OverloadedError):
        ask(engine, "b", 5, grammar=grammar)
    assert engine.grammars._unopened == [], "before there is a process"
    first = engine.grammars.matcher(grammar)
    engine.grammars.wait([first], 60)
    first.close()
    with pytest.raises(OverloadedError):
        ask(engine, "b", 5, grammar=grammar)
    assert [p.matchers for p in engine.grammars._processes] == [set()]
    engine.close()


def test_draining_gives_up_after_its_time_and_closing_ends_the_rest():
    engine = engine_of(loader=ByHand())
    never = ask(engine, "a", 5, held("lora-0"))
    assert not engine.drain(0.05)
    engine.close()
    assert never.finish == "cancelled"
    engine.idle_check()


def test_a_sink_that_raises_is_no_ones_problem_but_its_own(caplog):
    engine = engine_of()

    def sink(delta):
        raise RuntimeError("gone")

    engine.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=5)), sink)
    other = ask(engine, "b", 5, max_tokens=5)
    finish(engine)
    assert "its sink raised" in caplog.text and other.finish in ("length", "stop")


def test_observers_hear_every_end_and_cannot_break_the_engine(caplog):
    clock = Clock()
    engine = engine_of(clock=clock)
    ends, steps = [], []
    engine.on_finish = lambda *facts: ends.append(facts)
    engine.on_step = steps.append
    ask(engine, "a", 20, max_tokens=3, ignore_eos=True)
    clock.now += 1.0
    engine.step()
    for _ in range(2):
        clock.now += 0.5
        engine.step()
    (request, usage, reason, queue_s, ttft_s, total_s, gaps) = ends[0]
    assert request.id == "a" and usage.completion == 3 and reason == "length"
    assert (queue_s, ttft_s, total_s, gaps) == (1.0, 1.0, 2.0, [0.5, 0.5])
    assert [(s.prefill_rows, s.decode_rows, s.sequences) for s in steps] == [(20, 0, 1), (0, 1, 1), (0, 1, 1)]
    engine.on_finish = lambda *facts: 1 / 0
    heard = ask(engine, "b", 5, max_tokens=1)
    finish(engine)
    assert heard.finish in ("length", "stop") and "observer" in caplog.text


def test_whoever_has_an_answer_finds_it_counted():
    engine, ends, seen = engine_of(), [], []
    engine.on_finish = lambda *facts: ends.append(facts)
    engine.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=2)), lambda delta: seen.append((delta.finish is not None, len(ends))))
    engine.submit(Request("b", (1, 2, 3), SamplingParams(max_tokens=200)), lambda delta: seen.append((delta.finish is not None, len(ends))))
    engine.step()
    engine.cancel("b")
    finish(engine)
    assert [counted for last, counted in seen if last] == [1, 2]


def test_stop_tokens_and_min_tokens():
    engine = engine_of()
    free = ask(engine, "a", tokens(8, 1), max_tokens=12, ignore_eos=True)
    finish(engine)
    token = free.ids[3]
    first = free.ids.index(token)
    stopped = ask(engine, "b", tokens(8, 1), max_tokens=12, ignore_eos=True, stop_token_ids=(token,))
    later = ask(engine, "c", tokens(8, 1), max_tokens=12, ignore_eos=True, stop_token_ids=(token,), min_tokens=first + 2)
    finish(engine)
    assert stopped.finish == "stop" and stopped.ids == free.ids[: first + 1]
    assert len(later.ids) >= first + 2 and token not in later.ids[: first + 1]


def test_a_stop_text_ends_the_answer_before_it():
    engine = engine_of()
    free = ask(engine, "a", tokens(8, 3), max_tokens=30, ignore_eos=True)
    finish(engine)
    stop = free.text[4:7]
    heard = ask(engine, "b", tokens(8, 3), max_tokens=30, ignore_eos=True, stop=(stop, "never there"))
    finish(engine)
    assert heard.finish == "stop" and heard.text == free.text[: free.text.index(stop)] and len(heard.ids) < 30


def test_grammars_hold_and_end_the_answer():
    import json
    import signal

    engine = engine_of()
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
    a = ask(engine, "a", 8, held("lora-0"), max_tokens=60, grammar=Grammar("json_schema", json.dumps(schema)))
    b = ask(engine, "b", 8, max_tokens=60, grammar=Grammar("choice", '["ja", "nein"]'), temperature=1.0, seed=1, logprobs=2)
    c = ask(engine, "c", tokens(8, 1), max_tokens=6)
    finish(engine)
    assert a.finish == "stop" and json.loads(a.text)["n"] in (1, 22)
    assert b.finish == "stop" and b.text in ("ja", "nein") and b.tokens[0].logprob < 0 and len(b.tokens[0].top) == 2
    assert without_end(engine, c.ids) == solo("llama", tokens(8, 1), None, 6)
    slow = ask(engine, "s", 8, max_tokens=9, grammar=Grammar("regex", "[ab]{9}"), tenant="slow")
    while not slow.tokens:
        engine.step()
    engine.requests.by_id["s"].matcher.process.popen.send_signal(signal.SIGSTOP)  # its masks do not come any more
    beside = ask(engine, "x", tokens(8, 1), max_tokens=6)
    while not beside.finish:
        engine.step()
    assert without_end(engine, beside.ids) == without_end(engine, c.ids) and not slow.finish
    engine.requests.by_id["s"].matcher.process.popen.send_signal(signal.SIGCONT)
    wrong = ask(engine, "d", 8, grammar=Grammar("regex", "a(b"))
    nope = ask(engine, "e", 8, grammar=Grammar("json_schema", '{"type": "nope"}'))
    gone = ask(engine, "g", 8, grammar=Grammar("regex", "[ab]{9}"), tenant="slow")
    engine.cancel("g")
    finish(engine)
    assert slow.finish == "stop" and len(slow.text) == 9 and set(slow.text) <= {"a", "b"} and gone.finish == "cancelled"
    for heard in (wrong, nope):
        assert heard.finish == "error" and "cannot be followed" in str(heard.error) and heard.error.http_status == 400
    engine.close()


def test_the_engines_own_thread_serves_many_callers():
    engine = Engine(base_of("llama"), EngineConfig(kv_bytes=1 << 22, adapter_bytes=64 << 20))
    engine.start()
    assert sys.getswitchinterval() < 0.001, "a step waits so long for the interpreter, some hundred times"
    try:
        done: dict[str, Heard] = {}

        def caller(i):
            done[f"{i}"] = ask(engine, f"{i}", tokens(6 + i, i), held(CASES[i % len(CASES)]), max_tokens=8)

        threads = [threading.Thread(target=caller, args=(i,)) for i in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        late = engine.run([Request(f"late{i}", tuple(tokens(9, i)), SamplingParams(max_tokens=4)) for i in range(3)])
        assert engine.alive and engine.drain(30.0)
    finally:
        engine.close()
    assert not engine.alive
    engine.idle_check()
    for i in range(12):
        assert without_end(engine, done[f"{i}"].ids) == solo("llama", tokens(6 + i, i), held(CASES[i % len(CASES)]), 8)
    assert [without_end(engine, r.token_ids) for r in late] == [solo("llama", tokens(9, i), None, 4) for i in range(3)]


def test_a_bug_outside_a_forward_ends_the_open_requests_and_not_the_thread(monkeypatch, caplog):
    engine = Engine(base_of("llama"), EngineConfig(kv_bytes=1 << 22, adapter_bytes=1 << 20))
    schedule, broken = engine.scheduler.schedule, [True]

    def flaky(now):
        if broken:
            broken.pop()
            raise RuntimeError("a bug")
        return schedule(now)

    monkeypatch.setattr(engine.scheduler, "schedule", flaky)
    heard = ask(engine, "a", 5)
    engine.start()
    assert engine._until(lambda: heard.finish is not None, time.monotonic() + 10)
    after = engine.run([Request("b", (1, 2), SamplingParams(max_tokens=2))])
    engine.close()
    assert heard.finish == "error" and "a bug" in str(heard.error) and after[0].finish in ("length", "stop")


def test_running_a_list_gives_results_in_order_and_errors_in_place():
    engine = engine_of(max_queued=3)
    requests = [Request(f"{i}", tuple(tokens(4 + i, i)), SamplingParams(max_tokens=5, logprobs=1)) for i in range(10)]
    requests[4] = Request("4", (), SamplingParams())
    results = engine.run(requests)
    assert [r.usage.prompt for r in results] == [4, 5, 6, 7, 0, 9, 10, 11, 12, 13]
    assert results[4].finish == "error" and "empty" in str(results[4].error)
    for i, r in enumerate(results):
        if i != 4:
            assert without_end(engine, r.token_ids) == solo("llama", tokens(4 + i, i), None, 5) and len(r.logprobs) == len(r.token_ids)


def test_memory_is_divided_when_the_weights_are_packed(monkeypatch):
    base, asked = Base(tiny_model("llama"), tiny_tokenizer()), list[bool]()
    monkeypatch.setattr("trimtab.serve.config.available_bytes", lambda device: asked.append(packed) or 10**9)
    packed = False

    def path(self):
        nonlocal packed
        packed = True

    monkeypatch.setattr(Attached, "decode_path", property(path))
    engine = Engine(base, loader=AtOnce())
    assert asked == [True] and engine.stats().adapter_budget_bytes == 10**8
    told, spec = engine.memory(), base.spec
    assert told.kv_bytes == engine.stats().kv_blocks_total * 16 * 2 * spec.num_layers * spec.kv_width * 4
    assert told.weight_bytes == 4 * spec.num_parameters and told.total_bytes > told.weight_bytes + told.kv_bytes + told.adapter_bytes


def test_configs_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match="max_running = 0") as caught:
        EngineConfig(max_running=0, block_size=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="needs a row to decode"):
        EngineConfig(max_running=8, max_step_rows=4)
    with pytest.raises(ConfigError, match="one block of 16 tokens takes"):
        Engine(base_of("llama"), EngineConfig(kv_bytes=10), loader=AtOnce())
    with (
        monkeypatch.context() as patch,
        pytest.raises(OutOfMemory, match=r"0\.004 GB for keys and values and 6 GB for adapters") as refused,
    ):
        patch.setattr("trimtab.serve.config.most_bytes", lambda device: 5 * 10**9)
        Engine(base_of("llama"), EngineConfig(kv_bytes=4 * 10**6, adapter_bytes=6 * 10**9), loader=AtOnce())
    assert "keys and values of" in refused.value.fix and "--adapters-gb" in refused.value.fix
    torch.manual_seed(0)
    engine = Engine(base_of("llama"), loader=AtOnce())  # a share of what is free
    assert engine.stats().kv_blocks_total == 64 * 32 and engine.stats().adapter_budget_bytes > 1 << 20
