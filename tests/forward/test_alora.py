"""aLoRA against peft: forward, gradients and files, in one mixed batch; where it is on; what it refuses."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch

from tests.laws.common import gradient_difference, noisy
from tests.store.common import tiny_base
from tests.tiny import tiny_model
from trimtab.data.examples import one_row
from trimtab.decode.cached import continue_prompts
from trimtab.errors import AdapterError, ConfigError, NotMergeable
from trimtab.forward.batch import Piece
from trimtab.forward.packs import Mix, last_occurrence
from trimtab.methods import LoraConfig
from trimtab.store import Adapter
from trimtab.store.combine import combine
from trimtab.store.compress import compress
from trimtab.store.export import export
from trimtab.train.measure import log_probabilities_of
from trimtab.train.samples import Sample

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
CALL = (61, 62, 63)
IDS = [
    [7, 250, *CALL, 3, 90, *CALL, 41, 12, 199],  # two calls: the last counts
    [1, 2, 3, 61, 62, 5],  # none
    [*CALL, 9, 9],
    [5, 4, 3, 2, 1, *CALL],  # at its end
]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base) -> Adapter:
    return noisy(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", alora_invocation_tokens=CALL), scale=0.3)


@pytest.fixture(scope="module")
def pefts(adapter, tmp_path_factory):
    """peft's model over the folder that trimtab wrote."""
    folder = tmp_path_factory.mktemp("alora")
    adapter.save(folder / "a")
    assert json.loads((folder / "a" / "adapter_config.json").read_text())["alora_invocation_tokens"] == list(CALL)
    return peft.PeftModel.from_pretrained(tiny_model("llama"), folder / "a", is_trainable=True), folder


def test_logits_are_pefts_in_a_mixed_batch(base, adapter, pefts):
    model, _ = pefts
    lora = noisy(base, LoraConfig(r=3))
    sequences = [*IDS, IDS[0], IDS[0]]
    got = base.logits(sequences, [*[adapter] * 4, None, lora])
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS]
    for g, w in zip(got, want, strict=False):
        assert float((g - w).abs().max()) < 1e-5
    assert torch.allclose(got[1], base.logits([IDS[1]])[0], atol=1e-6)
    assert torch.allclose(got[0][:7], got[4][:7], atol=1e-6) and float((got[0][7:] - got[4][7:]).abs().max()) > 1e-2
    assert torch.allclose(got[5], base.logits([IDS[0]], [lora])[0], atol=1e-5)


def test_a_peft_folder_is_read(base, adapter, pefts):
    model, folder = pefts
    model.save_pretrained(folder / "theirs")
    loaded = Adapter.load(folder / "theirs", base)
    assert loaded.method.invocation == CALL
    assert torch.allclose(base.logits([IDS[0]], [loaded])[0], base.logits([IDS[0]], [adapter])[0], atol=1e-6)


def test_gradients_are_pefts(base, adapter, pefts):
    """Of the sum of all tokens' losses, over sequences with and without a call, in one batch; the adapter is on in several spans."""
    model, _ = pefts
    params = {k: t.clone().requires_grad_() for k, t in adapter.params.items()}
    mix = Mix([base.attached.pack(adapter.method, params, adapter.sites)])
    batch = base.batch([Piece(torch.tensor(ids), 0) for ids in IDS], mix)
    assert [(s.start, s.stop) for s in batch.spans] == [(7, 13), (19, 24), (29, 32)]
    hidden = base.attached.forward(batch)
    logits = base.attached.head(hidden, batch, range(batch.total))
    loss = sum(
        torch.nn.functional.cross_entropy(logits[a : b - 1], torch.tensor(ids[1:]), reduction="sum")
        for (a, b), ids in zip(batch.where, IDS, strict=True)
    )
    loss.backward()
    model.zero_grad()
    for ids in IDS:
        out = model(input_ids=torch.tensor([ids])).logits[0]
        if out.requires_grad:
            torch.nn.functional.cross_entropy(out[:-1], torch.tensor(ids[1:]), reduction="sum").backward()
    theirs = {n.replace("base_model.model.", "").replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert theirs.keys() == params.keys()
    for name, want in theirs.items():
        assert gradient_difference(params[name].grad, want) < 1e-4, name


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ([7, *CALL, 3, 9, 10], [7, *CALL, 3, 11], 5),  # on from the shared part on, in both
        ([7, 8, 3, *CALL, 9], [7, 8, 3, 11, *CALL], 3),  # on after it, in both
        ([7, *CALL, 3, *CALL, 9], [7, *CALL, 3, 11], 5),  # off there in one alone: its rows are computed twice
        ([7, 8, 9], [7, 8, *CALL], 2),
    ],
)
def test_shared_beginnings_are_as_if_they_were_not(base, adapter, first, second, shared):
    mix, (member,) = base.mix([adapter])
    batch = base.batch([Piece(torch.tensor(first), member), Piece(torch.tensor(second[shared:]), member, shared=shared)], mix)
    with torch.no_grad():
        logits = base.attached.head(base.attached.forward(batch), batch, range(batch.total))
    (a, b), (c, d) = batch.where
    assert torch.allclose(logits[a:b], base.logits([first], [adapter])[0], atol=1e-5)
    assert torch.allclose(logits[c:d], base.logits([second], [adapter])[0][shared:], atol=1e-5)


