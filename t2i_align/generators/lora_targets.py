"""Which layers of a network get an adapter.

Blocks are counted in forward order. With adapters only from block k on, everything before it is the
same function in policy and reference, and the backward pass ends at block k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions

# children that hold a network's blocks, in forward order; the first row a network has counts
STACKS = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("blocks",),
    ("layers",),
)


def linear_names(module: nn.Module) -> list[str]:
    """Full names of all linear layers (peft's ``all-linear``, for any module)."""
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def block_names(module: nn.Module) -> list[str]:
    """Full names of a network's blocks in forward order; empty where that order is not known.

    Two stacks of the same kind (an encoder's and a decoder's ``layers``) have no single order.
    """
    for stack in STACKS:
        roots = [(n, m) for n, m in module.named_modules() if stack[0] in dict(m.named_children())]
        outer = [r for r in roots if not any(r[0] != o and _under(r[0], o) for o, _ in roots)]
        if outer:
            return _blocks(*outer[0], stack) if len(outer) == 1 else []
    return []


def _under(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _blocks(root: str, parent: nn.Module, stack: Iterable[str]) -> list[str]:
    children, prefix = dict(parent.named_children()), f"{root}." if root else ""
    names = []
    for name in stack:
        child = children.get(name)
        if isinstance(child, nn.ModuleList):
            names += [f"{prefix}{name}.{i}" for i in range(len(child))]
        elif child is not None:
            names.append(f"{prefix}{name}")
    return names


def has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    """Whether a full module name ends with one of the suffixes, at a dot."""
    return any(name == s or name.endswith(f".{s}") for s in suffixes)


def target_names(module: nn.Module, options: LoraOptions, preset: list[str]) -> list[str]:
    """Suffixes, or full names where some layers are left out, for peft's ``target_modules``.

    Args:
        module: the network without adapters.
        options: the recipe's LoRA options.
        preset: what ``target_modules: attention`` means for this family.

    Raises:
        ModelError: ``from_block`` is no block, or nothing is left.
    """
    targets = options.target_modules
    if targets == "attention":
        targets = preset
    elif targets == "all-linear":
        targets = linear_names(module)
    if options.from_block is None and not options.exclude_modules:
        return list(targets)
    roots = [""] if options.from_block is None else _from_block(module, options.from_block)
    named = [n for n, _ in module.named_modules() if n and has_suffix(n, targets)]
    kept = [n for n in named if any(_under(n, r) for r in roots)]
    kept = [n for n in kept if not has_suffix(n, options.exclude_modules)]
    if named and not kept:
        raise ModelError(
            f"model.lora: from_block {options.from_block} and exclude_modules "
            f"{options.exclude_modules} leave none of {len(named)} target modules",
            "lower from_block, or shorten exclude_modules",
        )
    return kept or list(targets)


def _from_block(module: nn.Module, first: int) -> list[str]:
    blocks = block_names(module)
    if not blocks:
        raise ModelError(
            f"model.lora.from_block: {type(module).__name__} has no single stack of blocks",
            "remove the key; choose layers by model.lora.target_modules",
        )
    if first >= len(blocks):
        raise ModelError(
            f"model.lora.from_block: got {first}, but {type(module).__name__} has {len(blocks)} "
            f"blocks, 0 ({blocks[0]}) to {len(blocks) - 1} ({blocks[-1]})",
            f"give a number below {len(blocks)}",
        )
    return blocks[first:]


def check_patterns(options: LoraOptions, adapted: Iterable[str]) -> None:
    """Refuse a rank or alpha for layers that have no adapter, which peft would pass over.

    Args:
        options: the recipe's LoRA options.
        adapted: full names of the layers with adapters.

    Raises:
        ModelError: a pattern matches none of them.
    """
    names = list(adapted)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern: dict[str, int] = options.model_dump()[key]
        for suffix in pattern:
            if not any(re.fullmatch(rf"(.*\.)?({suffix})", n) for n in names):
                raise ModelError(
                    f"model.lora.{key}: '{suffix}' is the end of no adapted layer's name",
                    f"adapted are for instance {', '.join(names[:3])}",
                )
