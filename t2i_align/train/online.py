"""Preference training on trajectories of the policy itself.

    prompts -> [sample a round with the current policy -> judge -> pairs of transitions ->
    micro-batches of them until they are used up]*

A round's pairs are gathered over all processes, put in one order and shuffled by the run seed, so
every process holds the same pool, takes its own share of each micro-batch, and starts the next
round at the same time as the others. Pairs too few for a micro-batch wait for the next round's. The
pool is part of a checkpoint, so a resumed run goes on where it stopped.

Rounds are told in a line and in ``rollouts.jsonl`` of the run's folder: prompts, comparisons, what
was kept, the mean of the judge over everything it saw, seconds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from torch import Tensor

from t2i_align.contract import Event, Sample, Score, TensorDict
from t2i_align.data.order import picks
from t2i_align.errors import ModelError, TrainingError
from t2i_align.generators.diffusers_folder import DTYPES
from t2i_align.generators.drawing import Denoising
from t2i_align.process.seeds import derive, generator
from t2i_align.protocols import Generator, Objective
from t2i_align.rollout.compare import Asked, Found, trained_steps
from t2i_align.rollout.judging import LatentJudge
from t2i_align.rollout.options import RolloutOptions
from t2i_align.rollout.pairs import StepPairs
from t2i_align.rollout.prompts import encode
from t2i_align.rollout.rows import joined, take, tensors
from t2i_align.rollout.stepwise import Resampler
from t2i_align.rollout.versus import Versus
from t2i_align.rollout.walk import Draws, Steps, Walk, grid_of, sampled_process
from t2i_align.train.engine import Engine
from t2i_align.train.feed import Drawn
from t2i_align.train.log import PLAIN_SECONDS
from t2i_align.train.setup import Setup

ROUNDS_FILE = "rollouts.jsonl"
MAX_EMPTY = 20  # rounds in a row without a pair before a run is given up
MAKERS: dict[str, type[Resampler] | type[Versus]] = {"steps": Resampler, "trajectories": Versus}


@runtime_checkable
class ComparesTrajectories(Protocol):
    """An objective on trajectories: whether it compares next states or whole trajectories."""

    @property
    def compares(self) -> Literal["steps", "trajectories"]:
        """Which."""
        ...


class Sampled(Denoising, Generator, Protocol):
    """A generator that can be sampled step by step."""


def sampled_score(
    engine: Engine,
    generator: Sampled,
    guidance: float,
    negative: Any,
    event: Event,
    want: frozenset[str],
) -> Score:
    """What the policy says of an event while it is sampled: no gradients, the run's precision."""
    # a block of its own: the cache of cast weights must not outlive an optimizer step
    with engine.autocast(), torch.no_grad():
        return generator.score(event, "policy", want, guidance, negative(event.batch))


