"""Names of weights, from a published layout to ours and back.

A map is a literal table of templates, one line a kind of weight, as in

    ("blip.visual_encoder.blocks.{n}.mlp.{rest}", "vision.encoder.layers.{n}.mlp.{rest}")

``{n}`` stands for a number, ``{rest}`` for the end of a name. Each name must fit exactly one line,
so what a table does not know is an error and never silently lost, and the same table read from
right to left writes the published layout again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from t2i_align.errors import ModelError

Table = Sequence[tuple[str, str]]
FIELDS = {"n": r"(?P<n>\d+)", "rest": r"(?P<rest>.+)"}


def pattern(template: str) -> re.Pattern[str]:
    """The expression of a template."""
    text = re.escape(template)
    for name, expression in FIELDS.items():
        text = text.replace(re.escape("{" + name + "}"), expression)
    return re.compile(text)


def renamed(
    tensors: Mapping[str, Tensor], table: Table, what: str, *, back: bool = False
) -> dict[str, Tensor]:
    """The same tensors under the names of the other side.

    Args:
        tensors: by name.
        table: (published, ours) templates.
        what: the checkpoint, as messages call it.
        back: from ours to the published names.

    Raises:
        ModelError: names that no line of the table fits; names the first few.
    """
    lines = [(pattern(b if back else a), a if back else b) for a, b in table]
    made: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        fits = [(found, to) for rule, to in lines if (found := rule.fullmatch(name))]
        if len(fits) != 1:
            unknown.append(name)
            continue
        found, to = fits[0]
        made[to.format(**found.groupdict())] = tensor
    if unknown:
        first = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ModelError(
            f"{what}: {len(unknown)} of {len(tensors)} weights have names outside the published "
            f"layout: {first}",
            "bring the published file; another port of it may use other names",
        )
    return made


def num_layers(tensors: Mapping[str, Tensor], template: str) -> int:
    """One more than the largest ``{n}`` of the names that a template fits; 0 where none does."""
    rule = pattern(template)
    found = [int(m["n"]) for name in tensors if (m := rule.fullmatch(name))]
    return max(found, default=-1) + 1
