"""``model.layout``: a pipeline without a family, described in the recipe; import-light."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2i_align.options import Options


class LayoutOptions(Options):
    """How a pipeline's denoiser is called; see generators/layouts.py.

    Conditioning is captured from the pipeline, position ids included, so a run keeps one size.
    """

    denoiser: Literal["unet", "transformer"] = Field(
        default="transformer", description="component of the pipeline that is trained"
    )
    process: Literal["vp", "rectified"] = Field(
        description="vp: noised by the scheduler's betas; rectified: (1 - s) x_0 + s eps"
    )
    prediction: Literal["scheduler", "epsilon", "sample", "v_prediction", "velocity"] = Field(
        default="scheduler",
        description="what the network predicts; velocity is eps - x_0, the rule of flow models; "
        "scheduler: as the scheduler's prediction_type says",
    )
    sample_arg: str = Field(
        default="hidden_states", description="the denoiser's argument for the noised latents"
    )
    time_arg: str = Field(default="timestep", description="and for the time")
    time_factor: float = Field(
        default=1.0, description="the network is told time_offset + time_factor * t, t in [0, 1000]"
    )
    time_offset: float = Field(default=0.0, description="see time_factor")
    sign: Literal[1, -1] = Field(
        default=1, description="-1: the network predicts the negative (clocks from noise to data)"
    )
    time_args: list[str] = Field(
        default=[], description="further arguments that are told the time (flow maps' r)"
    )
    time_per: Literal["item", "frame"] = Field(
        default="item", description="frame: each latent frame of a clip is told the time"
    )
    codec: Literal["image", "clip", "image_of_clip", "patchified", "frames"] = Field(
        default="image",
        description="image: a picture VAE; clip: a video VAE; image_of_clip: pictures as clips of "
        "one frame; patchified: FLUX.2's; frames: each frame of a clip by a picture VAE",
    )
    causal: bool = Field(
        default=True,
        description="a clip's first frame is a latent frame of its own (F = k n + 1 frames); "
        "false: F = k n",
    )
    vae_tiling: bool = Field(
        default=False, description="the VAE works in tiles only (AutoencoderKLAllegro)"
    )
    packing: Literal["none", "squares", "tokens", "volume", "frames_first", "list"] = Field(
        default="none",
        description="how latents are handed to the denoiser; squares: tokens of 2 x 2 latent "
        "pixels (FLUX), tokens: of one, volume: of patch_size_t x patch_size^2",
    )
    channels: int | None = Field(
        default=None, ge=1, description="latent channels; null: in_channels, a fourth for squares"
    )
    vae_factor: list[int] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="pixels a latent pixel and frames a latent frame stand for; null: by the VAE's "
        "blocks, and 1",
    )
    branches: Literal["uncond_first", "cond_first", "two_calls", "embedded"] = Field(
        default="uncond_first",
        description="guidance as one batch (which half first), as two calls, or only as an input",
    )
    combine: Literal["standard", "beyond", "renormed"] = Field(
        default="standard", description="how two branches become one; see generators/guidance.py"
    )
    guidance_arg: str = Field(
        default="guidance_scale", description="the pipeline's argument for the guidance scale"
    )
    embedded_guidance: float | None = Field(
        default=None, description="guidance-distilled networks: the scale they are told"
    )
    attention: list[str] = Field(
        default=["to_k", "to_q", "to_v", "to_out.0"],
        description="module name suffixes behind lora.target_modules: attention",
    )
    alone: bool = Field(
        default=False, description="encode prompts one by one (pipelines that pad to the longest)"
    )
    ragged: bool = Field(
        default=False, description="run prompts of unequal length apart (no mask hides padding)"
    )
    shared: list[str] = Field(
        default=[],
        description="the denoiser's arguments without a batch dimension (position ids), where "
        "their length could be taken for one",
    )
    frame_args: list[str] = Field(
        default=[],
        description="the denoiser's arguments that the pipeline repeats for every frame",
    )
    checkpoint_blocks: list[str] = Field(
        default=[],
        description="lists of blocks that are recomputed one by one under gradient checkpointing, "
        "where the network's own way is wrong",
    )
    call: dict[str, bool | int | float | str] = Field(
        default={}, description="further arguments of the pipeline's call"
    )
    media: Literal["image", "video"] = Field(default="image", description="what it generates")
    cond_shapes: dict[str, list[int]] = Field(
        default={},
        description="shapes of one item's conditioning by argument, for planning without encoders",
    )
    integers: list[str] = Field(
        default=[], description="starts of those names whose conditioning is of integers"
    )
