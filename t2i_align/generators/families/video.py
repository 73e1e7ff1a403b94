"""Video: Wan, LTX-Video and CogVideoX, latents ``(c, f, h, w)``.

A clip of F frames has ``(F - 1) / k + 1`` latent frames, k the VAE's temporal factor, so F - 1 must
be a multiple of k.
"""

from __future__ import annotations

from typing import Any

from t2i_align.errors import ModelError
from t2i_align.generators.layouts import (
    DIT_ATTENTION,
    UNET_ATTENTION,
    Call,
    Config,
    FamilyLayout,
    Shapes,
)


def ltx_factor(vae: Config) -> tuple[int, int]:
    """From the VAE's patch and its scaling blocks, as the VAE computes them."""
    given = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    scaling = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
    space = given[0] or vae.get("patch_size", 4) * 2**scaling
    return space, given[1] or vae.get("patch_size_t", 1) * 2**scaling


def wan_factor(vae: Config) -> tuple[int, int]:
    """As the VAE's config says."""
    return vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)


def ltx_sized(call: Call) -> dict[str, Any]:
    """Latent frames, rows, columns, and the seconds and pixels one of them stands for."""
    _, _, frames, h, w = call.x_t.shape
    space, time = call.factor
    scale = (time / call.frame_rate, space, space)
    return {
        "num_frames": frames,
        "height": h,
        "width": w,
        "rope_interpolation_scale": scale,
    }


def cogvideox_sized(call: Call) -> dict[str, Any]:
    """Rotary embeddings of the grid, where the network uses them (the 5B models)."""
    config = call.config
    if not config.get("use_rotary_positional_embeddings"):
        _check_length(call)
        return {}
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p, p_t = config["patch_size"], config.get("patch_size_t")
    frames, h, w = call.x_t.shape[2], call.x_t.shape[3] // p, call.x_t.shape[4] // p
    width, height = config["sample_width"] // p, config["sample_height"] // p
    common: dict[str, Any] = {"embed_dim": config["attention_head_dim"], "grid_size": (h, w)}
    common["device"] = call.x_t.device
    if p_t is None:
        crop = get_resize_crop_region_for_grid((h, w), width, height)
        rotary = get_3d_rotary_pos_embed(crops_coords=crop, temporal_size=frames, **common)
    else:
        rotary = get_3d_rotary_pos_embed(
            crops_coords=None,
            temporal_size=(frames + p_t - 1) // p_t,
            grid_type="slice",
            max_size=(height, width),
            **common,
        )
    return {"image_rotary_emb": rotary}


def _check_length(call: Call) -> None:
    """The 2B's positions are counted from its own text length on."""
    wanted = call.config.get("max_text_seq_length", 226)
    found = call.cond["encoder_hidden_states"].shape[1]
    if found != wanted:
        raise ModelError(
            f"model.max_sequence_length: {found} text tokens, and this CogVideoX has positions for "
            f"{wanted} only",
            "remove the key" if wanted == 226 else f"set it to {wanted}",
        )


def wan_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) T5 tokens, zeros after the prompt."""
    return {"encoder_hidden_states": (length or 512, config["text_dim"])}


def ltx_shapes(config: Config, length: int | None = None) -> Shapes:
    """128 (or ``length``) T5 tokens and their mask."""
    num = length or 128
    return {
        "encoder_hidden_states": (num, config["caption_channels"]),
        "encoder_attention_mask": (num,),
    }


def cogvideox_shapes(config: Config, length: int | None = None) -> Shapes:
    """226 (or ``length``) T5 tokens."""
    num = length or config.get("max_text_seq_length", 226)
    return {"encoder_hidden_states": (num, config["text_embed_dim"])}


WAN_CITATION = """@article{wan2025,
  title={Wan: Open and Advanced Large-Scale Video Generative Models},
  author={{Team Wan}}, journal={arXiv:2503.20314}, year={2025}
}"""
LTX_CITATION = """@article{hacohen2024ltx,
  title={{LTX-Video}: Realtime Video Latent Diffusion},
  author={HaCohen, Yoav and Chiprut, Nisan and Brazowski, Benny and others},
  journal={arXiv:2501.00103}, year={2024}
}"""
COGVIDEOX_CITATION = """@inproceedings{yang2025cogvideox,
  title={{CogVideoX}: Text-to-Video Diffusion Models with An Expert Transformer},
  author={Yang, Zhuoyi and Teng, Jiayan and Zheng, Wendi and others}, booktitle={ICLR}, year={2025}
}"""

LAYOUTS = {
    "wan": FamilyLayout(
        pipelines=("WanPipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=UNET_ATTENTION,
        cond_shapes=wan_shapes,
        codec="clip",
        factor=wan_factor,
        branches="two_calls",
        media="video",
        citation=WAN_CITATION,
    ),
    "ltx": FamilyLayout(
        pipelines=("LTXPipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=UNET_ATTENTION,
        cond_shapes=ltx_shapes,
        codec="clip",
        packing="volume",
        factor=ltx_factor,
        sized=ltx_sized,
        replaced=("num_frames", "height", "width", "rope_interpolation_scale"),
        media="video",
        citation=LTX_CITATION,
    ),
    "cogvideox": FamilyLayout(
        pipelines=("CogVideoXPipeline",),
        denoiser="transformer",
        process="vp",
        sample_arg="hidden_states",
        prediction="scheduler",
        attention=DIT_ATTENTION,
        cond_shapes=cogvideox_shapes,
        codec="clip",
        packing="frames_first",
        factor=lambda vae: (
            2 ** (len(vae.get("block_out_channels", (1,) * 4)) - 1),
            int(vae.get("temporal_compression_ratio", 4)),
        ),
        sized=cogvideox_sized,
        replaced=("image_rotary_emb",),
        media="video",
        citation=COGVIDEOX_CITATION,
    ),
}
