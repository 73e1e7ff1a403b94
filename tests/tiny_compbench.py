"""Small BLIP, OWLv2, YOLOS and DPT of the real classes, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import clip_tokenizer
from tiny_clip import shaken

SIDE = 48
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] yes no a red car the wet dog bird next to and ? ,".split()


def blip_folder(folder: Path) -> Path:
    """BlipForQuestionAnswering; [DEC] and [ENC] behind the tokenizer's words, as published."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    vocab = {word: k for k, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    text: dict[str, Any] = {"vocab_size": len(WORDS) + 2, "bos_token_id": len(WORDS)}
    text |= {"hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    text |= {"pad_token_id": 0, "sep_token_id": 3, "projection_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = BlipForQuestionAnswering(config)
    shaken(model).save_pretrained(folder)
    return folder


def owl_folder(folder: Path) -> Path:
    from transformers import (
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    tokenizer = clip_tokenizer(16)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    config = Owlv2Config(
        text_config=size | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(1)
    shaken(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def yolos_folder(folder: Path) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": [32, 32], "patch_size": 8},
        **{"num_detection_tokens": 6, "id2label": {0: "car", 1: "wild bird", 2: "dog"}},
    )
    torch.manual_seed(2)
    shaken(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def depth_folder(folder: Path) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "is_hybrid": False},
        **{"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8]},
        **{"fusion_hidden_size": 8, "use_auxiliary_head": False},
    )
    torch.manual_seed(3)
    shaken(DPTForDepthEstimation(config)).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
