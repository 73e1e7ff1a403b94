"""Rectified flow over dense voxel latents ``(B, 8, 16, 16, 16)``, the 3D shape of the contract.

Conventions of TRELLIS stage 1: 1 = noise, velocity ``eps - x_0``, the network is told 1000 times
    the level. The
likelihood is the same ``elbo`` as for images; nothing in objectives or trainer knows the rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from t2i_align.contract import (
    DrawSpec,
    Encoded,
    Event,
    Kind,
    Media,
    MediaError,
    MediaKind,
    Rollout,
    Sample,
    SamplingInputs,
    Score,
    Seeds,
    TensorDict,
    View,
)
from t2i_align.errors import ModelError
from t2i_align.generators.adapters import AdaptOptions
from t2i_align.generators.byte_text import NUM_BYTES, byte_ids, pad_rows
from t2i_align.generators.diffusers_folder import DTYPES, read_json
from t2i_align.generators.drawing import draw_event
from t2i_align.generators.guidance import standard
from t2i_align.generators.scoring import score_event
from t2i_align.generators.views import Views, build_views, export_trained, refuse_checkpointing
from t2i_align.options import Options
from t2i_align.process.convert import Prediction
from t2i_align.process.schedule import Rectified
from t2i_align.process.seeds import normals

ATTENTION = ["to_q", "to_k", "to_v", "to_out"]


class VoxelFlowOptions(AdaptOptions):
    """A folder that ``VoxelDiT.save_pretrained`` wrote."""

    type: Literal["voxel_flow"] = "voxel_flow"
    timestep_shift: float = Field(default=1.0, gt=0, description="warp of the drawn noise level")


class VoxelFlow:
    """A voxel DiT as a generator."""

    Options: ClassVar[type[Options]] = VoxelFlowOptions
    kind: ClassVar[Kind] = "elbo"
    media_kind: ClassVar[MediaKind] = "voxels"
    prediction: Prediction = "velocity"
    citation: ClassVar[str] = ""

    def __init__(self, options: VoxelFlowOptions, device: str | torch.device = "cpu") -> None:
        """Read the config."""
        self.options = options
        self.device = torch.device(device)
        self.folder = Path(options.name_or_path).expanduser()
        if not (self.folder / "config.json").is_file():
            raise ModelError(
                f"model.name_or_path: no voxel model at '{options.name_or_path}' (no config.json)",
                "give the folder that VoxelDiT.save_pretrained wrote",
            )
        self.config = read_json(self.folder / "config.json")
        side = self.config["size"]
        self.shape = (self.config["channels"], side, side, side)
        self.process = Rectified(1000.0, options.timestep_shift)
        self._views: Views | None = None

    @property
    def views(self) -> Views:
        """The network's views."""
        assert self._views is not None, "load_module first"
        return self._views

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.views.module

    def load_module(self, seed: int, *, reference: bool, reference_mode: str = "auto") -> None:
        """Load weights (or build on meta), inject adapters, set up the reference."""
        from t2i_align.generators.voxel_net import VoxelDiT

        refuse_checkpointing(self.options, "voxel_flow", "")
        if self.device.type == "meta":
            with torch.device("meta"):
                net: Any = VoxelDiT.from_config(self.config)
        else:
            net = VoxelDiT.from_pretrained(self.folder)
        net.to(self.device)
        if self.options.dtype != "float32":
            net.to(DTYPES[self.options.dtype])
        self._views = build_views(
            net,
            self.options.lora,
            ATTENTION,
            seed,
            reference=reference,
            reference_mode=reference_mode,
        )

    def media_variants(self) -> Sequence[str]:
        """No augmentation."""
        return ("",)

    def media_key(self) -> Mapping[str, Any]:
        """Voxels are stored as they are."""
        return {"voxels": list(self.shape), "format": 1}

    def text_key(self) -> Mapping[str, Any]:
        """Bytes."""
        return {"text": "bytes", "format": 1}

    def load_media(self, media: Media, variant: str) -> Encoded:
        """Check the shape of one item."""
        x = torch.as_tensor(media.data, dtype=torch.float32)
        if tuple(x.shape) != self.shape:
            raise MediaError(f"voxels of shape {tuple(x.shape)}, the model wants {self.shape}")
        if not bool(x.isfinite().all()):
            raise MediaError("voxels hold NaN or infinity")
        return Encoded({"x0": x}, {})

    def encode_media(self, loaded: Sequence[Encoded]) -> list[Encoded]:
        """Latent voxels are already native."""
        return list(loaded)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TensorDict]:
        """Byte ids, variable length."""
        return [{"text_ids": byte_ids(p)} for p in prompts]

    def free_encoders(self, *, keep_decoder: bool) -> None:
        """There are none."""

    def assemble(
        self,
        states: Sequence[TensorDict],
        conds: Sequence[TensorDict],
        metas: Sequence[Mapping[str, Any]],
    ) -> Sample:
        """Stack voxels, pad text."""
        state = {"x0": torch.stack([s["x0"] for s in states]).float()}
        return Sample(state, self._condition([c["text_ids"] for c in conds]), tuple(metas))

    def _condition(self, texts: Sequence[Tensor]) -> TensorDict:
        marked = [torch.cat([torch.tensor([NUM_BYTES]), t]) for t in texts]  # start token
        ids, length = pad_rows(marked)
        return {"cond": ids, "cond_mask": torch.arange(ids.shape[1]) < length[:, None]}

    def draw(self, sample: Sample, spec: DrawSpec, seeds: Seeds, view: View | None = None) -> Event:
        """Noise the voxels, or invert them."""
        return draw_event(self, sample.state["x0"], sample.cond, spec, seeds, view)

    def use(self, view: View) -> AbstractContextManager[nn.Module]:
        """Select a view's weights."""
        return self.views.use(view)

    def denoise(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
        """The velocity at ``x_t (B, *L)``."""
        return self._velocity(net, x_t, time, cond)

    def _velocity(self, net: nn.Module, x: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
        dtype = DTYPES[self.options.dtype]
        cond = {k: v.to(x.device) for k, v in cond.items()}
        return net(x.to(dtype), time.to(dtype), cond["cond"], cond["cond_mask"])

    def guide(self, uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
        """The standard combination."""
        return standard(uncond, cond, guidance)

    def score(
        self,
        event: Event,
        view: View,
        want: frozenset[str] = frozenset(),
        guidance: float = 1.0,
        negative: TensorDict | None = None,
    ) -> Score:
        """Velocity error or step density of an event, guided when asked; see scoring.py."""
        return score_event(self, event, view, want, guidance, negative)

    def prepare_sampling(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int,
        guidance: float,
        negative_prompt: str | None = None,
    ) -> SamplingInputs:
        """Conditioning and, under guidance, the empty (or negative) prompt's."""
        cond = self._condition([byte_ids(p) for p in prompts])
        negative = None
        if guidance > 1:
            negative = self._condition([byte_ids(negative_prompt or "")] * len(prompts))
        return SamplingInputs(cond, negative, num_steps, guidance, self.shape)

    @torch.no_grad()
    def rollout(self, inputs: SamplingInputs, noise_seeds: Tensor, view: View) -> Rollout:
        """Euler steps of the flow from noise (level 1) to data (level 0)."""
        x = normals(noise_seeds, self.shape).to(self.device)
        level = torch.linspace(1, 0, inputs.num_steps + 1, dtype=torch.float64)
        sigma = self.process.level(self.process.time(level))
        with self.use(view) as net:
            for now, after in itertools.pairwise(sigma):
                time = (1000.0 * now).expand(len(x)).to(self.device)
                v = self._velocity(net, x, time, inputs.cond).float()
                if inputs.negative is not None:
                    base = self._velocity(net, x, time, inputs.negative).float()
                    v = base + inputs.guidance * (v - base)
                x = x + (after - now) * v
        return Rollout(Sample({"x0": x}, inputs.cond))

    def decode(self, sample: Sample) -> list[Media]:
        """Latent voxels as media."""
        return [Media("voxels", x.cpu().clone()) for x in sample.state["x0"]]

    def example(self, batch: int) -> Sample:
        """Zeros of the right shape, for planning."""
        cond = {
            "cond": torch.zeros(batch, 32, dtype=torch.int64),
            "cond_mask": torch.ones(batch, 32, dtype=torch.bool),
        }
        return Sample({"x0": torch.zeros(batch, *self.shape)}, cond)

    def export(self, folder: str) -> list[str]:
        """LoRA: a peft adapter folder; full: the network's own folder."""
        whole = ["config.json", "diffusion_pytorch_model.safetensors"]
        return export_trained(self.module, self.options, folder, whole)
