"""What no declared layout (``model.layout``) can describe, and what it describes wrongly.

The first is found from the pipeline's class before anything is loaded, the second from what the
pipeline hands its denoiser.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.latents import PACKINGS
from t2i_align.generators.layout_options import LayoutOptions

KEY = "model.layout"


def check_pipeline(
    index: Mapping[str, Any], options: DiffusersOptions, layout: LayoutOptions
) -> None:
    """Whether a pipeline turns prompts into pictures or clips by denoising latents of a VAE.

    Args:
        index: its model_index.json.
        options: the recipe's ``model`` section.
        layout: as declared there.

    Raises:
        ModelError: it does not, or the layout names what it does not have.
    """
    import diffusers

    name = index["_class_name"]
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ModelError(
            f"{KEY}: this diffusers {diffusers.__version__} has no pipeline {name}",
            "update diffusers, or use a pipeline it has",
        )
    takes = inspect.signature(cls.__call__).parameters
    parts = [k for k, v in index.items() if isinstance(v, list | tuple) and v[0] is not None]
    if not {"height", "width"} <= takes.keys():
        raise ModelError(
            f"{KEY}: {name} takes no height and width, so it makes neither pictures nor clips",
            "layouts are of pictures and clips; audio and shapes need a generator of their own",
        )
    if "vae" not in parts:
        raise ModelError(
            f"{KEY}: {name} has no VAE ({', '.join(parts)}), so its samples are no latents and "
            "have no denoising error",
            "masked-token models are model.type: masked_tokens",
        )
    if layout.denoiser not in parts:
        raise ModelError(
            f"{KEY}.denoiser: {name} has no {layout.denoiser}; its parts are {', '.join(parts)}"
        )
    _check_media(name, "num_frames" in takes, layout)
    if options.aspect_buckets is not None:
        raise ModelError(
            "model.aspect_buckets: a declared layout captures position ids at one size",
            "set model.aspect_buckets: null",
        )


def _check_media(name: str, clips: bool, layout: LayoutOptions) -> None:
    makes = "video" if clips else "image"
    if layout.media != makes:
        raise ModelError(f"{KEY}.media: {name} makes {makes}s", f"set {KEY}.media: {makes}")


def check_sample(sample: Any, packing: str, config: Mapping[str, Any], wanted: list[int]) -> None:
    """Whether a pipeline hands its denoiser whole samples, in the packing that was declared.

    Args:
        sample: the denoiser's latent argument.
        packing: as declared.
        config: of the denoiser.
        wanted: model latents ``(rows, *L)``.

    Raises:
        ModelError: it hands it something else, for example one chunk of frames.
    """
    expected = PACKINGS[packing].pack(torch.empty(wanted, device="meta"), config)
    found, shape = (
        [list(x.shape) for x in each] if isinstance(each, list) else list(each.shape)
        for each in (sample, expected)
    )
    if found != shape:
        raise ModelError(
            f"{KEY}: the pipeline hands its denoiser latents {found}, not {shape}",
            f"set {KEY}.packing, codec, channels or vae_factor to what it does; a pipeline that "
            "denoises a sample in parts has no layout",
        )


def of_frames(arguments: Mapping[str, Any], names: tuple[str, ...], rows: int) -> dict[str, Any]:
    """The first frame's share of arguments that a pipeline repeats for every frame.

    Raises:
        ModelError: one is not there, or not a multiple of ``rows`` long.
    """
    for name in names:
        value = arguments.get(name)
        if not isinstance(value, torch.Tensor) or len(value) % rows:
            raise ModelError(
                f"{KEY}.frame_args: the pipeline does not repeat '{name}' for every frame; it "
                f"passes {', '.join(arguments)}",
                "name the arguments whose first dimension is items times frames",
            )
    return {name: arguments[name][:: len(arguments[name]) // rows] for name in names}
