"""Families as data: what a pipeline's latents and denoiser call look like.

A layout says which component is the denoiser, how it is called, which process it was trained on and
how its latents come about. Conditioning is not described here: it is captured (capture.py), except
what depends on the size of a picture (position ids, time ids), which a rule gives, so that pictures
of any size can share a prompt's cache. The families are in families/; a family whose rules are
ordinary can be declared in a recipe (``model.layout``) without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from t2i_align.contract import TensorDict
from t2i_align.errors import ModelError
from t2i_align.generators.latents import PACKINGS, CodecName, PackingName
from t2i_align.generators.layout_options import LayoutOptions
from t2i_align.process.convert import Prediction

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

UNET_ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
DIT_ATTENTION = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", *UNET_ATTENTION]
Branches = Literal["uncond_first", "cond_first", "two_calls", "embedded"]
Combine = Literal["standard", "beyond", "renormed", "guider"]


@dataclass(frozen=True)
class Call:
    """What a size rule may use.

    Args:
        config: of the denoiser.
        x_t: model latents ``(B, *L)``.
        cond: flat conditioning ``(B, ...)``.
        factor: pixels a latent pixel and frames a latent frame stand for.
        frame_rate: frames a second, video only.
    """

    config: Config
    x_t: Tensor
    cond: TensorDict
    factor: tuple[int, int]
    frame_rate: float


def no_rule(call: Call) -> dict[str, Any]:
    """Nothing depends on the size."""
    return {}


def latent_channels(config: Config) -> int:
    """The denoiser's input channels."""
    return config["in_channels"]


def vae_blocks(vae: Config) -> tuple[int, int]:
    """``(8, 1)``: the VAE halves the picture between its blocks."""
    return 2 ** (len(vae.get("block_out_channels", (1,) * 4)) - 1), 1


