"""Training the world's learned judge (model and loss: clip_model.py, pictures: clip_pool.py).

Groups are drawn once and kept beside the state; a batch is a function of (seed, step), so a
continued run equals an uninterrupted one. Only training prompts are used.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from t2i_align.errors import InterruptedRun, OutputError
from t2i_align.progress import progress
from t2i_align.scenes.clip_model import (
    LENGTH,
    MapHeads,
    build,
    disturbed,
    export,
    logits,
    objective,
    prepared,
    word_tokenizer,
)
from t2i_align.scenes.clip_pool import (
    Pool,
    joined,
    render_pools,
    sample_pools,
    sample_rows,
    vocabulary,
)

MAP_WEIGHT = 0.5
EMA = 0.998
SAVE_EVERY = 100


@dataclass(frozen=True)
class ClipPlan:
    """Everything a run depends on beside its files.

    Args:
        renders: render groups, two pictures each.
        steps: optimiser steps.
        batch: groups a step.
        sample_share: share of them that are samples of a model, when files of samples are given.
        learning_rate: peak; 100 steps of warm-up, then linear to 0.
        seed: of weights, pictures and batches.
    """

    renders: int = 10_000
    steps: int = 2000
    batch: int = 64
    sample_share: float = 0.33
    learning_rate: float = 2e-3
    seed: int = 0


class Trainer:
    """One run: model, average, heads, optimiser, and the step it is at."""

    def __init__(self, plan: ClipPlan, renders: Pool, samples: Pool | None) -> None:
        """Fresh weights from the plan's seed."""
        torch.manual_seed(plan.seed)
        self.plan, self.renders, self.samples = plan, renders, samples
        self.tok = word_tokenizer()
        self.model = build(self.tok).train()
        self.model.visual.to(memory_format=torch.channels_last)
        self.heads = MapHeads(self.model.visual)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        texts = [m["prompt"] for m in vocabulary()]
        self.ids = self.tok(
            texts, padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).input_ids
        weights = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self.step_number = 0

    def batch(self, number: int) -> Pool:
        """The groups of a step."""
        rng = np.random.default_rng([self.plan.seed, number, 9])
        size = round(self.plan.batch * self.plan.sample_share) if self.samples is not None else 0
        picked = self.renders.take(rng.integers(len(self.renders), size=self.plan.batch - size))
        if not size or self.samples is None:
            return picked
        return joined([picked, self.samples.take(rng.integers(len(self.samples), size=size))])

    def step(self) -> float:
        """One optimiser step; the loss."""
        number, total = self.step_number, self.plan.steps
        rate = min((number + 1) / 100, 1 - number / total)
        for part in self.optimizer.param_groups:
            part["lr"] = self.plan.learning_rate * rate
        data = self.batch(number)
        rng = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + number)
        flat = lambda x: torch.from_numpy(x).flatten(0, 1)  # noqa: E731
        images = prepared(disturbed(flat(data.images), rng))
        s = logits(self.model, images, self.ids, torch.from_numpy(data.texts))
        loss = objective(s, torch.from_numpy(data.targets))
        loss = loss + MAP_WEIGHT * self.heads.loss(flat(data.classes), flat(data.colors))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))
            self._follow()
        self.step_number += 1
        return float(loss.detach())

    def _follow(self) -> None:
        """Move the average of the weights."""
        keep = min(EMA, (1 + self.step_number) / (10 + self.step_number))
        for k, v in self.model.state_dict().items():
            if v.is_floating_point():
                self.average[k].lerp_(v, 1 - keep)
            else:
                self.average[k].copy_(v)

    def save(self, path: Path) -> None:
        """Write the state; an earlier file survives a failure."""
        state = {
            "step": self.step_number,
            "model": self.model.state_dict(),
            "average": self.average,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.rename(path)

    def resume(self, path: Path) -> None:
        """Continue from a state of the same plan."""
        state = torch.load(path, weights_only=True)
        self.step_number = state["step"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def claim(work: Path, plan: ClipPlan, samples: Sequence[Path]) -> None:
    """Make the work folder, or make sure that it is of the same run.

    Raises:
        OutputError: it belongs to another plan or other samples.
    """
    files = [[file.name, file.stat().st_size] for file in samples]
    text = json.dumps({"plan": asdict(plan), "samples": files}, indent=1)
    note = work / "plan.json"
    work.mkdir(parents=True, exist_ok=True)
    if note.exists() and note.read_text() != text:
        raise OutputError(
            f"{work} holds an unfinished run of another plan: {note.read_text()}",
            "repeat its options to continue it, choose another folder, or delete it",
        )
    note.write_text(text)


def gathered(
    pools: Iterable[Pool], total: int, name: str, file: Path, console: Console
) -> Pool | None:
    """Groups with a progress bar, kept in a file; None when there are none."""
    if not file.exists():
        parts = []
        with progress(console, name, total) as bar:
            for pool in pools:
                parts.append(pool)
                bar.advance(len(pool))
        if not parts:
            return None
        whole = joined(parts)
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, **{f.name: getattr(whole, f.name) for f in fields(Pool)})
        temporary.rename(file)
    with np.load(file) as data:
        return Pool(*(data[f.name] for f in fields(Pool)))


def train_clip_judge(
    out: Path,
    plan: ClipPlan,
    samples: Sequence[Path] = (),
    *,
    console: Console,
    workers: int | None = None,
    minutes: float | None = None,
) -> dict[str, float]:
    """Draw the groups, train, write an open_clip folder; call again to continue.

    Args:
        out: folder for the weights; ``out/work`` holds pictures and state until the end.
        plan: sizes and seed.
        samples: parquet files of pairs.py, pairs on held-out prompts are left out.
        console: for progress.
        workers: processes that draw; all cores when None.
        minutes: stop after this long, to be continued by another call; None: train to the end.

    Returns:
        steps, mean loss of the last 50 steps, seconds of training in this call.

    Raises:
        InterruptedRun: stopped before the last step, to be continued.
        OutputError: ``out/work`` is of another plan.
    """
    work = out / "work"
    claim(work, plan, samples)
    pools = render_pools(plan.renders, plan.seed, workers or os.cpu_count() or 1)
    renders = gathered(pools, plan.renders, "renders", work / "renders.npz", console)
    assert renders is not None, "plan.renders is 0"
    rows = sample_rows(samples)
    found = sample_pools(rows, plan.seed)
    trainer = Trainer(
        plan,
        renders,
        gathered(found, len(rows), "samples", work / "samples.npz", console),
    )
    if (work / "state.pt").exists():
        trainer.resume(work / "state.pt")
    result = run(trainer, work / "state.pt", console, minutes)
    export(trainer.average, trainer.tok, out)
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    return result


def _stopped(saved: int, total: int) -> InterruptedRun:
    return InterruptedRun(f"stopped; step {saved} of {total} is saved", "the same call continues")


def run(trainer: Trainer, state: Path, console: Console, minutes: float | None) -> dict[str, float]:
    """Steps up to the plan's last, saved every SAVE_EVERY and when interrupted."""
    losses: list[float] = []
    start = time.monotonic()
    total, saved = trainer.plan.steps, trainer.step_number
    with progress(console, "training", total, saved) as bar:
        try:
            while trainer.step_number < total:
                losses.append(trainer.step())
                bar.reach(trainer.step_number, f"loss {np.mean(losses[-50:]):.3f}")
                late = minutes is not None and time.monotonic() - start > 60 * minutes
                late = late and trainer.step_number < total
                if late or trainer.step_number % SAVE_EVERY == 0:
                    trainer.save(state)
                    saved = trainer.step_number
                if late:
                    raise _stopped(saved, total)
        except KeyboardInterrupt as error:  # perhaps inside a step: what was saved last stands
            raise _stopped(saved, total) from error
    seconds = time.monotonic() - start
    return {"steps": total, "loss": float(np.mean(losses[-50:] or [math.nan])), "seconds": seconds}
