"""Tiny random pipeline folders whose prompts are read by a large language model.

FLUX.2, Qwen-Image, Z-Image and HunyuanImage 2.1, each with the real text encoder classes.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from tests.tiny import alphabet, vae
from tests.tiny_flux import flow_scheduler, save

QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
MISTRAL_SPECIAL = [
    *("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
]
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for m in messages %}{% set mark = 'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}"
    "[{{ mark }}]{% for part in m.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"
)


def qwen_template() -> str:
    """The instruction around a prompt whose first 34 tokens the pipelines cut off."""
    from diffusers import HunyuanImagePipeline

    call = inspect.signature(HunyuanImagePipeline._get_qwen_prompt_embeds)
    return call.parameters["template"].default


def language_tokenizer(text: str, special: list[str], **options: Any) -> Any:
    """Qwen2's tokenizer over bytes in which every word of ``text`` is one token.

    So a template has as many tokens as with the real vocabulary, and other words are spelt.
    """
    from transformers import Qwen2Tokenizer

    for mark in special:
        text = text.replace(mark, "\n")
    build: Any = Qwen2Tokenizer
    split = build(vocab={"<|endoftext|>": 0}).backend_tokenizer.pre_tokenizer
    words = list(dict.fromkeys(word for word, _ in split.pre_tokenize_str(text)))
    merges = dict.fromkeys((w[:i], w[i]) for w in words for i in range(1, len(w)))
    vocab = ["<|endoftext|>", *alphabet(), *(a + b for a, b in merges)]
    ids = {word: i for i, word in enumerate(dict.fromkeys(vocab))}
    made = build(vocab=ids, merges=list(merges), **options)
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def qwen_tokenizer() -> Any:
    """The tokenizer of Qwen-Image, Z-Image and HunyuanImage."""
    template = qwen_template() + "assistant"
    return language_tokenizer(template, QWEN_SPECIAL, chat_template=QWEN_CHAT)


def qwen_vl(tokenizer: Any, dim: int = 32) -> Any:
    """A three-layer Qwen2.5-VL; its eye is never opened."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **decoder(tokenizer, dim, 3),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": dim,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def decoder(tokenizer: Any, dim: int, num_layers: int) -> dict[str, Any]:
    """Sizes of a causal language model with heads of 16."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": dim // 16,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def mistral3(tokenizer: Any) -> Any:
    """A Mistral 3 of 31 layers, since FLUX.2 reads the 10th, 20th and 30th."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 16, **decoder(tokenizer, 16, 31)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return Mistral3ForConditionalGeneration(config).eval()


def flux2_vae() -> Any:
    """AutoencoderKLFlux2 whose batch norm has something to undo."""
    from diffusers import AutoencoderKLFlux2

    build: Any = AutoencoderKLFlux2
    made = build(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    made.bn.running_mean.normal_(0, 0.3)
    made.bn.running_var.uniform_(0.5, 2)
    return made


def flux2_transformer(*, guidance_embeds: bool) -> Any:
    """Flux2Transformer2DModel for three layers of a text encoder of width 16."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2(folder: Path) -> Path:
    """Flux2Pipeline, guidance-distilled (dev)."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE
    from transformers import PixtralImageProcessor, PixtralProcessor

    torch.manual_seed(7)
    tokenizer = language_tokenizer(SYSTEM_MESSAGE, MISTRAL_SPECIAL, padding_side="left")
    build: Any = Flux2Pipeline
    pipe = build(
        scheduler=flow_scheduler(),
        vae=flux2_vae(),
        text_encoder=mistral3(tokenizer),
        tokenizer=PixtralProcessor(
            image_processor=PixtralImageProcessor(), tokenizer=tokenizer, chat_template=MISTRAL_CHAT
        ),
        transformer=flux2_transformer(guidance_embeds=True),
    )
    return save(pipe, folder)


def flux2_klein(folder: Path) -> Path:
    """Flux2KleinPipeline of the base weights; Qwen 3's 9th, 18th and 27th layers are read."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(head_dim=16, **decoder(tokenizer, 16, 28))
    build: Any = Flux2KleinPipeline
    pipe = build(
        scheduler=flow_scheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(config).eval(),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False),
    )
    return save(pipe, folder)


def qwen_image_vae() -> Any:
    """AutoencoderKLQwenImage of four channels, normalised apart."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.9, 0.4],
        latents_std=[2.8, 1.4, 0.7, 1.2],
    )


def qwen_image(folder: Path) -> Path:
    """QwenImagePipeline."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    pipe = QwenImagePipeline(
        scheduler=flow_scheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    return save(pipe, folder)


def z_image(folder: Path) -> Path:
    """ZImagePipeline, not the few-step one."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    pipe = ZImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=False, shift=3.0),
        vae=vae(4, shift=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(head_dim=16, **decoder(tokenizer, 32, 3))).eval(),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    )
    return save(pipe, folder)


def hunyuan_vae() -> Any:
    """AutoencoderKLHunyuanImage, factor 16 instead of 32."""
    from diffusers import AutoencoderKLHunyuanImage

    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32,) * 5,
        layers_per_block=1,
        spatial_compression_ratio=16,
        sample_size=64,
        scaling_factor=0.75289,
    )


def hunyuan_image(folder: Path, **changes: Any) -> Path:
    """HunyuanImagePipeline 2.1 with both of its guiders.

    Args:
        folder: written.
        changes: of the transformer's config.
    """
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    glyphs = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=len(ByT5Tokenizer())
    )
    sizes: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 16,
        "rope_axes_dim": (8, 8),
    }
    pipe = HunyuanImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=False, shift=5.0),
        vae=hunyuan_vae(),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(glyphs).eval(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=HunyuanImageTransformer2DModel(**(sizes | changes)),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(
            adaptive_projected_guidance_start_step=2, adaptive_projected_guidance_scale=5.0
        ),
    )
    return save(pipe, folder)
