r"""Fitting a judge to pairs: the Bradley-Terry model with ties.

    d = s(x_w, c) - s(x_l, c)

    (1)  L = mean w [ -p log sigmoid(tau d) - (1 - p) log sigmoid(-tau d) ]

p is 1, or 1/2 for a tie, whose best d is 0. tau is fixed or fitted with the weights. PickScore's
loss is Eq. (1) less a constant. A judge that is told the noise level sees both pictures of a pair
with the same noise (fit_data.py). Everything random is a function of (seed, step), so a run that
was stopped and goes on equals one that was not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_align.errors import TrainingError
from t2i_align.judges.fit_data import Degrade, PairBatch, Pairs
from t2i_align.judges.fit_judge import build
from t2i_align.judges.fit_recipe import FitRecipe


def bradley_terry(difference: Tensor, preference: Tensor, weight: Tensor) -> Tensor:
    """Eq. (1) with tau in the differences already: ``(P,)`` each, to a scalar."""
    win, lose = F.logsigmoid(difference), F.logsigmoid(-difference)
    return -(weight * (preference * win + (1 - preference) * lose)).mean()


class Fit:
    """One run: judge, optimiser, and the step it is at.

    Args:
        recipe: validated.
        pairs: to train on.
        device: where the judge is.
        degrade: makes what the judge sees of noisy samples; None mixes noise into the pixels.
    """

    def __init__(
        self, recipe: FitRecipe, pairs: Pairs, device: torch.device, degrade: Degrade | None = None
    ) -> None:
        """Build the judge and its optimiser."""
        self.recipe, self.pairs, self.device, self.degrade = recipe, pairs, device, degrade
        self.options = recipe.fit
        self.fitted = build(recipe, device)
        if self.options.channels_last:
            self.fitted.clip.visual.to(memory_format=torch.channels_last)
        self.log_tau = nn.Parameter(torch.tensor(math.log(self.options.temperature), device=device))
        weights = self.fitted.trained()
        single = [p for p in weights if p.ndim < 2]
        if self.options.learn_temperature:
            single.append(self.log_tau)
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in weights if p.ndim > 1],
                "weight_decay": self.options.weight_decay,
            },
            {"params": single, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.step_number = 0
        self.history: list[dict[str, float]] = []

    def differences(self, batch: PairBatch) -> Tensor:
        """Winner minus loser, d of Eq. (1), ``(P,)``."""
        judge, pixels = self.fitted.judge, batch.pixels.to(self.device)
        if batch.level is None:
            scores = judge.score_tensor(pixels, batch.prompts)
        else:
            scores = judge.score_tensor(pixels, batch.prompts, batch.level)
        better, worse = scores.chunk(2)
        return better - worse

    def rate(self) -> float:
        """The learning rate of the step: linear warm-up, then linear to 0."""
        done, options = self.step_number, self.options
        warm = (done + 1) / max(1, options.lr_warmup_steps)
        return options.learning_rate * min(1.0, warm, 1 - done / options.max_train_steps)

    def step(self) -> float:
        """One optimiser step; the loss.

        Raises:
            TrainingError: it is not finite; names the records.
        """
        options, number = self.options, self.step_number
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        batch = self.pairs.step(number, options.train_batch_size, self.recipe.noise, self.degrade)
        self.fitted.batch_norms(self.recipe.judge.batch_norm == "train")
        half = self.options.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            d = self.log_tau.exp() * self.differences(batch)
        loss = bradley_terry(d, batch.preference.to(self.device), batch.weight.to(self.device))
        self.fitted.batch_norms(False)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss of step {number} is {loss.item()}; its first prompts: "
                f"{batch.prompts[:3]}",
                "lower fit.learning_rate, or look at those pairs",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.fitted.trained(), options.max_grad_norm)
        self.optimizer.step()
        self.step_number += 1
        self._log(loss.item(), d.detach())
        return loss.item()

    def _log(self, loss: float, d: Tensor) -> None:
        if self.step_number % self.options.logging_steps == 0:
            facts = {"step": self.step_number, "loss": loss, "margin": d.mean().item()}
            self.history.append(facts | {"temperature": self.log_tau.exp().item()})

    @torch.no_grad()
    def accuracy(self, pairs: Pairs, size: int = 64) -> float:
        """Share of pairs that are no ties whose winner scores higher; NaN without any."""
        places = [i for i, r in enumerate(pairs.records) if r.preference != 0.5]
        right = 0
        for start in range(0, len(places), size):
            at = [(place, 0) for place in places[start : start + size]]
            batch = pairs.batch(at, self.recipe.noise, self.degrade)
            right += int((self.differences(batch) > 0).sum())
        return right / len(places) if places else math.nan

    def save(self, path: Path) -> None:
        """Write the state; an earlier file survives a failure."""
        state = {
            "step": self.step_number,
            "weights": self.fitted.state(),
            "log_tau": self.log_tau.detach(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(path)

    def resume(self, path: Path) -> None:
        """Go on from a state of the same recipe."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step_number, self.history = state["step"], state["history"]
        self.fitted.load(state["weights"])
        self.log_tau.data.copy_(state["log_tau"])
        self.optimizer.load_state_dict(state["optimizer"])
