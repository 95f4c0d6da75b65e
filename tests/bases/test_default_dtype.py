"""torch's default dtype, which a program may have set, does not decide what a base is packed to."""

from __future__ import annotations

import pytest
import torch

from trimtab.bases.weights.four_bit import Fp4Double, Nf4Double


@pytest.mark.parametrize("cls", [Nf4Double, Fp4Double])
def test_four_bits(cls):
    """Kernels read its tables as fp32."""
    weight, before = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.get_default_dtype()

    def parts():
        return dict(cls.of_matrix(weight, None, torch.float32).state_dict())

    expected = parts()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = parts()
    finally:
        torch.set_default_dtype(before)
    assert expected.keys() == found.keys() and len(found) > 3
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
