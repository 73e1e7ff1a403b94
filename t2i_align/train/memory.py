"""Bytes on one device while training, found without weights.

    peak = steady + max(step, update, rollout)
    steady    weights and buffers, the reference's own, optimizer state, average
    step      what trace.py saw alive at once: event, saved activations, temporaries of the backward
              pass, casts of autocast, and gradients, which appear while activations leave
    update    all gradients and what the optimizer needs for the largest parameter
    rollout   the sampler's forward, where the policy is sampled while it is trained

Left out: the allocator's slack, what kernels take inside, the CUDA context (0.3 to 0.6 GB), frozen
encoders (dropped before training), and the decoder and judge of rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from t2i_align.generators.quantize import Rounded
from t2i_align.generators.views import Views
from t2i_align.train.options import TrainOptions
from t2i_align.train.trace import Traced

FLOAT = 4  # bytes of what an optimizer keeps
MIN_8BIT, BLOCK = 4096, 256  # bitsandbytes: smaller parameters stay float32; values a scale is of
HALVES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def factored(p: Tensor) -> int:
    """Values of Adafactor's two factors: means over the last and the last but one dimension."""
    return p.numel() // p.shape[-1] + p.numel() // p.shape[-2]


def state_bytes(name: str, p: Tensor) -> int:
    """State of an optimizer for one parameter; step counts, a few bytes each, are left out.

    Args:
        name: of the optimizer: AdamW two float32 moments; 8-bit two bytes and a scale a block for
            each; Adafactor two factors, which of a convolution (means over its kernel's two
            dimensions) may be as large as the parameter.
        p: the parameter.
    """
    if name == "adafactor":
        return FLOAT * (factored(p) if p.dim() > 1 else p.numel())
    if name == "adamw_8bit" and p.numel() >= MIN_8BIT:
        return 2 * (p.numel() + FLOAT * math.ceil(p.numel() / BLOCK))
    return 2 * FLOAT * p.numel()


def scratch_bytes(name: str, p: Tensor) -> int:
    """What updating one parameter needs for a moment: AdamW's kernels nothing."""
    if name != "adafactor":
        return 0
    return FLOAT * (2 * p.numel() + (factored(p) if p.dim() > 1 else 0))


def optimizer_bytes(name: str, trained: Iterable[Tensor]) -> int:
    """State of an optimizer for all that is trained."""
    return sum(state_bytes(name, p) for p in trained)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, storages counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def num_parameters(net: nn.Module) -> int:
    """Scalars of a network without its adapters; those kept in few bits count like any other."""
    plain = sum(p.numel() for name, p in net.named_parameters() if "lora_" not in name)
    few = (m for m in net.modules() if isinstance(m, Rounded))
    return plain + sum(m.in_features * m.out_features for m in few)


def net_bytes(net: nn.Module, dtype: torch.dtype) -> int:
    """Weights, and buffers in the dtype they are loaded in; quantised layers as they are kept."""
    kept = [b for m in net.modules() if isinstance(m, Rounded) for b in m.buffers(recurse=False)]
    ours = {id(b) for b in kept}
    buffers = [b for b in net.buffers() if b.is_floating_point() and id(b) not in ours]
    loaded = sum(b.numel() * dtype.itemsize for b in buffers)
    return size(net.parameters()) + size(kept) + loaded


def memory(
    views: Views, dtype: torch.dtype, train: TrainOptions, step: Traced, rollout: int
) -> dict[str, int]:
    """Bytes by kind; ``peak`` is not their sum, as gradients come while activations go.

    Args:
        views: of the network on the meta device.
        dtype: in which it is loaded.
        train: the ``train`` section.
        step: one micro-batch.
        rollout: most bytes alive while the policy is sampled.
    """
    trained = [p for p in views.module.parameters() if p.requires_grad]
    weights, reference = net_bytes(views.module, dtype), 0
    if views.reference is not None and views.reference is not views.module:
        reference = net_bytes(views.reference, dtype)
    elif views.followed:
        reference = size(views.followed.values())
    gradients, name = size(trained), train.optimizer
    steady = {
        "weights": weights,
        "reference copy": reference,
        "optimizer": optimizer_bytes(name, trained),
        "average (EMA)": FLOAT * sum(p.numel() for p in trained) if train.ema_decay else 0,
    }
    update = gradients + max((scratch_bytes(name, p) for p in trained), default=0)
    moving = max(step.peak, update, rollout)
    parts = {"gradients": gradients, "activations": step.activations}
    return steady | parts | {"peak": sum(steady.values()) + moving}
