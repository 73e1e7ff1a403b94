"""CLIP as judges share it: loaded once a process, device and dtype.

Whatever layout a file has (clip_layout.py), the network is transformers' ``CLIPModel`` in the shape
that clip_config.py finds.

Texts become the ids of CLIP's byte pair encoding, read from open_clip's wheel, at most 77 with the
end kept. ``cleaning`` says what is done to a text before: ``ftfy`` as OpenAI's and open_clip's code
(mojibake and curly quotes repaired, HTML entities resolved), ``plain`` as transformers' tokenizers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_align.judges.clip_config import clip_config
from t2i_align.judges.clip_layout import to_transformers
from t2i_align.judges.weights import load_strict, load_tensors
from t2i_align.optional import require

Cleaning = Literal["ftfy", "plain"]
CONTEXT = 77


def features(output: Any) -> Tensor:
    """The embedding of ``get_image_features`` and the like: a tensor before transformers 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipTrunk:
    """A CLIP model, frozen, in evaluation mode.

    Args:
        model: transformers' CLIPModel.
        scale: its learned scale, from float32 numbers; in bfloat16 100 becomes 98.9.
    """

    def __init__(self, model: Any, scale: float) -> None:
        """Keep them."""
        self.model, self.scale = model, scale
        self.size: int = model.config.vision_config.image_size

    def images(self, inputs: Tensor) -> Tensor:
        """Embeddings ``(B, E)`` float32 of prepared pictures ``(B, 3, s, s)``, not normalised."""
        first = self.model.visual_projection.weight
        inputs = inputs.to(first.device, first.dtype)
        return features(self.model.get_image_features(pixel_values=inputs)).float()

    def texts(self, prompts: Sequence[str], cleaning: Cleaning) -> Tensor:
        """Embeddings ``(B, E)`` float32 of prompts, not normalised; each distinct one is read once.

        Ids behind the last end of text are cut off: attention is causal, so they change nothing.
        """
        distinct = list(dict.fromkeys(prompts))
        ids = clip_tokens(distinct, cleaning).to(self.model.logit_scale.device)
        ids = ids[:, : int(ids.argmax(-1).max()) + 1]
        found = features(self.model.get_text_features(input_ids=ids)).float()
        return found[[distinct.index(p) for p in prompts]]


@cache
def _tokenizer(cleaning: Cleaning) -> Any:
    require("open_clip_torch", "judges", "CLIP's tokenizer")
    from open_clip.tokenizer import SimpleTokenizer

    made: Any = SimpleTokenizer()
    if cleaning == "plain":
        made.clean_fn = lambda text: " ".join(unicodedata.normalize("NFC", text).split()).lower()
    return made


def clip_tokens(prompts: Sequence[str], cleaning: Cleaning) -> Tensor:
    """Ids ``(B, 77)`` int64, padded with 0 behind the end of text."""
    return _tokenizer(cleaning)(list(prompts), context_length=CONTEXT)


def frozen(
    build: Any,
    tensors: dict[str, Tensor],
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    exact: Collection[str] = (),
) -> Any:
    """A network with exactly these weights, in evaluation mode, without gradients of its own.

    Args:
        build: makes the network; called where memory is not taken.
        tensors: under the network's names.
        what: the subject of the error's sentence.
        device: where it goes.
        dtype: of its floats.
        exact: names that stay float32: small ones that numbers are read off.
    """
    with torch.inference_mode(False):  # weights made in it would refuse gradients later
        with torch.device("meta"):
            module: nn.Module = build()
        load_strict(module, tensors, what)
        for name, buffer in module.named_buffers():
            if buffer.is_meta:  # not in the file: counts of positions
                owner, _, own = name.rpartition(".")
                values = torch.arange(buffer.shape[-1]).expand(buffer.shape)
                module.get_submodule(owner).register_buffer(own, values, persistent=False)
        kept = {k: v.detach().clone() for k, v in module.named_parameters() if k in exact}
        module.to(device, dtype)
        for name, parameter in module.named_parameters():
            if name in kept:
                parameter.data = kept[name].to(device)
        return module.eval().requires_grad_(False)


def clip_trunk(
    file: Path,
    architecture: str | None,
    device: torch.device,
    dtype: torch.dtype,
    sha256: str | None = None,
    published: str | None = None,
) -> ClipTrunk:
    """The CLIP model of a weights file, the same one for equal arguments.

    Args:
        file: safetensors or a pickle with a known hash, in open_clip's or transformers' layout.
        architecture: open_clip's name, or None for the ``config.json`` beside the file.
        device: where it goes.
        dtype: of its weights.
        sha256: of the file, see :func:`load_tensors`.
        published: hub id the file comes from, to know its activation.

    Raises:
        ModelError: unreadable, unknown, or not a CLIP of that shape.
    """
    return _clip_trunk(file.absolute(), architecture, device, dtype, sha256, published)


@cache
def _clip_trunk(
    file: Path,
    architecture: str | None,
    device: torch.device,
    dtype: torch.dtype,
    sha256: str | None,
    published: str | None,
) -> ClipTrunk:
    from transformers import CLIPModel

    config = clip_config(file, architecture, published)
    what = f"a CLIP like {architecture or file.with_name('config.json')}"
    tensors = to_transformers(load_tensors(file, sha256), file.name)
    model: Any = frozen(lambda: CLIPModel(config), tensors, what, device, dtype)
    return ClipTrunk(model, float(tensors["logit_scale"].float().exp()))
