"""What every backbone must prove, against the stock pipeline as the oracle.

A case names a builder of a tiny random pipeline folder of the real classes and the ``model``
options that go with it. The proofs below are the same for all of them; ``Case.fails`` says which a
family cannot pass, and why, and the docs' table is written from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import DrawSpec, Event, Sample, Seeds
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.process.convert import to_x0_eps
from t2i_align.process.schedule import broadcast
from t2i_align.process.seeds import normals
from tests.runs import jpeg, losses, train, weights, write_jsonl
from tests.stock_pipelines import PROMPTS, SEEDS, loop, stock, unpacked
from tests.tiny_video import moving, mp4

LORA = LoraOptions(r=2, lora_alpha=2)


@dataclass(frozen=True)
class Case:
    """One backbone under test.

    Args:
        name: of the family (or the pipeline, where the layout is declared).
        build: writes a pipeline folder.
        options: of ``model`` besides the folder.
        odd: height and width that are not square.
        guidance: a scale that turns guidance on; None where there is none.
        call: arguments of the stock pipeline that the suite fixes.
        guidance_arg: the pipeline's name for the scale; None: set on its guider.
        negative: the stock pipeline's negative prompt under guidance.
        no_guidance: the stock pipeline's scale that runs one branch.
        packs: the stock pipeline is given latents as its scheduler sees them.
        idle: names in which adapted layers end that cannot learn, since nothing reads their output.
        fails: proofs by name that it cannot pass, and why.
    """

    name: str
    build: Callable[[Path], Any]
    options: dict[str, Any]
    odd: tuple[int, int]
    guidance: float | None = 4.0
    call: dict[str, Any] = field(default_factory=dict)
    guidance_arg: str | None = "guidance_scale"
    negative: str | None = None
    no_guidance: float = 1.0
    packs: bool = True
    idle: tuple[str, ...] = ()
    fails: dict[str, str] = field(default_factory=dict)


def generator(case: Case, folder: Path, **changes: Any) -> DiffusersGenerator:
    """The policy loaded, encoders available."""
    options = DiffusersOptions(name_or_path=str(folder), **(case.options | changes))
    made = DiffusersGenerator(options)
    made.load_module(0, reference=changes.get("lora") is not None)
    return made


def proves_images(case: Case, folder: Path, guidance: float, size: tuple[int, int] | None) -> None:
    """Two prompts of unequal length: the suite's loop gives the pipeline's own pictures."""
    changes = {} if size is None else {"sample_size": size}
    g = generator(case, folder, **changes)
    inputs = g.prepare_sampling(PROMPTS, num_steps=4, guidance=guidance)
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])
    theirs = stock(case, g, normals(SEEDS, inputs.shape), 4, guidance)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= 1e-4
    assert (theirs[0] - theirs[1]).abs().max().item() > 1e-3  # the oracle is not constant


def events(g: DiffusersGenerator, num_draws: int = 1) -> tuple[Sample, Event]:
    """Two random latents under the two prompts, drawn at two levels."""
    conds = g.encode_prompts(PROMPTS)
    torch.manual_seed(5)
    size = replace(g.size, height=g.options.resolution, width=g.options.resolution)
    states = [{"x0": torch.randn(g.latent_shape(size))} for _ in PROMPTS]
    side = [g.options.resolution] * 2
    meta = {"original_size": side, "crop_top_left": [0, 0], "target_size": side}
    sample = g.assemble(states, conds, [meta, meta])
    event = g.draw(sample, DrawSpec(num_draws=num_draws), Seeds(SEEDS, SEEDS + 100))
    return sample, event


def proves_score(case: Case, folder: Path, guidance: float) -> None:
    """The error is that of the prediction which the pipeline's own loop gives its scheduler.

    Prompts are encoded as for training (cached, one by one where the family says so).
    """
    g = generator(case, folder)
    assert g.size.height == g.options.resolution
    inputs = g.prepare_sampling(PROMPTS, num_steps=4, guidance=guidance)
    steps = loop(case, g, normals(SEEDS, inputs.shape), guidance)
    _, event = events(g)
    negative = None
    if inputs.negative is not None:
        negative = inputs.negative
        event = replace(event, cond=inputs.cond)
    scale = 1.0 if negative is None else guidance
    if g.call.embedded_guidance is not None:
        told = {"guidance": torch.full((2,), guidance)}
        event = replace(event, cond=event.cond | told)
    for step in steps[:: len(steps) - 1]:
        x_t, wanted = (unpacked(g, x.float(), inputs.shape) for x in (step.x_t, step.prediction))
        time = step.time.expand(2)[:, None]
        here = replace(event, x_t=x_t[:, None], time=time)
        with torch.no_grad():
            score = g.score(here, "policy", guidance=scale, negative=negative)
        assert here.target is not None and score.error is not None
        literal = (wanted - here.target[:, 0]).square().flatten(1).mean(1)
        torch.testing.assert_close(score.error[:, 0], literal, rtol=1e-4, atol=1e-5)


def proves_true_target(case: Case, folder: Path) -> None:
    """A flipped sign or time direction fails: with the true target an Euler step gets closer."""
    g = generator(case, folder)
    sample, event = events(g)
    assert event.x_t is not None and event.time is not None and event.target is not None
    x_t, time = event.x_t[:, 0], event.time[:, 0]
    alpha, sigma = g.process.coefficients(time)
    x_0, eps = to_x0_eps(g.prediction, event.target[:, 0], x_t, alpha, sigma)
    alpha_2, sigma_2 = g.process.coefficients((time * 0.8).to(time.dtype))
    moved = broadcast(alpha_2, x_0) * x_0 + broadcast(sigma_2, eps) * eps
    distance = lambda x: (x - sample.state["x0"]).flatten(1).norm(dim=1)  # noqa: E731
    assert (distance(moved) < distance(x_t)).all()
    if g.layout.process == "rectified":  # the literal step of a rectified flow
        step = broadcast(0.2 * sigma, x_t)  # of the way, which may be short
        assert (distance(x_t - step * event.target[:, 0]) < distance(x_t)).all()


def proves_ragged(case: Case, folder: Path) -> None:
    """A prompt's error does not depend on the prompts it is batched with, nor on draws."""
    g = generator(case, folder)
    _, both = events(g, num_draws=2)
    with torch.no_grad():
        together = g.score(both, "policy").error
        for i in range(2):
            alone = replace(both.items(slice(i, i + 1)), cond=single(g, i))
            error = g.score(alone, "policy").error
            assert together is not None and error is not None
            torch.testing.assert_close(together[i : i + 1], error, rtol=1e-4, atol=1e-5)


