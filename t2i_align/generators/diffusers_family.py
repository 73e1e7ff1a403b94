"""Any text-conditioned diffusers pipeline with a layout, see layouts.py for the families.

The frozen parts (text encoders, VAE) and the denoiser are loaded apart: the cache is built with the
encoders only, then they are dropped and the denoiser is loaded. With a warm cache the encoders are
never loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from t2i_align.contract import (
    DrawSpec,
    Encoded,
    Event,
    Kind,
    Media,
    MediaKind,
    Rollout,
    Sample,
    SamplingInputs,
    Score,
    Seeds,
    TensorDict,
    View,
)
from t2i_align.data.buckets import Buckets, make_buckets
from t2i_align.generators import diffusers_folder as folders
from t2i_align.generators.cache_keys import Facts, media_key, text_key
from t2i_align.generators.calling import GUIDANCE, Caller, stacked, unstacked
from t2i_align.generators.checkpointing import enable
from t2i_align.generators.clip_masks import SCORED, scored
from t2i_align.generators.diffusers_frozen import FrozenParts, Size
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.diffusers_sampling import sample
from t2i_align.generators.drawing import draw_event, posterior
from t2i_align.generators.fitting import checked_size, load
from t2i_align.generators.guidance import StepGuidance, chosen_guider, guide
from t2i_align.generators.idle_options import check_idle, is_told_guidance
from t2i_align.generators.processes import prediction_of, process_of
from t2i_align.generators.scoring import score_event
from t2i_align.generators.views import Views, build_views
from t2i_align.options import Options
from t2i_align.process.convert import Prediction
from t2i_align.process.schedule import Process
from t2i_align.process.seeds import normals


class DiffusersGenerator:
    """One diffusers pipeline as a trainable generator.

    Args:
        options: the recipe's ``model`` section.
        device: where networks run; ``meta`` builds the denoiser without weights, for planning.
    """

    Options: ClassVar[type[Options]] = DiffusersOptions
    kind: ClassVar[Kind] = "elbo"
    media_kind: ClassVar[MediaKind] = "image"

    def __init__(self, options: DiffusersOptions, device: str | torch.device = "cpu") -> None:
        """Find the folder (downloading a hub id unless planning) and read its configs.

        Loads no weights.
        """
        self.options = options
        self.device = torch.device(device)
        self.folder: Path | None = None
        if self.device.type != "meta":
            self.folder = folders.find_folder(
                options.name_or_path, options.revision, options.variant, download=True
            )
        self.index, self.config, scheduler, folder = folders.describe(options)
        self.family, self.layout = folders.family(self.index, options)
        check_idle(options, self.layout, self.config)
        self.factor = self.layout.factor(folders.vae_config(folder))
        self.dtype = folders.DTYPES[options.dtype]
        self.call = self._caller()
        self.process = self._process(scheduler)
        self.prediction: Prediction = prediction_of(self.layout, options, scheduler)
        self._frozen: FrozenParts | None = None
        self._views: Views | None = None
        self.mixed_precision = "no"  # of the autocast around it, which decides what attention sees
        self.size = checked_size(options, self.layout, self.config, self.factor)

    def _caller(self) -> Caller:
        told, rate = self.options.embedded_guidance, self.options.frame_rate
        if not is_told_guidance(self.layout, self.config):
            told = None
        elif told is None:
            told = self.layout.embedded_guidance
        return Caller(self.layout, self.config, self.factor, self.dtype, told, rate)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """``(c, h, w)`` or ``(c, f, h, w)`` of the model latents of a size."""
        sides = size.height, size.width
        return self.layout.latent_shape(self.config, self.factor, sides, size.num_frames)

    def _process(self, scheduler: dict[str, Any]) -> Process:
        side = self.options.resolution // (self.factor[0] * self.layout.patch(self.config))
        return process_of(self.layout, self.options, scheduler, side**2)

    # -- loading
    # ------------------------------------------------------------------------------------------

    @property
    def citation(self) -> str:
        """BibTeX of the family."""
        return self.layout.citation

    @property
    def views(self) -> Views:
        """The denoiser's views."""
        assert self._views is not None, "load_module first"
        return self._views

    @property
    def module(self) -> nn.Module:
        """The denoiser."""
        return self.views.module

    def load_module(self, seed: int, *, reference: bool, reference_mode: str = "auto") -> None:
        """Load the denoiser, inject adapters, set up the reference."""
        cls = folders.denoiser_class(self.index, self.layout.denoiser)
        if self.device.type == "meta":
            net: Any = folders.meta_denoiser(cls, self.config, self.dtype)
        else:
            assert self.folder is not None
            net = folders.load_denoiser(
                cls, self.folder, self.layout.denoiser, self.dtype, self.options
            )
        names = self._cond_names()
        net = folders.prepared(net, self.options, self.device, names, self.mixed_precision)
        if self.options.gradient_checkpointing:
            enable(net, self.layout.checkpoint_blocks)
        self._views = build_views(
            net,
            self.options.lora,
            self.layout.attention,
            seed,
            reference=reference,
            reference_mode=reference_mode,
        )
        self._views.module.to(self.device)
        if self._frozen is not None:
            self._frozen.attach(net)

    def _cond_names(self) -> Iterable[str]:
        declared = self.options.layout
        return declared.cond_shapes if declared else self.layout.cond_shapes(self.config, None)

    @property
    def frozen(self) -> FrozenParts:
        """Text encoders, VAE and scheduler."""
        if self._frozen is None:
            assert self.folder is not None, "planning has no frozen parts"
            self._frozen = FrozenParts(
                self.options,
                self.folder,
                self.index,
                self.layout,
                self.factor,
                self.device,
                self._any_denoiser,
            )
        return self._frozen

    def _any_denoiser(self) -> nn.Module:
        if self._views is not None:
            return self._views.module
        cls = folders.denoiser_class(self.index, self.layout.denoiser)
        return folders.meta_denoiser(cls, self.config)

    @property
    def pipe(self) -> Any:
        """The stock pipeline; its denoiser is on the meta device until :meth:`load_module`."""
        return self.frozen.pipe

    def free_encoders(self, *, keep_decoder: bool) -> None:
        """Drop text encoders, and the VAE too unless samples will be decoded."""
        if self._frozen is not None:
            self._frozen.free(keep_decoder=keep_decoder)

    # -- encoding
    # -----------------------------------------------------------------------------------------

    def media_variants(self) -> Sequence[str]:
        """Plain, and mirrored when ``random_flip`` is on."""
        return ("", "flip") if self.options.random_flip else ("",)

    @property
    def buckets(self) -> Buckets | None:
        """The shapes images are fitted to, by record; None: the one square."""
        asked = self.options.aspect_buckets
        unit = self.factor[0] * self.layout.patch(self.config)
        return asked and make_buckets(asked, self.options.resolution, unit)

    def media_key(self) -> Mapping[str, Any]:
        """What an encoded image depends on; see cache_keys.py."""
        assert self.folder is not None
        return media_key(self.folder, self.options, self.layout)

    def text_key(self) -> Mapping[str, Any]:
        """What encoded prompts depend on."""
        assert self.folder is not None
        facts = Facts(self.index, self.config, self.factor)
        return text_key(self.folder, self.options, self.layout, facts)

    def load_media(self, media: Media, variant: str) -> Encoded:
        """Decode, resize, crop and maybe mirror one picture or clip; see fitting.py."""
        return load(media, variant, self.options, self.layout, self.factor[1])

    def encode_media(self, loaded: Sequence[Encoded]) -> list[Encoded]:
        """VAE posterior of each image in the denoiser's latent scale.

        Mean and std ``(c, h, w)``.
        """
        return self.frozen.encode(list(loaded))

    def encode_prompts(self, prompts: Sequence[str]) -> list[TensorDict]:
        """Captured conditioning of each prompt, without what belongs to the image."""
        groups = [[p] for p in prompts] if self.layout.alone else [list(prompts)]
        side = self.options.resolution
        size = Size(side, side, self.size.num_frames)  # what is trained on, not what is sampled
        found: list[TensorDict] = []
        for group in groups:
            cond = self.frozen.capture(group, size, 1).cond
            left_out = (*self.layout.per_image, GUIDANCE)
            found += unstacked({k: v for k, v in cond.items() if k not in left_out})
        return found

    def assemble(
        self,
        states: Sequence[TensorDict],
        conds: Sequence[TensorDict],
        metas: Sequence[Mapping[str, Any]],
    ) -> Sample:
        """Stack cached parts.

        Adds SDXL's time ids (height, width, top, left, target height, target width).
        """
        state = {k: torch.stack([s[k] for s in states]).float() for k in states[0]}
        cond = stacked(conds, ragged=self.layout.ragged)
        for key, rule in self.layout.per_image.items():
            assert rule == "sdxl_time_ids", rule
            cond[key] = torch.tensor([self._time_ids(m) for m in metas], dtype=torch.float32)
        inside = scored(metas, self.options, self.layout, self.factor[1])
        state |= {} if inside is None else {SCORED: inside}
        return Sample(state, cond, tuple(metas))

    def _time_ids(self, meta: Mapping[str, Any]) -> list[int]:
        if self.options.time_ids == "constant":
            target = meta["target_size"]
            return [*target, 0, 0, *target]
        return [*meta["original_size"], *meta["crop_top_left"], *meta["target_size"]]

    # -- events
    # -------------------------------------------------------------------------------------------

    def draw(self, sample: Sample, spec: DrawSpec, seeds: Seeds, view: View | None = None) -> Event:
        """Noise the latents, or invert them; the posterior's own noise is the noise seed's too."""
        x_0 = posterior(sample, seeds, sampled=self.options.vae_sample)
        event = draw_event(self, x_0, sample.cond, spec, seeds, view)
        inside = sample.state.get(SCORED)
        return event if inside is None else replace(event, elem_mask=inside.to(x_0.device))

    def use(self, view: View) -> AbstractContextManager[nn.Module]:
        """Select a view's weights."""
        return self.views.use(view)

    def denoise(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
        """One denoiser call ``(B, c, h, w) -> (B, c, h, w)`` with captured conditioning."""
        return self.call(net, x_t, time, cond)

    def guide(self, uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
        """The pipeline's combination of two branches, see guidance.py."""
        return guide(self.layout, self.config, (uncond, cond), guidance)

    def score(
        self,
        event: Event,
        view: View,
        want: frozenset[str] = frozenset(),
        guidance: float = 1.0,
        negative: TensorDict | None = None,
    ) -> Score:
        """Denoising error or step density of an event, guided when asked; see scoring.py."""
        return score_event(self, event, view, want, guidance, negative)

    # -- sampling
    # -----------------------------------------------------------------------------------------

    def prepare_sampling(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int,
        guidance: float,
        negative_prompt: str | None = None,
    ) -> SamplingInputs:
        """Encode prompts and keep the scheduler as the pipeline configured it."""
        found = self.frozen.capture(list(prompts), self.size, num_steps, guidance, negative_prompt)
        scale = 1.0 if found.negative is None else guidance
        plan, guider = copy.deepcopy(self.pipe.scheduler), None
        if self.layout.combine == "guider" and found.negative is not None:
            guider = copy.deepcopy(chosen_guider(self.pipe, found.cond))
        shape = self.latent_shape(self.size)
        return SamplingInputs(found.cond, found.negative, num_steps, scale, shape, plan, guider)

    @torch.no_grad()
    def rollout(self, inputs: SamplingInputs, noise_seeds: Tensor, view: View) -> Rollout:
        """The pipeline's sampling loop with its own scheduler.

        Equals ``pipe(latents=normals(noise_seeds))``, packed where the family packs.
        """
        x = normals(noise_seeds, inputs.shape).to(self.device, self.dtype)
        guidance = StepGuidance(
            self.layout, self.config, inputs.guidance, copy.deepcopy(inputs.guider)
        )
        with self.use(view) as net:

            def predict(x: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
                return self.denoise(net, x, time, cond)

            x = sample(predict, x, noise_seeds, inputs, guidance)
        return Rollout(Sample({"x0": x}, inputs.cond))

    def decode(self, sample: Sample) -> list[Media]:
        """Latents to images ``(3, h, w)`` or clips ``(3, f, h, w)`` in [0, 1]."""
        latent = sample.state["x0" if "x0" in sample.state else "mean"]
        clip = self.layout.media == "video"
        meta = {"frame_rate": self.options.frame_rate} if clip else {}
        return [Media(self.layout.media, found, meta) for found in self.frozen.decode(latent)]

    # -- planning and export

    def example(self, batch: int) -> Sample:
        """A sample of the right shapes, for planning."""
        side = self.options.resolution
        mean = torch.zeros(batch, *self.latent_shape(Size(side, side, self.size.num_frames)))
        shapes = self.layout.cond_shapes(self.config, self.options.max_sequence_length)
        whole = self.layout.integers
        kinds = {k: torch.int64 if k.startswith(whole) else torch.float32 for k in shapes}
        cond = {k: torch.zeros(batch, *shape, dtype=kinds[k]) for k, shape in shapes.items()}
        return Sample({"mean": mean, "std": mean}, cond)

    def load_adapter(self, name_or_path: str) -> None:
        """Load a trained adapter as the stock pipeline would; see diffusers_export.py."""
        from t2i_align.generators.diffusers_export import load_adapter

        load_adapter(self.pipe, self.layout.denoiser, self.module, name_or_path)

    def export(self, folder: str) -> list[str]:
        """LoRA.

        ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``; full: the denoiser's own
        folder.
        """
        from t2i_align.generators.diffusers_export import export_denoiser

        return export_denoiser(
            self.index, self.layout.denoiser, self.module, self.options.lora, folder
        )
