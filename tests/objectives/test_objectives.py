"""The contract of objectives over the registry, and the kernel that all of them share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from trimtab.bases.weights import weight_of
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES, Counts, Segments, Sft
from trimtab.ops import loss as kernels
from trimtab.train.options import TrainOptions


def segments(*targets: int, roles: tuple[str, ...] = ()) -> Segments:
    """Some rows of an optimizer step with twice as many, and three more targets."""
    roles = roles or ("",) * len(targets)
    return Segments(roles, targets, Counts(2 * len(targets), sum(targets) + 3), torch.device("cpu"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_that_are_known_beforehand_are_the_gradient_of_the_loss(name: str) -> None:
    objective, s = OBJECTIVES[name](), segments(3, 1, 4)
    logp_R = -torch.rand(8, requires_grad=True)
    if (weights := objective.nll_weights(s)) is None:
        return
    loss, metrics = objective.loss(logp_R, None, s)
    (gradient,) = torch.autograd.grad(loss, logp_R)
    torch.testing.assert_close(weights, -gradient)
    torch.testing.assert_close(loss, -(weights * logp_R).sum())
    assert metrics == {}, "what is known beforehand reports nothing else"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fields_stand_beside_those_of_methods_and_options(name: str) -> None:
    own = {f.name for f in dataclasses.fields(OBJECTIVES[name])}
    others = {f.name for method in BY_NAME.values() for f in dataclasses.fields(method)}
    assert own.isdisjoint(others | set(TrainOptions.model_fields) | {"data", "method", "objective"})


def test_sft_by_hand() -> None:
    # targets of two rows: log p = −1, −2 and −3; the step has 3 + 3 targets: (1 + 2 + 3) / 6
    loss, metrics = Sft().loss(torch.tensor([-1.0, -2.0, -3.0]), None, segments(2, 1))
    assert (float(loss), metrics) == (1.0, {})
    assert Sft().report(0.0, {}) == {"loss": 0.0, "perplexity": 1.0}


def test_sums_and_roles() -> None:
    s = segments(2, 1, 3, 1, roles=("chosen", "rejected", "chosen", "rejected"))
    assert s.sums(torch.arange(7.0)).tolist() == [1.0, 2.0, 12.0, 6.0]
    assert (s.having("chosen"), s.having("rejected")) == ([0, 2], [1, 3])


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["", "softcap"])
@pytest.mark.parametrize("rows", [4, 1024])
def test_log_probabilities_and_their_backward(rows: int, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own, for any gradient of the vector; in chunks as in one."""
    monkeypatch.setattr(kernels, "LOSS_ROWS", rows)
    torch.manual_seed(0)
    head, target_R, weight_R = nn.Linear(6, 11, bias=bias).requires_grad_(False), torch.arange(10) % 11, torch.randn(10)
    hidden_RH = (3 * torch.randn(10, 6)).requires_grad_()
    logits = head(hidden_RH)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    want_R = torch.log_softmax(logits, -1).gather(1, target_R[:, None]).squeeze(1)
    got_R = kernels.log_probabilities(hidden_RH, weight_of(head), head.bias, target_R, softcap)
    torch.testing.assert_close(got_R, want_R)

    def gradient(logp_R: Tensor) -> Tensor:
        return torch.autograd.grad((weight_R * logp_R).sum() + (logp_R[3] * logp_R[7]), hidden_RH, retain_graph=True)[0]

    torch.testing.assert_close(gradient(got_R), gradient(want_R))
    total, nll_R = kernels.supervised_loss(hidden_RH, weight_of(head), head.bias, target_R, weight_R, softcap)
    assert torch.equal(nll_R, -got_R), "both ways form the same numbers"
    torch.testing.assert_close(torch.autograd.grad(total, hidden_RH)[0], -torch.autograd.grad((weight_R * want_R).sum(), hidden_RH)[0])
