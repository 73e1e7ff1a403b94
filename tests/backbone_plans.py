"""Further proofs of every backbone: its clock, what it refuses, its plan and one step of training.

They go with those of tests/backbones.py.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from t2i_align.contract import DrawSpec, ScoredBatch
from t2i_align.errors import ModelError
from t2i_align.generators.capture import LENGTHS
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.process.convert import target
from t2i_align.process.schedule import broadcast
from t2i_align.process.seeds import normals
from t2i_align.protocols import LocalStats
from t2i_align.train.trace import example_event, trace
from tests.backbones import LORA, SEEDS, Case, events, generator
from tests.stock_pipelines import PROMPTS, loop


def proves_clock(case: Case, folder: Path) -> None:
    """At every time of the pipeline's loop, training noises by what its scheduler says is there."""
    g = generator(case, folder)
    inputs = g.prepare_sampling(PROMPTS, num_steps=4, guidance=1.0)
    steps = loop(case, g, normals(SEEDS, inputs.shape), 1.0)
    assert len({float(step.time) for step in steps}) > 1
    for step in steps:
        _, sigma = g.process.coefficients(step.time[None])
        # schedulers that round their times to integers are off by one in a thousand
        assert abs(float(sigma) - float(step.sigma)) < 2e-3, (step.time, sigma, step.sigma)


def proves_landing(case: Case, folder: Path) -> None:
    """The pipeline's scheduler, told the training target at every step, ends at the data.

    On the way the latents stay alpha x_0 + sigma eps with eps of unit size. So the target is of the
    kind that the scheduler takes, whatever a network made of it.
    """
    g = generator(case, folder)
    inputs = g.prepare_sampling(PROMPTS, num_steps=4, guidance=1.0)
    scheduler = copy.deepcopy(inputs.plan)
    x_0 = normals(SEEDS + 50, inputs.shape)
    start = x = normals(SEEDS, inputs.shape)
    if hasattr(scheduler, "init_noise_sigma"):
        x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        alpha, sigma = (broadcast(c, x_t) for c in g.process.coefficients(t.expand(len(x))))
        eps = (x_t - alpha * x_0) / sigma
        size = eps.flatten(1).square().mean(1).sqrt()
        assert ((size > 0.85) & (size < 1.15)).all(), (t, size)
        truth = target(g.prediction, x_0, eps, *g.process.coefficients(t.expand(len(x))))
        x = scheduler.step(truth.to(x.dtype), t, x, return_dict=False)[0]
    # DDIM's last step leaves the noise of the first level, the square root of 1e-3
    assert ((x - x_0).flatten(1).norm(dim=1) < 0.06 * (start - x_0).flatten(1).norm(dim=1)).all()


def proves_cond_shapes(case: Case, folder: Path) -> None:
    """A plan without encoders has the conditioning that encoders give, and the network takes it."""
    g = generator(case, folder)
    sample, _ = events(g)
    encoded = g.encode_prompts(PROMPTS)
    asked = g.layout.cond_shapes(g.config, g.options.max_sequence_length)
    found = {k: tuple(v.shape[1:]) for k, v in sample.cond.items() if not k.startswith(LENGTHS)}
    wanted = {k: shape for k, shape in asked.items() if not k.startswith(LENGTHS)}
    assert found.keys() == wanted.keys()
    for name, shape in found.items():
        fixed = name not in encoded[0] or encoded[0][name].shape == encoded[1][name].shape
        assert (shape if fixed else shape[1:]) == (wanted[name] if fixed else wanted[name][1:])
    options = g.options.model_copy(update={"lora": LORA})
    plan = DiffusersGenerator(options, device="meta")
    plan.load_module(0, reference=True)
    seen = trace(plan, example_event(plan, 2, DrawSpec()), reference=True)
    assert 0 < seen.reference <= seen.forward < seen.step < seen.flops


def proves_refusals(case: Case, folder: Path) -> None:
    """Sizes the network cannot take are refused by name before anything is loaded."""
    g = generator(case, folder)
    step = g.factor[0] * g.layout.patch(g.config)
    good, odd = g.options.resolution, g.options.resolution + step // 2
    for changes in ({"resolution": odd}, {"sample_size": (good, odd)}):
        with pytest.raises(ModelError, match=f"model.{next(iter(changes))}.*{step}"):
            options = {"name_or_path": str(folder), **(case.options | changes)}
            DiffusersGenerator(DiffusersOptions.model_validate(options))


def proves_step(case: Case, folder: Path) -> None:
    """One dpo step on a pair moves every adapter's B and nothing else by a single bit.

    A's gradient is zero at the start, where B is; so is that of text queries in a last block, whose
    text nobody reads.
    """
    g = generator(case, folder, lora=LORA)
    _, event = events(g)
    before = {k: p.detach().clone() for k, p in g.module.named_parameters()}
    trained = g.views.trained()
    with torch.no_grad():
        reference = g.score(event, "reference")
    scores = {"policy": g.score(event, "policy"), "reference": reference}
    batch = ScoredBatch(scores, torch.tensor([0]), torch.tensor([1]), torch.ones(1))
    output = DPO(DPOOptions(type="dpo", beta=5000.0))(batch, {}, LocalStats())
    assert abs(output.loss.item() - math.log(2)) < 1e-6
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    torch.optim.SGD(trained.values(), lr=0.01).step()  # small: the loss is a line there
    moved = {k for k, p in g.module.named_parameters() if not torch.equal(p, before[k])}
    ends = tuple(f"{name}.lora_B.default.weight" for name in case.idle)
    assert moved == {k for k in trained if "lora_B" in k and not k.endswith(ends)}
    with torch.no_grad():
        assert torch.equal(g.score(event, "reference").logp, reference.logp)
        margin = g.score(event, "policy").logp - reference.logp
    assert (margin[0] > margin[1]).all()  # towards the winner
