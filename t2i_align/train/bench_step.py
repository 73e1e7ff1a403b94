"""One DPO step under a layout: what is computed in it is chosen, what it finds is not.

The suite's own generator, objective and engine make the step. Weights are put back after it, so
that every layout starts from the same ones.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2i_align.contract import DrawSpec, Event, Sample, Score, ScoredBatch, Seeds
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.lora_targets import block_names
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.protocols import LocalStats
from t2i_align.train.accounting import Account
from t2i_align.train.bench_model import RESOLUTION
from t2i_align.train.engine import Engine
from t2i_align.train.options import TrainOptions

MOVED = 0.02  # size of the adapters' second factor, which starts at 0: policy and reference differ
BETA = 100.0


@dataclass(frozen=True)
class Layout:
    """What one step computes.

    Args:
        name: in the table.
        encode: run the VAE.
        recompute: gradient checkpointing.
        live: run the reference.
        late: adapters from the mid block on.
    """

    name: str
    encode: bool = False
    recompute: bool = False
    live: bool = False
    late: bool = False


LAYOUTS = (
    Layout("live", encode=True, recompute=True, live=True),
    Layout("latents", recompute=True, live=True),
    Layout("activations", live=True),
    Layout("errors"),
    Layout("trunk, live", live=True, late=True),
    Layout("trunk", late=True),
)


@dataclass(frozen=True)
class Settings:
    """What a bench is, so that only the same one is continued.

    Args:
        model: folder or hub id of a diffusers model; None: the random one of SDXL's architecture.
        resolution: of its pictures.
        pairs: of one step.
        rank: of the adapters.
        precision: of autocast.
        device: cpu or cuda.
        seed: of weights, pictures and draws.
    """

    model: str | None = None
    resolution: int = RESOLUTION
    pairs: int = 1
    rank: int = 8
    precision: Literal["no", "bf16"] = "no"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """The items of one step, winners first.

    Args:
        pixels: ``(2 P, 3, H, W)`` in [-1, 1].
        sample: latents and conditioning.
        seeds: of draws; winner and loser share theirs.
    """

    pixels: Tensor
    sample: Sample
    seeds: Seeds


class Side:
    """One network with adapters, and its engine.

    Args:
        settings: of the bench.
        folder: of the model.
        vae: the model's, on the device.
        late: adapters from the mid block on.
    """

    def __init__(self, settings: Settings, folder: str, vae: Any, *, late: bool) -> None:
        """Load it and move its adapters off their start."""
        self.settings, self.vae = settings, vae
        self.device = torch.device(settings.device)
        self.generator = self._generator(folder, None)
        if late:
            self.generator = self._generator(folder, middle(self.generator.module))
        options = TrainOptions(mixed_precision=settings.precision, max_grad_norm=1.0)
        accelerator = Accelerator(mixed_precision=settings.precision, cpu=settings.device == "cpu")
        self.engine = Engine(options, self.generator.views, accelerator, settings.pairs)
        draw = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for name, p in self.engine.trained.items():
                if "lora_B" in name:
                    p.copy_(MOVED * torch.randn(p.shape, generator=draw))
        self.start = {k: p.detach().clone() for k, p in self.engine.trained.items()}
        self.objective = DPO(DPOOptions(beta=BETA))

    def _generator(self, folder: str, first: int | None) -> DiffusersGenerator:
        s = self.settings
        lora = LoraOptions(r=s.rank, lora_alpha=s.rank, from_block=first)
        options = DiffusersOptions(name_or_path=folder, resolution=s.resolution, lora=lora)
        made = DiffusersGenerator(options, s.device)
        made.load_module(s.seed, reference=True)
        return made

    def pair(self, number: int) -> Pair:
        """Random pictures and text of a record; latents by the VAE."""
        g, s = torch.Generator().manual_seed(self.settings.seed + 1 + number), self.settings
        shape = (2 * s.pairs, 3, s.resolution, s.resolution)
        pixels = (0.5 * torch.randn(shape, generator=g)).clamp(-1, 1).to(self.device)
        example = self.generator.example(2 * s.pairs)
        cond = {
            k: torch.randn(v.shape, generator=g) if v.is_floating_point() else v
            for k, v in example.cond.items()
        }
        ids = torch.arange(s.pairs).repeat(2) + 1000 * number
        return Pair(pixels, Sample({"x0": self.encode(pixels)}, cond), Seeds(ids, ids + 7))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Means of the VAE's posterior in the denoiser's scale."""
        with self.engine.autocast():
            mean = self.vae.encode(pixels).latent_dist.mean.float()
        shift = self.vae.config.shift_factor or 0.0
        return ((mean - shift) * self.vae.config.scaling_factor).cpu()

    def event(self, pair: Pair, latents: Tensor) -> Event:
        """The step's event, on the device."""
        sample = replace(pair.sample, state={"x0": latents})
        return self.generator.draw(sample, DrawSpec(), pair.seeds).to(self.device)

    def score(self, event: Event, view: Literal["policy", "reference"]) -> Score:
        """As the loop asks for it."""
        with self.engine.autocast(), torch.set_grad_enabled(view == "policy"):
            return self.generator.score(event, view)

    def recompute(self, *, on: bool) -> None:
        """Gradient checkpointing on or off."""
        net: Any = self.generator.module
        net.enable_gradient_checkpointing() if on else net.disable_gradient_checkpointing()

    def restore(self) -> None:
        """Put the weights back."""
        with torch.no_grad():
            for name, p in self.engine.trained.items():
                p.copy_(self.start[name])

    def step(
        self, layout: Layout, pair: Pair, kept: Score | None, account: Account
    ) -> tuple[float, float]:
        """One optimizer step under a layout; loss and gradient norm."""
        phase, views = account.phase, self.generator.views
        latents = pair.sample.state["x0"]
        if layout.encode:
            with phase("encode"):
                latents = self.encode(pair.pixels)
        with phase("data"):
            event = self.event(pair, latents)
        with views.sharing() if kept is None else nullcontext():
            if kept is None:
                with phase("reference"):
                    kept = self.score(event, "reference")
            with phase("forward"):
                policy = self.score(event, "policy")
        with phase("forward"):
            loss = self.objective(self._batch(policy, kept), {}, LocalStats()).loss
        with phase("backward"):
            self.engine.backward(loss)
        with phase("optimizer"):
            norm = self.engine.step(self.settings.pairs)
        return float(loss.detach()), norm

    def _batch(self, policy: Score, reference: Score) -> ScoredBatch:
        n = self.settings.pairs
        first, one = torch.arange(n, device=self.device), torch.ones(n, device=self.device)
        scores = {"policy": policy, "reference": reference}
        return ScoredBatch(scores, chosen=first, rejected=first + n, preference=one)


def middle(net: nn.Module) -> int:
    """The mid block of a UNet, half way of other networks."""
    names = block_names(net)
    found = [i for i, name in enumerate(names) if name.endswith("mid_block")]
    return found[0] if found else len(names) // 2
