"""InPO and SmPO on given errors: worked numbers, gradients, and who decides.

V1.a: m_w=.1000 m_l=.1200 r_w=.1004 r_l=.1201 gives u = .3 at beta 2000; SmPO multiplies u by g = 10
tanh((s'_w - s'_l) / 2) of the judge's values, .2100777817 for cosines .2150 and .2080.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import Inversion, LossOutput, Score, ScoredBatch
from t2i_align.errors import DataError
from t2i_align.objectives.inpo import InPO, InPOOptions
from t2i_align.objectives.smpo import SmPO, SmPOOptions
from t2i_align.protocols import Inverts, LocalStats


def scored(
    m: Tensor, r: Tensor, values: Tensor | None = None, preference: float = 1.0
) -> ScoredBatch:
    """Winners in the first half, given mean errors."""

    def elbo(e: Tensor) -> Score:
        e = e[:, None]
        return Score("elbo", -0.5 * e, e > -1, torch.ones_like(e).long(), "mean", error=e)

    num = len(m) // 2
    index = torch.arange(num)
    return ScoredBatch(
        {"policy": elbo(m), "reference": elbo(r)},
        index,
        index + num,
        torch.full((num,), preference, dtype=m.dtype),
        values=values,
    )


def f64(*numbers: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(numbers, dtype=torch.float64)


def loss(objective: Any, batch: ScoredBatch) -> LossOutput:
    """One call from the first state."""
    return objective(batch, objective.init_state(), LocalStats())


M, R = f64(0.1000, 0.1200), f64(0.1004, 0.1201)


def test_v1a_inpo_is_dpo_on_its_events() -> None:
    out = loss(InPO(InPOOptions(beta=2000.0)), scored(M, R))
    assert out.loss.item() == pytest.approx(0.5543552445, abs=1e-9)
    tie = loss(InPO(InPOOptions(beta=2000.0)), scored(M, R, preference=0.5)).loss.item()
    assert tie == pytest.approx((math.log1p(math.exp(-0.3)) + math.log1p(math.exp(0.3))) / 2)


@pytest.mark.parametrize(
    ("better", "worse", "p", "weight"),
    [
        (0.2150, 0.2080, 0.5105038891, 0.2100777817),
        (0.2300, 0.2000, 0.5449019962, 0.8980399248),
        (0.28201571106910706, 0.11543526500463486, 0.7310585786, 4.6211715726),
    ],
)
def test_v4a_weight_of_a_pair(better: float, worse: float, p: float, weight: float) -> None:
    assert 10 * (2 * p - 1) == pytest.approx(weight, abs=2e-9)
    out = loss(SmPO(SmPOOptions(beta=2000.0)), scored(M, R, f64(better, worse)))
    assert out.metrics["smpo/weight"].item() == pytest.approx(weight, abs=1e-6)
    u = weight * 0.3  # V1.a's u at beta 2000
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-u)), abs=1e-9)


@pytest.mark.parametrize(
    ("better", "worse", "effective"),
    [
        (0.2150, 0.2080, 420.16),
        (0.2300, 0.2000, 1796.08),
        (0.28201571106910706, 0.11543526500463486, 9242.34),
    ],
)
def test_v4a_effective_beta(better: float, worse: float, effective: float) -> None:
    """At the reference dL/dm_w = (beta g / 2) sigmoid(0), the start of DPO with beta g."""
    m = M.clone().requires_grad_()
    out = loss(SmPO(SmPOOptions(beta=2000.0)), scored(m, M, f64(better, worse)))
    (gradient,) = torch.autograd.grad(out.loss, m)
    assert (4 * gradient).tolist() == pytest.approx([effective, -effective], abs=5e-3)


def test_v4b_loss() -> None:
    out = loss(SmPO(SmPOOptions(beta=2000.0)), scored(M, R, f64(0.2150, 0.2080)))
    assert out.metrics["logits/std"].item() == pytest.approx(0.0630233345, abs=1e-8)
    assert out.loss.item() == pytest.approx(0.6621319237, abs=1e-9)


BOTH: list[Callable[[], Any]] = [
    lambda: InPO(InPOOptions(beta=3.0)),
    lambda: SmPO(SmPOOptions(beta=3.0)),
    lambda: SmPO(SmPOOptions(beta=3.0, winner="label", values="from_data")),
]
VALUES = f64(0.21, 0.26, 0.18, 0.2, 0.19, 0.25)


@pytest.mark.parametrize("build", BOTH)
def test_gradients_by_finite_differences(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    m, r = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    for preference in (1.0, 0.5):
        f = lambda x, p=preference: loss(build(), scored(x, r, VALUES, p)).loss  # noqa: E731
        assert torch.autograd.gradcheck(f, (m.clone().requires_grad_(),))


@pytest.mark.parametrize("build", BOTH)
def test_policy_equal_to_reference_is_ln2(build: Callable[[], Any]) -> None:
    m = torch.rand(6, dtype=torch.float64)
    assert loss(build(), scored(m, m, VALUES)).loss.item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("build", BOTH[:2])
def test_a_batch_is_the_mean_of_its_pairs(build: Callable[[], Any]) -> None:
    """The released SmPO weighs all pairs by the first one's values; here each counts its own."""
    torch.manual_seed(3)
    m, r = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    whole = loss(build(), scored(m, r, VALUES))
    pairs = [[i, i + 3] for i in range(3)]
    parts = [loss(build(), scored(m[p], r[p], VALUES[p])).loss for p in pairs]
    torch.testing.assert_close(whole.loss, torch.stack(parts).mean())
    torch.testing.assert_close(whole.per_example, torch.stack(parts))