def test_rows_that_are_computed_again_have_their_noise(base, adapter):
    first, second = [7, *CALL, 3, *CALL, 9], [7, *CALL, 3, 11]
    pieces = [Piece(torch.tensor(first), 0, noise=(1, 0.5)), Piece(torch.tensor(second[5:]), 0, shared=5, noise=(2, 0.25))]
    batch = base.batch(pieces, base.mix([adapter])[0])
    n = len(first)
    assert batch.noise == [(0, n, 1, 0.5), (n, n + len(second), 2, 0.25)]
    assert batch.where[1] == (n + 5, n + len(second))


def test_what_was_drawn_calls_nothing(base, adapter):
    """Answers that spell the call, of one prompt: log-probabilities are those of the cache that they were drawn from."""
    prompt, answers = [7, 8, *CALL, 3], [[9, *CALL, 5, 6], [9, 4, 2]]
    supervised = [np.arange(len(prompt) + len(a)) >= len(prompt) for a in answers]
    segments = [Sample(np.array(prompt + a, dtype=np.int32), s, "", (0, 0)) for a, s in zip(answers, supervised, strict=True)]
    mix, (member,) = base.mix([adapter])
    with torch.no_grad():
        got = log_probabilities_of(base.attached, mix, [(member, s) for s in one_row(segments).segments])
        for answer, mine in zip(answers, got.split([len(a) for a in answers]), strict=True):
            (fed,) = continue_prompts(base.attached, mix, [member], [torch.tensor(prompt)], [[(0, torch.tensor(answer))]])
            logits = fed.logits_of(range(*fed.batch.where[0])).float()
            want = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(answer)[1:, None])[:, 0]
            assert torch.allclose(mine[1:], want, atol=1e-5)


def test_generation_is_pefts(base, adapter, pefts):
    """What the prompt calls decides, also for what is generated; beside the base and others."""
    model, _ = pefts
    from trimtab.decode.generate import Sampling

    got = base.generate_ids([*IDS, IDS[0]], [*[adapter] * 4, None], Sampling(6))
    for ids, new in zip(IDS, got, strict=False):
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        assert new == out[: len(new)] and (len(new) == 6 or out[len(new)] in base.stop_ids)
    assert got[4] == base.generate_ids([IDS[0]], None, Sampling(6))[0]


def test_it_is_refused_where_it_would_be_on_everywhere(base, adapter, tmp_path):
    with pytest.raises(NotMergeable, match="off before its invocation"):
        adapter.merge_into(tmp_path / "m")
    other = noisy(base, LoraConfig(r=2))
    for refused in (lambda: combine([other, adapter]), lambda: compress(adapter, rank=2), lambda: export(adapter, tmp_path / "v", "vllm")):
        with pytest.raises(AdapterError, match="aLoRA"):
            refused()
    for wrong in ({"use_dora": True}, {"modules_to_save": ("lm_head",)}, {"alora_invocation_tokens": (-1,)}):
        with pytest.raises(ConfigError, match="alora_invocation_tokens"):
            LoraConfig(**{"alora_invocation_tokens": CALL} | wrong)
    for wrong, words in (({"alora_invocation_tokens": (10_000,)}, "no token"), ({"target_modules": ("embed_tokens",)}, "embedding")):
        with pytest.raises(ConfigError, match=words):
            Adapter.create(base, LoraConfig(**{"alora_invocation_tokens": CALL} | wrong))


def test_the_last_occurrence_is_found():
    for ids, want in (([1, 1, 1], 1), ([1, 1, 2, 1, 1], 3), ([1], 1), ([], 0), ([2, 1, 2], 3), ([1, 1], 0)):
        assert last_occurrence((1, 1), ids) == want
