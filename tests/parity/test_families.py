"""SD1.5, SDXL and SD3 against stock diffusers, on tiny folders of the real classes.

The pipeline itself is the oracle: its images, and its denoiser called literally with what its own
    ``encode_prompt``
returns. Nothing here goes through the capture on the reference side.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import DrawSpec, Sample, Seeds
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.process.convert import to_x0_eps
from t2i_align.process.schedule import broadcast
from t2i_align.process.seeds import normals
from tests.tiny import pipeline_folder

FAMILIES = ["sd", "sdxl", "sd3"]
PROMPTS = ["a cat", "a much longer prompt about two dogs and a red umbrella on a boat"]
SEEDS = torch.tensor([3, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by (family, prediction type), built once."""

    @cache
    def build(family: str, prediction: str = "epsilon") -> Path:
        where = tmp_path_factory.mktemp(f"{family}-{prediction}")
        return pipeline_folder(family, where, prediction)

    return build


def generator(folder: Path, **changes: Any) -> DiffusersGenerator:
    """Policy loaded, encoders available."""
    made = DiffusersGenerator(DiffusersOptions(name_or_path=str(folder), resolution=64, **changes))
    made.load_module(0, reference=changes.get("lora") is not None)
    return made


def events(g: DiffusersGenerator, num_draws: int = 1) -> tuple[Sample, Any]:
    """Two random latents under the two prompts, drawn at two levels."""
    conds = g.encode_prompts(PROMPTS)
    torch.manual_seed(5)
    states = [{"x0": torch.randn(4, 8, 8)} for _ in PROMPTS]
    meta = {"original_size": (100, 80), "crop_top_left": (3, 5), "target_size": (64, 64)}
    sample = g.assemble(states, conds, [meta, meta])
    event = g.draw(sample, DrawSpec(num_draws=num_draws), Seeds(SEEDS, SEEDS + 100))
    return sample, event


def pipeline_images(
    g: DiffusersGenerator, inputs: Any, steps: int, guidance: float, negative: Any = None
) -> Tensor:
    """What the stock pipeline makes of the same prompts and latents."""
    return g.pipe(
        prompt=PROMPTS,
        negative_prompt=negative,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=normals(SEEDS, inputs.shape),
        output_type="pt",
    ).images


@pytest.mark.parametrize(("family", "guidance"), list(itertools.product(FAMILIES, [1.0, 5.0])))
def test_images_equal_the_pipeline(folder: Any, family: str, guidance: float) -> None:
    g = generator(folder(family))
    inputs = g.prepare_sampling(PROMPTS, num_steps=5, guidance=guidance)
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])
    theirs = pipeline_images(g, inputs, 5, guidance)
    assert (ours - theirs).abs().max().item() <= 1e-5
    assert (theirs[0] - theirs[1]).abs().max().item() > 1e-2  # the oracle is not constant


@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_images_equal_the_pipeline_with_the_hubs_schedulers(
    folder: Any, tmp_path: Path, name: str
) -> None:
    """SD1.5's own PNDM, and a multistep solver: the scheduler's state is its own business."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder("sd"), safety_checker=None)
    scheduler: Any = getattr(diffusers, name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path)
    g = generator(tmp_path)
    inputs = g.prepare_sampling(PROMPTS, num_steps=6, guidance=5.0)
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])
    theirs = pipeline_images(g, inputs, 6, 5.0)
    assert (ours - theirs).abs().max().item() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompt_equals_the_pipeline(folder: Any, family: str) -> None:
    g = generator(folder(family))
    inputs = g.prepare_sampling(PROMPTS, num_steps=3, guidance=4.0, negative_prompt="blurry, ugly")
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])
    theirs = pipeline_images(g, inputs, 3, 4.0, ["blurry, ugly"] * 2)
    assert (ours - theirs).abs().max().item() <= 1e-5


def literal_prediction(g: DiffusersGenerator, x_t: Tensor, time: Tensor) -> Tensor:
    """The denoiser called by hand with what the pipeline's own ``encode_prompt`` returns."""
    pipe = g.pipe
    if g.family == "sd":
        text, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        return pipe.unet(x_t, time, encoder_hidden_states=text).sample
    if g.family == "sdxl":
        text, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        ids = torch.tensor([[100.0, 80, 3, 5, 64, 64]] * 2)
        added = {"text_embeds": pooled, "time_ids": ids}
        return pipe.unet(x_t, time, encoder_hidden_states=text, added_cond_kwargs=added).sample
    text, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, device="cpu"
    )
    return pipe.transformer(
        hidden_states=x_t,
        timestep=time,
        encoder_hidden_states=text,
        pooled_projections=pooled,
    ).sample


