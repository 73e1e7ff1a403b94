"""What is particular to video families: noise schedules, frames, experts, clips end to end."""

from __future__ import annotations

import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from t2i_align.contract import Media, MediaError
from t2i_align.data.video import frames, load_clip
from t2i_align.errors import ModelError, RecipeError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import layout_of
from t2i_align.process.schedule import noised, vp_from_scheduler
from t2i_align.process.seeds import generator as rng
from t2i_align.process.seeds import normals
from t2i_align.recipe import load_recipe
from t2i_align.rollout.generate import Settings, generate, sample_images
from tests.backbones import PROMPTS, SEEDS
from tests.runs import losses, train, weights, write_jsonl, write_recipe
from tests.tiny_video import (
    COGVIDEOX_BETAS,
    cogvideox,
    cogvideox_5b,
    cogvideox_15,
    cogvideox_scheduler,
    ltx,
    moving,
    mp4,
    wan,
    wan_experts,
)

CLIP: dict[str, Any] = {"resolution": 32, "num_frames": 5}


def options(folder: Path, **changes: Any) -> DiffusersOptions:
    return DiffusersOptions.model_validate(CLIP | {"name_or_path": str(folder)} | changes)


def loaded(folder: Path, **changes: Any) -> DiffusersGenerator:
    made = DiffusersGenerator(options(folder, **changes))
    made.load_module(0, reference=False)
    return made


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan(tmp_path_factory.mktemp("wan"))


# -- schedules


def shifted(k: float, *, rescaled: bool) -> np.ndarray:
    """CogVideoX's abar by hand in float64: the ratio abar / (1 - abar) over k, then zero SNR."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - beta)
    ratio = abar / (1 - abar) / k
    abar = ratio / (1 + ratio)
    if not rescaled:
        return abar
    root = np.sqrt(abar)  # arXiv:2305.08891, algorithm 1: the last is 0, the first stays
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("k", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["ddim", "dpm"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_cogvideox_noises_by_its_own_schedule(kind: str, k: float, rescaled: bool) -> None:
    scheduler = cogvideox_scheduler(kind, k)
    config = dict(scheduler.config) | {"rescale_betas_zero_snr": rescaled}
    config["_class_name"] = type(scheduler).__name__
    process = vp_from_scheduler(config)
    np.testing.assert_allclose(process.alphas_cumprod.numpy(), shifted(k, rescaled=rescaled), 1e-9)
    plain = vp_from_scheduler({n: v for n, v in config.items() if n != "snr_shift_scale"})
    gap = (plain.alphas_cumprod - process.alphas_cumprod).abs().max().item()
    assert gap < 1e-6 if k == 1 else gap > 0.2  # what DDPM's rule would get wrong


def test_cogvideox_clips_are_noised_as_its_scheduler_does() -> None:
    scheduler = cogvideox_scheduler("ddim", 3.0)
    process = vp_from_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    time = torch.tensor([0, 500, 999])
    x_0, eps = torch.randn(2, 3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = noised(x_0, eps, *process.coefficients(time))
    torch.testing.assert_close(found, scheduler.add_noise(x_0, eps, time).float())
    assert torch.equal(found[2], eps[2])  # no signal is left at the end


def test_a_shift_without_its_class_is_refused() -> None:
    config: dict[str, object] = COGVIDEOX_BETAS | {"snr_shift_scale": 3.0, "_class_name": "Gone"}
    with pytest.raises(ModelError, match="has no class 'Gone' that would know how"):
        vp_from_scheduler(config)


def test_cogvideox_5b_samples_with_its_stochastic_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's DPM scheduler: noise of each item from its seed, the last estimate remembered.

    The pipeline's latents have frames first, so its own noise is drawn in that order.
    """
    from diffusers.schedulers import scheduling_dpm_cogvideox as dpm

    folder = cogvideox(tmp_path, rotary=True, scheduler="dpm")
    g = loaded(folder, max_sequence_length=24)
    inputs = g.prepare_sampling(PROMPTS, num_steps=4, guidance=6.0)
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])

    def drawn(shape: torch.Size, **given: Any) -> torch.Tensor:
        batch, num, channels, *space = shape
        return randn((batch, channels, num, *space), **given).transpose(1, 2)

    randn = dpm.randn_tensor
    monkeypatch.setattr(dpm, "randn_tensor", drawn)

    def theirs(offset: int) -> torch.Tensor:
        found = g.pipe(
            prompt=PROMPTS,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=4,
            guidance_scale=6.0,
            latents=normals(SEEDS, inputs.shape).transpose(1, 2),
            generator=[rng(s + offset) for s in SEEDS.tolist()],
            max_sequence_length=24,
            output_type="pt",
        )
        return found.frames.transpose(1, 2)

    assert (ours - theirs(1)).abs().max().item() <= 1e-4
    assert (ours - theirs(7)).abs().max().item() > 1e-3  # the noise matters


# -- sizes and refusals


