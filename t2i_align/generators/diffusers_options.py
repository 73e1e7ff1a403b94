"""Options of ``model: {type: diffusers}``; import-light."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2i_align.data.buckets import BucketOptions
from t2i_align.generators.adapters import AdaptOptions
from t2i_align.generators.layout_options import LayoutOptions
from t2i_align.options import Options


class QuantizationOptions(Options):
    """Linear layers of the frozen denoiser in few bits, under LoRA."""

    type: Literal["nf4", "int8", "float8"] = Field(
        description="nf4: 4 bits a weight in blocks of 64 (QLoRA, arXiv:2305.14314), needs "
        "bitsandbytes; int8: 8 bits a weight with one scale a row; float8: the same with e4m3 "
        "numbers, needs torchao; activations are untouched"
    )
    backend: Literal["auto", "torchao"] = Field(
        default="auto",
        description="whose numbers: auto: bitsandbytes' for nf4, the suite's own for int8, "
        "torchao's for float8; torchao: int8 by its Int8WeightOnlyConfig, too",
    )
    double_quant: bool = Field(
        default=False, description="nf4: the blocks' scales in 8 bits too, 0.4 bits a weight less"
    )
    skip_modules: list[str] = Field(
        default=[], description="module name suffixes that stay in model.dtype"
    )


class DiffusersOptions(AdaptOptions):
    """A stock diffusers pipeline: a local folder or a hub id."""

    type: Literal["diffusers"] = "diffusers"
    family: Literal[
        "auto",
        "chroma",
        "cogvideox",
        "cogview4",
        "flux",
        "flux2",
        "flux2_klein",
        "hunyuan_image",
        "ltx",
        "lumina2",
        "pixart",
        "qwen_image",
        "sana",
        "sd",
        "sd3",
        "sdxl",
        "wan",
        "z_image",
    ] = Field(default="auto", description="auto: by the pipeline class named in model_index.json")
    layout: LayoutOptions | None = Field(
        default=None,
        description="how the denoiser of a pipeline without a family is called; null: by family",
    )
    variant: str | None = Field(
        default=None, description="weight variant of the hub repo, e.g. fp16"
    )
    vae_name_or_path: str | None = Field(
        default=None,
        description="another VAE; SDXL's own overflows in float16, "
        "madebyollin/sdxl-vae-fp16-fix does not",
    )
    denoiser_name_or_path: str | None = Field(
        default=None,
        description="weights to start from instead of the pipeline's own, e.g. the unet/ folder "
        "an earlier run exported; they are the reference too",
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="precision of the VAE; float32 is safe, and paid once thanks to the cache",
    )
    vae_sample: bool = Field(
        default=True,
        description="sample the VAE posterior each draw as the released trainers do; false: "
        "its mean",
    )
    resolution: int = Field(
        default=512, ge=16, description="side of the square crop in pixels, a multiple of 8"
    )
    aspect_buckets: BucketOptions | None = Field(
        default=None,
        description="fit every record to one of several shapes of about resolution^2 pixels, the "
        "one nearest to its winner's; null: the one square",
    )
    sample_size: tuple[int, int] | None = Field(
        default=None,
        description="height and width of generated media; null: the square of resolution",
    )
    num_frames: int = Field(
        default=1,
        ge=1,
        description="video: frames of a clip, 1 more than a multiple of the VAE's; of longer clips "
        "the first are used",
    )
    short_clips: Literal["skip", "mask"] = Field(
        default="skip",
        description="video: what becomes of clips of fewer frames. skip: left out and counted; "
        "mask: their last frame is repeated, and what holds a repeated frame is not scored",
    )
    given_frames: int = Field(
        default=0,
        ge=0,
        description="video: first frames that are not scored, e.g. 1 where both clips of a pair "
        "were made from one picture",
    )
    frame_rate: float = Field(
        default=25.0,
        gt=0,
        description="video: frames a second of samples that are written, and what LTX is told",
    )
    embedded_guidance: float | None = Field(
        default=None,
        ge=0,
        description="guidance-distilled models (FLUX dev): the scale the network is told while it "
        "is trained; null: the pipeline's default",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="center as in the DPO code; random is fixed for each image, so it can be "
        "cached",
    )
    random_flip: bool = Field(
        default=False,
        description="mirror winner and loser jointly (MaPO, diffusers); flips break "
        "left/right prompts",
    )
    time_ids: Literal["image", "constant"] = Field(
        default="image",
        description="SDXL size conditions: image feeds each image's true size and crop; "
        "constant is "
        "[res, res, 0, 0, res, res] as in the released DPO code",
    )
    prediction_type: Literal["auto", "epsilon", "sample", "v_prediction", "velocity"] = Field(
        default="auto",
        description="what the network predicts; auto: as the scheduler's config says",
    )
    max_sequence_length: int | None = Field(
        default=None,
        ge=1,
        description="text tokens of pipelines that pad a T5 or language-model prompt; null: the "
        "pipeline's own (256 for SD3, where diffusers' training scripts use 77)",
    )
    timestep_shift: float | None = Field(
        default=None,
        gt=0,
        description="flow models: warp of the drawn noise level; null: the scheduler's static "
        "shift",
    )
    quantization: QuantizationOptions | None = Field(
        default=None, description="bits of the frozen denoiser under LoRA; null: model.dtype"
    )
    attention: Literal["sdpa", "auto", "xformers", "flash"] = Field(
        default="sdpa",
        description="kernel of the denoiser's attention, tried on the device before training; "
        "sdpa: torch's own; auto: the first of flash, xformers, sdpa that works",
    )
    offload_frozen: bool = Field(
        default=False,
        description="text encoders and VAE wait in CPU memory and visit the device only while they "
        "encode or decode; slower, for online runs that do not fit otherwise",
    )
    allow_distilled: bool = Field(
        default=False,
        description="train a few-step distilled model (turbo, lightning, LCM) by an objective on "
        "denoising errors although these say little of its samples",
    )
