"""One call of a denoiser as its pipeline makes it, from model latents and flat conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from t2i_align.contract import TensorDict, map_dict
from t2i_align.errors import ModelError
from t2i_align.generators.capture import ARGUMENT, LENGTHS, unflatten
from t2i_align.generators.latents import PACKINGS
from t2i_align.generators.layouts import Call, FamilyLayout

GUIDANCE = "guidance"  # argument of guidance-distilled denoisers


@dataclass(frozen=True)
class Caller:
    """Calls denoisers of one family.

    Args:
        layout: the family.
        config: of the denoiser.
        factor: pixels a latent pixel and frames a latent frame stand for.
        dtype: of latents and conditioning.
        embedded_guidance: the scale a guidance-distilled network is told where the conditioning
            does not say; None for other networks.
        frame_rate: frames a second, video only.
    """

    layout: FamilyLayout
    config: Mapping[str, Any]
    factor: tuple[int, int]
    dtype: torch.dtype
    embedded_guidance: float | None
    frame_rate: float

    def __call__(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: TensorDict) -> Tensor:
        """The prediction ``(B, *L)`` in the family's convention.

        Args:
            net: denoiser.
            x_t: noised model latents ``(B, *L)``.
            time: ``(B,)`` in the scheduler's scale.
            cond: flat conditioning ``(B, ...)``.
        """
        if self.layout.ragged:
            lengths = [v.tolist() for k, v in cond.items() if k.startswith(LENGTHS)]
            if lengths:
                return self._by_length(net, x_t, time, cond, list(zip(*lengths, strict=True)))
        output = net(**self.arguments(x_t, time, cond))[0]
        return self._latents(output, tuple(x_t.shape[1:]))

    def arguments(self, x_t: Tensor, time: Tensor, cond: TensorDict) -> dict[str, Any]:
        """Keyword arguments of the denoiser."""
        layout = self.layout
        parts = {k: self._cast(k, v).to(x_t.device) for k, v in cond.items()}
        if x_t.is_meta:
            parts |= {k: torch.ones(parts[k].shape, dtype=torch.bool) for k in layout.counts}
        given = unflatten(parts)
        given |= layout.sized(Call(self.config, x_t, parts, self.factor, self.frame_rate))
        if self.embedded_guidance is not None and GUIDANCE not in given:
            given[GUIDANCE] = torch.full((len(x_t),), self.embedded_guidance, device=x_t.device)
        given[layout.sample_arg] = PACKINGS[layout.packing].pack(x_t.to(self.dtype), self.config)
        given |= self._told(time, x_t)
        for name in layout.frame_args:
            given[name] = given[name].repeat_interleave(x_t.shape[2], dim=0)
        return given | {"return_dict": False}

    def _told(self, time: Tensor, x_t: Tensor) -> dict[str, Tensor]:
        """The time under each of its names."""
        layout = self.layout
        told = layout.time(time, self.config)
        if layout.time_per == "frame":
            told = told[:, None].expand(-1, x_t.shape[2])
        return dict.fromkeys((layout.time_arg, *layout.time_args), told)

    def _cast(self, key: str, value: Tensor) -> Tensor:
        keep = key in self.layout.per_image or key == GUIDANCE or not value.is_floating_point()
        return value if keep else value.to(self.dtype)

    def _latents(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """The network's output as model latents; a learned variance is left out."""
        if isinstance(output, Tensor) and output.shape[1:] == (2 * shape[0], *shape[1:]):
            output = output.chunk(2, dim=1)[0]
        latent = PACKINGS[self.layout.packing].unpack(output, shape, self.config)
        return latent if self.layout.sign == 1 else -latent

    def _by_length(
        self, net: nn.Module, x_t: Tensor, time: Tensor, cond: TensorDict, lengths: Sequence[Any]
    ) -> Tensor:
        """Items grouped by the lengths of their text and ids, in the order they came."""
        groups = {n: [i for i, m in enumerate(lengths) if m == n] for n in dict.fromkeys(lengths)}
        found: dict[int, Tensor] = {}
        for index in groups.values():
            part = {k: v[index] for k, v in cond.items() if not k.startswith(LENGTHS)}
            for k in [k for k in part if LENGTHS + k in cond]:
                length = int(cond[LENGTHS + k][index[0]])
                part[k] = part[k].narrow(1 + ragged_axis(cond[k]), 0, length)
            output = net(**self.arguments(x_t[index], time[index], part))[0]
            latent = self._latents(output, tuple(x_t.shape[1:]))
            found |= dict(zip(index, latent, strict=True))
        return torch.stack([found[i] for i in range(len(lengths))])


def stacked(conds: Sequence[TensorDict], *, ragged: bool) -> TensorDict:
    """Conditioning of items ``(B, ...)``; text of unequal length is padded with zeros.

    Args:
        conds: of each item, without batch dimension.
        ragged: also say how long each was (``lengths.<name>``), since no mask does.

    Raises:
        ModelError: what the pipeline passes for a whole batch differs among these items.
    """
    cond: TensorDict = {}
    for key in conds[0]:
        values = [c[key] for c in conds]
        if key.startswith(ARGUMENT) and not ragged:
            _refuse_unequal(key, values)
        even = len({v.shape for v in values}) == 1
        cond[key] = torch.stack(values) if even else _padded(values)
        if ragged and values[0].dim() > 1:
            axis = ragged_axis(cond[key])
            cond[LENGTHS + key] = torch.tensor([v.shape[axis] for v in values])
    return cond


def _refuse_unequal(key: str, values: Sequence[Tensor]) -> None:
    """Arguments without a batch dimension are taken from the first item, so all must agree."""
    if any(not torch.equal(values[0], v) for v in values[1:]):
        name = key.partition(".")[2]
        raise ModelError(
            f"model.layout: the pipeline passes '{name}' for a whole batch, and what it passes "
            "for one prompt is not what it passes for another",
            "set model.layout.alone and ragged: true, so that such prompts run apart",
        )


def ragged_axis(batch: Tensor) -> int:
    """Of items of a batch ``(B, ...)``, the dimension that text fills: the first above 1.

    Tokens of an embedding ``(L, d)``, keys of a mask ``(1, 1, L)``.
    """
    return next((i for i, n in enumerate(batch.shape[1:]) if n > 1), 0)


def _padded(values: Sequence[Tensor]) -> Tensor:
    """A batch of items that differ in one dimension, with zeros at its end."""
    dims = range(values[0].dim())
    axis = next(i for i in dims if len({v.shape[i] for v in values}) > 1)
    moved = pad_sequence([v.movedim(axis, 0) for v in values], batch_first=True)
    return moved.movedim(1, 1 + axis)


def unstacked(cond: TensorDict) -> list[TensorDict]:
    """Conditioning of each item; lists lose their padding."""
    num = len(next(iter(cond.values())))
    items = [map_dict(cond, lambda v, i=i: v[i].cpu().clone()) for i in range(num)]
    return [
        {k: v[: int(c[LENGTHS + k])].clone() if LENGTHS + k in c else v for k, v in c.items()}
        for c in items
    ]
