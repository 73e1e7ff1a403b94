r"""How every denoising generator scores its events: one prediction, read as an error or as a step.

    (1)  prediction = uncond + guidance (cond - uncond)

or as the family's pipeline joins them (generators/guidance.py). Both branches carry gradients, as
in the released trainers of SPO and D3PO. An event that says ``inputs["detach_negative"]`` detaches
the unconditional one (Flow-GRPO's first release): the value is the same, its gradient is that of
``guidance`` times the conditional branch alone.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from t2i_align.contract import Event, Score, TensorDict, View, map_dict
from t2i_align.generators.drawing import Denoising
from t2i_align.process.elbo import elbo_score, flat, repeat_draws
from t2i_align.process.transition import transition_score

SAME = "same"  # (B,) number of the first item with this x_t, time and condition
DETACH = "detach_negative"  # (B,) bool, one value for all items


def score_event(
    generator: Denoising,
    event: Event,
    view: View,
    want: frozenset[str],
    guidance: float,
    negative: TensorDict | None,
) -> Score:
    """What a view's weights say of an elbo or transition event.

    Items that share their state (SPO's candidates of one step) say so with ``inputs["same"]``: the
    network runs once on the first ones, which come first in the batch.

    Args:
        generator: its network and process.
        event: to score.
        view: whose weights.
        want: tensors to keep besides.
        guidance: classifier-free guidance of Eq. (1), 1 = off.
        negative: the unconditional branch ``(B, ...)``, needed when guidance is on.
    """
    if event.kind not in ("elbo", "transition"):
        raise ValueError(f"a denoising generator has no {event.kind} likelihood")
    assert event.x_t is not None
    same = event.inputs.get(SAME)
    seen, without = event, negative
    if same is not None:
        first = slice(int(same.max()) + 1)
        seen = event.items(first)
        without = None if negative is None else map_dict(negative, lambda x: x[first])
    pred = predict(generator, seen, view, guidance, without).unflatten(0, (-1, event.x_t.shape[1]))
    pred = pred if same is None else pred[same]
    if event.kind == "transition":
        return transition_score(pred, event, generator.prediction, want)
    return elbo_score(flat(pred), event, want)


def predict(
    generator: Denoising, event: Event, view: View, guidance: float, negative: TensorDict | None
) -> Tensor:
    """Eq. (1) on the folded states, ``(B S, *L)``; float32 where guided."""
    assert event.x_t is not None and event.time is not None
    x_t, time, num = flat(event.x_t), flat(event.time), event.x_t.shape[1]
    with generator.use(view) as net:
        pred = generator.denoise(net, x_t, time, repeat_draws(event.cond, num))
        if guidance == 1.0:
            return pred
        if negative is None:
            raise ValueError("guidance needs the unconditional branch's conditioning")
        given = event.inputs.get(DETACH)
        detached = given is not None and bool(given.any())
        # after the conditional branch, so that autocast's cast weights already carry gradients
        with torch.no_grad() if detached else contextlib.nullcontext():
            uncond = generator.denoise(net, x_t, time, repeat_draws(negative, num)).float()
    return generator.guide(uncond, pred.float(), guidance)
