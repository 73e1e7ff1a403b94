"""Conditioning captured from the pipeline's own denoiser call.

Every diffusers pipeline ends its preparation (tokenise, encode, mask, pool, pack, set timesteps) in
one call of its denoiser. A keyword hook on the denoiser intercepts the first such call and stops
the pipeline there. What it holds is by construction what the denoiser expects: no pipeline's
``encode_prompt`` is re-implemented, and the scheduler is left configured exactly as the pipeline
wants it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import TensorDict
from t2i_align.errors import ModelError

IGNORED = {"return_dict"}
SHARED = "shared."  # prefix of conditioning without a batch dimension (position ids)


class _Stop(Exception):
    """Raised by the hook to leave the pipeline."""


@dataclass(frozen=True)
class Captured:
    """Arguments of the pipeline's first denoiser call.

    Args:
        sample: the latents as passed to the denoiser (scaled, doubled under guidance).
        time: its time argument.
        cond: every other tensor, flattened: nested keys joined by dots.
    """

    sample: Tensor
    time: Tensor
    cond: TensorDict


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> TensorDict:
    """Nested keyword arguments to a flat dict of tensors; None and empty dicts are dropped.

    Raises:
        ModelError: an argument is neither a tensor nor a dict, so it cannot be cached.
    """
    flat: TensorDict = {}
    for key, value in arguments.items():
        if value is None or key in IGNORED:
            continue
        if isinstance(value, Tensor):
            flat[prefix + key] = value.detach()
        elif isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            raise ModelError(
                f"the pipeline passes {prefix}{key}={value!r} to its denoiser, which cannot be "
                "cached "
                "(tensors and dicts of tensors can)"
            )
    return flat


def unflatten(cond: TensorDict) -> dict[str, Any]:
    """Inverse of :func:`flatten`."""
    nested: dict[str, Any] = {}
    for key, value in cond.items():
        *path, last = key.removeprefix(SHARED).split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def capture(
    pipe: Any, denoiser: nn.Module, call: Mapping[str, Any], sample_arg: str, time_arg: str
) -> Captured:
    """Run ``pipe(**call)`` up to its first denoiser call and return that call's arguments.

    Args:
        pipe: a diffusers pipeline with its text encoders.
        denoiser: the module the pipeline calls; may live on the meta device, it is never run.
        call: keyword arguments of the pipeline.
        sample_arg: name of the denoiser's latent argument.
        time_arg: name of its time argument.
    """
    signature = inspect.signature(type(denoiser).forward)
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(signature.bind(module, *args, **kwargs).arguments)
        raise _Stop

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(**call)
    except _Stop:
        pass
    finally:
        handle.remove()
    if not seen:
        raise ModelError(f"{type(pipe).__name__} finished without calling its denoiser")
    seen.pop("self")
    sample, time = seen.pop(sample_arg), seen.pop(time_arg)
    return Captured(sample, torch.as_tensor(time), flatten(seen))
