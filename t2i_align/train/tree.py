"""Nested state (dicts, lists, numbers, tensors) as a JSON skeleton plus safetensors, and back.

Optimizers keep their state in nested dicts with integer keys and mixed values; this stores any of
them without pickle.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON-able structure and named tensors.

    Raises:
        TypeError: a leaf is neither JSON-able nor a tensor.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"tensor": name, "shape": list(node.shape)}
        if isinstance(node, dict):
            return {"dict": [[k, walk(v)] for k, v in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [walk(v) for v in node], "tuple": isinstance(node, tuple)}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"value": node}
        raise TypeError(f"cannot store a {type(node).__name__} without pickle")

    return walk(tree), tensors


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`pack`."""
    if "tensor" in skeleton:
        return tensors[skeleton["tensor"]].reshape(skeleton["shape"])
    if "dict" in skeleton:
        return {k: unpack(v, tensors) for k, v in skeleton["dict"]}
    if "list" in skeleton:
        items = [unpack(v, tensors) for v in skeleton["list"]]
        return tuple(items) if skeleton["tuple"] else items
    return skeleton["value"]
