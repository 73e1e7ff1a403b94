"""FLUX.1 [dev], FLUX.2 [dev], FLUX.2 [klein] base and Chroma: packed latents with position ids.

The dev models are guidance-distilled: the network is told a guidance scale. Training tells it
``model.embedded_guidance``, sampling the scale asked for. Klein's base is guided by two branches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from t2i_align.generators.layouts import (
    DIT_ATTENTION,
    Call,
    Config,
    FamilyLayout,
    Shapes,
)

GRID = 3  # coordinates of FLUX.1's position ids: 0, row, column
GRID2 = 4  # of FLUX.2's: time, row, column, place in the text


def rows_and_columns(h: int, w: int, like: Tensor, width: int) -> Tensor:
    """Position ids ``(h w, width)`` whose columns 1 and 2 are row and column."""
    ids = torch.zeros(h, w, width, device=like.device)
    ids[..., 1] = torch.arange(h, device=like.device)[:, None]
    ids[..., 2] = torch.arange(w, device=like.device)[None, :]
    return ids.flatten(0, 1)


def flux_sized(call: Call) -> dict[str, Any]:
    """Ids of picture tokens (row, column) and of text tokens (zeros)."""
    h, w = call.x_t.shape[-2:]
    length = call.cond["encoder_hidden_states"].shape[1]
    return {
        "img_ids": rows_and_columns(h // 2, w // 2, call.x_t, GRID),
        "txt_ids": torch.zeros(length, GRID, device=call.x_t.device),
    }


def flux2_sized(call: Call) -> dict[str, Any]:
    """Ids of picture tokens, and of text tokens by their place; int64, per item."""
    num, _, h, w = call.x_t.shape
    length = call.cond["encoder_hidden_states"].shape[1]
    text = torch.zeros(num, length, GRID2, dtype=torch.int64, device=call.x_t.device)
    text[..., 3] = torch.arange(length, device=call.x_t.device)
    image = rows_and_columns(h, w, call.x_t, GRID2).long()
    return {"img_ids": image.expand(num, -1, -1), "txt_ids": text}


def chroma_sized(call: Call) -> dict[str, Any]:
    """FLUX.1's ids; the text's mask continued by ones for the picture's tokens."""
    h, w = call.x_t.shape[-2:]
    mask = call.cond["attention_mask"]
    image = mask.new_ones(len(mask), (h // 2) * (w // 2))
    return flux_sized(call) | {"attention_mask": torch.cat([mask, image], 1)}


def flux_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) T5 tokens and CLIP's pooled vector."""
    return {
        "encoder_hidden_states": (length or 512, config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


def flux2_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) tokens of a language model's layers."""
    return {"encoder_hidden_states": (length or 512, config["joint_attention_dim"])}


def chroma_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) T5 tokens and their mask."""
    num = length or 512
    return {
        "encoder_hidden_states": (num, config["joint_attention_dim"]),
        "attention_mask": (num,),
    }


def quarter(config: Config) -> int:
    """Channels before four latent pixels became one token."""
    return config["in_channels"] // 4


FLUX_CITATION = """@misc{flux2024,
  author={{Black Forest Labs}}, title={{FLUX}}, year={2024},
  howpublished={\\url{https://github.com/black-forest-labs/flux}}
}"""
FLUX2_CITATION = """@misc{flux2,
  author={{Black Forest Labs}}, title={{FLUX.2}: Frontier Visual Intelligence}, year={2025},
  howpublished={\\url{https://bfl.ai/blog/flux-2}}
}"""
CHROMA_CITATION = """@misc{chroma2025,
  author={{Lodestone Rock}}, title={Chroma: Open-Source, Uncensored, Built for the Community},
  year={2025}, howpublished={\\url{https://huggingface.co/lodestones/Chroma}}
}"""

FLUX2 = FamilyLayout(
    pipelines=("Flux2Pipeline",),
    denoiser="transformer",
    process="rectified",
    sample_arg="hidden_states",
    prediction="velocity",
    attention=[*DIT_ATTENTION, "to_qkv_mlp_proj"],  # of single blocks, whose MLP's input is in it
    cond_shapes=flux2_shapes,
    time_factor=1e-3,
    codec="patchified",
    packing="tokens",
    factor=lambda vae: (2 * 2 ** (len(vae.get("block_out_channels", (1,) * 4)) - 1), 1),
    sized=flux2_sized,
    replaced=("img_ids", "txt_ids"),
    branches="embedded",
    embedded_guidance=4.0,
    citation=FLUX2_CITATION,
)
LAYOUTS = {
    "flux": FamilyLayout(
        pipelines=("FluxPipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,
        cond_shapes=flux_shapes,
        time_factor=1e-3,
        packing="squares",
        channels=quarter,
        sized=flux_sized,
        replaced=("img_ids", "txt_ids"),
        branches="embedded",
        embedded_guidance=3.5,
        citation=FLUX_CITATION,
    ),
    "flux2": FLUX2,
    "flux2_klein": replace(
        FLUX2, pipelines=("Flux2KleinPipeline",), branches="two_calls", embedded_guidance=None
    ),
    "chroma": FamilyLayout(
        pipelines=("ChromaPipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,
        cond_shapes=chroma_shapes,
        time_factor=1e-3,
        packing="squares",
        channels=quarter,
        sized=chroma_sized,
        replaced=("img_ids", "txt_ids"),
        text_args={"attention_mask": "encoder_hidden_states"},
        branches="two_calls",
        checkpoint_blocks=("transformer_blocks", "single_transformer_blocks"),
        citation=CHROMA_CITATION,
    ),
}
