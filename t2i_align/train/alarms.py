"""What the doctor of a run (``watch.py``) warns of: one function and one line of a table each.

A function reads the series of a run and gives the number the alarm is about, or None where nothing
is wrong or nothing can be said yet. Windows are of steps since the start or the last refresh of the
reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from t2i_align.protocols import Needs
from t2i_align.recipe import Recipe

KEPT = 200  # steps of a series
SEEN = "watch/"  # prefix of what only the doctor reads
AGREE = 1e-3  # share of a loss that kernels of half precision may differ by; equal weights give 0
SURE = 4.0  # standard errors


@dataclass(frozen=True)
class Facts:
    """What the doctor must know of a run.

    Args:
        total: optimizer steps of the run.
        warmup: those of the learning rate's warm-up.
        records: records of a step.
        reference: whether the objective compares with one.
        bounded: whether its loss is bounded below.
        beta: the objective's, None where it has none.
        anchor: its ``sft_weight``, None where it takes none.
        max_grad_norm: None where nothing is clipped.
        divergence_limit: see ``train.divergence_limit``.
    """

    total: int
    warmup: int
    records: int
    reference: bool
    bounded: bool
    beta: float | None
    anchor: float | None
    max_grad_norm: float | None
    divergence_limit: float | None

    @staticmethod
    def of(recipe: Recipe, needs: Needs, records: int) -> Facts:
        """The facts of a recipe."""
        train, objective = recipe.train, recipe.objective.model_dump()
        return Facts(
            train.max_train_steps,
            train.lr_warmup_steps,
            records,
            "reference" in needs.views,
            needs.bounded_below,
            objective.get("beta"),
            objective.get("sft_weight"),
            train.max_grad_norm,
            train.divergence_limit,
        )

    @property
    def settled(self) -> int:
        """Steps after which a healthy run has moved: the warm-up, then a fifth of what is left."""
        return self.warmup + max(50, (self.total - self.warmup) // 5)


@dataclass
class History:
    """What a run showed so far.

    Args:
        facts: of the run.
        series: the last :data:`KEPT` values of each metric since the last refresh.
        step: optimizer steps done.
        since: those since the last refresh or the start.
        start: the losers' mean loss over the first ten steps.
    """

    facts: Facts
    series: dict[str, list[float]] = field(default_factory=dict)
    step: int = 0
    since: int = 0
    start: list[float] = field(default_factory=list)

    def add(self, step: int, values: dict[str, float]) -> None:
        """The reduced metrics of a step."""
        self.step = step
        self.since += 1
        for name, value in values.items():
            row = self.series.setdefault(name, [])
            row.append(value)
            del row[:-KEPT]
        if len(self.start) < 10 and f"{SEEN}loser" in values:
            self.start.append(values[f"{SEEN}loser"])

    def forget(self) -> None:
        """The reference moved: what was measured against the old one says nothing any more."""
        self.series, self.since = {}, 0

    def last(self, name: str, num: int) -> list[float] | None:
        """The last ``num`` values of a metric, None while there are fewer."""
        row = self.series.get(name, [])
        return row[-num:] if len(row) >= num else None


def mean(values: list[float]) -> float:
    """Of a non-empty list."""
    return math.fsum(values) / len(values)


def sureness(values: list[float]) -> float:
    """Mean over its standard error: how many of them it is away from 0."""
    centre = mean(values)
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))
    error = spread / math.sqrt(len(values))
    return math.copysign(math.inf, centre) if error == 0 and centre else centre / max(error, 1e-30)


def _start_margin(w: History) -> float | None:
    apart = w.last(f"{SEEN}apart", 1)
    return apart[0] if w.step == 1 and apart and apart[0] > AGREE else None


def _stuck(w: History) -> float | None:
    apart, rates = w.last(f"{SEEN}apart", 20), w.last("lr", 21)
    if apart is None or rates is None or any(apart) or not all(rates[:-1]):
        return None
    return 0.0


def _winner_error(w: History) -> float | None:
    gap, loser = w.last(f"{SEEN}winner_gap", 50), w.last(f"{SEEN}loser_gap", 50)
    if gap is None or loser is None:
        return None
    margins = [b - a for a, b in zip(gap, loser, strict=True)]
    rising = mean(gap) > 0 and sureness(gap) > SURE
    return mean(gap) if rising and sureness(margins) > SURE else None


def _saturated(w: History) -> float | None:
    share = w.last("logits/saturated", 20)
    if not w.facts.reference or share is None or mean(share) <= 0.25:
        return None
    return mean(share)


def _dead_logit(w: History) -> float | None:
    spread = w.last("logits/std", 20)
    if not w.facts.reference or spread is None or w.since < w.facts.settled:
        return None
    return mean(spread) if mean(spread) < 0.05 else None


def _chance(w: History) -> float | None:
    """Of the last 2,000 records or more, so that one standard error is a little over .01."""
    num = max(20, math.ceil(2000 / w.facts.records))
    right = w.last("rewards/accuracies", min(num, KEPT))
    if not w.facts.reference or right is None or w.since < w.facts.settled + len(right):
        return None
    error = 0.5 / math.sqrt(len(right) * w.facts.records)
    return mean(right) if error < 0.02 and mean(right) < 0.5 + 2 * error else None


def _clipped_always(w: History) -> float | None:
    norms, limit = w.last("grad_norm", 100), w.facts.max_grad_norm
    if norms is None or limit is None or w.since < w.facts.warmup + 100:
        return None
    share = sum(n > limit for n in norms) / len(norms)
    return mean(norms) / limit if share >= 0.95 else None


def _clipped_never(w: History) -> float | None:
    norms, limit = w.last("grad_norm", 100), w.facts.max_grad_norm
    if norms is None or limit is None or w.since < w.facts.warmup + 100:
        return None
    return max(norms) / limit if max(norms) < 0.01 * limit else None


def _diverged(w: History) -> float | None:
    now, limit = w.last(f"{SEEN}loser", 10), w.facts.divergence_limit
    if w.facts.bounded or limit is None or now is None:
        return None
    known = [x for x in (w.last(f"{SEEN}loser_reference", 10), w.start) if x and len(x) >= 10]
    base = min(map(mean, known), default=0.0)  # a reference that follows drifts along
    if base <= 0 or mean(now) <= limit * base:
        return None
    return mean(now) / base


@dataclass(frozen=True)
class Alarm:
    """One thing that can be wrong.

    Args:
        holds: the number it is about, or None.
        advice: what was seen and what to do.
        stop: training must not go on.
    """

    holds: Callable[[History], float | None]
    advice: Callable[[History, float], str]
    stop: bool = False


def _rescaled(w: History, by: float) -> str:
    """``objective.beta`` times a factor, as a number where it is known."""
    return f"about {by:.2g} times" + ("" if w.facts.beta is None else f", {w.facts.beta * by:.3g}")


def _to_unit_spread(w: History) -> float:
    """What the logits must be multiplied with to spread by 1; at most 1/5."""
    spread = w.last("logits/std", 1)
    return min(0.2, 1 / max(spread[0], 1e-9)) if spread else 0.2


def _advise_winner(w: History, value: float) -> str:
    loser = mean(w.last(f"{SEEN}loser_gap", 50) or [math.nan])
    anchor = {None: "", 0.0: "add an anchor (objective.sft_weight), "}.get(
        w.facts.anchor, f"raise the anchor (objective.sft_weight, {w.facts.anchor}), "
    )
    return (
        f"the winners' loss is {value:.3g} above the reference's and the losers' {loser:.3g}: the "
        f"margin grows by unlearning losers faster than winners, which costs quality; {anchor}use "
        "dpop or dpo_safeguard, lower the learning rate or stop earlier"
    )


def _advise_dead(w: History, value: float) -> str:
    pull = w.last("gradient_factor/chosen", 1)
    now = "" if pull is None else f" (now {pull[0]:.3g} times sft's gradient)"
    return (
        f"the logits spread by {value:.3g} where 1 would use the sigmoid, so all pairs pull "
        f"alike{now} and nothing holds the policy at the reference; raise objective.beta "
        f"{_rescaled(w, 1 / max(value, 1e-9))}, or the learning rate if the policy has hardly moved"
    )


ALARMS: dict[str, Alarm] = {
    "start_margin": Alarm(
        _start_margin,
        lambda w, v: (
            f"before the first update policy and reference differ by {v:.2g} of their loss; they "
            "must agree: is the reference another base, are adapters not really off, or is "
            "something random in the forward pass? margins and betas mean nothing until this is 0"
        ),
    ),
    "stuck": Alarm(
        _stuck,
        lambda w, v: (
            "after 20 updates policy and reference still say exactly the same: the reference "
            "moves with the policy (adapters not really off, shared weights), or the updates are "
            "too small for this precision; compare lora, reference.mode and train.learning_rate"
        ),
    ),
    "winner_error": Alarm(_winner_error, _advise_winner),
    "saturated": Alarm(
        _saturated,
        lambda w, v: (
            f"{v:.0%} of the pairs have a logit beyond 5: on the right side they teach nothing "
            "any more, on the wrong side they pull at full strength; if this came late the pairs "
            "are learned, so stop earlier; else beta is too large for this data or the learning "
            f"rate too high: try objective.beta {_rescaled(w, _to_unit_spread(w))}"
        ),
    ),
    "dead_logit": Alarm(_dead_logit, _advise_dead),
    "chance_accuracy": Alarm(
        _chance,
        lambda w, v: (
            f"implicit accuracy on the training pairs is {v:.3f}, chance: the labels carry nothing "
            "this policy can learn (shuffled? winner and loser swapped? noise levels where the "
            "pairs do not differ?), or the learning rate is too low"
        ),
    ),
    "clipped_always": Alarm(
        _clipped_always,
        lambda w, v: (
            f"nearly every gradient is clipped, by {v:.2g} times on average: steps have the length "
            "max_grad_norm sets, and strong pairs count like weak ones; lower objective.beta, or "
            f"raise train.max_grad_norm to some {2 * v * (w.facts.max_grad_norm or 0):.2g}"
        ),
    ),
    "clipped_never": Alarm(
        _clipped_never,
        lambda w, v: (
            f"the largest gradient of 100 steps is {v:.2g} of train.max_grad_norm, so clipping "
            "would let a spike of a hundred times the usual pass; lower it to some "
            f"{5 * v * (w.facts.max_grad_norm or 0):.2g}"
        ),
    ),
    "diverged": Alarm(
        _diverged,
        lambda w, v: (
            f"the losers' loss is {v:.3g} times what it was before training, beyond "
            f"train.divergence_limit {w.facts.divergence_limit:g}; this objective has no lower "
            "bound and would go on until the model is destroyed; use an earlier checkpoint, a "
            "lower train.learning_rate, or an objective with a reference and a bound"
        ),
        stop=True,
    ),
}
