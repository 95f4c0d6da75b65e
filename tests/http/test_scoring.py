"""Scoring over HTTP: echo, log-probabilities of prompts, biases, several answers of which the best are told. The reference is transformers'
own forward and tokenizer, and peft's adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.http.common import BASE, CHAT, TEXT, Site, adapter_folders, base_of, call, error_of, events, post, site
from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer
from trimtab.http.assemble import Asked

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
PATH, CHAT_PATH, NEAR = "/v1/completions", "/v1/chat/completions", 1e-4
IDS = [list(b"The quick brown fox"), list(b"The quick brown bear!"), list(b"no")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return adapter_folders(tmp_path_factory.mktemp("adapters"), base_of())


@pytest.fixture(scope="module")
def served(folders: dict[str, str]) -> Iterator[Site]:
    with site(Asked(adapters=folders)) as s:
        yield s
        s.idle()


@pytest.fixture(scope="module")
def theirs(folders: dict[str, str]) -> dict[str, Any]:
    """The same models in the hands of transformers and peft."""
    return {BASE: tiny_model("llama"), **{n: peft.PeftModel.from_pretrained(tiny_model("llama"), f) for n, f in folders.items()}}


@torch.no_grad()
def wanted(model: Any, ids: list[int]) -> torch.Tensor:
    """log p [T - 1, V] of what follows each token but the last."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)[:-1]


def near(found: list[float], want: torch.Tensor) -> bool:
    return bool((torch.tensor(found).double() - want).abs().max() < NEAR)


