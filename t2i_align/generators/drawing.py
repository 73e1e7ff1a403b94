"""How every denoising generator draws its events: noise at a level, drawn or found by inversion."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from t2i_align.contract import DrawSpec, Event, Sample, Seeds, TensorDict, View
from t2i_align.process.convert import Prediction
from t2i_align.process.elbo import draw_elbo
from t2i_align.process.inversion import Noises, draw_inverted
from t2i_align.process.schedule import Process
from t2i_align.process.seeds import normals


class Denoising(Protocol):
    """What drawing needs of a generator."""

    device: torch.device

    @property
    def process(self) -> Process:
        """How its samples are noised."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What its network predicts."""
        ...

    def use(self, view: View) -> AbstractContextManager[nn.Module]:
        """Select a view's weights."""
        ...

    def denoise(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
        """One call of the network, ``(N, *L) -> (N, *L)``."""
        ...

    def guide(self, uncond: Tensor, cond: Tensor, guidance: float) -> Tensor:
        """One prediction of two branches."""
        ...


def posterior(sample: Sample, seeds: Seeds, *, sampled: bool) -> Tensor:
    """The native state ``(B, *L)``; an encoder's posterior is sampled from the noise seeds."""
    if "x0" in sample.state:
        return sample.state["x0"]
    mean = sample.state["mean"]
    if not sampled:
        return mean
    own = normals((seeds.noise * 5 + 1) & (2**62 - 1), mean.shape[1:]).to(mean.device)
    return mean + sample.state["std"] * own


def draw_event(
    generator: Denoising,
    x_0: Tensor,
    cond: TensorDict,
    spec: DrawSpec,
    seeds: Seeds,
    view: View | None = None,
) -> Event:
    """Everything random of ``x_0 (B, *L)``, drawn once.

    Inversion runs the network with the prompt alone (no guidance), without gradients, under the
    weights of ``view`` (default: the one the inversion names).
    """
    if spec.inversion is None:
        return draw_elbo(x_0, cond, generator.process, generator.prediction, spec, seeds)
    if view is not None:
        spec = replace(spec, inversion=replace(spec.inversion, view=view))
    assert spec.inversion is not None
    with torch.no_grad(), generator.use(spec.inversion.view) as net:

        def predict(x: Tensor, time: Tensor, part: TensorDict) -> Tensor:
            return generator.denoise(net, x, time, part)

        noises = Noises(predict, generator.process, generator.prediction)
        cond = {name: value.to(generator.device) for name, value in cond.items()}
        return draw_inverted(x_0.to(generator.device), cond, spec, seeds, noises)
