r"""Model and loss of the world's learned judge: a small open_clip dual encoder.

The score of picture x under prompt c is the cosine of two embeddings, its logit

    (1)  s = exp(a) cos(f(x), g(c)) + b

Groups of two pictures and six prompts (clip_pool.py) carry the exact judge's answer y in [0, 1]:

    (2)  L = BCE(s, y)                                             sigmoid contrast (SigLIP,
                                                                   arXiv:2303.15343), soft targets
         + mean over (x1, x2, c), y1 > y2:  -log sigmoid(s1 - s2)  Bradley-Terry, same prompt
         + mean over (x, c1, c2), y1 > y2:  -log sigmoid(s1 - s2)  hard negative prompts
         + w CE(head(map of f), class and colour in each cell)     only while training

The last term tells the convolutional trunk what lies where, which a contrastive loss alone finds
slowly on so few pictures. Both towers are open_clip's own (a modified ResNet and a text
transformer); the tokenizer knows whole words.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_align.optional import require
from t2i_align.scenes.clip_pool import NONE
from t2i_align.scenes.grammar import COLORS
from t2i_align.scenes.text import words

LENGTH = 12  # tokens of the longest prompt, start and end included
SIZE = 128  # pictures are doubled, so that the trunk's last map keeps 4 x 4 places
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
MARGIN = 0.05  # answers closer than this are ties
SPECIAL = ("<unk>", "<pad>", "<start>", "<end>")
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def word_tokenizer() -> Any:
    """A tokenizer with a token a word of the grammar, any other word being ``<unk>``.

    The world's CLIPTokenizer (text.py) numbers its words differently in every process; here the
    numbers are fixed, so that weights are a function of the seed.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {w: i for i, w in enumerate([*SPECIAL, *words()])}
    made: Any = Tokenizer(models.WordLevel(known, unk_token=SPECIAL[0]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, known[name]) for name in SPECIAL[2:]]
    made.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[2]} $A {SPECIAL[3]}", special_tokens=ends
    )
    names = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **names)


def model_config(vocab: int, eos: int) -> dict[str, Any]:
    """open_clip's model config: 2.1 M parameters, 4.2 MB in float16."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": [1, 1, 2, 1],
            "width": 16,
            "head_width": 64,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": vocab,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "pool_type": "eos",
            "eos_id": eos,
            "hf_tokenizer_name": ".",
        },
        "init_logit_scale": math.log(10.0),
        "init_logit_bias": -3.0,
    }


class MapHeads(nn.Module):
    """Class and colour at each cell of the trunk's last map; dropped after training."""

    def __init__(self, visual: Any) -> None:
        """Listen to the last stage of the vision tower."""
        super().__init__()
        channels = visual.attnpool.c_proj.in_features
        self.classes = nn.Conv2d(channels, NONE + 1, 1)
        self.colors = nn.Conv2d(channels, len(COLORS), 1)
        self.seen: list[Tensor] = []
        visual.layer4.register_forward_hook(lambda _m, _i, out: self.seen.append(out))

    def loss(self, classes: Tensor, colors: Tensor) -> Tensor:
        """Cross-entropy of the map of the latest forward pass.

        Args:
            classes: ``(B, CELLS, CELLS)``.
            colors: the same, -100 where there is nothing.
        """
        found = self.seen.pop().float()
        weight = torch.ones(NONE + 1, device=found.device)
        weight[NONE] = 0.2
        first = F.cross_entropy(self.classes(found), classes, weight)
        return first + F.cross_entropy(self.colors(found), colors, ignore_index=-100)


def build(tok: Any) -> Any:
    """A fresh model."""
    require("open_clip_torch", "judges", "the world's dual encoder")
    from open_clip.model import CLIP

    return CLIP(**model_config(len(tok), tok.eos_token_id))


def disturbed(images: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures moved by up to 3 pixels, brighter or darker, noisy or blurred: ``(B, 3, 64, 64)``.

    Args:
        images: ``(B, 64, 64, 3)`` uint8.
        rng: CPU generator.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    b, side = len(x), x.shape[-1]
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    dy, dx = torch.randint(0, 7, (2, b), generator=rng)
    rows, columns = dy[:, None] + torch.arange(side), dx[:, None] + torch.arange(side)
    item = torch.arange(b)[:, None, None]
    x = padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share, level, noise = (torch.rand(b, 1, 1, 1, generator=rng) for _ in range(3))
    x = torch.lerp(x, soft, 0.7 * share * (share > 0.5)) + 0.06 * (level - 0.5)
    return (x + 0.02 * noise * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def prepared(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the vision tower takes them, ``(B, 3, SIZE, SIZE)``."""
    x = F.interpolate(images, size=SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def logits(model: Any, images: Tensor, ids: Tensor, texts: Tensor) -> Tensor:
    """Eq. (1), ``(G, 2, T)``.

    Args:
        model: open_clip's CLIP.
        images: ``(2 G, 3, SIZE, SIZE)``.
        ids: token ids of the whole vocabulary.
        texts: ``(G, T)`` places in it; each prompt is encoded once.
    """
    distinct, back = texts.unique(return_inverse=True)
    with torch.autocast(images.device.type, torch.bfloat16):
        seen = model.encode_image(images)
        said = model.encode_text(ids[distinct])
    seen = F.normalize(seen.float(), dim=-1).view(len(texts), 2, -1)
    said = F.normalize(said.float(), dim=-1)[back]
    cosine = torch.einsum("gie,gte->git", seen, said)
    return model.logit_scale.exp() * cosine + model.logit_bias


def ranking(s: Tensor, y: Tensor) -> Tensor:
    """Bradley-Terry loss of all ordered pairs along the last dimension, ties left out."""
    better = y[..., :, None] - y[..., None, :] > MARGIN
    loss = F.softplus(s[..., None, :] - s[..., :, None])
    return (loss * better).sum() / better.sum().clamp(min=1)


def objective(s: Tensor, y: Tensor) -> Tensor:
    """Eq. (2) without the map: logits and answers ``(G, 2, T)`` to a scalar."""
    return (
        F.binary_cross_entropy_with_logits(s, y)
        + ranking(s.transpose(1, 2), y.transpose(1, 2))
        + ranking(s, y)
    )


def export(average: dict[str, Tensor], tok: Any, out: Path) -> None:
    """The folder open_clip loads with ``local-dir:``: float16 weights, config, tokenizer."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in average.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, out / WEIGHTS)
    (out / WEIGHTS).chmod(0o644)  # safetensors writes for the owner only
    preprocess = {"size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    config = {
        "model_cfg": model_config(len(tok), tok.eos_token_id),
        "preprocess_cfg": preprocess | {"resize_mode": "squash"},
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    tok.save_pretrained(out)
