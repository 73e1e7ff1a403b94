"""Queues before the frozen encoders: what the stores lack is batched, encoded, stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from t2i_align.contract import Encoded, TensorDict
from t2i_align.data.cache import TensorStore, cast
from t2i_align.errors import ModelError
from t2i_align.protocols import Generator

MEDIA_FIX = (
    "non-finite latents: the SDXL VAE overflows in float16; set model.vae_dtype: float32 or "
    "bfloat16, or model.vae_name_or_path: madebyollin/sdxl-vae-fp16-fix"
)
TEXT_FIX = "the text encoder overflowed; set model.dtype: float32 or bfloat16"

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(loaded: Encoded) -> Shapes:
    """Items of equal shapes can be stacked."""
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in loaded.state.items()))


@dataclass
class MediaQueue:
    """Loaded media waiting for the encoder, by shape.

    Args:
        generator: whose encoder.
        store: where results go.
        dtype: precision they are kept in.
        batch_size: media encoded at once; at most eight times as many wait.
    """

    generator: Generator
    store: TensorStore
    dtype: torch.dtype
    batch_size: int
    num_encoded: int = 0
    _waiting: dict[Shapes, list[tuple[str, str, Encoded]]] = field(default_factory=dict)
    _keys: set[str] = field(default_factory=set)

    def holds(self, key: str) -> bool:
        """Whether there is nothing to do for a key."""
        return key in self.store or key in self._keys

    def add(self, key: str, record_id: str, loaded: Encoded) -> None:
        """Queue one medium; encodes when a batch is full."""
        if self.holds(key):
            return
        self._keys.add(key)
        shapes = shapes_of(loaded)
        group = self._waiting.setdefault(shapes, [])
        group.append((key, record_id, loaded))
        if len(group) >= self.batch_size:
            self._encode(shapes)
        elif len(self._keys) >= 8 * self.batch_size:
            self.drain()

    def drain(self) -> None:
        """Encode all that waits."""
        for shapes in list(self._waiting):
            self._encode(shapes)

    @torch.no_grad()
    def _encode(self, shapes: Shapes) -> None:
        group = self._waiting.pop(shapes)
        results = self.generator.encode_media([loaded for _, _, loaded in group])
        for (key, record_id, _), result in zip(group, results, strict=True):
            state = self._cast(record_id, result)
            self.store.put(key, state, result.meta)
            self._keys.discard(key)
            self.num_encoded += 1

    def _cast(self, record_id: str, result: Encoded) -> TensorDict:
        """What the store keeps; an error says which record, and what the VAE ran in."""
        try:
            return cast(result.state, self.dtype, f"record '{record_id}'", MEDIA_FIX)
        except ModelError as error:
            held = self.generator.media_key().get("vae_dtype")
            where = f" (model.vae_dtype: {held})" if held else ""
            raise ModelError(f"{error.message}{where}", error.fix) from error


@dataclass
class PromptQueue:
    """Prompts waiting for the text encoders; arguments as in :class:`MediaQueue`."""

    generator: Generator
    store: TensorStore
    dtype: torch.dtype
    batch_size: int
    num_encoded: int = 0
    _waiting: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, prompt: str) -> None:
        """Queue one prompt; encodes when a batch is full."""
        if key in self.store or key in self._waiting:
            return
        self._waiting[key] = prompt
        if len(self._waiting) >= self.batch_size:
            self.drain()

    @torch.no_grad()
    def drain(self) -> None:
        """Encode all that waits."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        prompts: Sequence[str] = list(waiting.values())
        results = self.generator.encode_prompts(prompts)
        for key, prompt, result in zip(waiting, prompts, results, strict=True):
            self.store.put(key, cast(result, self.dtype, f"prompt {prompt[:60]!r}", TEXT_FIX))
            self.num_encoded += 1