def test_the_judge_decides_or_the_label_does() -> None:
    """``value``: exchanging the labels changes nothing. ``label``: it negates the logit."""
    swap = torch.tensor([1, 0])
    values = f64(0.20, 0.23)  # the judge prefers the second
    for winner, sign in (("value", 1.0), ("label", -1.0)):
        objective = SmPO(SmPOOptions(beta=2000.0, winner=winner))  # type: ignore[arg-type]
        outs = [loss(objective, scored(M[i], R[i], values[i])) for i in (torch.arange(2), swap)]
        u = [out.metrics["logits/std"].item() for out in outs]
        assert u[0] == pytest.approx(sign * u[1], abs=1e-9)
        assert [out.metrics["smpo/agreement"].item() for out in outs] == [0.0, 1.0]
        assert all(out.metrics["smpo/weight"].item() > 0 for out in outs)
    kept = loss(SmPO(SmPOOptions()), scored(M, R, values, preference=0.5))
    plain = loss(SmPO(SmPOOptions()), scored(M, R, values))
    assert kept.loss.item() == plain.loss.item()


def test_equal_values_teach_nothing() -> None:
    for values in ("fixed", "from_data"):
        m = M.clone().requires_grad_()
        objective = SmPO(SmPOOptions(values=values))  # type: ignore[arg-type]
        out = loss(objective, scored(m, R, f64(0.2, 0.2)))
        (grad,) = torch.autograd.grad(out.loss, m)
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-12)
        assert grad.abs().max().item() == 0


def test_the_range_from_data_grows_and_is_kept() -> None:
    """Seen [2, 3], then [1, 3]: gaps 1 of range 1, then .5 of range 2; any unit gives the same."""
    for unit in (1.0, 100.0):
        objective = SmPO(SmPOOptions(values="from_data", gamma=1.0))
        state = objective.init_state()
        first = objective(scored(M, R, unit * f64(3, 2)), state, LocalStats())
        second = objective(
            scored(M.repeat_interleave(2), R.repeat_interleave(2), unit * f64(3, 2, 2, 1)),
            first.state,
            LocalStats(),
        )
        assert first.metrics["smpo/weight"].item() == pytest.approx(math.tanh(0.5))
        weights = second.metrics["smpo/weight"].tolist()
        assert weights == pytest.approx([math.tanh(0.25)] * 2)
        kept = {k: v.item() / unit for k, v in second.state.items()}
        assert kept == {"value_min": 1.0, "value_max": 3.0}


def test_all_ranks_keep_one_range() -> None:
    class Two(LocalStats):
        """Another rank has seen 0.1 and 0.9."""

        def gather(self, x: Tensor) -> Tensor:
            return torch.cat([x.detach(), f64(0.1, 0.9)])

    objective = SmPO(SmPOOptions(values="from_data"))
    out = objective(scored(M, R, f64(0.5, 0.3)), objective.init_state(), Two())
    assert {k: v.item() for k, v in out.state.items()} == {"value_min": 0.1, "value_max": 0.9}
    assert out.metrics["smpo/weight"].item() == pytest.approx(10 * math.tanh(0.125))


def test_values_in_another_unit_or_missing_are_refused() -> None:
    """PickScore with its logit scale would saturate every weight."""
    with pytest.raises(DataError, match=r"20\.8 to 21\.5, far outside 0\.1154 to 0\.282"):
        loss(SmPO(SmPOOptions()), scored(M, R, f64(21.5, 20.8)))
    for values in (None, f64(0.2, float("nan"))):
        with pytest.raises(DataError, match="without a judge's value"):
            loss(SmPO(SmPOOptions()), scored(M, R, values))
    with pytest.raises(ValueError, match=r"value_max 0.1 is not above value_min 0.2"):
        SmPOOptions(value_min=0.2, value_max=0.1)


def test_what_they_declare() -> None:
    """Inverted, time shared and noise not, no cached reference; the published inversion."""
    inpo, smpo = InPO(InPOOptions()), SmPO(SmPOOptions())
    for objective in (inpo, smpo):
        assert isinstance(objective, Inverts)
        assert objective.needs.kinds == {"elbo"} and objective.needs.coupling == "time"
        assert not objective.needs.cacheable_reference
    assert inpo.inversion == Inversion(10, eta=0.1)
    assert smpo.inversion == replace(inpo.inversion, eta=0.0, renoise=True)
    assert smpo.needs.values and not inpo.needs.values
