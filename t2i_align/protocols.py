"""What generators and objectives promise; the records they exchange are in :mod:`contract`.

Implementations do not inherit from these protocols; pyright checks the shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from t2i_align.contract import (
    Coupling,
    DrawSpec,
    Encoded,
    Event,
    Inversion,
    Kind,
    Layout,
    LossOutput,
    Media,
    MediaKind,
    Rollout,
    Sample,
    SamplingInputs,
    Score,
    ScoredBatch,
    Seeds,
    TensorDict,
    View,
)
from t2i_align.options import Options


class Stats(Protocol):
    """What must be global over ranks is asked of this."""

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` over all its elements and all ranks, detached, scalar."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x`` concatenated along the first dimension, detached."""
        ...


class LocalStats:
    """Stats of a single process."""

    def mean(self, x: Tensor) -> Tensor:
        """Plain mean."""
        return x.detach().float().mean()

    def gather(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x.detach()


@dataclass(frozen=True)
class Needs:
    """What an objective declares of itself; the loop, the checks and the listings read it.

    Args:
        kinds: likelihood kinds it is defined for.
        only: why no others; told where one is refused.
        views: views to score; ``policy`` always, with gradients.
        layout: what a record must hold.
        coupling: what the items of a record share by default.
        want: extra tensors asked of every Score (``pred``, ``target``, ``mean``, ``std``).
        values: every item must carry a judge's number.
        labels: every item must be labelled good or bad.
        cacheable_reference: whether reference errors may be cached.
        bounded_below: False means the loop stops a run whose losers' errors run away.
        feed: where micro-batches come from: stored records, trajectories of the policy while it
            is trained (``train/online.py``), or demonstrations against a replay of the policy's
            own samples (``train/replay.py``).
    """

    kinds: frozenset[Kind]
    views: frozenset[View] = frozenset({"policy", "reference"})
    layout: Layout = "pairs"
    coupling: Coupling = "time+noise"
    want: frozenset[str] = frozenset()
    values: bool = False
    labels: bool = False
    cacheable_reference: bool = True
    bounded_below: bool = True
    feed: Literal["stored", "trajectory", "replay"] = "stored"
    only: str = ""

    @property
    def online(self) -> bool:
        """Whether samples come from the policy while it is trained."""
        return self.feed != "stored"


ANY_KIND: frozenset[Kind] = frozenset({"elbo", "transition", "token", "masked"})


@runtime_checkable
class Objective(Protocol):
    """A pure function from scores to a loss that declares what it needs.

    It holds no model, device, RNG, config or logger.

    Class attributes:
        Options: its pydantic options, with ``type: Literal["name"]``.
        needs: what it declares; an instance may narrow it by its options.
        citation: BibTeX.
    """

    Options: ClassVar[type[Options]]
    needs: Needs
    citation: ClassVar[str]

    def init_state(self) -> TensorDict:
        """State before the first step; empty for stateless objectives."""
        ...

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """The loss of one micro-batch."""
        ...


@runtime_checkable
class Inverts(Protocol):
    """An objective whose noise is not drawn but found by inverting the sample."""

    @property
    def inversion(self) -> Inversion:
        """How."""
        ...


class Generator(Protocol):
    """A trainable model family.

    ``encode`` is split in two, because the text of a prompt is encoded once for the many media that
    share it: ``encode_media`` and ``encode_prompts`` give the parts the cache stores, ``assemble``
    joins them to a Sample.
    """

    Options: ClassVar[type[Options]]
    kind: ClassVar[Kind]
    media_kind: ClassVar[MediaKind]

    @property
    def views(self) -> Any:
        """The :class:`t2i_align.generators.views.Views` of the trained network."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """The network that is trained (the policy), adapters included.

        Needs :meth:`load_module`.
        """
        ...

    def load_module(self, seed: int, *, reference: bool, reference_mode: str = "auto") -> None:
        """Load the network, add adapters (initialised from ``seed``), set up the reference."""
        ...

    def export(self, folder: str) -> list[str]:
        """Write the trained weights in the format the field's stock loaders read.

        Returns the file names.
        """
        ...

    def media_variants(self) -> Sequence[str]:
        """Names of the augmentations cached for each medium; ``("",)`` for none."""
        ...

    def media_key(self) -> Mapping[str, Any]:
        """Everything an encoded medium depends on besides its content, JSON-able.

        Hashed into the cache key.
        """
        ...

    def text_key(self) -> Mapping[str, Any]:
        """The same for encoded prompts."""
        ...

    def load_media(self, media: Media, variant: str) -> Encoded:
        """Decode and preprocess one medium on the CPU; raises MediaError for a broken one."""
        ...

    def encode_media(self, loaded: Sequence[Encoded]) -> list[Encoded]:
        """Run the frozen encoder on equally shaped inputs of ``load_media``."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[TensorDict]:
        """Conditioning of each prompt, without batch dimension."""
        ...

    def assemble(
        self,
        states: Sequence[TensorDict],
        conds: Sequence[TensorDict],
        metas: Sequence[Mapping[str, Any]],
    ) -> Sample:
        """Batch cached parts (pads where the family needs it.

        Adds per-image conditioning such as time ids).
        """
        ...

    def example(self, batch: int) -> Sample:
        """A sample of the right shapes on the generator's device, for planning."""
        ...

    def free_encoders(self, *, keep_decoder: bool) -> None:
        """Drop the frozen encoders from memory."""
        ...

    def draw(self, sample: Sample, spec: DrawSpec, seeds: Seeds, view: View | None = None) -> Event:
        """Everything random, drawn once.

        On the CPU, so that every machine and rank draws the same.
        """
        ...

    def score(
        self,
        event: Event,
        view: View,
        want: frozenset[str] = frozenset(),
        guidance: float = 1.0,
        negative: TensorDict | None = None,
    ) -> Score:
        """What the weights of ``view`` say of the event; gradients flow when grad mode is on."""
        ...

    def use(self, view: View) -> AbstractContextManager[torch.nn.Module]:
        """Select the weights of a view for the duration of a block."""
        ...

    def prepare_sampling(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int,
        guidance: float,
        negative_prompt: str | None = None,
    ) -> SamplingInputs:
        """Encode prompts for :meth:`rollout`."""
        ...

    def rollout(self, inputs: SamplingInputs, noise_seeds: Tensor, view: View) -> Rollout:
        """Draw one sample for each prompt; the noise is a function of ``noise_seeds (B,)`` only."""
        ...

    def decode(self, sample: Sample) -> list[Media]:
        """Samples to media, frozen decoder included."""
        ...
