"""/v1/embeddings through the official client, against transformers' hidden states and peft's adapter."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.http.common import BASE, Site, error_of, post
from tests.http.test_scoring import NEAR, folders, served, theirs
from tests.tiny import tiny_tokenizer

__all__ = ["folders", "served", "theirs"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
PATH, TEXTS = "/v1/embeddings", ["hello you", "x", "The quick brown fox"]


def embedded(s: Site, **body: Any) -> Any:
    async def run() -> Any:
        transport = httpx.ASGITransport(app=s.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)
            return await client.embeddings.create(**({"model": BASE, "input": TEXTS} | body))

    return asyncio.run(run())


@torch.no_grad()
def wanted(model: Any, text: str, pooling: str) -> torch.Tensor:
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return hidden.mean(0) if pooling == "mean" else hidden[-1]


@pytest.mark.parametrize("model", [BASE, "lora", "ia3"])
def test_vectors_are_hidden_states(served: Site, theirs: dict[str, Any], model: str):
    """The client asks for base64 by itself, and decodes it."""
    for pooling in ("mean", "last"):
        told = embedded(served, model=model, extra_body={"pooling": pooling})
        assert [d.index for d in told.data] == [0, 1, 2] and told.usage.prompt_tokens == sum(map(len, TEXTS)) == told.usage.total_tokens
        plain = embedded(served, model=model, encoding_format="float", extra_body={"pooling": pooling, "normalize": True})
        for text, one, unit in zip(TEXTS, told.data, plain.data, strict=True):
            want = wanted(theirs[model], text, pooling)
            assert (torch.tensor(one.embedding) - want).abs().max() < NEAR
            assert (torch.tensor(unit.embedding) - want / want.norm()).abs().max() < NEAR
    assert embedded(served, model=model, input=TEXTS[0]).data[0].embedding == embedded(served, model=model).data[0].embedding


def test_many_texts_and_ids(served: Site):
    ids = [[7] * (1 + i % 5) for i in range(70)]
    many = embedded(served, input=ids)
    assert len(many.data) == 70 and many.usage.prompt_tokens == sum(map(len, ids))
    assert torch.allclose(torch.tensor(many.data[3].embedding), torch.tensor(many.data[68].embedding), atol=NEAR)


def test_more_texts_than_a_tenant_may_have_answers(served: Site, monkeypatch: pytest.MonkeyPatch):
    whole = embedded(served, input=["x", "ab", "x"] * 5)
    monkeypatch.setattr(served.services.admission, "max_open", 4)
    some = embedded(served, input=["x", "ab", "x"] * 5)
    assert [d.index for d in some.data] == list(range(15)) and some.usage == whole.usage
    assert torch.allclose(*(torch.tensor([d.embedding for d in told.data]) for told in (some, whole)), atol=NEAR)


def test_vectors_that_are_no_numbers_are_an_error(served: Site, monkeypatch: pytest.MonkeyPatch):
    body = served.engine.base.attached.__class__.forward
    monkeypatch.setattr(served.engine.base.attached.__class__, "forward", lambda self, batch: body(self, batch) * float("nan"))
    assert "not finite" in error_of(post(served.app, PATH, {"model": BASE, "input": "hello"}), 500)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 3}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["x", "y" * 10_000]}, "input[1]"),
        ({"input": [[1, 300]]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"pooling": "max"}, "pooling"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"model": "nothing"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_named(served: Site, fields: dict[str, Any], param: str):
    error = error_of(post(served.app, PATH, {"model": BASE, "input": "x"} | fields), 404 if "model" in fields else 400)
    assert (error["param"] or "").startswith(param), error
    size = served.services.hidden_size
    assert post(served.app, PATH, {"model": BASE, "input": "x", "dimensions": size, "user": 3}).status_code == 200
