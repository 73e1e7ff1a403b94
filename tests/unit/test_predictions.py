"""The pictures that a step-aware judge is fitted on: a real pipeline's decoded predictions.

Eq. (2) of rollout/predictions.py, against the pipeline's own parts: with a denoiser that predicts
the very noise, every level gives the autoencoder's reconstruction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.errors import RecipeError, UserError
from t2i_align.judges.fit_options import NoiseOptions
from t2i_align.judges.fit_recipe import load_fit_recipe
from t2i_align.process.seeds import normals
from t2i_align.rollout.predictions import Predictions
from tests import tiny

SIDE = 32
SEEDS = torch.tensor([3, 4, 3])
PROMPTS = ["a red car", "a bird", "a red car"]


def pictures() -> Tensor:
    """Three of them, the last equal to the first."""
    found = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return torch.cat([found, found[:1]])


def predicted(folder: Path) -> NoiseOptions:
    """Options of predictions by a pipeline."""
    given = {"process": "predicted", "model": str(folder), "guidance_scale": 3.0}
    return NoiseOptions.model_validate(given)


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictions:
    """Of a tiny pipeline of three families: epsilon without and with time ids, and a flow."""
    folder = tiny.pipeline_folder(request.param, tmp_path_factory.mktemp("p") / request.param)
    return Predictions(predicted(folder), "cpu")


def reconstruction(made: Predictions, pixels: Tensor) -> Tensor:
    """The autoencoder's, by diffusers alone."""
    vae = made.generator.pipe.vae
    with torch.no_grad():
        latent = vae.encode(2 * pixels - 1).latent_dist.mean
        return (0.5 + 0.5 * vae.decode(latent).sample).clamp(0, 1)


def test_equal_pictures_under_equal_noise_are_equal(made: Predictions) -> None:
    level = torch.tensor([0.6, 0.6, 0.6])
    found = made(pictures(), level, SEEDS, PROMPTS)
    assert found.shape == (3, 3, SIDE, SIDE) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
    assert torch.equal(found, made(pictures(), level, SEEDS, PROMPTS))
    other = made(pictures(), level, torch.tensor([3, 4, 5]), PROMPTS)
    assert (other[2] - found[2]).abs().max() > 1e-3


def test_a_denoiser_that_knows_the_noise_gives_the_reconstruction(
    made: Predictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every level, whatever the prediction type."""
    made(pictures(), torch.full((3,), 0.5), SEEDS, PROMPTS)
    model = made.generator

    def knows(_net: Any, x: Tensor, time: Tensor, _cond: Any) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in model.process.coefficients(time))
        eps = normals(SEEDS, x.shape[1:])
        return eps if model.prediction == "epsilon" else eps - (x - sigma * eps) / alpha

    monkeypatch.setattr(model, "denoise", knows)
    want = reconstruction(made, pictures())
    for level in (0.1, 0.5, 0.9):
        found = made(pictures(), torch.full((3,), level), SEEDS, PROMPTS)
        torch.testing.assert_close(found, want, atol=2e-3, rtol=0)


def test_guidance_combines_both_branches(
    made: Predictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale 1 asks the conditional branch alone, once."""
    calls = []
    made(pictures(), torch.full((3,), 0.5), SEEDS, PROMPTS)
    own = made.generator.denoise
    monkeypatch.setattr(made.generator, "denoise", lambda *given: (calls.append(1), own(*given))[1])
    guided = made(pictures(), torch.full((3,), 0.5), SEEDS, PROMPTS)
    assert len(calls) == 2
    plain_options = made.options.model_copy(update={"guidance_scale": 1.0})
    monkeypatch.setattr(made, "options", plain_options)
    plain = made(pictures(), torch.full((3,), 0.5), SEEDS, PROMPTS)
    assert len(calls) == 3 and not torch.equal(plain, guided)


def test_pictures_must_be_square(tmp_path: Path) -> None:
    folder = tiny.pipeline_folder("sd", tmp_path / "sd")
    given = Predictions(predicted(folder), "cpu")
    with pytest.raises(UserError, match="32 x 48 pixels"):
        given(torch.rand(1, 3, 32, 48), torch.tensor([0.5]), torch.tensor([1]), ["p"])


@pytest.mark.parametrize("edit", ["noise.model=null", "noise.process=rectified"])
def test_process_and_model_belong_together(edit: str) -> None:
    with pytest.raises(RecipeError, match="process: predicted and model: NAME belong together"):
        load_fit_recipe("judge_scenes_timed", [edit])