@pytest.mark.parametrize(
    ("family", "prediction"),
    [
        ("sd", "epsilon"),
        ("sd", "v_prediction"),
        ("sdxl", "epsilon"),
        ("sdxl", "v_prediction"),
        ("sd3", "epsilon"),
    ],
)
def test_score_equals_a_literal_computation(folder: Any, family: str, prediction: str) -> None:
    """x_t, target and error rebuilt from the pipeline's own scheduler and denoiser."""
    from diffusers import DDPMScheduler

    g = generator(folder(family, prediction))
    sample, event = events(g)
    x_0, eps, time = sample.state["x0"], normals(SEEDS + 100, (1, 4, 8, 8))[:, 0], event.time[:, 0]
    if family == "sd3":
        sigma = (time / 1000).view(-1, 1, 1, 1)
        x_t, target = (1 - sigma) * x_0 + sigma * eps, eps - x_0
    else:
        config: Any = g.pipe.scheduler.config
        ddpm: Any = DDPMScheduler.from_config(config)
        x_t = ddpm.add_noise(x_0, eps, time)
        target = eps if prediction == "epsilon" else ddpm.get_velocity(x_0, eps, time)
    with torch.no_grad():
        error = (literal_prediction(g, x_t, time) - target).square().mean((1, 2, 3))
        score = g.score(event, "policy")
    torch.testing.assert_close(event.x_t[:, 0], x_t, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(score.error_per_item(), error, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score.per_item(), -0.5 * error, atol=1e-5, rtol=1e-5)
    assert score.dims.tolist() == [[256], [256]] and score.reduction == "mean"


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_score_is_the_pipelines_combination(folder: Any, family: str) -> None:
    g = generator(folder(family))
    _, event = events(g)
    negative = {k: v.roll(1, 0) for k, v in event.cond.items()}
    with torch.no_grad():
        want = frozenset({"pred"})
        cond = g.score(event, "policy", want).pred
        other = g.score(replace_cond(event, negative), "policy", want).pred
        guided = g.score(event, "policy", want, guidance=3.0, negative=negative).pred
    assert cond is not None and other is not None and guided is not None
    torch.testing.assert_close(guided, other + 3.0 * (cond - other))


def replace_cond(event: Any, cond: dict[str, Tensor]) -> Any:
    """The same event under other conditioning."""
    from dataclasses import replace

    return replace(event, cond=cond)


@pytest.mark.parametrize("family", FAMILIES)
def test_true_target_step_moves_towards_the_data(folder: Any, family: str) -> None:
    """A flipped sign or time direction fails here.

    Re-noising at a lower level with the true target gets closer.
    """
    g = generator(folder(family))
    sample, event = events(g)
    x_t, time = event.x_t[:, 0], event.time[:, 0]
    alpha, sigma = g.process.coefficients(time)
    x_0, eps = to_x0_eps(g.prediction, event.target[:, 0], x_t, alpha, sigma)
    lower = (time * 0.8).to(time.dtype)
    alpha_2, sigma_2 = g.process.coefficients(lower)
    moved = broadcast(alpha_2, x_0) * x_0 + broadcast(sigma_2, eps) * eps
    before = (x_t - sample.state["x0"]).flatten(1).norm(dim=1)
    after = (moved - sample.state["x0"]).flatten(1).norm(dim=1)
    assert (after < before).all()
    if family == "sd3":  # the literal Euler step of a rectified flow
        stepped = x_t - 0.05 * event.target[:, 0]
        assert ((stepped - sample.state["x0"]).flatten(1).norm(dim=1) < before).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_several_draws_equal_single_ones(folder: Any, family: str) -> None:
    g = generator(folder(family))
    _, event = events(g, num_draws=3)
    with torch.no_grad():
        score = g.score(event, "policy")
        one = g.score(event.items(slice(0, 1)), "policy")
    assert score.error is not None and score.error.shape == (2, 3)
    torch.testing.assert_close(score.error[:1], one.error)
    torch.testing.assert_close(score.per_item(), -0.5 * score.error.mean(1))


def errors(g: DiffusersGenerator, event: Any, view: Any) -> Tensor:
    """Denoising errors under a view."""
    error = g.score(event, view).error
    assert error is not None
    return error


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_off_is_bitwise_the_base(folder: Any, family: str) -> None:
    base = generator(folder(family))
    g = generator(folder(family), lora=LoraOptions(r=2, lora_alpha=2))
    _, event = events(g)
    with torch.no_grad():
        plain = errors(base, event, "policy")
        assert torch.equal(errors(g, event, "reference"), plain)
        for name, p in g.module.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
        assert torch.equal(errors(g, event, "reference"), plain)
        assert not torch.equal(errors(g, event, "policy"), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_adapters_only_and_checkpointing_is_exact(folder: Any, family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        g = generator(
            folder(family),
            lora=LoraOptions(r=2, lora_alpha=2),
            gradient_checkpointing=checkpointing,
        )
        _, event = events(g)
        g.score(event, "policy").logp.sum().backward()
        grads.append({k: p.grad for k, p in g.module.named_parameters() if p.grad is not None})
        assert grads[-1] and all("lora_" in k for k in grads[-1])
    assert grads[0].keys() == grads[1].keys()
    for k in grads[0]:
        torch.testing.assert_close(grads[0][k], grads[1][k])


def test_sdxl_time_ids_per_image_or_constant(folder: Any) -> None:
    meta = [
        {"original_size": (300, 200), "crop_top_left": (1, 2), "target_size": (64, 64)},
        {"original_size": (640, 480), "crop_top_left": (0, 80), "target_size": (64, 64)},
    ]
    states = [{"x0": torch.zeros(4, 8, 8)}] * 2
    for mode, want in {
        "image": [[300, 200, 1, 2, 64, 64], [640, 480, 0, 80, 64, 64]],
        "constant": [[64, 64, 0, 0, 64, 64]] * 2,
    }.items():
        g = generator(folder("sdxl"), time_ids=mode)
        cond = g.assemble(states, g.encode_prompts(PROMPTS), meta).cond
        assert cond["added_cond_kwargs.time_ids"].tolist() == want


def test_flow_shift_comes_from_the_scheduler(folder: Any) -> None:
    """SD3's static shift 3: the median level .5 becomes sigma .75; the recipe can override it."""
    for override, want in {None: 0.75, 1.0: 0.5}.items():
        g = DiffusersGenerator(
            DiffusersOptions(
                name_or_path=str(folder("sd3")), resolution=64, timestep_shift=override
            )
        )
        time = g.process.time(torch.tensor(0.5))
        assert g.process.level(time).item() == pytest.approx(want)


def test_vae_posterior_is_sampled_and_its_mean_on_request(folder: Any) -> None:
    """encode -> draw at level 0 returns mean + std * noise in the denoiser's scale."""
    from t2i_align.contract import Encoded

    torch.manual_seed(0)
    pixels = torch.rand(3, 64, 64) * 2 - 1
    meta = {"original_size": (64, 64), "crop_top_left": (0, 0), "target_size": (64, 64)}
    for sampled in (True, False):
        g = generator(folder("sd3"), vae_sample=sampled)
        state = g.encode_media([Encoded({"pixels": pixels}, meta)])[0].state
        posterior = g.pipe.vae.encode(pixels[None]).latent_dist
        config = g.pipe.vae.config
        mean = (posterior.mean[0] - config.shift_factor) * config.scaling_factor
        torch.testing.assert_close(state["mean"], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state["std"], posterior.std[0] * config.scaling_factor)
        sample = g.assemble([state], g.encode_prompts(PROMPTS[:1]), [meta])
        spec = DrawSpec(max_level=1e-9)
        x_t = g.draw(sample, spec, Seeds(SEEDS[:1], SEEDS[:1])).x_t
        assert x_t is not None
        z = (x_t[0, 0] - mean) / state["std"]
        if sampled:
            assert 0.8 < z.std().item() < 1.2
        else:
            assert z.abs().max().item() < 1e-2
