"""The nouns every part of the suite shares.

The idea. A preference objective needs to know how likely a generator finds a sample. Diffusion and
flow models bound it (``elbo``), token models know it (``token``), sampled trajectories have
Gaussian steps
(``transition``), masked models have a surrogate (``masked``). Whatever is random about that number
(timestep, noise, mask) is drawn once into an :class:`Event`; scoring an event with given weights (a
:data:`View`) is then deterministic, so policy and reference always see the same thing.

Shape legend: B items, U units per item (S draws for ``elbo``, tokens for ``token``), ``*L`` the
    generator's own
latent shape of any rank, P pairs.

Convention for beta (the released Diffusion-DPO code, arXiv:2311.12908): an elbo unit has
``logp = -0.5 * weight * error`` with ``error`` the mean squared error over elements, so
``beta * [logp - logp_ref] = -(beta/2) (m - r)``. Beta is never portable between kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["elbo", "transition", "token", "masked"]
View = Literal["policy", "reference", "old", "ema"]
Coupling = Literal["none", "time", "time+noise"]
Layout = Literal["pairs", "winners", "items", "groups"]
MediaKind = Literal["image", "audio", "video", "voxels", "mesh", "codes"]
TensorDict = dict[str, Tensor]


@dataclass(frozen=True)
class Media:
    """What a judge may look at and a generator can encode.

    Args:
        kind: modality.
        data: encoded bytes (image file), or a tensor: codes ``(T,)`` int64, voxels ``(c, d, h,
            w)``, image ``(3, h, w)`` and video ``(3, f, h, w)`` in [0, 1], audio ``(n,)``.
        meta: e.g. ``{"sample_rate": 16000}``.
    """

    kind: MediaKind
    data: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


def map_dict(d: Mapping[str, Tensor], f: Callable[[Tensor], Tensor]) -> TensorDict:
    """Apply ``f`` to every value."""
    return {k: f(v) for k, v in d.items()}


@dataclass(frozen=True)
class Sample:
    """A generator's native state with its conditioning; cacheable, no media.

    Args:
        state: tensors ``(B, ...)``, e.g. ``{"x0": (B, c, h, w)}`` or ``{"codes": (B, T), "length":
            (B,)}``.
        cond: conditioning tensors ``(B, ...)``; belongs to the item, not to the pair.
        meta: one dict an item (record id, prompt, ...), never used in math.
    """

    state: TensorDict
    cond: TensorDict
    meta: tuple[Mapping[str, Any], ...] = ()

    @property
    def batch(self) -> int:
        """Number of items B."""
        return next(iter(self.state.values())).shape[0]

    def to(self, device: torch.device | str) -> Sample:
        """Move all tensors."""
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return replace(self, state=map_dict(self.state, move), cond=map_dict(self.cond, move))


@dataclass(frozen=True)
class Seeds:
    """Per-item seeds of the two random streams of an event, int64 ``(B,)`` on the CPU.

    Coupling is a matter of seeds: items that share a ``time`` seed get the same noise level, items
        that share a
    ``noise`` seed (and a shape) the same noise. Seeds are a function of (run seed, record id, draw
    index) only.
    """

    time: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Event:
    """Everything random about scoring samples, drawn once.

    Args:
        kind: likelihood kind.
        cond: conditioning ``(B, ...)``.
        mask: ``(B, U)`` bool, units that count.
        x_t: elbo ``(B, S, *L)``, noised states.
        time: ``(B, S)`` the model's own time (already scaled as the denoiser expects).
        lam: ``(B, S)`` canonical noise level in [0, 1], 1 = pure noise; metrics bin on it.
        log_snr: elbo ``(B, S)``, log(alpha^2 / sigma^2) of the process at that level, or None.
        target: elbo ``(B, S, *L)`` in the model's prediction convention.
        x_next: transition ``(B, S, *L)``.
        inputs: model-ready tensors of token and masked kinds.
        labels: ``(B, U)`` int64, token and masked.
        weight: ``(B, U)`` unit weights or None for 1.
        elem_mask: ``(B, *L)`` bool, elements inside the error, or None for all.
        depends_on_policy: the draw used policy weights (inversion), so no reference cache is legal.
    """

    kind: Kind
    cond: TensorDict
    mask: Tensor
    x_t: Tensor | None = None
    time: Tensor | None = None
    lam: Tensor | None = None
    log_snr: Tensor | None = None
    target: Tensor | None = None
    x_next: Tensor | None = None
    inputs: TensorDict = field(default_factory=dict)
    labels: Tensor | None = None
    weight: Tensor | None = None
    elem_mask: Tensor | None = None
    depends_on_policy: bool = False

    @property
    def batch(self) -> int:
        """Number of items B."""
        return self.mask.shape[0]

    def _map(self, f: Callable[[Tensor], Tensor]) -> Event:
        changes: dict[str, Any] = {}
        for f_ in fields(self):
            value = getattr(self, f_.name)
            if isinstance(value, Tensor):
                changes[f_.name] = f(value)
            elif isinstance(value, dict):
                changes[f_.name] = map_dict(value, f)
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Event:
        """Move all tensors."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def items(self, index: Tensor | slice) -> Event:
        """The events of some items, for micro-batching."""
        return self._map(lambda x: x[index])


