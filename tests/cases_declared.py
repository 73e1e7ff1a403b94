"""Pipelines without a family, by a layout as a recipe declares it, and those that are refused.

The first ten by class name (:func:`generators`) are all here; the cases after them are extra.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from t2i_align.generators.layouts import family_of
from tests import tiny_declared as tiny
from tests.backbones import Case

EMBEDS = "encoder_hidden_states"
ODD = (64, 96)
SQUARE = {"resolution": 64}
TEXT = {"max_sequence_length": 32}
UNET = {"denoiser": "unet", "process": "vp", "sample_arg": "sample"}
DIT = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_q", "to_v", "to_out.0"]
FLOW = {"process": "rectified", "prediction": "velocity"}
MOTION: dict[str, Any] = {
    **UNET,
    "media": "video",
    "codec": "frames",
    "frame_args": [EMBEDS],
    "cond_shapes": {EMBEDS: [77, 16]},
}
XL = {
    EMBEDS: [77, 32],
    "added_cond_kwargs.text_embeds": [16],
    "added_cond_kwargs.time_ids": [6],
}
CLIP = {"resolution": 32, "num_frames": 3}
IDS = {"shared.txt_ids": [32, 3], "shared.img_ids": [16, 3]}


def declared(
    pipeline: str, build: Any, layout: dict[str, Any], options: dict[str, Any], **more: Any
) -> Case:
    """A case of a pipeline class with its layout."""
    odd = more.pop("odd", ODD)
    return Case(pipeline, build, {**options, "layout": layout}, odd, **more)


CASES: tuple[Case, ...] = (
    declared(
        "AllegroPipeline",
        tiny.allegro,
        {
            "process": "vp",
            "media": "video",
            "codec": "clip",
            "vae_factor": [8, 4],
            "causal": False,
            "vae_tiling": True,
            "shared": ["image_rotary_emb"],
            "integers": ["shared.image_rotary_emb.1"],
            "cond_shapes": {
                EMBEDS: [1, 32, 32],
                "encoder_attention_mask": [32],
                **{f"shared.image_rotary_emb.0.0.{i}": [6, 8] for i in range(2)},
                **{f"shared.image_rotary_emb.0.{j}.{i}": [8, 8] for j in (1, 2) for i in range(2)},
                **{f"shared.image_rotary_emb.1.{j}": [1, 384] for j in range(3)},
            },
            "call": {"clean_caption": False},
        },
        {"resolution": 128, "num_frames": 24, **TEXT},
        odd=(128, 176),
        call={**TEXT, "clean_caption": False},
    ),
    declared(
        "AltDiffusionPipeline",
        tiny.alt_diffusion,
        {**UNET, "cond_shapes": {EMBEDS: [77, 16]}},
        SQUARE,
    ),
    declared(
        "AnimateDiffPAGPipeline",
        partial(tiny.animate_diff, perturbed=True),
        {**MOTION, "call": {"pag_scale": 0.0}},
        CLIP,
        odd=(32, 48),
        call={"pag_scale": 0.0},
    ),
    declared("AnimateDiffPipeline", tiny.animate_diff, MOTION, CLIP, odd=(32, 48)),
    declared(
        "AnimateDiffSDXLPipeline",
        tiny.animate_diff_sdxl,
        {**MOTION, "cond_shapes": XL},
        CLIP,
        odd=(32, 48),
    ),
    declared(
        "AnyFlowPipeline",
        tiny.any_flow,
        {
            **FLOW,
            "media": "video",
            "codec": "clip",
            "vae_factor": [8, 4],
            "packing": "frames_first",
            "time_args": ["r_timestep"],
            "time_per": "frame",
            "cond_shapes": {EMBEDS: [32, 32]},
            "call": {"use_mean_velocity": False},
        },
        {"resolution": 32, "num_frames": 5, **TEXT},
        odd=(32, 48),
        call={**TEXT, "use_mean_velocity": False},
        packs=False,
    ),
    declared(
        "AuraFlowPipeline",
        tiny.aura_flow,
        {
            **FLOW,
            "time_factor": 1e-3,
            "attention": DIT,
            "cond_shapes": {EMBEDS: [32, 32]},
        },
        {**SQUARE, **TEXT},
        call=TEXT,
    ),
    declared(
        "BriaFiboPipeline",
        tiny.bria_fibo,
        {
            **FLOW,
            "codec": "image_of_clip",
            "packing": "tokens",
            "vae_factor": [16, 1],
            "attention": DIT,
            "alone": True,
            "ragged": True,
            "shared": ["txt_ids", "img_ids"],
            "cond_shapes": {
                EMBEDS: [32, 32],
                **{f"text_encoder_layers.{i}": [32, 16] for i in range(3)},
                **IDS,
            },
        },
        {**SQUARE, **TEXT},
        call=TEXT,
    ),
    declared(
        "BriaPipeline",
        tiny.bria,
        {
            **FLOW,
            "packing": "squares",
            "attention": DIT,
            "shared": ["txt_ids", "img_ids"],
            "cond_shapes": {EMBEDS: [32, 32], **IDS},
        },
        {**SQUARE, **TEXT},
        call=TEXT,
    ),
    declared(
        "CogView3PlusPipeline",
        tiny.cogview3_plus,
        {
            "process": "vp",
            "cond_shapes": {
                EMBEDS: [32, 32],
                "original_size": [2],
                "target_size": [2],
                "crop_coords": [2],
            },
        },
        {**SQUARE, **TEXT},
        call=TEXT,
    ),
)

NOTES = {
    "AllegroPipeline": "its VAE works in tiles of one clip only, 24 frames at least",
    "AltDiffusionPipeline": "diffusers 0.42.1 does not find the class of its text encoder any "
    "more; it is loaded from the pipeline's module",
    "AnimateDiffPAGPipeline": "pag_scale 0: perturbed attention is a guidance of the same network",
    "AnimateDiffPipeline": "a folder saved with its motion modules in (UNetMotionModel)",
    "AnimateDiffSDXLPipeline": "size conditions are those of the run's size, uncropped",
    "AnyFlowFARPipeline": "it denoises chunk after chunk, each told the clean ones before it",
    "AnyFlowPipeline": "a flow map: its velocity (r = t) is trained and sampled, "
    "its long steps are not",
}


@dataclass(frozen=True)
class Refused:
    """A pipeline that no layout describes.

    Args:
        reason: part of the error.
        layout: the nearest there is.
        build: writes a folder; None: its model_index.json is enough.
    """

    reason: str
    layout: dict[str, Any]
    build: Callable[[Path], Path] | None = None


REFUSED: dict[str, Refused] = {
    "AceStepPipeline": Refused(
        "AceStepPipeline takes no height and width, so it makes neither pictures nor clips", FLOW
    ),
    "AmusedPipeline": Refused(
        "AmusedPipeline has no VAE (vqvae, tokenizer, text_encoder, transformer, scheduler), so "
        "its samples are no latents and have no denoising error",
        FLOW,
    ),
    "AnyFlowFARPipeline": Refused(
        "the pipeline hands its denoiser latents [2, 1, 4, 4, 4], not [2, 2, 4, 4, 4]",
        {
            **FLOW,
            "media": "video",
            "codec": "clip",
            "vae_factor": [8, 4],
            "packing": "frames_first",
            "time_args": ["r_timestep"],
            "time_per": "frame",
            "call": {"use_mean_velocity": False},
        },
        tiny.any_flow_far,
    ),
    "AudioLDM2Pipeline": Refused(
        "AudioLDM2Pipeline takes no height and width, so it makes neither pictures nor clips", UNET
    ),
    "AudioLDMPipeline": Refused(
        "AudioLDMPipeline takes no height and width, so it makes neither pictures nor clips", UNET
    ),
}

VARIANTS = ("Img2Img", "Inpaint", "Control", "Edit", "Upscale", "ToVideo", "VideoToWorld", "Prior")


def generates_from_text(cls: type) -> bool:
    """A text-conditioned generator: takes a prompt and needs nothing else.

    Pictures, clips and audio alike, deprecated or not. Pipelines that start from a picture, a clip
    or a control are told by what they need and by their names.
    """
    takes = inspect.signature(cls.__call__).parameters  # type: ignore[attr-defined]
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {
        k
        for k, p in takes.items()
        if p.default is inspect.Parameter.empty and p.kind not in open_ended
    }
    variant = any(word in cls.__name__ for word in VARIANTS) and "TextToVideo" not in cls.__name__
    return "prompt" in takes and needed <= {"self", "prompt"} and not variant


def generators() -> Iterator[str]:
    """Text-conditioned pipelines of diffusers without a family, by class name."""
    import diffusers

    names = {n for group in diffusers._import_structure.values() for n in group}  # type: ignore
    for name in sorted(names):
        if name.endswith("Pipeline") and not name.endswith("ModularPipeline"):
            cls = getattr(diffusers, name)
            if generates_from_text(cls) and family_of(name) is None:
                yield name


def index_only(folder: Path, pipeline: str) -> Path:
    """A folder with the index of a pipeline that is refused before more is read."""
    import diffusers

    parts = list(inspect.signature(getattr(diffusers, pipeline).__init__).parameters)[1:]
    index: dict[str, Any] = {name: ["diffusers", name] for name in parts}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
    return folder
