"""The laws run over the registry, so the registry must not be empty, and everything that they compare must do something."""

import pytest

from tests.laws.common import CASES, EXAMPLES, REQUIRED, adapter_of, base_of, difference, plain_of, tokens
from tests.laws.plain import PLAIN, plain_logits
from tests.tiny import FAMILIES
from trimtab.methods import METHODS


def test_the_registry_holds_every_method():
    assert set(METHODS) >= REQUIRED
    assert all(cls.examples() for cls in METHODS.values()), "a method without examples is under no law"
    assert len(EXAMPLES) == sum(len(cls.examples()) for cls in METHODS.values())
    assert set(PLAIN) == set(METHODS), "tests/laws/plain.py holds each method once more, written plainly: add the new one"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_adapter_changes_the_logits_clearly(family, case):
    base, ids = base_of(family), tokens(12, 1)
    with_adapter, without = base.logits([ids, ids], [adapter_of(family, case), None])
    assert difference(with_adapter, without) > 0.02


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_method_equals_its_plain_form(family, case):
    """The mixed forward of one adapter against hooks on transformers' own model: an independent second writing of each formula."""
    ids, adapter = tokens(21, 2), adapter_of(family, case)
    assert difference(base_of(family).logits([ids], [adapter])[0], plain_logits(plain_of(family), adapter, ids).detach()) < 1e-5