@dataclass(frozen=True)
class Score:
    """What one set of weights says of an event; float32.

    Args:
        kind: likelihood kind.
        logp: ``(B, U)`` nats (token, masked, transition) or ``-0.5 * weight * error`` (elbo).
        mask: ``(B, U)`` bool.
        dims: ``(B, U)`` number of scalars reduced into each unit (1 for tokens).
        reduction: how those scalars were reduced.
        error: ``(B, U)`` mean squared error, elbo only.
        pred: ``(B, S, *L)`` and the others below only when asked for with ``want``.
    """

    kind: Kind
    logp: Tensor
    mask: Tensor
    dims: Tensor
    reduction: Literal["sum", "mean"]
    error: Tensor | None = None
    pred: Tensor | None = None
    target: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None

    def per_item(self, units: Literal["auto", "sum", "mean"] = "auto") -> Tensor:
        """Log-likelihood of each item, ``(B,)``.

        ``auto`` sums tokens, masked tokens and transitions (a joint likelihood) and averages elbo
        draws (one estimate). How many tokens are masked is drawn: a mean over them would divide
        beta by a random number.
        """
        return reduce_units(self.logp, self.mask, self._units(units))

    def error_per_item(self) -> Tensor:
        """Mean denoising error of each item over its draws, ``(B,)``; elbo only."""
        if self.error is None:
            raise ValueError(f"a {self.kind} score has no denoising error")
        return reduce_units(self.error, self.mask, "mean")

    def _units(self, units: Literal["auto", "sum", "mean"]) -> Literal["sum", "mean"]:
        if units != "auto":
            return units
        return "mean" if self.kind == "elbo" else "sum"


