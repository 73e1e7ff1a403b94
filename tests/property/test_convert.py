"""Prediction types round-trip in float64, and errors convert by the stated identities."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from t2i_align.process.convert import Prediction, convert, target, to_x0_eps
from t2i_align.process.schedule import VP, Rectified, noised, vp_from_scheduler

KINDS: list[Prediction] = list(get_args(Prediction))


def coefficients(process: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Five levels of a process, float64, ends excluded."""
    s = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    return (1 - s, s) if process == "rectified" else ((1 - s**2).sqrt(), s)


@pytest.mark.parametrize("process", ["vp", "rectified"])
@pytest.mark.parametrize(("a", "b"), list(itertools.product(KINDS, KINDS)))
def test_round_trip(process: str, a: Prediction, b: Prediction) -> None:
    torch.manual_seed(0)
    alpha, sigma = coefficients(process)
    x_0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    x_t = noised(x_0, eps, alpha, sigma)
    pred = target(a, x_0, eps, alpha, sigma)
    other = convert(a, b, pred, x_t, alpha, sigma)
    torch.testing.assert_close(other, target(b, x_0, eps, alpha, sigma))
    torch.testing.assert_close(convert(b, a, other, x_t, alpha, sigma), pred)


@pytest.mark.parametrize(
    ("process", "kind", "power"),
    [("vp", "v_prediction", "alpha"), ("rectified", "velocity", "alpha")],
)
def test_error_identities(process: str, kind: Prediction, power: str) -> None:
    """|eps - eps^|^2 = alpha^2 |v - v^|^2 for both processes (rectified: alpha = 1 - t)."""
    torch.manual_seed(1)
    alpha, sigma = coefficients(process)
    x_0, eps, noise = torch.randn(3, 5, 8, dtype=torch.float64)
    x_t = noised(x_0, eps, alpha, sigma)
    pred = target(kind, x_0, eps, alpha, sigma) + 0.1 * noise
    _, eps_hat = to_x0_eps(kind, pred, x_t, alpha, sigma)
    own = (0.1 * noise).square().sum(1)
    torch.testing.assert_close((eps_hat - eps).square().sum(1), alpha.square() * own)


def test_stable_diffusion_schedule_values() -> None:
    """abar of scaled_linear .00085 to .012: values published with every SD checkpoint's config."""
    vp = vp_from_scheduler(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
        }
    )
    want = {
        0: 0.99915,
        1: 0.99829603,
        101: 0.89298054,
        250: 0.67379263,
        501: 0.27499907,
        999: 0.0046601,
    }
    for t, abar in want.items():
        assert vp.alphas_cumprod[t].item() == pytest.approx(abar, abs=1e-6)
    assert isinstance(vp, VP)


def test_levels_and_times_are_inverse() -> None:
    vp = VP(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64))
    t = torch.arange(1000)
    assert torch.equal(vp.time(vp.level(t).double()), t)
    flow = Rectified(1000.0, shift=3.0)
    assert flow.level(flow.time(torch.tensor(0.5))).item() == pytest.approx(
        0.75
    )  # 3 * .5 / (1 + 2 * .5)
    assert vp.time(torch.tensor(0.0)).item() == 0 and vp.time(torch.tensor(0.9999)).item() == 999
