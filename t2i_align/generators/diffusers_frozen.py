"""The frozen parts of a pipeline: text encoders, VAE, scheduler.

Loaded lazily, apart from the denoiser, and dropped once everything they encode is cached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import Encoded, TensorDict
from t2i_align.errors import ModelError
from t2i_align.generators import diffusers_folder as folders
from t2i_align.generators import latents
from t2i_align.generators.calling import stacked, unstacked
from t2i_align.generators.capture import Captured, capture, flatten
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.guidance import set_guiders
from t2i_align.generators.layout_checks import check_sample, of_frames
from t2i_align.generators.layouts import FamilyLayout
from t2i_align.generators.offload import HOME, visiting
from t2i_align.generators.vae_guard import finite_pixels

DECODE_PIXELS = 2**20  # pictures decoded at once: one of 1024 px, 64 of 128 px
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Size:
    """Of generated media, in pixels and frames."""

    height: int
    width: int
    num_frames: int = 1


@dataclass(frozen=True)
class Conditioned:
    """Flat conditioning ``(B, ...)`` of both branches; ``negative`` is None without guidance."""

    cond: TensorDict
    negative: TensorDict | None


def joined(parts: Sequence[Conditioned]) -> Conditioned:
    """One batch of prompts that were encoded apart, so that no mate's padding is part of them."""
    cond = stacked([unstacked(part.cond)[0] for part in parts], ragged=True)
    others = [unstacked(part.negative)[0] for part in parts if part.negative is not None]
    return Conditioned(cond, stacked(others, ragged=True) if others else None)


def _own(x: Tensor) -> Tensor:
    """One of a batch, in memory of its own and in the usual order."""
    return x.cpu().clone(memory_format=torch.contiguous_format)


