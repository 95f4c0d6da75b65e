"""The contract of objectives over the registry, and the kernel that all of them share."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.bases.weights import weight_of
from trimtab.data import Example
from trimtab.errors import ConfigError
from trimtab.methods import BY_NAME
from trimtab.objectives import OBJECTIVES, Counts, Segments, Sft
from trimtab.objectives.cpo import Cpo
from trimtab.objectives.dpo import Dpo
from trimtab.objectives.kto import Kto
from trimtab.objectives.orpo import Orpo
from trimtab.objectives.simpo import Simpo
from trimtab.ops import loss as kernels
from trimtab.train.options import TrainOptions


def segments(*targets: int, roles: tuple[str, ...] = ()) -> Segments:
    """Some rows of an optimizer step with twice as many, and three more targets."""
    roles = roles or ("",) * len(targets)
    return Segments(roles, targets, Counts(2 * len(targets), sum(targets) + 3), torch.device("cpu"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_that_are_known_beforehand_are_the_gradient_of_the_loss(name: str) -> None:
    objective, s = OBJECTIVES[name].some(), segments(3, 1, 4)
    logp_R = -torch.rand(8, requires_grad=True)
    weights = objective.nll_weights(s)
    assert (weights is not None) == (name == "sft")
    if weights is None:
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


BY_HAND = {
    # log p of two tokens of the chosen answer and one of the rejected: −1, −2 | −4; the base's: −2, −2.5 | −3.5. So c = 1.5 and r = −0.5,
    # Δ = 2, the means over tokens −1.5 and −4; the step has twice the rows and tokens of these
    "sigmoid": (Dpo(beta=0.5), 0.313262 / 2),  # −log σ(1)
    "hinge": (Dpo(beta=0.2, loss_type="hinge"), 0.6 / 2),
    "ipo": (Dpo(beta=0.5, loss_type="ipo"), (1.25 - 1.0) ** 2 / 2),  # 1.5 / 2 − (−0.5) = 1.25
    "exo_pair": (Dpo(beta=0.5, loss_type="exo_pair", label_smoothing=0.5), 0.110944 / 2),  # log 2 less the entropy of σ(1)
    "nca_pair": (Dpo(beta=2.0, loss_type="nca_pair"), (0.048587 + 1.524294 + 0.156631) / 2),
    "robust": (Dpo(beta=0.5, loss_type="robust", label_smoothing=0.25), (0.75 * 0.313262 - 0.25 * 1.313262) / 0.5 / 2),
    "bco_pair": (Dpo(beta=2.0, loss_type="bco_pair"), (0.048587 + 0.313262) / 2),
    "sppo_hard": (Dpo(beta=0.5, loss_type="sppo_hard"), (0.5**2 + 0.5**2) / 2),
    "apo_zero": (Dpo(beta=2.0, loss_type="apo_zero"), (1 - 0.952574 + 0.268941) / 2),
    "apo_down": (Dpo(beta=0.5, loss_type="apo_down"), (0.679179 + 1 - 0.731059) / 2),
    "discopop": (Dpo(beta=0.5, loss_type="discopop", discopop_tau=1.0), (0.313262 * 0.268941 + 0.367879 * 0.731059) / 2),
    "sigmoid_norm": (Dpo(beta=0.8, loss_type="sigmoid_norm"), 0.313262 / 2),
    "sft": (Dpo(beta=0.5, loss_type=("sigmoid", "sft"), loss_weights=(2.0, 0.5)), 2 * 0.313262 / 2 + 0.5 * 3 / 4),
    "cpo": (Cpo(beta=1.0), 0.313262 / 2 + 3 / 4),  # −log σ(−3 + 4), and the mean NLL of the chosen answers
    "simpo": (Simpo(beta=2.0, simpo_gamma=4.0), 0.313262 / 2),  # 2 · 2.5 − 4 = 1
    # odds of e^−1.5 and e^−4 are 0.287212 and 0.018657: log σ of the log of their quotient is −0.062955
    "orpo": (Orpo(beta=0.5), 3 / 4 + 0.5 * 0.062955 / 2),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_pairs_by_hand(case: str) -> None:
    objective, want = BY_HAND[case]
    counts = Counts(2, 6, {"chosen": 2, "rejected": 2}, {"chosen": 4, "rejected": 2})
    s = Segments(("chosen", "rejected"), (2, 1), counts, torch.device("cpu"))
    loss, metrics = objective.loss(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([-2.0, -2.5, -3.5]), s)
    assert float(loss) == pytest.approx(want, abs=1e-5)
    assert float(metrics["rewards/accuracies"]) == 0.5, "one of two rows, which the other part of the step adds to"
    if isinstance(objective, Dpo):
        assert float(metrics["rewards/margins"]) == pytest.approx(objective.beta * 2 / 2)


def test_kto_by_hand() -> None:
    # c = 1 for the wanted answer and −1 for the unwanted one; z = max(0, mean(3, −1)) = 1: 1 − σ(0) and 1 − σ(2), over three answers
    counts = Counts(3, 5, {"desirable": 2, "undesirable": 1}, {})
    s = Segments(("desirable", "undesirable"), (2, 1), counts, torch.device("cpu"), torch.tensor([3.0, -1.0]))
    given = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([-2.0, -2.0, -3.0])
    loss, metrics = Kto(beta=1.0, undesirable_weight=2.0).loss(*given, s)
    assert float(loss) == pytest.approx((0.5 + 2 * 0.119203) / 3, abs=1e-6)
    assert float(metrics["kl"]) == pytest.approx(2 / 3), "the part of two answers of three"
    assert (float(metrics["rewards/chosen"]), float(metrics["rewards/rejected"])) == (0.5, -1.0)
    loss, _ = Kto(beta=1.0, loss_type="apo_zero_unpaired").loss(*given, dataclasses.replace(s, probes_P=None))
    assert float(loss) == pytest.approx((1 - 0.731059 + 0.268941) / 3, abs=1e-6)


def test_odds_are_exact_at_both_ends() -> None:
    counts = Counts(1, 2, {}, {"chosen": 1})
    s = Segments(("chosen", "rejected"), (1, 1), counts, torch.device("cpu"))
    logp_R = torch.tensor([-1e-6, -60.0], requires_grad=True)
    loss, metrics = Orpo().loss(logp_R, None, s)
    assert float(metrics["log_odds_chosen"]) == pytest.approx(-1e-6 - math.log(1e-6) + 60, rel=1e-6)
    assert all(torch.autograd.grad(loss, logp_R)[0].isfinite())
    sure_R = torch.tensor([0.0, -60.0], requires_grad=True)  # fp32 rounds a learnt answer's probability to 1
    assert all(torch.autograd.grad(Orpo().loss(sure_R, None, s)[0], sure_R)[0].isfinite())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_are_finite(name: str, value: float) -> None:
    numbers = [f.name for f in dataclasses.fields(OBJECTIVES[name]) if f.type == "float"]
    for field in numbers:
        with pytest.raises(ConfigError, match=f"{field} = {value}: Input should be a finite number"):
            OBJECTIVES[name](**{field: value})


def test_a_mismatched_pair_has_the_prompt_of_one_row_and_the_answer_of_the_one_before() -> None:
    def row(ids: list[int], prompt: int) -> Example:
        return Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt, "", (0, ids[0]), "desirable")

    rows = [row([1, 2, 3], 2), row([10, 11, 12, 13], 1), row([20, 21, 22], 2)]
    found = Kto().probes(rows)
    assert [(e.ids.tolist(), int(e.supervised.argmax())) for e in found] == [([1, 2, 22], 2), ([10, 3], 1), ([20, 21, 11, 12, 13], 2)]
    assert Kto(loss_type="apo_zero_unpaired").probes(rows) == []
    pair = dataclasses.replace(row([1, 2, 3], 2), others=(row([1, 2, 4], 2),))
    found = Kto().probes([pair, rows[1], dataclasses.replace(pair, ids=np.array([5, 6, 7], dtype=np.int32), others=(row([5, 6, 8], 2),))])
    assert [e.ids.tolist() for e in found] == [[1, 2, 7], [1, 2, 8], [10, 3], [5, 6, 11, 12, 13], [5, 6, 11, 12, 13]]


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
    several_RK = (target_R[:, None] + torch.tensor([0, 3, 5])) % 11  # several targets a row
    got_RK, want_RK = (
        kernels.log_probabilities(hidden_RH, weight_of(head), head.bias, several_RK, softcap),
        torch.log_softmax(logits, -1).gather(1, several_RK),
    )
    torch.testing.assert_close(got_RK, want_RK)
    of_several = [torch.autograd.grad((weight_R[:, None] * x * x).sum(), hidden_RH, retain_graph=True)[0] for x in (got_RK, want_RK)]
    torch.testing.assert_close(*of_several)
    total, nll_R = kernels.supervised_loss(hidden_RH, weight_of(head), head.bias, target_R, weight_R, softcap)
    assert torch.equal(nll_R, -got_R), "both ways form the same numbers"
    torch.testing.assert_close(torch.autograd.grad(total, hidden_RH)[0], -torch.autograd.grad((weight_R * want_R).sum(), hidden_RH)[0])
