"""Two tenants, one of which calls tools whose schemas take long: the other's plain request has a row in each step."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest

from tests.http.common import BASE, Site, post, site
from tests.http.test_tools import base_with
from trimtab.http.schema import ChatBody
from trimtab.http.tools import sampled, tools_in
from trimtab.http.words import words_of
from trimtab.serve.grammars import Grammars
from trimtab.serve.request import Delta, Request, SamplingParams

HOSTILE = {"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(40)}}
TOOLS = [{"type": "function", "function": {"name": f"f{i}", "parameters": HOSTILE}} for i in range(2)]
CALL = {"model": BASE, "messages": [{"role": "user", "content": "go " * 20}], "tools": TOOLS, "max_tokens": 40, "temperature": 1.0}
NEW = 8


def steps_of(s: Site, name: str) -> list[tuple[int, int]]:
    """(rows of the victim, of all) in each step while its request is open."""
    found, done, schedule = list[tuple[int, int]](), Event(), s.engine.scheduler.schedule

    def watched(now: float) -> Any:
        work = schedule(now)
        if name in s.engine.requests.by_id:
            rows = [(w.live.request.tenant, w.rows + len(w.drafts)) for w in work]
            found.append((sum(n for tenant, n in rows if tenant == "victim"), sum(n for _, n in rows)))
        return work

    def sink(delta: Delta) -> None:
        if delta.finish is not None:
            done.set()

    s.engine.scheduler.schedule = watched  # type: ignore[method-assign]
    prompt = tuple(s.engine.base.encode("The harbour at dawn"))
    s.engine.submit(Request(name, prompt, SamplingParams(max_tokens=NEW, ignore_eos=True), tenant="victim", cache_salt=name), sink)
    assert done.wait(60)
    s.engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_plain_request_beside_hostile_tools_takes_its_own_steps(choice: str) -> None:
    with site(base=base_with("qwen2_5"), kv_bytes=64 << 20) as s, ThreadPoolExecutor(6) as pool:
        alone = steps_of(s, "alone")
        answers = [pool.submit(post, s.app, "/v1/chat/completions", CALL | {"tool_choice": choice, "seed": i}) for i in range(6)]
        while not len(s.engine.requests):
            assert not all(a.done() for a in answers)
        beside = [steps_of(s, f"beside{i}") for i in range(2)]
        assert all(a.result().status_code in (200, 400) for a in answers)
    most = s.engine.scheduler.bounds.recent_rows
    for found in beside:
        with_rows = [f for f in found if f[0]]
        assert len(with_rows) <= len([f for f in alone if f[0]]) + 2  # its prompt may take turns
        assert len(found) - len(with_rows) <= 2, "steps went by without a row of the one that waits"
        assert max(all_rows for _, all_rows in with_rows[1:]) <= most


def many_tools(count: int) -> list[dict[str, Any]]:
    """As frameworks write them of functions: titles, descriptions and defaults are most of it."""
    text = {"type": "string", "title": "Query", "description": "What to look for, in plain words. " * 4}
    fields: dict[str, Any] = {
        "query": text,
        "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 10, "title": "Limit", "description": "At most so many."},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "title": "Unit"},
        "since": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}], "default": None, "title": "Since"},
        "near": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}, "of": text}, "required": ["x"]}},
    }
    schema = {"type": "object", "title": "Arguments", "properties": fields, "required": ["query", "limit"], "additionalProperties": False}
    return [{"type": "function", "function": {"name": f"tool_number_{i}", "parameters": schema}} for i in range(count)]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_5_think", "llama3", "gptoss"])
def test_as_many_ordinary_tools_as_a_request_may_have_can_be_forced(template: str) -> None:
    """Their grammar is within the limits of its process, and follows a call of the last one."""
    base = base_with(template)
    words = words_of(base)
    body = ChatBody.model_validate({"model": BASE, "messages": [{"role": "user", "content": "x"}], "tools": many_tools(128)})
    body = body.model_copy(update={"tool_choice": "required"})
    sampling = sampled(SamplingParams(max_tokens=9), tools_in(body, words), words, base.encode("x"))
    assert sampling.grammar is not None and sampling.grammar.trigger is None
    form = words.answers.calls
    assert form is not None
    t, given = form.tagged, {"query": "harbour", "limit": 7}
    said = json.dumps(given) if t is None else "".join(t.key + key + t.value + str(value) + t.close for key, value in given.items())
    call = form.before + "tool_number_127" + form.middle + said + form.after
    ids = base.tokenizer(call, add_special_tokens=False)["input_ids"]
    grammars = Grammars(base.tokenizer, words.vocab_size, base.stop_ids)
    try:
        matcher = grammars.matcher(sampling.grammar)
        assert grammars.wait([matcher], 60) == {matcher} and not matcher.error
        for i, token in enumerate(ids):
            assert np.unpackbits(np.frombuffer(matcher.mask, dtype=np.uint8), bitorder="little")[token], call[: i + 1]
            matcher.advance(token)
            assert grammars.wait([matcher], 60) == {matcher} and not matcher.error
    finally:
        grammars.shutdown()
