"""Conditioning captured from the pipeline's own denoiser call.

Every diffusers pipeline ends its preparation (tokenise, encode, mask, pool, pack, set timesteps) in
one call of its denoiser, or two where the guided branches run apart. The denoiser's forward is
replaced for a moment by one that notes its arguments and stops the pipeline there. What it holds is
by construction what the denoiser expects: no pipeline's ``encode_prompt`` is re-implemented, and
the scheduler is left configured exactly as the pipeline wants it.

Conditioning is cached as flat tensors of one item. A name says what else a value was:

    a.b            nested mapping
    shared.a       no batch dimension (position ids): equal for all items
    static.a       not a tensor (sizes, shapes): its JSON as bytes, equal for all items
    lengths.a      of a list of ragged tensors, padded with zeros to the longest
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import TensorDict
from t2i_align.errors import ModelError

IGNORED = {"return_dict"}
SHARED = "shared."
STATIC = "static."
LENGTHS = "lengths."
ARGUMENT = (SHARED, STATIC)  # prefixes that are no part of an argument's name


class _Stop(Exception):
    """Raised by the stand-in to leave the pipeline."""


@dataclass(frozen=True)
class Captured:
    """Arguments of the pipeline's first denoiser calls.

    Args:
        sample: the latents as passed to the denoiser (scaled, doubled under guidance).
        time: its time argument.
        calls: of each call every other argument by name.
    """

    sample: Any
    time: Tensor
    calls: tuple[dict[str, Any], ...]


def padded(parts: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Ragged ``(L_i, ...)`` as ``(B, max L, ...)`` with zeros, and their lengths ``(B,)``."""
    lengths = torch.tensor([len(x) for x in parts])
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True), lengths


def flatten(
    arguments: Mapping[str, Any], rows: int, prefix: str = "", shared: Sequence[str] = ()
) -> TensorDict:
    """Keyword arguments to a flat dict of tensors of ``rows`` items; None is dropped.

    Args:
        arguments: by name.
        rows: number of items; a tensor of another length is taken to be equal for all.
        prefix: of the names.
        shared: names of arguments that are equal for all whatever their length.

    Raises:
        ModelError: an argument can be written neither as tensors nor as JSON.
    """
    flat: TensorDict = {}
    for key, value in arguments.items():
        name = prefix + key
        if value is None or key in IGNORED or (isinstance(value, Mapping) and not value):
            continue
        if isinstance(value, Tensor):
            flat |= _tensor(name, value.detach(), rows, name.split(".")[0] in shared)
        elif isinstance(value, Mapping):
            flat |= flatten(value, rows, f"{name}.", shared)
        elif isinstance(value, list) and _one_an_item(value, rows):
            stacked, lengths = padded([x.detach() for x in value])
            flat |= {name: stacked, LENGTHS + name: lengths}
        elif isinstance(value, list | tuple) and _holds_tensors(value):
            flat |= flatten({str(i): x for i, x in enumerate(value)}, rows, f"{name}.", shared)
        else:
            flat[STATIC + name] = _static(name, value).expand(rows, -1).clone()
    return flat


def _tensor(name: str, value: Tensor, rows: int, shared: bool) -> TensorDict:
    if value.dim() > 0 and value.shape[0] == rows and not shared:
        return {name: value}
    return {SHARED + name: value.expand(rows, *value.shape).clone()}