def single(g: DiffusersGenerator, i: int) -> dict[str, Tensor]:
    """Conditioning of one prompt, encoded and assembled alone."""
    side = [g.options.resolution] * 2
    meta = {"original_size": side, "crop_top_left": [0, 0], "target_size": side}
    conds = g.encode_prompts([PROMPTS[i]])
    return g.assemble([{"x0": torch.zeros(1)}], conds, [meta]).cond


def proves_adapters(case: Case, folder: Path) -> None:
    """LoRA off is bitwise the base; gradients reach adapters only, checkpointed or not."""
    base = generator(case, folder)
    base.module.requires_grad_(False)  # as under adapters: torch's matmul chooses its kernel by it
    _, event = events(base)
    with torch.no_grad():
        plain = base.score(event, "policy").logp
    grads: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        g = generator(case, folder, lora=LORA, gradient_checkpointing=checkpointing)
        _fill(g.module)
        with torch.no_grad():
            assert torch.equal(g.score(event, "reference").logp, plain)
            assert not torch.equal(g.score(event, "policy").logp, plain)
        g.score(event, "policy").logp.sum().backward()
        grads.append({k: p.grad for k, p in g.module.named_parameters() if p.grad is not None})
    assert grads[0] and all("lora_" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def _fill(module: nn.Module) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))