class TrajectoryFeed:
    """Pairs of transitions of the policy's own trajectories.

    Args:
        setup: recipe and process group.
        generator: with its text encoders.
        objective: on trajectories.
    """

    def __init__(self, setup: Setup, generator: Sampled, objective: Objective) -> None:
        """Encode the prompts and compute the steps of the sampler.

        Raises:
            ModelError: no step of the recipe's sampler can be trained.
        """
        recipe = setup.recipe
        assert recipe.rollout is not None and isinstance(objective, ComparesTrajectories)
        self.setup, self.generator = setup, generator
        self.options: RolloutOptions = recipe.rollout
        self.make = MAKERS[objective.compares]
        self.prompts = encode(generator, self.options, recipe.cache.encode_batch_size)
        process = sampled_process(generator.process, self.prompts.plan)
        grid = grid_of(process, self.options.num_inference_steps, self.prompts.plan)
        o = self.options
        self.steps = Steps(process, grid, o.kernel, o.amount, o.log_prob)
        if not bool(trained_steps(self.steps, o).any()):
            raise ModelError(
                f"rollout.divert_start_step: of {len(grid)} steps none is left to train on",
                "lower it, or raise rollout.num_inference_steps",
            )
        self.device = setup.accelerator.device
        self._pool: StepPairs | None = None
        self._round = 0
        self._history: list[dict[str, float]] = []
        self._told = -math.inf

    def ready(self, engine: Engine) -> None:
        """Load decoder and judge, and build the sampler around the policy."""
        o = self.options
        scorer = partial(
            sampled_score,
            engine,
            self.generator,
            self.prompts.guidance,
            partial(self.prompts.without, device=self.device),
        )
        dtype = DTYPES[o.dtype]
        walk = Walk(self.steps, scorer, self.generator.prediction, dtype, self.device)
        assert o.judge is not None
        # the decoder may have been dropped with the encoders; this loads it, and drops them again
        self.generator.decode(Sample({"x0": torch.zeros(1, *self.prompts.shape)}, {}))
        self.generator.free_encoders(keep_decoder=True)
        self.judge = LatentJudge(o.judge, self.generator, self.device, DTYPES[o.judge_dtype])
        self.collect = self.make(walk, self.judge, o)

    def start(self, samples_seen: int, state: TensorDict) -> None:
        """Take up a checkpoint's pool, or begin without one."""
        kept = dict(state)
        self._round = int(kept.pop("round", torch.tensor(0)))
        self._pool = StepPairs(**kept) if kept else None
        self._history = []

    def state(self) -> TensorDict:
        """The unused pairs, all of them, and the number of rounds."""
        kept = tensors(self._pool) if self._pool is not None and len(self._pool) else {}
        return {"round": torch.tensor(self._round), **kept}

    def next(self) -> Drawn:
        """The next pairs; samples a new round when they do not suffice."""
        empty = 0
        while self._pool is None or len(self._pool) < self.setup.micro:
            empty = 0 if self._sample_round() else empty + 1
            if empty == MAX_EMPTY:
                raise TrainingError(
                    f"{MAX_EMPTY} rounds of samples in a row gave no pair; judge "
                    f"'{self.options.judge}' tells none apart by more than the threshold",
                    "lower rollout.threshold, raise rollout.judge_scale or num_candidates",
                )
        micro, pool = self.setup.micro, self._pool
        self._pool = take(pool, slice(micro, None))
        size = self.setup.recipe.train.train_batch_size
        first = self.setup.accelerator.process_index * size
        return self._drawn(take(pool, slice(first, first + size)))

    def _drawn(self, pairs: StepPairs) -> Drawn:
        """A micro-batch on the device."""
        o, cond = self.options, self.prompts.condition(pairs.prompt)
        event = pairs.event(self.steps, cond, self.device, detach=o.detach_negative)
        numbers = self.prompts.numbers(pairs.prompt)
        where = zip(pairs.prompt.tolist(), pairs.visit.tolist(), pairs.step.tolist(), strict=True)
        return Drawn(
            event,
            pairs.batch(numbers, event.lam, self.device),
            tuple(f"prompt {p} visit {v} step {s}" for p, v, s in where),
            guidance=self.prompts.guidance,
            negative=self.prompts.without(event.batch, self.device),
        )

    # -- rounds

    def _sample_round(self) -> bool:
        """Sample, judge, gather, shuffle; returns whether there was a pair."""
        began, found = time.perf_counter(), Found()
        with self.setup.phases("rollout"), torch.no_grad():
            for part in self._own_prompts():
                self.collect(self._asked(part), found)
            pairs = self._gather(found, time.perf_counter() - began)
        self._round += 1
        if pairs is None:
            return False
        waiting = [] if self._pool is None else [self._pool]
        self._pool = joined([*waiting, pairs])
        return True

    def _own_prompts(self) -> list[list[tuple[int, int]]]:
        """This process's (prompt, visit) of the round, in batches."""
        o, accelerator = self.options, self.setup.accelerator
        first = self._round * o.prompts_per_round
        every = picks(first, o.prompts_per_round, len(self.prompts), self.setup.recipe.seed)
        own = every[accelerator.process_index :: accelerator.num_processes]
        return [own[i : i + o.batch_size] for i in range(0, len(own), o.batch_size)]

    def _asked(self, part: list[tuple[int, int]]) -> Asked:
        """A batch of prompts with its randomness."""
        index, visits = (torch.tensor(column) for column in zip(*part, strict=True))
        texts = [self.prompts.texts[i] for i, _ in part]
        names = [f"{i}:{text}" for (i, _), text in zip(part, texts, strict=True)]
        draws = Draws(self.setup.recipe.seed, names, visits.tolist())
        cond = self.prompts.condition(index)
        return Asked(index, visits, texts, cond, self.prompts.shape, draws)

    def _gather(self, found: Found, seconds: float) -> StepPairs | None:
        """All processes' pairs in one shuffled order, the same on each."""
        own = found.joined()
        scores = torch.cat(found.scores) if found.scores else torch.empty(0)
        mine = (None if own is None else tensors(own), scores, found.num_compared, found.num_kept)
        every: list[Any] = gather_object([mine])
        self._note([row[1:] for row in every], seconds)
        parts = [StepPairs(**tensors) for tensors, *_ in every if tensors is not None]
        return self._shuffled(joined(parts)) if parts else None

    def _shuffled(self, pairs: StepPairs) -> StepPairs:
        """By the run seed, from an order that does not depend on who sampled what."""
        names = zip(pairs.prompt.tolist(), pairs.visit.tolist(), pairs.step.tolist(), strict=True)
        keys = list(names)
        order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
        seed = derive(self.setup.recipe.seed, "", self._round, "rollout/order")
        return take(pairs, order[torch.randperm(len(pairs), generator=generator(seed))])

    # -- what is told

    def _note(self, parts: list[tuple[Tensor, int, int]], seconds: float) -> None:
        """A line of the round, on the console (not more often than every ten seconds) and on disk.

        Raises:
            TrainingError: the judge failed on everything.
        """
        scores = torch.cat([scores for scores, _, _ in parts])
        known = scores[~scores.isnan()]
        if not len(known):
            raise TrainingError(
                f"judge '{self.options.judge}' gave no number for any of {len(scores)} samples: "
                f"{self.judge.last_reason}"
            )
        compared, kept = (sum(part[k] for part in parts) for k in (1, 2))
        row = {
            "round": self._round + 1,
            "prompts": self.options.prompts_per_round,
            "compared": compared,
            "kept": kept,
            "failed": len(scores) - len(known),
            "judge/mean": float(known.mean()),
            "judge/std": float(known.std(unbiased=False)),
            "seconds": round(seconds, 3),
        }
        self._history.append(row)
        if self.setup.main:
            self._write(row)
        if time.perf_counter() - self._told >= PLAIN_SECONDS:
            self._told = time.perf_counter()
            self.setup.say(
                f"round {row['round']}: {row['prompts']} prompts, {kept} of {compared} comparisons "
                f"kept, judge {row['judge/mean']:.4g}, {seconds:.1f} s"
            )

    def _write(self, row: dict[str, float]) -> None:
        """Add a line; the first one of a call forgets rounds on disk that are sampled again."""
        path = self.setup.folder / ROUNDS_FILE
        if len(self._history) == 1 and path.exists():
            whole = path.read_text().rpartition("\n")[0].splitlines()  # a killed run tears a line
            kept = [line for line in whole if json.loads(line)["round"] < row["round"]]
            path.write_text("".join(f"{line}\n" for line in kept))
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def identity(self) -> str:
        """Hash of the prompts in their order."""
        return self.prompts.identity()

    def summary(self) -> Mapping[str, Any]:
        """Prompts, rounds, and the judge's mean in the first and the last of this call."""
        seen = {"first": self._history[:1], "last": self._history[-1:]}
        judged = {k: v[0]["judge/mean"] for k, v in seen.items() if v}
        return {"prompts": len(self.prompts), "rounds": self._round, "judge": judged}

    def close(self) -> None:
        """Nothing runs in the background."""