class FrozenParts:
    """A stock pipeline around a denoiser that may be absent (on the meta device).

    Args:
        options: the recipe's ``model`` section.
        folder: the pipeline folder.
        index: its model_index.json.
        layout: its family.
        factor: pixels a latent pixel and frames a latent frame stand for.
        device: where the frozen parts run.
        denoiser: gives the denoiser to build the pipeline around.
    """

    def __init__(
        self,
        options: DiffusersOptions,
        folder: Path,
        index: dict[str, Any],
        layout: FamilyLayout,
        factor: tuple[int, int],
        device: torch.device,
        denoiser: Callable[[], nn.Module],
    ) -> None:
        """Load nothing yet."""
        self.options = options
        self.folder = folder
        self.index = index
        self.layout = layout
        self.factor = factor
        self.device = device
        self.denoiser = denoiser
        self._pipe: Any = None

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded on first use."""
        if self._pipe is None:
            self._pipe = self._load()
        return self._pipe

    def _load(self) -> Any:
        import diffusers

        parts: dict[str, Any] = {self.layout.denoiser: self.denoiser()}
        parts |= {name: None for name in OPTIONAL_PARTS if name in self.index}
        parts |= {
            n: None for n, v in self.index.items() if v == [None, None]
        }  # e.g. SD3 without T5
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        vae_dtype = folders.DTYPES[self.options.vae_dtype]
        default = folders.DTYPES[self.options.dtype]
        try:
            if self.options.vae_name_or_path:
                vae: Any = folders.denoiser_class(self.index, "vae")
                parts["vae"] = vae.from_pretrained(
                    folders.local_or_hub(self.options.vae_name_or_path), dtype=vae_dtype
                )
            cls = getattr(diffusers, self.index["_class_name"])
            own = folders.own_parts(cls, self.index, self.folder, default)
            parts |= dict.fromkeys(own)
            pipe = cls.from_pretrained(
                self.folder,
                dtype={"vae": vae_dtype, "default": default},
                variant=self.options.variant,
                **parts,
            )
        except folders.LOADING as error:
            raise ModelError(
                f"cannot load {self.index['_class_name']} from {self.options.name_or_path}: "
                f"{error}",
                "is the folder complete? model_index.json lists its parts",
            ) from error
        pipe.register_modules(**own)
        pipe.set_progress_bar_config(disable=True)
        if self.layout.vae_tiling:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()  # Allegro's tiles hold one clip
        if self.options.prediction_type in ("epsilon", "sample", "v_prediction"):
            pipe.scheduler.register_to_config(prediction_type=self.options.prediction_type)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != self.layout.denoiser:
                home = HOME if self.options.offload_frozen else self.device
                part.to(home).eval().requires_grad_(False)
        return pipe

    def attach(self, denoiser: nn.Module) -> None:
        """Give an already loaded pipeline its denoiser."""
        if self._pipe is not None:
            setattr(self._pipe, self.layout.denoiser, denoiser)

    def free(self, *, keep_decoder: bool) -> None:
        """Drop text encoders, and everything unless samples will be decoded."""
        if self._pipe is None:
            return
        if not keep_decoder:
            self._pipe = None
            return
        for name in list(self._pipe.components):
            if name.startswith(("text_encoder", "tokenizer")):
                setattr(self._pipe, name, None)

    @visiting("vae")
    @torch.no_grad()
    def encode(self, loaded: list[Encoded]) -> list[Encoded]:
        """VAE posterior of each medium in the denoiser's scale.

        Mean and std ``(c, h, w)`` or ``(c, f, h, w)``; a deterministic autoencoder gives ``x0``.
        """
        pixels = torch.stack([e.state["pixels"] for e in loaded])
        mean, std = latents.encode(self.pipe.vae, pixels, self.layout.codec)
        if std is None:
            states = [{"x0": _own(x)} for x in mean]
        else:
            both = zip(mean, std, strict=True)
            states = [{"mean": _own(m), "std": _own(s)} for m, s in both]
        return [Encoded(state, e.meta) for state, e in zip(states, loaded, strict=True)]

    @visiting("vae")
    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Model latents to images ``(B, 3, h, w)`` or clips ``(B, 3, f, h, w)`` in [0, 1]."""
        vae = self.pipe.vae
        space, time = self.factor
        area = latent.shape[-1] * latent.shape[-2] * space**2
        length = latent.shape[2] * time if latent.dim() == 5 else 1
        at_once = max(1, DECODE_PIXELS // (area * length))
        parts = [latents.decode(vae, x, self.layout.codec) for x in latent.split(at_once)]
        pixels = finite_pixels(torch.cat(parts), vae.dtype)
        return (pixels / 2 + 0.5).clamp(0, 1).cpu()

    def _call(self, prompts: list[str], size: Size, num_steps: int) -> dict[str, Any]:
        """Arguments of the pipeline that guidance does not touch."""
        call: dict[str, Any] = {
            "prompt": prompts,
            "height": size.height,
            "width": size.width,
            "num_inference_steps": num_steps,
            "output_type": "latent",
            **self.layout.call,
        }
        if self.layout.media == "video":
            call["num_frames"] = size.num_frames
            if "frame_rate" in self._parameters():
                call["frame_rate"] = self.options.frame_rate
        if self.options.max_sequence_length is not None:
            self._takes("model.max_sequence_length", "its text encoders have a fixed length")
            call["max_sequence_length"] = self.options.max_sequence_length
        return call

    def _takes(self, key: str, why_not: str) -> None:
        """Refuse an option of a call that the pipeline does not have."""
        if key.rpartition(".")[2] not in self._parameters():
            raise ModelError(
                f"{key}: {type(self.pipe).__name__} does not take it", f"remove the key; {why_not}"
            )

    def _parameters(self) -> Mapping[str, Any]:
        return inspect.signature(type(self.pipe).__call__).parameters

    @visiting("text_encoder", "image_encoder")
    def capture(
        self,
        prompts: list[str],
        size: Size,
        num_steps: int,
        guidance: float = 1.0,
        negative: str | None = None,
    ) -> Conditioned:
        """Conditioning of prompts, and of the branch without them under guidance.

        Args:
            prompts: one an item.
            size: of the media.
            num_steps: the scheduler is set to.
            guidance: scale of the pipeline; 1 = off.
            negative: prompt of the other branch; None: the pipeline's own.
        """
        layout = self.layout
        if layout.alone and layout.ragged and len(prompts) > 1:
            parts = [self.capture([p], size, num_steps, guidance, negative) for p in prompts]
            return joined(parts)
        call = self._call(prompts, size, num_steps)
        guided = guidance > 1 and layout.branches != "embedded"
        if layout.combine == "guider":
            set_guiders(self.pipe, guidance)
        else:
            told = guided or layout.branches == "embedded"
            call[layout.guidance_arg] = guidance if told else layout.no_guidance
        if negative is None and guided and layout.guidance_arg == "true_cfg_scale":
            negative = " "  # such pipelines guide only when a negative prompt is given
        if negative is not None:
            if layout.branches == "embedded":
                raise ModelError(
                    "negative_prompt: this family is told the guidance scale, so it has no branch "
                    "that a negative prompt could go to",
                    "leave it out",
                )
            self._takes("negative_prompt", "its own is the empty prompt")
            call["negative_prompt"] = [negative] * len(prompts)
        apart = guided and layout.branches == "two_calls"
        denoiser = getattr(self.pipe, layout.denoiser)
        names = (layout.sample_arg, layout.time_arg)
        found = capture(self.pipe, denoiser, call, names, self.device, 2 if apart else 1)
        if self.options.layout is not None:
            rows = 2 * len(prompts) if guided and not apart else len(prompts)
            shape = layout.latent_shape(
                denoiser.config, self.factor, (size.height, size.width), size.num_frames
            )
            check_sample(found.sample, layout.packing, denoiser.config, [rows, *shape])
        return self._conditioned(found, len(prompts), guided)

    def _kept(self, call: dict[str, Any], rows: int) -> dict[str, Any]:
        """A call's arguments but those given anew; a clip's of its first frame, a text's alone."""
        left_out = (*self.layout.replaced, *self.layout.time_args)
        kept = {k: v for k, v in call.items() if k not in left_out}
        first = of_frames(kept, self.layout.frame_args, rows)
        cut = {k: kept[k][:, : kept[of].shape[1]] for k, of in self.layout.text_args.items()}
        return kept | first | cut

    def _conditioned(self, found: Captured, num: int, guided: bool) -> Conditioned:
        order = self.layout.branches
        rows = 2 * num if guided and order in ("uncond_first", "cond_first") else num
        shared = self.layout.shared
        kept = [self._kept(call, rows) for call in found.calls]
        flat = [self._masked(flatten(call, rows, shared=shared)) for call in kept]
        if not guided:
            return Conditioned(flat[0], None)
        if order == "two_calls":
            return Conditioned(flat[0], flat[1])
        halves = slice(num), slice(num, None)
        first, second = ({k: v[half] for k, v in flat[0].items()} for half in halves)
        return Conditioned(second, first) if order == "uncond_first" else Conditioned(first, second)

    def _masked(self, flat: TensorDict) -> TensorDict:
        """With a mask of ones where the pipeline left it out, since mates may be longer."""
        name = self.layout.text_mask
        if name is None or name in flat:
            return flat
        text = flat["encoder_hidden_states"]
        return flat | {name: torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)}
