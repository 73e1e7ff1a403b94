"""From pixels to the latents a denoiser works on, and from those to what it is handed.

Two steps that pipelines mix up are kept apart here:

    codec    VAE posterior -> model latent ``(c, h, w)`` or ``(c, f, h, w)``: lifting a picture to a
             clip of one frame, patchifying, and the affine map ``(z - shift) * scale`` with the
             constants of the VAE's config (scaling_factor, shift_factor, latents_mean, latents_std)
             or its batch norm (FLUX.2)
    packing  model latent -> the denoiser's own argument: tokens, frames first, a list

Noise, errors and kernels live on model latents, so no objective knows of tokens. A packing is an
isometry: the mean squared error is the same before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Config = Mapping[str, Any]
CodecName = Literal["image", "clip", "image_of_clip", "patchified", "frames"]
PackingName = Literal["none", "squares", "tokens", "volume", "frames_first", "list"]


def affine(vae: Any) -> tuple[Tensor, Tensor]:
    """``(shift, scale)`` of model latent = (VAE latent - shift) * scale.

    Scalars, or ``(c,)`` where the VAE normalises channels apart.
    """
    config = vae.config
    shift = torch.tensor(float(config.get("shift_factor") or 0.0), device=vae.device)
    scale = torch.tensor(float(config.get("scaling_factor") or 1.0), device=vae.device)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:  # LTX keeps them as buffers
        buffers = dict(vae.named_buffers(recurse=False))
        mean, std = buffers.get("latents_mean"), buffers.get("latents_std")
    if mean is not None and std is not None:
        shift = torch.as_tensor(mean, dtype=torch.float32, device=vae.device)
        scale = scale / torch.as_tensor(std, dtype=torch.float32, device=vae.device)
    return shift, scale


def batch_norm_affine(vae: Any) -> tuple[Tensor, Tensor]:
    """The same from the running statistics of FLUX.2's VAE, ``(4 c,)``."""
    norm = vae.bn
    return norm.running_mean.float(), (norm.running_var.float() + vae.config.batch_norm_eps) ** -0.5


def per_channel(x: Tensor, like: Tensor) -> Tensor:
    """A scalar or ``(c,)`` that broadcasts over ``like (B, c, ...)``."""
    return x if x.dim() == 0 else x.view(-1, *[1] * (like.dim() - 2))


def patchify(x: Tensor) -> Tensor:
    """``(B, c, h, w) -> (B, 4 c, h/2, w/2)``: each square of four becomes channels."""
    return torch.nn.functional.pixel_unshuffle(x, 2)


def unpatchify(x: Tensor) -> Tensor:
    """Inverse of :func:`patchify`."""
    return torch.nn.functional.pixel_shuffle(x, 2)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, codec: CodecName) -> tuple[Tensor, Tensor | None]:
    """Posterior mean and standard deviation in the denoiser's scale, float32.

    Args:
        vae: a diffusers autoencoder.
        pixels: ``(B, 3, h, w)`` or ``(B, 3, f, h, w)`` in [-1, 1].
        codec: how its latents become the model's.

    Returns:
        None as the second if the autoencoder is deterministic (DC-AE).
    """
    if codec == "frames":
        pictures = encode(vae, _pictures(pixels), "image")
        mean, std = (None if x is None else _clips(x, len(pixels)) for x in pictures)
        assert mean is not None
        return mean, std
    lifted = codec == "image_of_clip"
    given = (pixels.unsqueeze(2) if lifted else pixels).to(vae.device, vae.dtype)
    if given.dim() == 4 and given.device.type == "cpu":
        given = given.contiguous(memory_format=torch.channels_last)  # takes 4/5 of the time there
    output = vae.encode(given)
    if hasattr(output, "latent"):
        parts = [output.latent.float(), None]
    else:
        parts = [output.latent_dist.mean.float(), output.latent_dist.std.float()]
    if lifted:
        parts = [None if x is None else x.squeeze(2) for x in parts]
    if codec == "patchified":
        parts = [None if x is None else patchify(x) for x in parts]
    mean, std = parts
    assert mean is not None
    shift, scale = (per_channel(c, mean) for c in _affine(vae, codec))
    return (mean - shift) * scale, None if std is None else std * scale