@dataclass(frozen=True)
class FamilyLayout:
    """One denoiser family.

    Args:
        pipelines: pipeline class names (``_class_name`` of model_index.json) that have this layout.
        denoiser: component name of the denoiser.
        process: ``vp`` (discrete, the scheduler's betas) or ``rectified``.
        sample_arg: the denoiser's latent argument.
        prediction: what the network predicts; ``scheduler`` reads the scheduler's
            ``prediction_type``.
        attention: LoRA preset of ``target_modules: attention``.
        cond_shapes: conditioning shapes of one item from the denoiser's config and the option
            max_sequence_length, for planning without encoders.
        time_arg: its time argument.
        time_factor: the network is told ``time_offset + time_factor * t``, t the scheduler's time.
        time_offset: see ``time_factor``.
        time_config: name of a config entry that multiplies the time, too.
        told_shift: of flows whose network is told the level before the warp by its sampler: the
            warp's factor from the scheduler's config and the number of a picture's tokens.
        sign: -1 if the network predicts the negative of ``prediction``.
        codec: how VAE latents become the denoiser's.
        packing: how those are handed over.
        channels: latent channels from the denoiser's config.
        factor: pixels a latent pixel and frames a latent frame stand for, from the VAE's config.
        sized: arguments that depend on the size of the latents, ``Call -> arguments``.
        replaced: names of captured arguments that ``sized`` gives.
        text_args: captured arguments that go on for the picture, each with the one of the text to
            whose length it is cut.
        per_image: conditioning that belongs to the image, not the prompt: key -> rule of
            ``assemble``.
        alone: prompts are encoded one by one, since mates would pad them.
        ragged: prompts of unequal length run apart, since nothing masks padding.
        text_mask: the mask of encoder_hidden_states, of pipelines that leave it out where no prompt
            is padded.
        branches: how guidance runs: one batch (which half first), two calls, or as an input of the
            network only.
        combine: how the branches become one prediction, see guidance.py.
        guidance_arg: the pipeline's argument for the guidance scale of two branches.
        no_guidance: the scale at which the pipeline runs one branch; the suite's own is 1.
        embedded_guidance: of guidance-distilled networks, the scale they are told while training;
            None if they take none.
        call: further arguments of the pipeline's call.
        counts: names of masks whose entries the network counts on the host; planning, where tensors
            have no values, hands it real ones.
        checkpoint_blocks: lists of blocks that are recomputed one by one under gradient
            checkpointing, see checkpointing.py; empty: the network's own way.
        media: what it generates.
        shared: captured arguments without a batch dimension, where their length could be taken for
            one.
        integers: starts of the names of conditioning that is of integers, for planning.
        frame_args: captured arguments that the pipeline repeats for every frame of a clip.
        time_args: further arguments of the denoiser that are told the time.
        time_per: whether a clip has one time or each of its latent frames its own.
        causal: a clip's first frame is a latent frame of its own; else frames come in whole groups.
        vae_tiling: the VAE works in tiles only, see ``enable_tiling``.
        citation: BibTeX of the family.
    """

    pipelines: tuple[str, ...]
    denoiser: Literal["unet", "transformer"]
    process: Literal["vp", "rectified"]
    sample_arg: str
    prediction: Prediction | Literal["scheduler"]
    attention: list[str]
    cond_shapes: Callable[[Config, int | None], Shapes]
    time_arg: str = "timestep"
    time_factor: float = 1.0
    time_offset: float = 0.0
    time_config: str | None = None
    told_shift: Callable[[Config, int], float] | None = None
    sign: int = 1
    codec: CodecName = "image"
    packing: PackingName = "none"
    channels: Callable[[Config], int] = latent_channels
    factor: Callable[[Config], tuple[int, int]] = vae_blocks
    sized: Callable[[Call], dict[str, Any]] = no_rule
    replaced: tuple[str, ...] = ()
    text_args: Mapping[str, str] = field(default_factory=dict)
    per_image: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    ragged: bool = False
    text_mask: str | None = None
    branches: Branches = "uncond_first"
    combine: Combine = "standard"
    guidance_arg: str = "guidance_scale"
    no_guidance: float = 1.0
    embedded_guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[str, ...] = ()
    checkpoint_blocks: tuple[str, ...] = ()
    media: Literal["image", "video"] = "image"
    shared: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    frame_args: tuple[str, ...] = ()
    time_args: tuple[str, ...] = ()
    time_per: Literal["item", "frame"] = "item"
    causal: bool = True
    vae_tiling: bool = False
    citation: str = ""

    def time(self, t: Tensor, config: Config) -> Tensor:
        """What the network is told of the scheduler's time."""
        factor = self.time_factor
        if self.time_config is not None:
            factor *= config[self.time_config]
        return t if factor == 1 and self.time_offset == 0 else self.time_offset + factor * t

    def latent_shape(
        self, config: Config, factor: tuple[int, int], sides: tuple[int, int], num_frames: int
    ) -> tuple[int, ...]:
        """``(c, h, w)`` or ``(c, f, h, w)`` of model latents, from pixels and frames.

        A clip has a latent frame for ``factor[1]`` frames and, if causal, one for the first.
        """
        space, k = factor
        frames: tuple[int, ...] = ()
        if self.codec in ("clip", "frames"):
            frames = (self.latent_frames(num_frames, k),)
        return (self.channels(config), *frames, sides[0] // space, sides[1] // space)

    def latent_frames(self, num_frames: int, k: int) -> int:
        """How many latent frames a clip fills, of which one stands for k frames."""
        return (num_frames - 1) // k + 1 if self.causal else num_frames // k

    def patch(self, config: Config) -> int:
        """Latent pixels a side of one token.

        A config's patch_size tells of the packing where pixels are packed (Qwen-Image), of the
        network's first layer elsewhere.
        """
        squares = PACKINGS[self.packing].squares
        if squares > 1 or self.denoiser == "unet":
            return squares
        found = config.get("patch_size", config.get("all_patch_size", 1))
        return found if isinstance(found, int) else found[-1]

    def patch_t(self, config: Config) -> int:
        """Latent frames of one token."""
        if self.media == "image":
            return 1
        found = config.get("patch_size", 1)
        return (config.get("patch_size_t") or 1) if isinstance(found, int) else found[0]


FAMILIES = {  # of each family its module in families/
    "chroma": "flux",
    "cogvideox": "video",
    "cogview4": "cogview",
    "flux": "flux",
    "flux2": "flux",
    "flux2_klein": "flux",
    "hunyuan_image": "hunyuan",
    "ltx": "video",
    "lumina2": "lumina",
    "pixart": "pixart",
    "qwen_image": "qwen",
    "sana": "pixart",
    "sd": "sd",
    "sd3": "sd",
    "sdxl": "sd",
    "wan": "video",
    "z_image": "lumina",
}


@cache
def layout_of(family: str) -> FamilyLayout:
    """The layout of a family by name."""
    module = import_module(f"t2i_align.generators.families.{FAMILIES[family]}")
    return module.LAYOUTS[family]


def family_of(pipeline_class: str) -> str | None:
    """Name of the family a pipeline class belongs to, or None."""
    return next((name for name in FAMILIES if pipeline_class in layout_of(name).pipelines), None)


def declared(options: LayoutOptions) -> FamilyLayout:
    """The layout a recipe declares (``model.layout``)."""
    given = options.model_dump()
    shapes: Shapes = {k: tuple(v) for k, v in given.pop("cond_shapes").items()}
    channels, factor = given.pop("channels"), given.pop("vae_factor")
    given["integers"] = tuple(given["integers"])
    parts = 4 if options.packing == "squares" else 1

    def cond_shapes(config: Config, length: int | None) -> Shapes:
        if not shapes:
            raise ModelError(
                "model.layout.cond_shapes: a plan without encoders needs the shapes of one item's "
                "conditioning",
                "name them, e.g. {encoder_hidden_states: [256, 4096]}, or train without a plan",
            )
        return shapes

    return FamilyLayout(
        pipelines=(),
        cond_shapes=cond_shapes,
        channels=lambda config: channels or config["in_channels"] // parts,
        factor=vae_blocks if factor is None else lambda vae: (factor[0], factor[1]),
        **given,
    )