@pytest.mark.parametrize(
    ("family", "denoiser", "vae", "size", "shape"),
    [
        # the hub's configs: latent frames 1 + (F - 1) / k, k = 4, 8, 4
        ("wan", {"in_channels": 16}, {}, (480, 832, 81), (16, 21, 60, 104)),
        ("ltx", {"in_channels": 128}, {}, (512, 704, 161), (128, 21, 16, 22)),
        ("cogvideox", {"in_channels": 16}, {}, (480, 720, 49), (16, 13, 60, 90)),
        (
            "wan",
            {"in_channels": 48},
            {"scale_factor_spatial": 16, "scale_factor_temporal": 4},
            (704, 1280, 121),
            (48, 31, 44, 80),
        ),
    ],
    ids=["wan", "ltx", "cogvideox", "wan 2.2 5B"],
)
def test_full_size_latents(
    family: str,
    denoiser: dict[str, Any],
    vae: dict[str, Any],
    size: tuple[int, int, int],
    shape: tuple[int, ...],
) -> None:
    layout = layout_of(family)
    space, time = layout.factor(vae)
    height, width, num = size
    latent = ((num - 1) // time + 1, height // space, width // space)
    assert (layout.channels(denoiser), *latent) == shape and (num - 1) % time == 0


@pytest.mark.parametrize(
    ("build", "num_frames", "told"),
    [
        (wan, 6, "6 is not one more than a multiple of 4, fix: use 5 or 9"),
        (ltx, 4, "4 is not one more than a multiple of 2, fix: use 3 or 5"),
        (
            cogvideox_15,
            9,
            r"9 is not 4 (2 m - 1) + 1 for a whole m: a token holds 2 latent frames, "
            "fix: use 5 or 13",
        ),
    ],
    ids=["wan", "ltx", "cogvideox 1.5"],
)
def test_frames_the_vae_or_the_tokens_cannot_hold(
    tmp_path: Path, build: Any, num_frames: int, told: str
) -> None:
    folder = build(tmp_path)
    with pytest.raises(ModelError) as caught:
        DiffusersGenerator(options(folder, num_frames=num_frames))
    said = f"{caught.value.message}, fix: {caught.value.fix}"
    assert said == f"model.num_frames: {told}"
    proposed = [int(n) for n in str(caught.value.fix).removeprefix("use ").split(" or ")]
    for n in proposed:  # and what it proposes is taken
        assert DiffusersGenerator(options(folder, num_frames=n)).size.num_frames == n


def test_two_experts_are_refused(tmp_path: Path) -> None:
    folder = wan_experts(tmp_path)
    with pytest.raises(ModelError, match="two experts") as caught:
        DiffusersGenerator(options(folder))
    assert "Wan 2.1" in str(caught.value.fix)


def test_the_2b_has_one_text_length(tmp_path: Path) -> None:
    g = loaded(cogvideox(tmp_path), max_sequence_length=16)
    inputs = g.prepare_sampling(PROMPTS, num_steps=2, guidance=1.0)
    with pytest.raises(ModelError, match=r"max_sequence_length: 16 text tokens.* for 24 only"):
        g.rollout(inputs, SEEDS, "policy")
    rotary = loaded(cogvideox_5b(tmp_path / "5b"), max_sequence_length=16)
    inputs = rotary.prepare_sampling(PROMPTS, num_steps=2, guidance=1.0)
    assert rotary.rollout(inputs, SEEDS, "policy").sample.state["x0"].isfinite().all()


# -- clips end to end


def test_a_clip_is_encoded_as_by_hand(wan_folder: Path) -> None:
    """Wan's (z - mean) / std of the posterior of the first five frames; its decoder undoes it."""
    g = loaded(wan_folder)
    data = mp4(moving(1, 7, (40, 48)))
    (encoded,) = g.encode_media([g.load_media(Media("video", data, {"key": "k"}), "")])
    pixels, _ = load_clip(data, 5, 32, "center", "k", False)
    vae = g.pipe.vae
    with torch.no_grad():
        posterior = vae.encode(pixels[None]).latent_dist
        decoded = vae.decode(posterior.mean).sample
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"]).view(4, 1, 1, 1) for name in ("mean", "std")
    )
    assert encoded.state["mean"].shape == (4, 2, 4, 4)
    torch.testing.assert_close(encoded.state["mean"], (posterior.mean[0] - mean) / std)
    torch.testing.assert_close(encoded.state["std"], posterior.std[0] / std)
    (ours,) = g.decode(g.assemble([encoded.state], g.encode_prompts(["a"]), [encoded.meta]))
    assert ours.kind == "video" and ours.data.shape == (3, 5, 32, 32)
    shown = (decoded[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.data, shown, rtol=0, atol=2e-4)


def recipe(folder: Path, work: Path, **model: Any) -> dict[str, Any]:
    """Six pairs of clips, wide and tall by turns, and one whose loser is too short."""
    rows = []
    for i in range(7):
        for side in "wl":
            length = 3 if (i, side) == (6, "l") else 6
            clip = moving(2 * i + (side == "w"), length, [(36, 56), (56, 36)][i % 2])
            (work / f"{side}{i}.mp4").write_bytes(mp4(clip))
        row = {"id": str(i), "prompt": PROMPTS[i % 2]}
        rows.append(row | {"chosen": f"w{i}.mp4", "rejected": f"l{i}.mp4"})
    write_jsonl(work / "pairs.jsonl", rows)
    lora = {"r": 2, "lora_alpha": 2}
    common = CLIP | {"max_sequence_length": 32, "lora": lora} | model
    return {
        "model": {"type": "diffusers", "name_or_path": str(folder), **common},
        "objective": {"type": "dpo", "beta": 500},
        "data": {"type": "trl", "path": str(work / "pairs.jsonl"), "media": "video"},
        "cache": {"dir": str(work / "cache"), "dtype": "float32"},
        "train": {
            "learning_rate": 1e-2,
            "train_batch_size": 2,
            "max_train_steps": 3,
            "checkpointing_steps": 3,
            "report_to": "none",
        },
    }


def test_dpo_on_clips_of_two_aspects(wan_folder: Path, tmp_path: Path) -> None:
    """Buckets by the clips' own shapes; the short clip's pair is left out and named; clips saved.

    Resume and export are proven for every family in test_backbones.py.
    """
    sections = recipe(
        wan_folder, tmp_path, resolution=48, aspect_buckets={"sizes": [[32, 48], [48, 32]]}
    )
    sections["validation"] = {
        "prompts": PROMPTS,
        "validation_steps": 3,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    train(tmp_path, "run", sections)
    assert abs(losses(tmp_path / "run")[0] - math.log(2)) < 1e-6
    assert weights(tmp_path / "run", 3)
    (report,) = (tmp_path / "cache" / "v1" / "manifests").glob("*.json")
    facts = json.loads(report.read_text())
    assert facts["buckets"] == {"32x48": 3, "48x32": 3}
    assert facts["num_skipped"] == 1
    assert facts["skipped"] == [["6", "a clip of 3 frames; model.num_frames asks for 5"]]
    sheet = max((tmp_path / "run").rglob("*.mp4"))
    assert sheet.name == "step-00000003.mp4"
    shown = list(frames(sheet))
    assert len(shown) == 5 and shown[0].size == (96, 48)


def test_recipes_are_told_of_experts_and_of_judges_of_pictures(
    wan_folder: Path, tmp_path: Path
) -> None:
    """Before anything is loaded, and both at once."""
    sections = recipe(wan_experts(tmp_path / "experts"), tmp_path)
    sections["rounds"] = {"num_rounds": 2, "samples": {"label_by": {"judges": ["jpeg"]}}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, "experts", sections))
    told = [str(p) for p in caught.value.problems]
    assert any("model.name_or_path: this pipeline has two experts" in t for t in told)
    makes = "rounds.samples: judges look at pictures, and DiffusersGenerator makes video"
    assert any(makes in t for t in told)
    sections = recipe(wan_folder, tmp_path)
    load_recipe(write_recipe(tmp_path, "one", sections))  # and one expert is fine


def test_pictures_are_not_made_of_clips(wan_folder: Path) -> None:
    g = loaded(wan_folder, max_sequence_length=32)
    with pytest.raises(MediaError, match="this model makes video"):
        sample_images(g, PROMPTS[:1], [3], num_steps=1, guidance=1.0)


def others(one: Media, every: list[Media]) -> list[Media]:
    return [x for x in every if x is not one]


def test_generate_writes_clips(wan_folder: Path, tmp_path: Path) -> None:
    g = loaded(wan_folder, max_sequence_length=32, frame_rate=16)
    quick = Settings(num_inference_steps=2, guidance_scale=1.0, batch_size=2)
    run = partial(generate, g, PROMPTS, quick, tmp_path, Console(file=io.StringIO()))
    assert run() == 2
    rows = [json.loads(x) for x in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == ["00000-00.mp4", "00001-00.mp4"]
    assert rows[0]["num_frames"] == 5 and rows[0]["frame_rate"] == 16
    inputs = g.prepare_sampling(PROMPTS, num_steps=2, guidance=1.0)
    seeds = torch.tensor([r["noise_seed"] for r in rows])
    clips = g.decode(g.rollout(inputs, seeds, "policy").sample)
    for row, clip in zip(rows, clips, strict=True):
        shown = np.stack([np.asarray(x) for x in frames(tmp_path / row["file_name"])])
        found = torch.from_numpy(shown).permute(3, 0, 1, 2) / 255
        assert found.shape == clip.data.shape
        near, far = ((found - c.data).mean(0).abs().mean() for c in (clip, *others(clip, clips)))
        assert near < 0.05 < 0.1 < far  # the codec is lossy, of colour above all
    assert run() == 0
    (tmp_path / "00001-00.mp4").unlink()
    assert run() == 1 and not list(tmp_path.glob("*.tmp"))