def reduce_units(x: Tensor, mask: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """Masked sum or mean over units: ``(B, U) -> (B,)``."""
    total = torch.where(mask, x, torch.zeros_like(x)).sum(1)
    return total if how == "sum" else total / mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class ScoredBatch:
    """What an objective sees: scores by view, who won, and what else is known of the items.

    Args:
        scores: one Score of all B items for each view.
        chosen: ``(P,)`` item index of each pair's winner.
        rejected: ``(P,)`` item index of its loser.
        preference: ``(P,)`` probability that ``chosen`` is preferred: 1, or 0.5 for a kept tie.
        labels: ``(B,)`` +1 desirable, -1 undesirable (binary layouts), or None.
        groups: ``(B,)`` record number of each item (ranked layouts), or None.
        ranks: ``(B,)`` rank inside the group, 0 = best, or None.
        values: ``(B,)`` judge values, or None.
        prompts: ``(B,)`` int64 hash of each item's prompt in [0, 2**62), or None.
        records: ``(B,)`` number of each item's record in the batch, or None.
        advantages: ``(B,)`` or None.
        weight: ``(P,)`` or ``(B,)`` record weights, or None.
        lam: ``(B, U)`` noise levels for metrics by timestep bin, or None.
        log_snr: ``(B, U)`` log signal-to-noise ratios of the events, or None.
    """

    scores: Mapping[str, Score]
    chosen: Tensor
    rejected: Tensor
    preference: Tensor
    labels: Tensor | None = None
    groups: Tensor | None = None
    ranks: Tensor | None = None
    values: Tensor | None = None
    prompts: Tensor | None = None
    records: Tensor | None = None
    advantages: Tensor | None = None
    weight: Tensor | None = None
    lam: Tensor | None = None
    log_snr: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """Result of an objective.

    Args:
        loss: scalar, mean of ``per_example``.
        per_example: ``(P,)`` or ``(B,)``, used to name the records behind a non-finite loss.
        metrics: name -> detached tensor of one value an example. The engine gathers them over the
            step and ranks and takes the mean (the standard deviation for names ending in ``/std``),
            ignoring NaN (a bin without members).
        state: what the objective wants back next time (running means, EMAs).
    """

    loss: Tensor
    per_example: Tensor
    metrics: dict[str, Tensor]
    state: TensorDict = field(default_factory=dict)


@dataclass(frozen=True)
class Inversion:
    """Noise found by running the sampler's ODE backwards from the sample to the drawn level.

    Args:
        num_steps: n, steps of the full grid; the last one is cut so that the path ends at the
            drawn level exactly.
        renoise: average the prediction of each step with the one at its end (ReNoise), twice the
            forwards.
        eta: fresh noise a step, as a multiple of the DDIM step's standard deviation.
        view: whose predictions.
        grid: ``exact``, or ``released``: the grid of the authors' code under diffusers 0.20, which
            starts one step before 0 and overshoots the drawn level.
    """

    num_steps: int = 10
    renoise: bool = False
    eta: float = 0.0
    view: View = "policy"
    grid: Literal["exact", "released"] = "exact"


@dataclass(frozen=True)
class DrawSpec:
    """How events are drawn.

    Args:
        num_draws: S, independent (time, noise) draws an item.
        timestep_sampling: density of the noise level.
        logit_mean: mean of the normal behind ``logit_normal``.
        logit_std: its standard deviation.
        mode_scale: scale of the ``mode`` density (SD3 paper).
        min_level: lowest canonical noise level, in [0, 1).
        max_level: highest, in (0, 1].
        inversion: how the noise is found; None draws it.
    """

    num_draws: int = 1
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    min_level: float = 0.0
    max_level: float = 1.0
    inversion: Inversion | None = None


@dataclass(frozen=True)
class Encoded:
    """One item as the cache stores it.

    Tensors without batch dimension, and JSON-able facts about the item.
    """

    state: TensorDict
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingInputs:
    """Prompts ready to be sampled, after which the text encoders may be freed.

    Args:
        cond: conditioning ``(B, ...)``.
        negative: the unconditional branch, or None when guidance is off.
        num_steps: sampler steps.
        guidance: classifier-free guidance scale, 1 = off.
        shape: latent shape ``*L`` of one item.
        plan: whatever else the family's sampler needs (a configured scheduler).
        guider: joins the guided branches where the pipeline has a component for it.
    """

    cond: TensorDict
    negative: TensorDict | None
    num_steps: int
    guidance: float
    shape: tuple[int, ...]
    plan: Any = None
    guider: Any = None

    def items(self, index: slice) -> SamplingInputs:
        """Some of the prompts."""
        pick = lambda d: map_dict(d, lambda x: x[index])  # noqa: E731
        negative = None if self.negative is None else pick(self.negative)
        return replace(self, cond=pick(self.cond), negative=negative)


@dataclass(frozen=True)
class Rollout:
    """Samples drawn from a view, with what is needed to score them again."""

    sample: Sample
    event: Event | None = None
    old: Score | None = None


class MediaError(Exception):
    """A medium that cannot be used (truncated, not an image, too large).

    Its record is skipped and counted.
    """
