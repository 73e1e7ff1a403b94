"""The training loop, top to bottom.

    recipe -> feed (stored records, or samples of the policy) -> [draw -> score(reference) ->
    score(policy) -> objective -> step]* -> export

It is free of modality and of where samples come from: every generator of the contract and every
feed goes through it unchanged.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import t2i_align
from t2i_align.contract import Score, ScoredBatch
from t2i_align.errors import InterruptedRun, TrainingError
from t2i_align.protocols import Generator, Objective
from t2i_align.recipe import Recipe
from t2i_align.registry import resolve
from t2i_align.train.accounting import account_of, line
from t2i_align.train.alarms import Facts
from t2i_align.train.checkpoint import Checkpoints
from t2i_align.train.engine import Engine, RankStats, trainable_count
from t2i_align.train.feed import Drawn, Feed
from t2i_align.train.load import load_network
from t2i_align.train.log import RunLog, peak_memory, reduce_metrics, write_json
from t2i_align.train.nonfinite import NonFinite, bad_records, culprit, loss_error
from t2i_align.train.reference import reference_of
from t2i_align.train.setup import Setup
from t2i_align.train.start import start_from
from t2i_align.train.stop import StopRequest
from t2i_align.train.validation import prepare_validation, save_samples
from t2i_align.train.watch import Told, Watch, measure

FEEDS = {
    "stored": "t2i_align.train.offline:StoredFeed",
    "trajectory": "t2i_align.train.online:TrajectoryFeed",
    "replay": "t2i_align.train.replay:ReplayFeed",
}
# prefixes of other tensors among the objective's in a checkpoint
FEED = "feed."  # of the feed
REFERENCE = "reference."  # of a reference that follows the policy
OTHERS = (FEED, REFERENCE)


def parts(kept: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """A checkpoint's small tensors: the objective's own, the feed's, the reference's."""
    named = [{k.removeprefix(p): v for k, v in kept.items() if k.startswith(p)} for p in OTHERS]
    return {k: v for k, v in kept.items() if not k.startswith(OTHERS)}, *named


class Run:
    """One run, its parts set up in the order they are needed.

    Args:
        recipe: validated.
        console: for lines and progress.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        """Claim the output folder, then build data, model and engine."""
        self.recipe = recipe
        self.setup = Setup(recipe, console)
        self.phases, self.folder = self.setup.phases, self.setup.folder
        self.accelerator, self.main = self.setup.accelerator, self.setup.main
        self.objective: Objective = recipe.chosen("objective")(recipe.objective)
        self.generator: Generator = self.setup.generator()
        self.setup.recheck()
        with self.phases("prepare"):
            feed = resolve(FEEDS[self.objective.needs.feed])
            self.feed: Feed = feed(self.setup, self.generator, self.objective)
            self.samples = None
            if recipe.validation is not None:
                self.samples = prepare_validation(self.generator, recipe.validation)
            judged = self.objective.needs.feed == "trajectory"  # its judge sees decoded states
            self.generator.free_encoders(keep_decoder=judged or recipe.validation is not None)
        with self.phases("load"):
            self._load()

    def _load(self) -> None:
        recipe, train = self.recipe, self.recipe.train
        load_network(self.setup, self.generator, self.objective.needs)
        views = self.generator.views
        start = recipe.model.start_from
        self.start = None if start is None else start_from(views, start)
        if recipe.reference.moves:
            views.let_reference_follow()
        self.kept = reference_of(self.setup, self.generator, self.feed, self.objective.needs)
        records = self.setup.records_per_step
        self.engine = Engine(train, views, self.accelerator, records)
        self.account = account_of(recipe, self.setup, self.objective.needs, views)
        self.watch = Watch(Facts.of(recipe, self.objective.needs, records))
        self.feed.ready(self.engine)
        self.state = {
            k: v.to(self.accelerator.device) for k, v in self.objective.init_state().items()
        }
        self.stats = RankStats(self.accelerator)
        self.last_records: list[str] = []
        self.skipped = self.left = 0  # steps so far; micro-batches of this step yet to be drawn
        self.checkpoints = Checkpoints(self.folder / "checkpoints", train.checkpoints_total_limit)
        self._resume()
        self.log = RunLog(
            self.folder,
            self.setup.console,
            train.max_train_steps,
            self.engine.step_count,
            active=self.main,
        )

    def _resume(self) -> None:
        self.feed.start(0, {})
        which = self.recipe.train.resume_from_checkpoint
        if which is None:
            return
        found = self.checkpoints.load(which)
        for warning in self.checkpoints.warnings:
            self.say(warning)
        if found is None:
            self.say("no checkpoint to continue from; starting at step 0")
            return
        if found.trainer.get("data") not in (None, self.feed.identity()):
            raise TrainingError(
                "the data changed since the checkpoint: other records, or another order of them",
                "restore the files, or start a new run in another output_dir",
            )
        if which == "latest" and found.trainer.get("start") != self.start:
            raise TrainingError(
                "model.start_from holds other weights than when this run began",
                "restore them, or start a new run in another output_dir",
            )
        self.engine.restore(found)
        if self.main and which == "latest":
            self.checkpoints.retire_after(found.step)
        device, (own, fed, reference) = self.accelerator.device, parts(found.objective)
        if bool(reference) != self.recipe.reference.moves:
            raise TrainingError(
                "reference.refresh: the checkpoint holds "
                + ("a reference that moved" if reference else "no reference of its own"),
                "keep reference.refresh as it was",
            )
        self.generator.views.restore_reference(reference)
        self.state = {k: v.to(device) for k, v in own.items()}
        self.watch.restore(found.trainer.get("watch"))
        self.skipped = found.trainer.get("skipped", 0)
        self.feed.start(found.samples_seen, fed)
        self.say(f"continuing at step {found.step} ({found.samples_seen} records seen)")

    def say(self, text: str) -> None:
        """One line, from the main process."""
        self.setup.say(text)

    # -- the loop
    # -----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary.

        Raises:
            TrainingError: a loss or gradient is no number, more often than the recipe allows.
            StorageError: a checkpoint could not be saved.
            InterruptedRun: stopped on request, after a checkpoint.
        """
        train = self.recipe.train
        self.accelerator.init_trackers("tensorboard")
        stop = StopRequest()
        keeping = contextlib.nullcontext() if self.kept is None else self.kept
        with keeping, self.log.progress(), stop.listening(), contextlib.closing(self.feed):
            if self.engine.step_count == 0:
                self._sample()
            while self.engine.step_count < train.max_train_steps:
                values = self._step_or_skip()
                step = self.engine.step_count
                self._look(self.watch.step(step, values))
                self._refresh(step)
                if step % train.logging_steps == 0 or step == train.max_train_steps:
                    self.log.step(step, values, self.setup.records_per_step)
                    self.accelerator.log(values, step=step)
                done = step == train.max_train_steps
                stopping = self.setup.anyone(bool(stop))
                if self.recipe.validation and (
                    done or step % self.recipe.validation.validation_steps == 0
                ):
                    self._sample()  # before the save: a run killed here draws them again
                if done or stopping or step % train.checkpointing_steps == 0:
                    self._save()
                if stopping and not done:
                    raise InterruptedRun(
                        f"stopped at step {step} of {train.max_train_steps}; a checkpoint was "
                        "written",
                        "continue with train.resume_from_checkpoint=latest",
                    )
        return self._finish()

    def _step_or_skip(self) -> dict[str, float]:
        """One step, or none where the recipe allows that; returns what is logged.

        Raises:
            TrainingError: a loss or gradient is no number, more often than that.
        """
        before, rate = self.state, self.engine.learning_rate
        try:
            return self._step()
        except NonFinite as error:
            told, allowed = (
                error.told(self.engine.step_count + 1),
                self.recipe.train.max_skipped_steps,
            )
            if self.skipped >= allowed:
                spent = f"; all {allowed} skips were used before" if allowed else ""
                raise self._broken(told + spent) from error
        self.skipped += 1
        self.say(f"skipped ({self.skipped} of {allowed}): {told}")
        for _ in range(self.left):
            self.feed.next()
        self.state = before
        self.engine.skip(self.setup.records_per_step)
        seen = float(self.engine.samples_seen)
        return {"skipped_steps": float(self.skipped), "lr": rate, "samples_seen": seen}

    def _step(self) -> dict[str, float]:
        """One optimizer step; returns what is logged."""
        num = self.recipe.train.gradient_accumulation_steps
        metrics: dict[str, list[Tensor]] = defaultdict(list)
        rate = self.engine.learning_rate
        phase = self.account.phase
        with self.phases("train"), self.account.step():
            self.last_records = records = []
            for k in range(num):
                with phase("data"):
                    drawn = self.feed.next()
                self.left = num - 1 - k
                records += drawn.record_ids
                with self.engine.micro(last=k == num - 1):
                    scored = self._score(drawn)
                    with phase("forward"):
                        out = self.objective(scored, self.state, self.stats)
                        self._guard(out.loss, out.per_example, drawn)
                        seen = out.metrics | measure(scored, out.loss)
                    with phase("backward"):
                        self.engine.backward(out.loss / num)
                self.state = out.state
                metrics["loss"].append(out.loss.detach()[None])
                for name, value in seen.items():
                    metrics[name].append(value)
            try:
                with phase("optimizer"):
                    norm = self.engine.step(self.setup.records_per_step)
            except FloatingPointError as error:
                raise NonFinite(f"non-finite gradient ({error})", "", records) from error
        values = reduce_metrics(self.engine.gather_metrics(metrics))
        return values | {
            "lr": rate,
            "grad_norm": norm,
            "samples_seen": float(self.engine.samples_seen),
        }

    def _score(self, drawn: Drawn) -> ScoredBatch:
        """Let every view score the event; the policy last, with gradients."""
        needs = self.objective.needs
        scores: dict[str, Score] = {}
        with self.account.clock("data"):
            known = None if self.kept is None else self.kept.read(drawn)
        self.account.asked(live=known is None)
        asked = needs.views if known is None else needs.views - {"reference"}
        with self.generator.views.sharing() if len(asked) > 1 else contextlib.nullcontext():
            for view in sorted(asked, key=lambda v: v == "policy"):
                phase = self.account.phase("forward" if view == "policy" else "reference")
                # an autocast block of its own: its cache of cast weights must not outlive a view
                with phase, self.engine.autocast(), torch.set_grad_enabled(view == "policy"):
                    scores[view] = self.generator.score(
                        drawn.event, view, needs.want, drawn.guidance, drawn.negative
                    )
        if known is not None:
            scores["reference"] = known
        elif self.kept is not None:
            scores["reference"] = self.kept.settle(drawn, scores["reference"])
        return replace(drawn.batch, scores=scores)

    def _look(self, told: list[Told]) -> None:
        """Tell what the doctor found; stop where going on would destroy the model.

        Raises:
            TrainingError: a loss without a lower bound ran away.
        """
        for alarm in told:
            self.say(str(alarm))
        if told and self.main:
            write_json(self.folder / "doctor.json", {"format": 1, "doctor": self.watch.told})
        for alarm in told:
            if alarm.stop:
                raise TrainingError(
                    f"stopped at step {alarm.step}: {alarm.advice}", "checkpoints are intact"
                )

    def _refresh(self, step: int) -> None:
        """Let the reference follow the policy where the recipe says so."""
        share = self.recipe.reference.share(step)
        if share:
            self.generator.views.refresh(share)
            self.watch.refreshed()

    def _guard(self, loss: Tensor, per_example: Tensor, drawn: Drawn) -> None:
        """Give a step up on NaN or infinity, naming module, noise levels and records."""
        if not self.setup.anyone(not bool(loss.isfinite())):
            return
        want = self.objective.needs.want

        def again() -> None:
            with self.engine.autocast():
                self.generator.score(drawn.event, "policy", want, drawn.guidance, drawn.negative)

        raise loss_error(
            bad_records(per_example, drawn.batch, drawn.record_ids),
            culprit(self.generator.module, again),
        )

    def _broken(self, told: str) -> TrainingError:
        """The error of a step that cannot be taken, or that broke the weights."""
        return TrainingError(
            f"{told}; checkpoints are intact",
            "lower train.learning_rate or objective.beta, use mixed_precision bf16 instead of "
            "fp16, or drop those records; then continue with "
            "train.resume_from_checkpoint=latest",
        )

    def _save(self) -> None:
        with self.phases("checkpoint"):
            if not self.engine.weights_finite():
                error = NonFinite("non-finite weights", "", self.last_records)
                raise self._broken(error.told(self.engine.step_count))
            if self.kept is not None:
                self.kept.flush()  # before, so that a resumed run reads the bits it has seen
            if self.main:
                kept = self.state | {FEED + k: v for k, v in self.feed.state().items()}
                if self.recipe.reference.moves:
                    followed = self.generator.views.followed
                    kept |= {REFERENCE + k: v for k, v in followed.items()}
                extra = {
                    "data": self.feed.identity(),
                    "start": self.start,
                    "watch": self.watch.state(),
                    "skipped": self.skipped,
                }
                self.checkpoints.save(self.engine.state(kept, extra))
            self.accelerator.wait_for_everyone()

    def _sample(self) -> None:
        options = self.recipe.validation
        if options is None or self.samples is None or not self.main:
            return
        with self.phases("samples"), self.engine.autocast():
            step = self.engine.step_count
            averaged = self.engine.ema is not None
            where = self.folder / "samples"
            save_samples(self.generator, self.samples, options, where, step, averaged=averaged)

    def _finish(self) -> dict[str, Any]:
        """Export, summary, goodbye."""
        self.log.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        seconds = {k: round(v, 3) for k, v in self.phases.seconds.items()}
        trained = self.engine.step_count - self.log.first_step
        pairs = trained * self.setup.records_per_step
        summary = {
            "format": 1,
            "t2i_align": t2i_align.__version__,
            "steps": self.engine.step_count,
            "samples_seen": self.engine.samples_seen,
            "trainable_parameters": trainable_count(self.generator.module),
            **self.feed.summary(),
            **({} if self.kept is None else {"reference_cache": self.kept.summary()}),
            "seconds": seconds,
            "records_per_second": round(pairs / max(seconds.get("train", 0.0), 1e-9), 4),
            "accounting": self.account.summary(seconds),
            "last": self.log.last,
            "doctor": self.watch.told,
            **peak_memory(self.accelerator.device),
        }
        if self.main:
            view = "ema" if self.engine.ema else "policy"
            with self.generator.use(view), torch.no_grad():
                summary["exported"] = self.generator.export(str(self.folder))
            write_json(self.folder / "summary.json", summary)
            self.say(line(summary["accounting"]))
            self.say(
                f"done: {summary['steps']} steps, wrote {', '.join(summary['exported'])} to "
                f"{self.folder}"
            )
        return summary
