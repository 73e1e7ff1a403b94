"""The frozen parts of a pipeline: text encoders, VAE, scheduler.

Loaded lazily, apart from the denoiser, and dropped once everything they encode is cached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import Encoded
from t2i_align.errors import ModelError
from t2i_align.generators import diffusers_folder as folders
from t2i_align.generators.capture import SHARED, Captured, capture
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout

DECODE_PIXELS = 2**20  # pictures decoded at once: one of 1024 px, 64 of 128 px
OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


class FrozenParts:
    """A stock pipeline around a denoiser that may be absent (on the meta device).

    Args:
        options: the recipe's ``model`` section.
        folder: the pipeline folder.
        index: its model_index.json.
        layout: its family.
        device: where the frozen parts run.
        denoiser: gives the denoiser to build the pipeline around.
    """

    def __init__(
        self,
        options: DiffusersOptions,
        folder: Path,
        index: dict[str, Any],
        layout: FamilyLayout,
        device: torch.device,
        denoiser: Callable[[], nn.Module],
    ) -> None:
        """Load nothing yet."""
        self.options = options
        self.folder = folder
        self.index = index
        self.layout = layout
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
                parts["vae"] = diffusers.AutoencoderKL.from_pretrained(
                    folders.local_or_hub(self.options.vae_name_or_path), dtype=vae_dtype
                )
            pipe = getattr(diffusers, self.index["_class_name"]).from_pretrained(
                self.folder,
                dtype={"vae": vae_dtype, "default": default},
                variant=self.options.variant,
                **parts,
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot load {self.index['_class_name']} from {self.options.name_or_path}: "
                f"{error}",
                "is the folder complete? model_index.json lists its parts",
            ) from error
        pipe.set_progress_bar_config(disable=True)
        if self.options.prediction_type in ("epsilon", "sample", "v_prediction"):
            pipe.scheduler.register_to_config(prediction_type=self.options.prediction_type)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name != self.layout.denoiser:
                part.to(self.device).eval().requires_grad_(False)
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

    def latent_affine(self) -> tuple[Tensor, Tensor]:
        """``(shift, scale)`` of model latent = (VAE latent - shift) * scale; per channel if so."""
        config = self.pipe.vae.config
        shift = torch.tensor(float(config.get("shift_factor") or 0.0), device=self.device)
        scale = torch.tensor(float(config.scaling_factor), device=self.device)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shift = torch.tensor(mean, device=self.device).view(-1, 1, 1)
            scale = scale / torch.tensor(std, device=self.device).view(-1, 1, 1)
        return shift, scale

    @torch.no_grad()
    def encode(self, loaded: list[Encoded]) -> list[Encoded]:
        """VAE posterior of each image in the denoiser's scale: mean and std ``(c, h, w)``."""
        vae = self.pipe.vae
        pixels = torch.stack([e.state["pixels"] for e in loaded])
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        shift, scale = self.latent_affine()
        mean = ((posterior.mean.float() - shift) * scale).cpu()
        std = (posterior.std.float() * scale).cpu()
        return [
            Encoded({"mean": mean[i].clone(), "std": std[i].clone()}, e.meta)
            for i, e in enumerate(loaded)
        ]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Model latents to images ``(B, 3, h, w)`` in [0, 1]."""
        vae = self.pipe.vae
        shift, scale = self.latent_affine()
        latent = (latent.to(self.device).float() / scale + shift).to(vae.dtype)
        at_once = max(1, DECODE_PIXELS // self.options.resolution**2)
        parts = [vae.decode(x, return_dict=False)[0].float() for x in latent.split(at_once)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).cpu()

    def _sequence_length(self) -> int | None:
        if "max_sequence_length" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise ModelError(
                f"model.max_sequence_length: {type(self.pipe).__name__} does not take it",
                "remove the key; its text encoders have a fixed length",
            )
        return self.options.max_sequence_length

    def capture(
        self, prompts: list[str], num_steps: int, guidance: float, negative: str | None
    ) -> Captured:
        """Conditioning of prompts; under guidance the unconditional rows come first."""
        call: dict[str, Any] = {
            "prompt": prompts,
            "height": self.options.resolution,
            "width": self.options.resolution,
            "num_inference_steps": num_steps,
            "guidance_scale": guidance,
            "output_type": "latent",
        }
        if negative is not None:
            call["negative_prompt"] = [negative] * len(prompts)
        if self.options.max_sequence_length is not None:
            call["max_sequence_length"] = self._sequence_length()
        denoiser = getattr(self.pipe, self.layout.denoiser)
        found = capture(self.pipe, denoiser, call, self.layout.sample_arg, self.layout.time_arg)
        rows = len(prompts) * (2 if guidance > 1 else 1)
        cond = {}
        for key, value in found.cond.items():
            if value.dim() > 0 and value.shape[0] == rows:
                cond[key] = value
            else:
                cond[SHARED + key] = value.expand(rows, *value.shape).clone()
        return Captured(found.sample, found.time, cond)