def _one_an_item(values: list[Any], rows: int) -> bool:
    """Whether a list has a tensor for each item; not if these are batches, e.g. one a layer."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    batches = all(x.dim() > 2 and len(x) == rows for x in tensors)
    return len(tensors) == len(values) == rows and not batches


def _holds_tensors(value: Any) -> bool:
    """Whether there are tensors in nested sequences."""
    if isinstance(value, list | tuple):
        return any(_holds_tensors(x) for x in value)
    return isinstance(value, Tensor)


def _static(name: str, value: Any) -> Tensor:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the pipeline passes {name}={value!r} to its denoiser, which cannot be cached "
            "(tensors, and what JSON can hold, can)"
        ) from error
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unflatten(cond: TensorDict) -> dict[str, Any]:
    """Inverse of :func:`flatten` for a batch; lists come back as tuples."""
    nested: dict[str, Any] = {}
    for key, value in cond.items():
        if key.startswith(LENGTHS):
            continue
        *path, last = _bare(key).split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = _value(key, value, cond)
    return {k: _tuples(v) for k, v in nested.items()}


def _bare(key: str) -> str:
    for prefix in ARGUMENT:
        key = key.removeprefix(prefix)
    return key


def _value(key: str, value: Tensor, cond: TensorDict) -> Any:
    if key.startswith(SHARED):
        return value[0]
    if key.startswith(STATIC):
        text = bytes(value[0].cpu().tolist()).rstrip(b"\0")  # mates' texts may be longer
        return _frozen(json.loads(text))
    if LENGTHS + key in cond:
        if value.is_meta:  # planning: all as long as the longest
            return list(value)
        return [x[:n] for x, n in zip(value, cond[LENGTHS + key].tolist(), strict=True)]
    return value


def _frozen(value: Any) -> Any:
    """JSON's lists were tuples, or serve as such."""
    return tuple(_frozen(x) for x in value) if isinstance(value, list) else value


def _tuples(node: Any) -> Any:
    """A mapping from 0, 1, ... was a tuple."""
    if not isinstance(node, dict):
        return node
    if node and all(k.isdigit() for k in node):
        return tuple(_tuples(node[str(i)]) for i in range(len(node)))
    return {k: _tuples(v) for k, v in node.items()}


@contextmanager
def _on_device(pipe: Any, device: torch.device) -> Iterator[None]:
    """Let a pipeline work on ``device`` though its denoiser, absent, is on the meta device.

    Some pipelines take the device of their first part, which may be the denoiser.
    """
    cls = type(pipe)
    fixed = property(lambda _: device)
    pipe.__class__ = type(cls.__name__, (cls,), {"_execution_device": fixed, "device": fixed})
    try:
        yield
    finally:
        pipe.__class__ = cls


def capture(
    pipe: Any,
    denoiser: nn.Module,
    call: Mapping[str, Any],
    names: tuple[str, str],
    device: torch.device,
    num_calls: int = 1,
) -> Captured:
    """Run ``pipe(**call)`` up to its first denoiser calls and return their arguments.

    Args:
        pipe: a diffusers pipeline with its text encoders.
        denoiser: the module the pipeline calls; may live on the meta device, it is never run.
        call: keyword arguments of the pipeline.
        names: of the denoiser's latent and time arguments.
        device: of the frozen parts.
        num_calls: 2 where the guided branches run apart.

    Raises:
        ModelError: the pipeline called its denoiser less often, or without these arguments.
    """
    signature = inspect.signature(type(denoiser).forward)
    calls: list[dict[str, Any]] = []
    sample_arg, time_arg = names

    def _stand_in(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        calls.append(dict(signature.bind(denoiser, *args, **kwargs).arguments))
        if len(calls) == num_calls:
            raise _Stop
        return (torch.zeros_like(calls[-1][sample_arg]),)

    original = denoiser.__dict__.get("forward")
    denoiser.forward = _stand_in
    try:
        # a compiled denoiser would be compiled anew for each stand-in
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, _on_device(pipe, device):
            pipe(**call)
    except _Stop:
        pass
    finally:
        if original is None:
            del denoiser.forward
        else:
            denoiser.forward = original
    return _read(type(pipe).__name__, calls, sample_arg, time_arg, num_calls)


def _read(
    pipeline: str, calls: list[dict[str, Any]], sample_arg: str, time_arg: str, num_calls: int
) -> Captured:
    if len(calls) < num_calls:
        raise ModelError(
            f"{pipeline} called its denoiser {len(calls)} times in one step, not {num_calls}",
            "model.layout.branches says how its guided branches run",
        )
    for name in (sample_arg, time_arg):
        if name not in calls[0]:
            raise ModelError(
                f"{pipeline} calls its denoiser without '{name}'; it passes "
                f"{', '.join(k for k in calls[0] if k != 'self')}",
                "set model.layout.sample_arg and time_arg to what it passes",
            )
    sample, time = calls[0][sample_arg], torch.as_tensor(calls[0][time_arg])
    left_out = {"self", sample_arg, time_arg}
    kept = tuple({k: v for k, v in c.items() if k not in left_out} for c in calls)
    return Captured(sample, time, kept)
