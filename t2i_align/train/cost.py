r"""How often the denoiser runs for one record, so what a record costs.

With n items a record, S draws of each, b branches (2 with guidance inside the likelihood), and the
FLOPs of one item's forward f, of its forward and backward g, of the reference's forward r:

    (1)  stored        n S (g + r [a reference is asked]) + n S m f
    (2)  trajectory    n b (g + r) + b c f            detached: n (g + f + 2 r) + b c f
    (3)  replay        2 (g + r) + N f              the demonstration and a state of its own

    n    pairs 2, winners and items 1, groups K (mean of the data); of SPO's pairs that part at
         their step (num_inner_steps 0) the network sees one state, so n = 1
    m    predictions of an inversion: the mean over the drawn levels of the steps below them, twice
         with ReNoise
    c    predictions while sampling a prompt, over the pairs it gives when the judge keeps every
         comparison; what it rejects makes each record dearer
    N    steps of the replay's sampler, unguided

f, g and r are counted by the formulas of torch's FlopCounterMode; where the policy takes the trunk
from the reference (generators/trunk.py), g lacks it. Text and media come from the cache; decoder
and judge of rollouts are told as samples a record, not as FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from t2i_align.contract import DrawSpec, Inversion, View
from t2i_align.generators.adapters import AdaptOptions
from t2i_align.generators.diffusers_folder import describe
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.process.inversion import PATHS
from t2i_align.process.schedule import Process
from t2i_align.process.timesteps import sample_levels
from t2i_align.recipe import Recipe
from t2i_align.rollout.compare import trained_steps
from t2i_align.rollout.options import RolloutOptions
from t2i_align.rollout.walk import Steps, grid_of

NUM_LEVELS = 4096  # drawn for the mean length of an inversion


@dataclass(frozen=True)
class Calls:
    """Predictions of one record, each of one item.

    Args:
        trained: with gradients.
        reference: of the reference.
        detached: of the policy beside those, without gradients.
        inverted: to find the noise.
        inverter: whose.
        sampled: of the policy while it is sampled.
        judged: samples that are decoded and judged.
    """

    trained: float
    reference: float = 0.0
    detached: float = 0.0
    inverted: float = 0.0
    inverter: View = "policy"
    sampled: float = 0.0
    judged: float = 0.0

    def flops(
        self, step: float, forward: float, reference: float, alone: float | None = None
    ) -> dict[str, int]:
        """FLOPs by kind.

        Args:
            step: of one item's forward and backward.
            forward: of its forward.
            reference: of the reference's.
            alone: of its forward outside of steps, where no trunk is shared; None: the same.
        """
        alone = forward if alone is None else alone
        inversion = reference if self.inverter == "reference" else alone
        parts = {
            "policy": self.trained * step + self.detached * forward,
            "reference": self.reference * reference,
            "inversion": self.inverted * inversion,
            "rollout": self.sampled * alone,
        }
        return {name: round(value) for name, value in parts.items()}


def inversion_calls(how: Inversion, spec: DrawSpec, process: Process) -> float:
    """The number m of Eq. (1)."""
    levels = sample_levels(spec, torch.arange(NUM_LEVELS))
    path = PATHS[how.grid](process, process.time(levels).flatten(), how.num_steps)
    return float(path.num_steps.double().mean()) * (2 if how.renoise else 1)


def stored_calls(recipe: Recipe, num_items: float, process: Process | None) -> Calls:
    """Eq. (1)."""
    inversion = getattr(recipe.chosen("objective")(recipe.objective), "inversion", None)
    draws = num_items * recipe.draw.num_draws
    reference = draws if "reference" in recipe.needs.views else 0.0
    if inversion is None or process is None:
        return Calls(draws, reference)
    draw = recipe.draw.model_dump(exclude={"coupling", "num_distinct"})
    each = inversion_calls(inversion, DrawSpec(**draw), process)
    return Calls(draws, reference, inverted=draws * each, inverter=inversion.view)


@dataclass(frozen=True)
class Prompt:
    """What sampling one prompt takes and gives."""

    forwards: int
    judged: int
    pairs: int


def resampled(trained: list[bool], candidates: int, inner: int) -> Prompt:
    """SPO's resampler (rollout/stepwise.py): K candidates of every trained step.

    Args:
        trained: of every step.
        candidates: K.
        inner: steps that candidates run on alone.
    """
    forwards = judged = pairs = i = 0
    known = False
    while i < len(trained):
        forwards += 0 if known else 1
        if not trained[i]:
            i, known = i + 1, False
            continue
        end = i + 1
        while end < min(i + 1 + inner, len(trained)) and trained[end]:
            end += 1
        forwards += candidates * sum(j + 1 < len(trained) for j in range(i, end))
        judged, pairs = judged + candidates, pairs + end - i
        i, known = end, end < len(trained)
    return Prompt(forwards, judged, pairs)


def whole(trained: list[bool], candidates: int) -> Prompt:
    """D3PO's trajectories (rollout/versus.py): K of every prompt, a pair a trained step."""
    return Prompt(candidates * len(trained), candidates, sum(trained))


