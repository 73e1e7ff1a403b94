"""The voxel flow: rank 5 through the same elbo, TRELLIS conventions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2i_align.contract import DrawSpec, Media, MediaError, Seeds
from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.voxel_flow import VoxelFlow, VoxelFlowOptions
from t2i_align.process.seeds import normals
from tests.tiny import voxel_folder

SHAPE = (8, 16, 16, 16)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> VoxelFlow:
    folder = voxel_folder(tmp_path_factory.mktemp("voxel"))
    made = VoxelFlow(VoxelFlowOptions(name_or_path=str(folder), lora=LoraOptions(r=2)))
    made.load_module(0, reference=True)
    return made


def test_score_is_the_flattened_literal_formula(flow: VoxelFlow) -> None:
    torch.manual_seed(0)
    x_0, seeds = torch.randn(2, *SHAPE), torch.tensor([1, 2])
    sample = flow.assemble(
        [{"x0": x} for x in x_0], flow.encode_prompts(["a box", "chair"]), [{}, {}]
    )
    event = flow.draw(sample, DrawSpec(num_draws=2), Seeds(seeds, seeds + 9))
    assert event.x_t is not None and event.lam is not None and event.time is not None
    assert event.x_t.shape == (2, 2, *SHAPE)
    eps = normals(seeds + 9, (2, *SHAPE))
    with torch.no_grad():
        score = flow.score(event, "policy")
        for b in range(2):
            for s in range(2):
                t = event.lam[b, s]
                x_t = (1 - t) * x_0[b] + t * eps[b, s]
                v = flow.module(
                    x_t[None],
                    1000 * t[None],
                    sample.cond["cond"][b : b + 1],
                    sample.cond["cond_mask"][b : b + 1],
                )[0]
                error = (v - (eps[b, s] - x_0[b])).flatten().square().mean()
                assert score.error is not None
                assert score.error[b, s].item() == pytest.approx(error.item(), rel=1e-5)
    assert score.logp.shape == (2, 2) and score.dims[0, 0].item() == 8 * 16**3


def test_pad_length_does_not_change_a_score(flow: VoxelFlow) -> None:
    x, seeds = torch.zeros(SHAPE), torch.tensor([1, 2])
    both = flow.assemble(
        [{"x0": x}] * 2, flow.encode_prompts(["a", "a much longer prompt"]), [{}, {}]
    )
    alone = flow.assemble([{"x0": x}], flow.encode_prompts(["a"]), [{}])
    with torch.no_grad():
        one = flow.score(flow.draw(both, DrawSpec(), Seeds(seeds, seeds)), "policy").per_item()[0]
        two = flow.score(
            flow.draw(alone, DrawSpec(), Seeds(seeds[:1], seeds[:1])), "policy"
        ).per_item()[0]
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_euler_rollout_of_a_known_flow(flow: VoxelFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true velocity towards a point, any number of Euler steps lands on it exactly."""
    goal = torch.full((1, *SHAPE), 0.3)
    inputs = flow.prepare_sampling(["a"], num_steps=3, guidance=1.0)

    def velocity(net: object, x: torch.Tensor, time: torch.Tensor, cond: object) -> torch.Tensor:
        return (x - goal) / (time.view(-1, 1, 1, 1, 1) / 1000)

    monkeypatch.setattr(flow, "_velocity", velocity)
    end = flow.rollout(inputs, torch.tensor([4]), "policy").sample.state["x0"]
    torch.testing.assert_close(end, goal, atol=1e-5, rtol=0)


def test_bad_input(flow: VoxelFlow, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="the model wants"):
        flow.load_media(Media("voxels", torch.zeros(8, 8, 8, 8)), "")
    with pytest.raises(MediaError, match="NaN or infinity"):
        flow.load_media(Media("voxels", torch.full(SHAPE, float("nan"))), "")
    with pytest.raises(ModelError, match="no voxel model"):
        VoxelFlow(VoxelFlowOptions(name_or_path=str(tmp_path)))
