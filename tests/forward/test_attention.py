"""What a model hands to its attention beside queries, keys and values: accepted where it asks for nothing, else refused by name and value.

transformers hands over other names in every version, so these are names that no version has.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from tests.laws.common import difference, plain_of, tokens
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.errors import BaseError
from trimtab.forward import attention, kv_cache
from trimtab.model import Base

FAMILIES = ["llama", "gemma2", "gpt2"]
"""llama's attention is computed by `fast`; the others' own modules call the interface; gpt2 in a module of another kind."""
IDS = tokens(11, 3)


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 12), torch.zeros(1, 2, 3, 12), 0)
    return cache


NOTHING = {
    "none": None,
    "off": False,
    "zero": 0,
    "zero_float": 0.0,
    "empty": (),
    "empty_mapping": {},
    "no_rows": torch.empty(0, 4),
    "new_cache": DynamicCache(),
    "output_gates": True,
    "return_scores": True,
    "use_cache": True,
    "use_causal": True,
    "new_scale": None,
}
CHANGES = [
    ("sinks", torch.zeros(4), "sinks=a tensor [4]"),
    ("temperature", 0.5, "temperature=0.5"),
    ("kind", "chunked", "kind='chunked'"),
    ("gate", True, "gate=True"),
    ("is_causal", False, "is_causal=False"),
    ("use_causal", 0, "use_causal=0"),
    ("new_scale", 0.0, "new_scale=0.0"),
    ("heads", [1], "heads=a list"),
    ("bias_fn", len, "bias_fn=a builtin_function_or_method"),
]


def handing(family, arguments):
    """A base whose layers hand these arguments to their attention."""
    base = Base(tiny_model(family), tiny_tokenizer())
    for layer in base.spec.layers:
        attend = base.model.get_submodule(layer.attention)
        forward = attend.forward
        attend.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs, **arguments)
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_that_ask_for_nothing_change_nothing(family):
    arguments = {name: value for name, value in NOTHING.items() if name != "use_cache"}
    with torch.no_grad():
        want = plain_of(family)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert difference(handing(family, arguments).logits([IDS])[0], want) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "value", "words"), CHANGES, ids=[c[2] for c in CHANGES])
def test_an_argument_that_may_change_the_result_is_refused_by_name_and_value(family, name, value, words):
    with pytest.raises(BaseError) as refusal:
        handing(family, {name: value, "none": None}).logits([IDS])
    assert f"asks for {words}, which" in str(refusal.value) and "trimtab doctor" in str(refusal.value)


def test_a_filled_cache_is_refused_where_it_has_not_been_read_yet():
    with pytest.raises(BaseError, match=r"asks for new_cache=a DynamicCache, which"):
        handing("llama", {"new_cache": filled_cache()}).logits([IDS])


def interface(keys=5, mask=None, **arguments):
    """The function that transformers calls, on five random rows."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 4, keys, 8)
    plan = attention.AttentionPlan([kv_cache.Run(0, 5, ((0, 5),))], torch.device("cpu"))
    return q, k, attention.forward(SimpleNamespace(layer_idx=0), q, k, k, mask, trimtab_plan=plan, **arguments)[0]


def test_the_interface_takes_a_cache_that_the_model_has_already_read():
    q, k, got = interface(layer_cache=filled_cache(), **NOTHING)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert difference(got[0], want[0].transpose(0, 1)) <= 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keys": 8}, "cached_keys=3"),
        ({"mask": torch.ones(1, 1, 5, 5)}, r"attention_mask=a tensor \[1, 1, 5, 5\]"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"dropout": 0.1, "sinks": "x"}, "dropout=0.1, sinks='x'"),
    ],
)
def test_the_interface_refuses_what_it_would_leave_out(arguments, words):
    with pytest.raises(BaseError, match=f"asks for {words}, which"):
        interface(**arguments)