@torch.no_grad()
def decode(vae: Any, latent: Tensor, codec: CodecName) -> Tensor:
    """Model latents to pixels in [-1, 1], ``(B, 3, h, w)`` or ``(B, 3, f, h, w)``, float32."""
    if codec == "frames":
        return _clips(decode(vae, _pictures(latent), "image"), len(latent))
    latent = latent.to(vae.device).float()
    shift, scale = (per_channel(c, latent) for c in _affine(vae, codec))
    latent = latent / scale + shift
    if codec == "patchified":
        latent = unpatchify(latent)
    if codec == "image_of_clip":
        return vae.decode(latent.unsqueeze(2).to(vae.dtype), return_dict=False)[0][:, :, 0].float()
    given = latent.to(vae.dtype)
    if vae.config.get("timestep_conditioning"):  # LTX 0.9.1 and later: clean latents, so time 0
        return vae.decode(given, given.new_zeros(len(given)), return_dict=False)[0].float()
    decoded = vae.decode(given, return_dict=False)[0].float()
    # Allegro's VAE takes channels first and returns frames first
    frames_first = decoded.dim() == 5 and decoded.shape[1] != 3 and decoded.shape[2] == 3
    return decoded.transpose(1, 2) if frames_first else decoded


def _pictures(clips: Tensor) -> Tensor:
    """``(B, c, f, h, w) -> (B f, c, h, w)``."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(pictures: Tensor, num: int) -> Tensor:
    """Inverse of :func:`_pictures` for ``num`` clips."""
    return pictures.unflatten(0, (num, -1)).transpose(1, 2)


def _affine(vae: Any, codec: CodecName) -> tuple[Tensor, Tensor]:
    return batch_norm_affine(vae) if codec == "patchified" else affine(vae)


def _squares(x: Tensor, config: Config) -> Tensor:
    """``(B, c, h, w) -> (B, h/2 w/2, 4 c)``."""
    return patchify(x).flatten(2).transpose(1, 2)


def _unsquares(tokens: Tensor, shape: tuple[int, ...], config: Config) -> Tensor:
    _, h, w = shape
    return unpatchify(tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)))


def _tokens(x: Tensor, config: Config) -> Tensor:
    """``(B, c, h, w) -> (B, h w, c)``."""
    return x.flatten(2).transpose(1, 2)


def _untokens(tokens: Tensor, shape: tuple[int, ...], config: Config) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, shape[1:])


def _volume(x: Tensor, config: Config) -> Tensor:
    """``(B, c, f, h, w) -> (B, f/p_t h/p w/p, c p_t p p)``."""
    p, q = config.get("patch_size", 1), config.get("patch_size_t", 1)
    x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, q))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def _unvolume(tokens: Tensor, shape: tuple[int, ...], config: Config) -> Tensor:
    p, q = config.get("patch_size", 1), config.get("patch_size_t", 1)
    c, f, h, w = shape
    x = tokens.unflatten(2, (c, q, p, p)).unflatten(1, (f // q, h // p, w // p))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Packing:
    """Between model latents and the denoiser's argument.

    Args:
        pack: ``(latents (B, *L), config) -> argument``.
        unpack: ``(output, *L, config) -> (B, *L)``.
        squares: how many latent pixels a side one token covers, besides the network's own patch.
    """

    pack: Callable[[Tensor, Config], Any]
    unpack: Callable[[Any, tuple[int, ...], Config], Tensor]
    squares: int = 1


PACKINGS: dict[str, Packing] = {
    "none": Packing(lambda x, config: x, lambda x, shape, config: x),
    "squares": Packing(_squares, _unsquares, squares=2),
    "tokens": Packing(_tokens, _untokens),
    "volume": Packing(_volume, _unvolume),
    "frames_first": Packing(
        lambda x, config: x.transpose(1, 2), lambda x, shape, config: x.transpose(1, 2)
    ),
    "list": Packing(
        lambda x, config: list(x.unsqueeze(2)),
        lambda xs, shape, config: torch.stack(list(xs)).squeeze(2),
    ),
}
