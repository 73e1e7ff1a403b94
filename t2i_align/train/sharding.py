"""FSDP2: parameters, gradients and optimizer state split over the processes.

Each block that a network names as repeated is one unit, gathered before its forward and backward
and let go after; what is left is the outermost unit. Done by torch's ``fully_shard`` itself, on
whatever device the run has: accelerate would take plain DistributedDataParallel on a CPU without
saying so. Checkpoints hold whole tensors, so they do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from t2i_align.generators.views import Views
from t2i_align.train.compiled import repeated_blocks


def shard(views: Views, device: torch.device) -> None:
    """Split the policy, and the frozen copy where there is one, over all processes.

    Raises:
        RuntimeError: some parameter stayed whole.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for net in {id(n): n for n in (views.module, views.reference) if n is not None}.values():
        for unit in (*repeated_blocks(net), net):
            fully_shard(unit, mesh=mesh)
        odd = [name for name, p in net.named_parameters() if not isinstance(p, DTensor)]
        if odd:
            raise RuntimeError(f"fsdp2 left {odd[0]} whole")


def whole(x: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, split as ``model`` is."""
    if not isinstance(model, DTensor) or isinstance(x, DTensor):
        return x
    x = x.to(model.device, model.dtype)
    return distribute_tensor(x, model.device_mesh, model.placements, src_data_rank=None)


def whole_tree(tree: Any) -> Any:
    """An optimizer's state with whole tensors."""
    if isinstance(tree, Tensor):
        return whole(tree)
    if isinstance(tree, dict):
        return {k: whole_tree(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole_tree(v) for v in tree)
    return tree


def split_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimizer's state with what has a parameter's shape split as that parameter is."""
    rows = {}
    for i, entries in state["state"].items():
        p = parameters[i]
        rows[i] = {
            k: like(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
            for k, v in entries.items()
        }
    return {**state, "state": rows}


def settle(views: Views) -> None:
    """Give the policy whole, plain parameters for good, to be exported; it no longer trains."""
    for owner in list(views.module.modules()):
        for name, p in list(owner.named_parameters(recurse=False)):
            if isinstance(p, DTensor):
                plain = nn.Parameter(whole(p), requires_grad=p.requires_grad)
                setattr(owner, name, plain)
    if views.ema is not None:
        views.ema = {k: whole(v) for k, v in views.ema.items()}
