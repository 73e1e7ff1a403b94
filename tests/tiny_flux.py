"""Tiny random pipeline folders of FLUX.1 and Chroma: a T5 over bytes and packed latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import alphabet, clip_config, clip_tokenizer, vae

BLOCKS = {"num_layers": 1, "num_single_layers": 1}


def save(pipe: Any, folder: Path) -> Path:
    """Save a pipeline whose weights are spread so that its pictures differ."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                if p.dim() > 1:
                    p.data.mul_(1.5)
    pipe.save_pretrained(folder)
    return folder


def byte_tokenizer(**special: str) -> Any:
    """A fast tokenizer of single bytes with T5's (or the given) special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = special or {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *alphabet()]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token=words[-1]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if "eos_token" in special:
        end = special["eos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, words.index(end))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def t5(dim: int = 32) -> Any:
    """A two-layer T5 encoder for :func:`byte_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=dim, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(byte_tokenizer())
    )
    return T5EncoderModel(config).eval()


def flow_scheduler(**changes: Any) -> Any:
    """FlowMatchEuler with FLUX's dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    build: Any = FlowMatchEulerDiscreteScheduler
    return build(**({"use_dynamic_shifting": True} | changes))


def flux(folder: Path) -> Path:
    """FluxPipeline, guidance-distilled (dev)."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **BLOCKS,
    )
    pipe = FluxPipeline(
        scheduler=flow_scheduler(),
        vae=vae(4, shift=0.1159),
        text_encoder=CLIPTextModel(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(),
        transformer=transformer,
    )
    return save(pipe, folder)


def chroma(folder: Path) -> Path:
    """ChromaPipeline."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(7)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **BLOCKS,
    )
    pipe = ChromaPipeline(
        scheduler=flow_scheduler(),
        vae=vae(4, shift=0.1159),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )
    return save(pipe, folder)