def sampled_prompt(options: RolloutOptions, compares: str, steps: list[bool]) -> Prompt:
    """What a prompt takes and gives, by what is compared."""
    if compares == "trajectories":
        return whole(steps, options.num_candidates)
    return resampled(steps, options.num_candidates, options.num_inner_steps)


def scheduler_of(model: AdaptOptions, num_steps: int) -> Any:
    """The pipeline's scheduler with its timesteps set, from configs alone; None without one.

    Architectures that are built in say nothing of it: DDIM that ends at time 0 (as the schedulers
    of Stable Diffusion do), and Euler for flows.
    """
    if not isinstance(model, DiffusersOptions):
        return None
    import diffusers

    index, _, config, _ = describe(model)
    if config.get("use_dynamic_shifting"):
        return None  # its grid depends on the resolution; equal steps have as many
    flow = "beta_schedule" not in config
    default = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    if "scheduler" not in index and not flow:
        config = config | {"set_alpha_to_one": False}
    found = getattr(diffusers, index.get("scheduler", ["diffusers", default])[1])
    scheduler = found.from_config(config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def trained_mask(recipe: Recipe, options: RolloutOptions, process: Process) -> list[bool]:
    """Which of the sampler's steps are trained."""
    num = options.num_inference_steps
    grid = grid_of(process, num, scheduler_of(recipe.model, num))
    steps = Steps(process, grid, options.kernel, options.amount, options.log_prob)
    return trained_steps(steps, options).tolist()


def states_seen(recipe: Recipe, num_items: float) -> float:
    """Items of one record that a forward sees; see n above."""
    if recipe.needs.feed == "replay":
        return 2.0
    if recipe.needs.feed == "stored" or recipe.rollout is None:
        return num_items
    return 1.0 if shares_state(recipe, recipe.rollout) else 2.0


def shares_state(recipe: Recipe, options: RolloutOptions) -> bool:
    """Whether the transitions of a pair start from one state."""
    return compares(recipe) == "steps" and options.num_inner_steps == 0


def compares(recipe: Recipe) -> str:
    """What an objective on trajectories compares."""
    objective: Any = recipe.chosen("objective")(recipe.objective)
    return objective.compares


def trajectory_calls(
    recipe: Recipe, options: RolloutOptions, process: Process, branches: int
) -> Calls:
    """Eq. (2)."""
    mask = trained_mask(recipe, options, process)
    prompt = sampled_prompt(options, compares(recipe), mask)
    items, pairs = states_seen(recipe, 2.0), max(prompt.pairs, 1)
    detached = items if options.detach_negative and branches == 2 else 0.0
    asked = "reference" in recipe.needs.views
    return Calls(
        trained=items * branches - detached,
        reference=items * branches if asked else 0.0,
        detached=detached,
        sampled=branches * prompt.forwards / pairs,
        judged=prompt.judged / pairs,
    )


def calls(recipe: Recipe, num_items: float, process: Process | None, branches: int = 1) -> Calls:
    """Eq. (1), (2) or (3).

    Args:
        recipe: of the run.
        num_items: n of stored records.
        process: of a denoising generator, None for others.
        branches: b of trajectories.
    """
    feed, options = recipe.needs.feed, recipe.rollout
    if feed == "stored" or options is None or process is None:
        return stored_calls(recipe, num_items, process)
    if feed == "trajectory":
        return trajectory_calls(recipe, options, process, branches)
    asked = 2.0 if "reference" in recipe.needs.views else 0.0
    return Calls(2.0, asked, sampled=float(options.num_inference_steps))
