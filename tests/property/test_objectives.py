"""Invariants every pairwise objective on a margin must have."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2i_align.contract import LossOutput, Score, ScoredBatch
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.protocols import LocalStats

error = st.floats(0.01, 2.0)
four = st.lists(error, min_size=4, max_size=4)


def elbo(errors: Tensor) -> Score:
    """A score of given mean errors."""
    e = errors[:, None]
    return Score("elbo", -0.5 * e, torch.ones_like(e).bool(), torch.ones_like(e).long(), "mean", e)


def dpo(m: Tensor, r: Tensor) -> LossOutput:
    """Winners in the first half."""
    n = len(m) // 2
    i = torch.arange(n)
    batch = ScoredBatch({"policy": elbo(m), "reference": elbo(r)}, i, i + n, torch.ones(n).double())
    return DPO(DPOOptions(beta=10.0))(batch, {}, LocalStats())


@settings(deadline=None)
@given(four, four)
def test_swapping_winner_and_loser_negates_the_logit(m: list[float], r: list[float]) -> None:
    mt, rt = torch.tensor(m, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    swap = torch.tensor([2, 3, 0, 1])
    u, v = dpo(mt, rt), dpo(mt[swap], rt[swap])
    torch.testing.assert_close(u.metrics["logits/std"], -v.metrics["logits/std"])


@settings(deadline=None)
@given(four, four, st.floats(-0.5, 0.5))
def test_a_constant_on_both_errors_changes_nothing(
    m: list[float], r: list[float], c: float
) -> None:
    mt, rt = torch.tensor(m, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    torch.testing.assert_close(dpo(mt, rt).loss, dpo(mt + c, rt).loss)
    torch.testing.assert_close(dpo(mt, rt).loss, dpo(mt, rt + c).loss)


@settings(deadline=None)
@given(four, four)
def test_split_batch_averages_to_the_whole(m: list[float], r: list[float]) -> None:
    mt, rt = torch.tensor(m, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    parts = [dpo(mt[[i, i + 2]], rt[[i, i + 2]]).loss for i in range(2)]
    torch.testing.assert_close(dpo(mt, rt).loss, torch.stack(parts).mean())


@settings(deadline=None)
@given(four, four)
def test_exchanging_policy_and_reference_negates_the_logit(m: list[float], r: list[float]) -> None:
    mt, rt = torch.tensor(m, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)
    a, b = dpo(mt, rt).metrics["logits/std"], dpo(rt, mt).metrics["logits/std"]
    torch.testing.assert_close(a, -b)
