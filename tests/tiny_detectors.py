"""Small detectors of the real classes, saved as folders; every number of theirs is random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from t2i_align.evaluate.detectors.base import DetectorOptions
from tests.tiny_clip import shaken


def detector_options(**given: Any) -> DetectorOptions:
    """Options of a detector."""
    return DetectorOptions(**given)


def swin(**given: Any) -> Any:
    """Config of a backbone of four stages."""
    from transformers import SwinConfig

    shape: dict[str, Any] = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    return SwinConfig(**shape, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], **given)


def mask2former_folder(folder: Path, num_labels: int = 80, seed: int = 0) -> Path:
    """Mask2Former with a Swin of four stages."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    torch.manual_seed(seed)
    backbone = swin(out_features=["stage1", "stage2", "stage3", "stage4"])
    shape: dict[str, Any] = {"num_labels": num_labels}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        **shape,
    )
    model: Any = Mask2FormerForUniversalSegmentation(config)
    shaken(model, seed).save_pretrained(folder)
    return folder


def owlv2_folder(folder: Path, seed: int = 0) -> Path:
    """OWLv2 of two layers a tower, with its processor over single bytes."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor
    from transformers import Owlv2Processor as Processor

    from tests.tiny import clip_tokenizer

    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = tower | {"vocab_size": 514, "max_position_embeddings": 64}
    text |= {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = tower | {"image_size": 64, "patch_size": 16}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    model: Any = shaken(Owlv2ForObjectDetection(config), seed)
    with torch.no_grad():  # logits of moderate size, so that scores differ
        for head, bias in ((model.class_head.logit_scale, 2.0), (model.class_head.logit_shift, 0)):
            head.weight.zero_()
            head.bias.fill_(bias)
    model.save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Processor(images, clip_tokenizer(64)).save_pretrained(folder)
    return folder


def bert_tokenizer() -> Any:
    """A BertTokenizer that knows the words of the class names, special tokens at BERT's ids."""
    from transformers import BertTokenizer

    from t2i_align.evaluate.detectors.base import CLASSES

    words = sorted({word for name in CLASSES for word in name.split()})
    vocab = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    vocab |= {".": 1012, "?": 1029} | {word: 2000 + k for k, word in enumerate(words)}
    return BertTokenizer(vocab=vocab, model_max_length=256)


def grounding_dino_folder(folder: Path, seed: int = 0) -> Path:
    """Grounding DINO of one layer a part, with its processor."""
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
    )
    from transformers import GroundingDinoProcessor as Processor

    torch.manual_seed(seed)
    backbone = swin(out_indices=[2, 3, 4])
    text = BertConfig(
        vocab_size=2200,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=12,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        d_model=32,
        disable_custom_kernels=True,
    )
    shaken(GroundingDinoForObjectDetection(config), seed).save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    Processor(images, bert_tokenizer()).save_pretrained(folder)
    return folder
