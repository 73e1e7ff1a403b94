"""Options of ``model: {type: diffusers}``; import-light."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2i_align.generators.adapters import AdaptOptions


class DiffusersOptions(AdaptOptions):
    """A stock diffusers pipeline: a local folder or a hub id."""

    type: Literal["diffusers"] = "diffusers"
    family: Literal["auto", "sd", "sdxl", "sd3"] = Field(
        default="auto", description="auto: by the pipeline class named in model_index.json"
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
