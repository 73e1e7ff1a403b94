"""ImageReward's network in transformers' parts, built from the published weights alone.

The equations are in imagereward.py. All sizes are read off the shapes of the weights, except the
width of an attention head, which is 64 in both towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.judges.key_map import num_layers, renamed
from t2i_align.judges.weights import load_strict

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # Eq. (1), of the released model
HEAD_WIDTH = 64  # of both transformers; the other sizes are read off the weights
VIT, BERT = "blip.visual_encoder.", "blip.text_encoder."
KEYS = (
    (VIT + "cls_token", "vision.embeddings.class_embedding"),
    (VIT + "pos_embed", "vision.embeddings.position_embedding"),
    (VIT + "patch_embed.proj.{rest}", "vision.embeddings.patch_embedding.{rest}"),
    (VIT + "blocks.{n}.norm1.{rest}", "vision.encoder.layers.{n}.layer_norm1.{rest}"),
    (VIT + "blocks.{n}.norm2.{rest}", "vision.encoder.layers.{n}.layer_norm2.{rest}"),
    (VIT + "blocks.{n}.attn.qkv.{rest}", "vision.encoder.layers.{n}.self_attn.qkv.{rest}"),
    (VIT + "blocks.{n}.attn.proj.{rest}", "vision.encoder.layers.{n}.self_attn.projection.{rest}"),
    (VIT + "blocks.{n}.mlp.{rest}", "vision.encoder.layers.{n}.mlp.{rest}"),
    (VIT + "norm.{rest}", "vision.post_layernorm.{rest}"),
    (BERT + "embeddings.{rest}", "text.embeddings.{rest}"),
    (BERT + "encoder.{rest}", "text.encoder.{rest}"),
    ("mlp.layers.{rest}", "head.{rest}"),
)
BUFFERS = (BERT + "embeddings.position_ids",)  # a counter, no weight


class ImageRewardModel(nn.Module):
    """Vision tower, text tower and head, sized like a set of published weights.

    Args:
        published: tensors by their published names.
    """

    def __init__(self, published: Mapping[str, Tensor]) -> None:
        """Build without loading."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        patch = published[VIT + "patch_embed.proj.weight"].shape
        side = math.isqrt(published[VIT + "pos_embed"].shape[1] - 1)  # in patches
        vision = BlipVisionConfig(
            hidden_size=patch[0],
            intermediate_size=published[VIT + "blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=num_layers(published, VIT + "blocks.{n}.norm1.weight"),
            num_attention_heads=patch[0] // HEAD_WIDTH,
            image_size=patch[-1] * side,
            patch_size=patch[-1],
            hidden_act="gelu",
            layer_norm_eps=1e-6,  # timm's; transformers' default is 1e-5
        )
        words = published[BERT + "embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=words[0],
            hidden_size=words[1],
            encoder_hidden_size=vision.hidden_size,
            intermediate_size=published[BERT + "encoder.layer.0.intermediate.dense.weight"].shape[
                0
            ],
            num_hidden_layers=num_layers(published, BERT + "encoder.layer.{n}.output.dense.weight"),
            num_attention_heads=words[1] // HEAD_WIDTH,
            max_position_embeddings=len(published[BERT + "embeddings.position_embeddings.weight"]),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,
            pad_token_id=0,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        shapes = {i: published[f"mlp.layers.{i}.weight"].shape for i in (0, 2, 4, 6, 7)}
        self.head = nn.Sequential(
            *(
                nn.Linear(shapes[i][1], shapes[i][0]) if i in shapes else nn.Identity()
                for i in range(8)
            )
        )
        self.image_size: int = patch[-1] * side

    def fold(self) -> None:
        """Replace the chain of linear layers by their product, multiplied out in float64."""
        chain = [layer for layer in self.head if isinstance(layer, nn.Linear)]
        weight = torch.eye(chain[0].in_features).double()
        bias = torch.zeros(chain[0].in_features).double()
        for layer in chain:
            own = layer.weight.detach().double()
            weight, bias = own @ weight, own @ bias + layer.bias.double()
        folded = nn.Linear(weight.shape[1], weight.shape[0])
        folded.load_state_dict({"weight": weight.float(), "bias": bias.detach().float()})
        self.head = nn.Sequential(folded)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Eq. (1): pixels ``(B, 3, s, s)`` as the tower takes them, ids and mask ``(B, L)``."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        said = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(said[:, 0].float()).squeeze(-1) - MEAN) / STD


def load_model(published: dict[str, Tensor]) -> ImageRewardModel:
    """The model of published weights, folded, frozen, in evaluation mode.

    Raises:
        ModelError: a name is missing or unknown.
    """
    weights = {k: v for k, v in published.items() if k not in BUFFERS}
    ours = renamed(weights, KEYS, "ImageReward")
    try:
        with torch.inference_mode(False):  # else it would refuse gradients later
            model = ImageRewardModel(published)
            load_strict(model, ours, "ImageReward")
            model.fold()
    except KeyError as error:
        raise ModelError(
            f"ImageReward: the weights lack {error}", "bring the published file, whole"
        ) from error
    return model.eval().requires_grad_(False)
