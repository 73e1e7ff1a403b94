"""Starting from the weights an earlier run trained (``model.start_from``).

The policy gets them, and the reference too: the next stage of staged DPO (sDPO, Kim et al. 2024,
arXiv:2403.19270) or the next round of generate, judge and train. What was trained is taken by name
from a checkpoint, so it is the same for full fine-tuning and for adapters, whatever the family.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from t2i_align.errors import ModelError
from t2i_align.generators.views import Views
from t2i_align.train.checkpoint import Checkpoints, sha256, verify


def start_file(name: str) -> Path:
    """The weights ``model.start_from`` means: averaged ones where the run kept an average.

    Args:
        name: a run's ``output_dir``, of which the newest good checkpoint counts, or a checkpoint.

    Raises:
        ModelError: there is none.
    """
    folder = Path(name).expanduser()
    found = folder
    if not (folder / "manifest.json").is_file():
        good = [p for p in Checkpoints(folder / "checkpoints", None).all() if not verify(p)]
        found = good[-1] if good else folder
    problem = verify(found)
    if problem:
        raise ModelError(
            f"model.start_from: no good checkpoint in '{name}' ({problem})",
            "give the output_dir of a run of this suite, or a folder checkpoints/step-NNNNNNNN "
            "of it",
        )
    averaged = found / "ema.safetensors"
    return averaged if averaged.is_file() else found / "weights.safetensors"


def start_from(views: Views, name: str) -> str:
    """Put an earlier run's trained weights into the policy, and make them the reference.

    Args:
        views: of the freshly loaded network.
        name: as for :func:`start_file`.

    Returns:
        SHA-256 of the weights, by which a resumed run knows that they are the same.

    Raises:
        ModelError: there are none, or names or shapes of the parameters differ. Another
            ``lora_alpha`` or base of the same shapes is not noticed: give those of that run.
    """
    file = start_file(name)
    theirs, mine = load_file(file), views.trained()
    if not mine.keys() & theirs.keys():
        raise ModelError(
            f"model.start_from: '{name}' trained other parameters than this recipe, not one of "
            f"them the same: {', '.join(sorted(theirs)[:2])} there, {', '.join(sorted(mine)[:2])} "
            "here",
            "use the model and lora options of that run",
        )
    shapes = [{k: tuple(v.shape) for k, v in d.items()} for d in (mine, theirs)]
    odd = sorted(k for k in mine.keys() | theirs.keys() if shapes[0].get(k) != shapes[1].get(k))
    if odd:
        raise ModelError(
            f"model.start_from: '{name}' trained other parameters than this recipe, e.g. "
            f"{odd[0]}: {shapes[1].get(odd[0])} there, {shapes[0].get(odd[0])} here",
            "use the model and lora options of that run",
        )
    with torch.no_grad():
        for k, p in mine.items():
            p.copy_(theirs[k])
    if views.reference is not None and not views.borrowed:
        views.let_reference_follow()
    return sha256(file)
