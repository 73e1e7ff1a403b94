"""The judge that is fitted: built for training, and written as a folder that is a judge.

The folder is an open_clip folder (config, float32 weights, tokenizer), with ``timed.safetensors``
when the judge is told the noise level, and a card. Copied into reward_models/ under the card's name
it is a judge of the suite.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.judges.dual_encoder import DualEncoder, DualEncoderOptions
from t2i_align.judges.fit_options import StartOptions
from t2i_align.judges.fit_recipe import FitRecipe
from t2i_align.judges.timed_clip import TimedClip, TimedClipOptions
from t2i_align.judges.timed_model import FILE, save_modulation
from t2i_align.process.seeds import derive

WEIGHTS = "open_clip_model.safetensors"
NOT_COPIED = ("card.yaml", "golden.json", FILE)  # of the folder a run starts from
IMPLEMENTATIONS = {
    "dual_encoder": "t2i_align.judges.dual_encoder:DualEncoder",
    "timed_clip": "t2i_align.judges.timed_clip:TimedClip",
}


@dataclass(frozen=True)
class Fitted:
    """A judge in training.

    Args:
        judge: has ``score_tensor``.
        clip: open_clip's model.
        parts: everything with weights, by the name its state is saved under.
    """

    judge: Any
    clip: Any
    parts: dict[str, nn.Module]

    def trained(self) -> list[nn.Parameter]:
        """The weights that move."""
        return [p for part in self.parts.values() for p in part.parameters() if p.requires_grad]

    def state(self) -> dict[str, Any]:
        """All weights and statistics."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Put them back."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def batch_norms(self, training: bool) -> None:
        """Whether batch norms follow the statistics of what they see."""
        for module in self.clip.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(training)


def build(recipe: FitRecipe, device: torch.device) -> Fitted:
    """The judge at its start, with gradients where the recipe wants them.

    Raises:
        ModelError: its folder cannot be loaded.
    """
    start = recipe.judge
    common: dict[str, Any] = {"path": ".", "output": start.output}
    if start.type == "dual_encoder":
        judge: Any = DualEncoder(
            start.folder, DualEncoderOptions.model_validate(common), device, torch.float32
        )
        parts: dict[str, nn.Module] = {"clip": judge.model}
        clip = judge.model
    else:
        timed = FILE if (start.folder / FILE).is_file() and start.weights == "pretrained" else None
        options = TimedClipOptions.model_validate(common | {"width": start.width, "timed": timed})
        judge = TimedClip(start.folder, options, device, torch.float32)
        clip = judge.base.model
        parts = {"clip": clip, "timed": judge.modulation}
        judge.modulation.requires_grad_(True)
    if start.weights == "scratch":
        anew(clip, start, derive(recipe.seed, "", 0, "fresh weights"))
    if start.train != "modulation":
        (clip if start.train == "all" else clip.visual).requires_grad_(True)
    return Fitted(judge, clip, parts)


def anew(clip: Any, start: StartOptions, seed: int) -> None:
    """Give a model the weights its architecture starts with.

    Raises:
        ModelError: open_clip cannot build the folder's architecture.
    """
    import open_clip

    name = f"local-dir:{start.folder.resolve()}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            fresh = open_clip.create_model(name, load_weights=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"open_clip cannot build {name}: {error}", "see open_clip") from error
    clip.load_state_dict(fresh.state_dict())


def export(fitted: Fitted, recipe: FitRecipe, temperature: float, out: Path) -> None:
    """Write the folder.

    Args:
        fitted: after training.
        recipe: its recipe.
        temperature: factor of the loss; with logits it becomes part of the model's own scale.
        out: the folder.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for file in recipe.judge.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in NOT_COPIED:
            shutil.copyfile(file, out / file.name)
    state = {k: v.detach().cpu().clone().contiguous() for k, v in fitted.clip.state_dict().items()}
    state["logit_scale"] += torch.tensor(temperature).log()
    save_file(state, out / WEIGHTS)
    (out / WEIGHTS).chmod(0o644)  # safetensors writes for the owner only
    if "timed" in fitted.parts:
        save_modulation(fitted.judge.modulation, out / FILE)
    (out / "card.yaml").write_text(card(recipe, out.name), encoding="utf-8")


def card(recipe: FitRecipe, name: str) -> str:
    """The card of a fitted judge."""
    options: dict[str, Any] = {"path": ".", "output": recipe.judge.output}
    takes = "a picture and a prompt"
    if recipe.judge.type == "timed_clip":
        options["timed"], takes = FILE, "a picture, a prompt and a noise level"
    facts = {
        "name": name,
        "version": 1,
        "changelog": [{"version": 1, "change": f"fitted, recipe {recipe.fingerprint()[:12]}"}],
        "implementation": IMPLEMENTATIONS[recipe.judge.type],
        "sources": [{"id": recipe.judge.path}],
        "license": "that of the weights it started from and of the pairs",
        "summary": "A judge fitted to pairs (Bradley-Terry).",
        "input": takes,
        "output": f"the model's {recipe.judge.output}",
        "range": "not bounded" if recipe.judge.output == "logit" else "-1 to 1",
        "direction": "higher is better",
        "citation": "see the sources",
        "failure_modes": ["it knows no more than its pairs; read the held-out accuracy"],
        "details": {"options": options, "recipe": recipe.to_dict()},
    }
    return json.dumps(facts, indent=1) + "\n"  # JSON is YAML
