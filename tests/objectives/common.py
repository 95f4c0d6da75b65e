"""A run beside another library's loss: peft's model of the variant's adapter, trained plainly with torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.common import metrics
from trimtab.train import Report


def trained(model: Any) -> dict[str, Any]:
    """The tensors of peft's that train, under trimtab's names."""
    return {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def take_on(model: Any, params: Mapping[str, Tensor]) -> None:
    for key, p in trained(model).items():
        p.copy_(params[key])


def ten_steps(model: Any, loss_of: Callable[[int], Tensor]) -> list[float]:
    """The loss of each step, which trains the model in place. loss_of: the loss of an epoch, which is one step."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=5e-3, weight_decay=0.1), []
    for epoch in range(10):
        loss = loss_of(epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_run(report: Report, losses: list[float], model: Any, abs: float | None = None) -> None:
    """Variant v had these losses, and its tensors are now the model's."""
    assert [line["loss"] for line in metrics(report)["v"]] == pytest.approx(losses, rel=1e-4, abs=abs)
    for key, p in trained(model).items():
        assert float((report.adapters["v"].params[key] - p.detach()).norm() / p.detach().norm()) < 1e-4, key
