"""The sums that tell on a device whether weights have changed: a bit anywhere, in any dtype, is seen; a copy is not a change."""

from __future__ import annotations

import pytest
import torch

from tests.laws.standin import on_device, standin
from tests.tiny import tiny_model
from trimtab.bases import fingerprint_model
from trimtab.bases.unchanged import Watch, random_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 33)])
def test_every_bit_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = random_sum(t, 7)
    assert random_sum(t.clone(), 7) == before
    raw = t.view(-1).view(torch.uint8)
    for place in {0, len(raw) // 2, len(raw) - 1}:
        for bit in range(1 if dtype == torch.bool else 8):
            raw[place] ^= 1 << bit
            assert random_sum(t, 7) != before
            raw[place] ^= 1 << bit
    assert random_sum(t, 7) == before


def test_the_sum_is_that_of_a_plain_loop() -> None:
    t = torch.randn(11, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(-(2**63), 2**63 - 1, (11,), generator=generator, dtype=torch.int64).tolist()
    want = sum(w * r for w, r in zip(t.view(torch.int32).tolist(), numbers, strict=True))
    assert int(random_sum(t, 3)) % 2**64 == want % 2**64


def test_a_model_on_a_device_is_hashed_once_and_waited_for_once() -> None:
    with standin() as device:
        model = on_device(tiny_model("qwen2", dtype=torch.bfloat16))
        watch = Watch(model)
        with device.counted() as costs:
            assert watch.now(model) == watch.before == fingerprint_model(tiny_model("qwen2", dtype=torch.bfloat16))
        assert costs.syncs == 1 and not costs.to_host
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.25
        assert watch.now(model) == fingerprint_model(model) != watch.before