@pytest.mark.parametrize("model", [BASE, "lora", "ia3"])
@pytest.mark.parametrize("concurrent", [False, True])
def test_lm_evals_loglikelihood_requests(served: Site, theirs: dict[str, Any], model: str, concurrent: bool):
    """The requests of its `local-completions`, and what it reads from the answers, against what its `hf` model computes with `peft=`:
    the sum of log-probabilities of the continuation, and whether it is the greedy one."""
    greedy = int(wanted(theirs[model], IDS[0])[-1].argmax())
    asked = [*IDS, [*IDS[0][:-1], greedy]]
    contexts = [10, 17, 1, len(IDS[0]) - 1]
    body = {"model": model, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    batches = [[ids] for ids in asked] if concurrent else [asked]
    choices = [c for b in batches for c in post(served.app, PATH, body | {"prompt": b}).json()["choices"]]
    for choice, ids, context in zip(choices, asked, contexts, strict=True):
        told = choice["logprobs"]
        found, top = told["token_logprobs"][context:-1], told["top_logprobs"][context:-1]
        want = wanted(theirs[model], ids)[context - 1 :]
        own = want.gather(1, torch.tensor(ids[context:])[:, None])[:, 0]
        assert abs(sum(found) - float(own.sum())) < NEAR and near(found, own)
        is_greedy = all(lp == max(t.values()) for lp, t in zip(found, top, strict=True))
        assert is_greedy == bool((want.argmax(-1) == torch.tensor(ids[context:])).all())
    assert is_greedy


def test_echo_and_no_new_tokens(served: Site, theirs: dict[str, Any]):
    ids = served.services.words.encode_text("hello you", True)
    plain, bare = (post(served.app, PATH, TEXT | {"prompt": "hello you", "max_tokens": n}).json() for n in (6, 0))
    assert bare["choices"][0] == {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
    assert bare["usage"]["completion_tokens"] == 0 and bare["usage"]["prompt_tokens"] == len(ids)
    body = TEXT | {"prompt": ["hello you", "x"], "echo": True, "n": 2}
    echoed = [c["text"] for c in post(served.app, PATH, body).json()["choices"]]
    assert echoed[:2] == ["hello you" + plain["choices"][0]["text"]] * 2 and echoed[2] == echoed[3] and echoed[3][0] == "x"
    scored = post(served.app, PATH, body | {"max_tokens": 0, "logprobs": 2}).json()["choices"]
    assert [c["text"] for c in scored] == ["hello you"] * 2 + ["x"] * 2 and scored[0]["logprobs"] == scored[1]["logprobs"]
    told, want = scored[0]["logprobs"], wanted(theirs[BASE], ids)
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None and told["tokens"] == list("hello you")
    assert near(told["token_logprobs"][1:], want.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    assert all(near(sorted(t.values())[-2:], w.topk(2).values.flip(0)) for t, w in zip(told["top_logprobs"][1:], want, strict=True))
    assert told["text_offset"] == list(range(9))
    by_ids = post(served.app, PATH, TEXT | {"prompt": [[EOS_ID, *ids[:2]]], "echo": True, "max_tokens": 0}).json()["choices"][0]
    assert by_ids["text"] == tiny_tokenizer().convert_ids_to_tokens(EOS_ID) + "he"


def test_a_streamed_echo_is_the_whole_one(served: Site):
    body = TEXT | {
        "prompt": ["hello you", "x"],
        "echo": True,
        "n": 2,
        "logprobs": 1,
        "seed": 3,
        "temperature": 1.0,
        "return_token_ids": True,
    }
    whole = post(served.app, PATH, body).json()["choices"]
    streamed = events(post(served.app, PATH, body | {"stream": True}).text)[:-1]
    for i, choice in enumerate(whole):
        mine = [c for e in streamed for c in e["choices"] if c["index"] == i]
        assert "".join(c["text"] for c in mine) == choice["text"] and mine[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            told = [v for c in mine if c["logprobs"] for v in c["logprobs"][name]]
            assert [v and pytest.approx(v, abs=NEAR) for v in values] == told if name.endswith("logprobs") else told == values
        assert [t for c in mine for t in c["token_ids"]] == choice["token_ids"]
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [choice["prompt_token_ids"]]


def test_prompt_logprobs_have_vllms_shape(served: Site, theirs: dict[str, Any]):
    text = post(served.app, PATH, TEXT | {"model": "lora", "prompt_logprobs": 2, "max_tokens": 1}).json()["choices"][0]
    chat = post(served.app, CHAT_PATH, CHAT | {"model": "lora", "prompt_logprobs": 0, "max_tokens": 1, "return_token_ids": True}).json()
    ids = served.services.words.encode_text("hello", True)
    for told, tokens, most in ((text["prompt_logprobs"], ids, 2), (chat["prompt_logprobs"], chat["prompt_token_ids"], 0)):
        want = wanted(theirs["lora"], tokens)
        assert told[0] is None and len(told) == len(tokens)
        for row, token, entry in zip(want, tokens[1:], told[1:], strict=True):
            best = row.topk(most).indices.tolist()
            assert set(entry) == {str(i) for i in {*best, token}}
            assert near([e["logprob"] for e in entry.values()], row[[int(i) for i in entry]])
            assert all(e["rank"] == 1 + int((row > row[int(i)]).sum()) for i, e in entry.items())
            assert entry[str(token)]["decoded_token"] == served.services.words.piece(token).decode("utf-8", "replace")
    assert chat["choices"][0]["token_ids"] and "token_ids" not in text


def test_the_best_of_several_are_told(served: Site):
    body = TEXT | {"temperature": 1.5, "seed": 7, "max_tokens": 5, "ignore_eos": True}
    every = post(served.app, PATH, body | {"n": 6, "logprobs": 0}).json()
    best = post(served.app, PATH, body | {"n": 2, "best_of": 6}).json()
    ranked = sorted(every["choices"], key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]] and best["choices"][0]["logprobs"] is None
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 30 and best["usage"]["prompt_tokens"] == every["usage"]["prompt_tokens"]


def test_biases_ids_for_tokens_and_control_tokens(served: Site):
    for path, body in ((PATH, TEXT | {"logprobs": 0}), (CHAT_PATH, CHAT | {"logprobs": True})):
        told = post(served.app, path, body | {"logit_bias": {"65": 100}, "max_tokens": 3, "return_tokens_as_token_ids": True}).json()
        logprobs = told["choices"][0]["logprobs"]
        assert (logprobs["tokens"] if path == PATH else [c["token"] for c in logprobs["content"]]) == ["token_id:65"] * 3
    ended = TEXT | {"logit_bias": {str(EOS_ID): 100}, "max_tokens": 3, "skip_special_tokens": False}
    texts = [post(served.app, PATH, ended | more).json()["choices"][0]["text"] for more in ({}, {"include_stop_str_in_output": True})]
    assert texts == ["", tiny_tokenizer().convert_ids_to_tokens(EOS_ID)]
    letter = TEXT | {"logit_bias": {"65": 100}, "stop": "bb", "max_tokens": 5}
    texts = [post(served.app, PATH, letter | more).json()["choices"][0]["text"] for more in ({}, {"include_stop_str_in_output": True})]
    assert texts == ["", "bb"]


@pytest.mark.parametrize("last", ["The answer is", "so ", " two\n"])
def test_an_answer_goes_on_with_the_last_message(served: Site, last: str):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": last}]
    options = {"messages": talk, "continue_final_message": True, "add_generation_prompt": False}
    want = tiny_tokenizer().apply_chat_template(talk, continue_final_message=True, return_dict=False)
    assert post(served.app, "/tokenize", options).json()["tokens"] == want
    answer = post(served.app, CHAT_PATH, CHAT | options).json()["choices"][0]["message"]["content"]
    assert answer == post(served.app, PATH, TEXT | {"prompt": want}).json()["choices"][0]["text"]
    echoed = post(served.app, CHAT_PATH, CHAT | options | {"echo": True}).json()["choices"][0]["message"]["content"]
    stream = events(post(served.app, CHAT_PATH, CHAT | options | {"echo": True, "stream": True}).text)[:-1]
    assert echoed == last + answer == "".join(c["delta"].get("content", "") for e in stream for c in e["choices"])


def test_a_conversation_as_it_stands_and_a_text_without_a_start(served: Site):
    talk = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    told = post(served.app, "/tokenize", {"messages": talk[1:], "add_generation_prompt": False}).json()["tokens"]
    assert told == tiny_tokenizer().apply_chat_template(talk[1:], return_dict=False)
    ends = post(served.app, "/tokenize", {"messages": talk, "add_generation_prompt": False}).json()["tokens"]
    assert ends.count(tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")) == 2, "what a message spells is text"
    wrong = {"messages": talk, "continue_final_message": True, "add_generation_prompt": True}
    assert "excludes it" in error_of(post(served.app, "/tokenize", wrong), 400)["message"]
    bare = post(served.app, "/tokenize", {"prompt": "a", "add_special_tokens": False}).json()["tokens"]
    assert bare == tiny_tokenizer()("a", add_special_tokens=False).input_ids


def test_what_is_asked_of_prompts_is_bounded_before_it_is_computed(served: Site):
    limit = served.services.limits.logprobs
    prompts = [[7] * 60] * 64
    error = error_of(post(served.app, PATH, TEXT | {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": 200}), 400)
    assert error["param"] == "logprobs" and str(limit) in error["message"]
    error = error_of(post(served.app, CHAT_PATH, CHAT | {"prompt_logprobs": 21}), 400)
    assert error["param"] == "prompt_logprobs"
    assert call(served.app, "GET", "/metrics").status_code == 200