def pairs(folder: Path, resolution: int, num_frames: int) -> Path:
    """Four pairs of pictures, or clips of a frame too many, whose sizes differ."""
    rows = []
    for i in range(4):
        names = []
        for side in ("w", "l"):
            seed, size = 2 * i + (side == "w"), (resolution, resolution + 8 * i)
            name = folder / f"{side}{i}.{'jpg' if num_frames == 1 else 'mp4'}"
            clip = num_frames > 1
            name.write_bytes(mp4(moving(seed, num_frames + 1, size)) if clip else jpeg(seed, *size))
            names.append(name.name)
        rows.append({"prompt": PROMPTS[i % 2], "chosen": names[0], "rejected": names[1]})
    return write_jsonl(folder / "pairs.jsonl", rows)


def sections(case: Case, folder: Path, work: Path) -> dict[str, Any]:
    """A recipe of two dpo steps on the backbone, at full precision."""
    lora = {"r": 2, "lora_alpha": 2}
    num_frames = case.options.get("num_frames", 1)
    return {
        "model": {"type": "diffusers", "name_or_path": str(folder), "lora": lora, **case.options},
        "objective": {"type": "dpo", "beta": 500},
        "data": {
            "type": "trl",
            "path": str(pairs(work, case.options["resolution"], num_frames)),
            "media": "image" if num_frames == 1 else "video",
        },
        "cache": {"dir": str(work / "cache"), "dtype": "float32"},
        "train": {
            "learning_rate": 1e-2,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "report_to": "none",
        },
    }


def proves_training(case: Case, folder: Path, work: Path) -> None:
    """``train``: margin 0 at first, resume bit for bit, and the exported adapter is the policy."""
    recipe = sections(case, folder, work)
    train(work, "whole", recipe)
    assert abs(losses(work / "whole")[0] - math.log(2)) < 1e-6
    train(work, "parts", recipe, "train.max_train_steps=1")
    train(work, "parts", recipe, "train.resume_from_checkpoint=latest")
    one, two = (weights(work / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    before = weights(work / "whole", 1)
    assert any(not torch.equal(one[k], before[k]) for k in one)
    proves_reload(case, folder, work / "whole", one)


def proves_reload(case: Case, folder: Path, run: Path, trained: dict[str, Tensor]) -> None:
    """The exported adapter, read by the stock loader, gives the policy's pictures."""
    policy = generator(case, folder, lora=LORA)
    parameters = dict(policy.module.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    inputs = policy.prepare_sampling(PROMPTS, num_steps=3, guidance=1.0)
    sampled = policy.rollout(inputs, SEEDS, "policy").sample
    ours = torch.stack([m.data for m in policy.decode(sampled)])
    plain = generator(case, folder)
    noise = normals(SEEDS, inputs.shape)
    without = stock(case, plain, noise, 3, 1.0)
    load_stock_adapter(plain, run)
    theirs = stock(case, plain, noise, 3, 1.0)
    own = generator(case, folder)
    own.load_adapter(str(run))
    again = own.rollout(inputs, SEEDS, "policy").sample.state["x0"]
    torch.testing.assert_close(again, sampled.state["x0"], rtol=1e-4, atol=1e-4)
    assert (ours - theirs).abs().max().item() <= 1e-4
    assert (without - theirs).abs().max().item() > 1e-4  # the adapter does something


def load_stock_adapter(g: DiffusersGenerator, run: Path) -> None:
    """By the pipeline's ``load_lora_weights``; by peft where the pipeline has none."""
    if hasattr(g.pipe, "load_lora_weights"):
        g.pipe.load_lora_weights(str(run))
        return
    from peft import PeftModel

    name = g.layout.denoiser
    setattr(
        g.pipe, name, PeftModel.from_pretrained(getattr(g.pipe, name), str(run)).base_model.model
    )
