"""Preference training on stored records, top to bottom.

    recipe -> source -> cache (latents, text) -> [draw -> score(reference) -> score(policy) ->
    objective -> step]* -> export

The loop is free of modality: every generator of the contract goes through it unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from torch import Tensor

import t2i_align
from t2i_align.contract import Coupling, DrawSpec, Score, ScoredBatch
from t2i_align.data.batch import Batch, Prepared
from t2i_align.data.label_source import build_source
from t2i_align.data.order import picks
from t2i_align.data.prepare import prepare
from t2i_align.errors import InterruptedRun, TrainingError
from t2i_align.protocols import Generator, Objective
from t2i_align.recipe import Recipe
from t2i_align.train import output
from t2i_align.train.checkpoint import Checkpoints
from t2i_align.train.engine import Engine, RankStats, trainable_count
from t2i_align.train.log import Phases, RunLog, peak_memory, reduce_metrics, write_json
from t2i_align.train.stop import StopRequest
from t2i_align.train.validation import prepare_validation, save_samples


def scored_batch(
    batch: Batch, scores: Mapping[str, Score], lam: Tensor | None, device: torch.device
) -> ScoredBatch:
    """What the objective sees of a data batch, on the training device."""
    names = ("chosen", "rejected", "preference", "labels", "groups", "ranks", "values", "weight")
    parts = {name: getattr(batch, name) for name in names}
    moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in parts.items()}
    return ScoredBatch(scores=scores, lam=lam, **moved)


class OfflineRun:
    """One run, its parts set up in the order they are needed.

    Args:
        recipe: validated.
        console: for lines and progress.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        """Claim the output folder, then build data, model and engine."""
        self.recipe, self.console = recipe, console
        self.phases = Phases()
        self.folder = Path(recipe.output_dir).expanduser()
        tracker = None if recipe.train.report_to == "none" else recipe.train.report_to
        self.accelerator = Accelerator(
            mixed_precision=recipe.train.mixed_precision,
            log_with=tracker,
            project_dir=str(self.folder),
            # other processes wait while the first builds the cache, which may take days
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        )
        self.main = self.accelerator.is_main_process
        resume = recipe.train.resume_from_checkpoint is not None
        if self.main:
            output.claim(
                self.folder, recipe.to_dict(), resume=resume, version=t2i_align.__version__
            )
        self.accelerator.wait_for_everyone()
        self.objective: Objective = recipe.chosen("objective")(recipe.objective)
        device = self.accelerator.device
        self.generator: Generator = recipe.chosen("model")(recipe.model, device)
        with self.phases("prepare"):
            self.data = self._prepare()
            self.samples = None
            if recipe.validation is not None:
                self.samples = prepare_validation(self.generator, recipe.validation)
            self.generator.free_encoders(keep_decoder=recipe.validation is not None)
        with self.phases("load"):
            self._load()

    def _prepare(self) -> Prepared:
        recipe = self.recipe
        shown = self.console if self.main else None
        source = build_source(recipe.chosen("data"), recipe.data, recipe.cache.dir, shown)
        with self.accelerator.main_process_first():
            data = prepare(
                source,
                self.generator,
                self.objective.layout,
                recipe.cache,
                pairing=recipe.data.pairing,
                extra_prompts=("",),
                console=shown,
            )
        return data

    def _load(self) -> None:
        recipe, train = self.recipe, self.recipe.train
        self.generator.load_module(
            recipe.seed,
            reference="reference" in self.objective.views,
            reference_mode=recipe.reference.mode,
        )
        self.micro = train.train_batch_size * self.accelerator.num_processes
        self.records_per_step = self.micro * train.gradient_accumulation_steps
        self.engine = Engine(train, self.generator.views, self.accelerator, self.records_per_step)
        self.state = {
            k: v.to(self.accelerator.device) for k, v in self.objective.init_state().items()
        }
        self.stats = RankStats(self.accelerator)
        draw = recipe.draw.model_dump()
        coupling: Any = draw.pop("coupling")
        self.coupling: Coupling = self.objective.coupling if coupling == "auto" else coupling
        self.spec = DrawSpec(**draw)
        self.last_records: list[str] = []
        self.checkpoints = Checkpoints(self.folder / "checkpoints", train.checkpoints_total_limit)
        self._resume()
        self.log = RunLog(
            self.folder,
            self.console,
            train.max_train_steps,
            self.engine.step_count,
            active=self.main,
        )

    def _resume(self) -> None:
        which = self.recipe.train.resume_from_checkpoint
        if which is None:
            return
        found = self.checkpoints.load(which)
        for warning in self.checkpoints.warnings:
            self.say(warning)
        if found is None:
            self.say("no checkpoint to continue from; starting at step 0")
            return
        if found.trainer.get("data") not in (None, self.data.identity()):
            raise TrainingError(
                "the data changed since the checkpoint: other records, or another order of them",
                "restore the files, or start a new run in another output_dir",
            )
        self.engine.restore(found)
        if self.main and which == "latest":
            self.checkpoints.retire_after(found.step)
        self.state = {k: v.to(self.accelerator.device) for k, v in found.objective.items()}
        self.say(f"continuing at step {found.step} ({found.samples_seen} records seen)")

    def say(self, text: str) -> None:
        """One line, from the main process."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # -- the loop
    # -----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary.

        Raises:
            TrainingError: a non-finite loss.
            StorageError: a checkpoint could not be saved.
            InterruptedRun: stopped on request, after a checkpoint.
        """
        train = self.recipe.train
        self.accelerator.init_trackers("tensorboard")
        stop = StopRequest()
        with self.log.progress(), stop.listening(), ThreadPoolExecutor(1) as pool:
            if self.engine.step_count == 0:
                self._sample()
            batches = self._batches(pool)
            while self.engine.step_count < train.max_train_steps:
                values = self._step(batches)
                step = self.engine.step_count
                if step % train.logging_steps == 0 or step == train.max_train_steps:
                    self.log.step(step, values, self.records_per_step)
                    self.accelerator.log(values, step=step)
                done = step == train.max_train_steps
                stopping = self._anyone(bool(stop))
                if done or stopping or step % train.checkpointing_steps == 0:
                    self._save()
                if stopping and not done:
                    raise InterruptedRun(
                        f"stopped at step {step} of {train.max_train_steps}; a checkpoint was "
                        "written",
                        "continue with train.resume_from_checkpoint=latest",
                    )
                if self.recipe.validation and (
                    done or step % self.recipe.validation.validation_steps == 0
                ):
                    self._sample()
        return self._finish()

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """This rank's micro-batches from the current position on, one read ahead."""
        train = self.recipe.train
        share = train.train_batch_size
        position = self.engine.samples_seen + self.accelerator.process_index * share

        def load(at: int) -> Batch:
            return self.data.batch(
                picks(at, share, len(self.data), self.recipe.seed),
                run_seed=self.recipe.seed,
                coupling=self.coupling,
                empty_prompts=self.recipe.data.proportion_empty_prompts,
            )

        ahead = pool.submit(load, position)
        while True:
            batch = ahead.result()
            position += self.micro
            ahead = pool.submit(load, position)
            yield batch

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step; returns what is logged."""
        num = self.recipe.train.gradient_accumulation_steps
        metrics: dict[str, list[Tensor]] = defaultdict(list)
        rate = self.engine.learning_rate
        with self.phases("train"):
            self.last_records = records = []
            for k in range(num):
                batch = next(batches)
                records += batch.record_ids
                with self.engine.micro(last=k == num - 1):
                    out = self.objective(self._score(batch), self.state, self.stats)
                    self._guard(out.loss, out.per_example, batch)
                    self.engine.backward(out.loss / num)
                self.state = out.state
                metrics["loss"].append(out.loss.detach()[None])
                for name, value in out.metrics.items():
                    metrics[name].append(value)
            try:
                norm = self.engine.step(self.records_per_step)
            except FloatingPointError as error:
                raise self._broken(f"non-finite gradient ({error})", records) from error
        values = reduce_metrics(self.engine.gather_metrics(metrics))
        return values | {
            "lr": rate,
            "grad_norm": norm,
            "samples_seen": float(self.engine.samples_seen),
        }

    def _score(self, batch: Batch) -> ScoredBatch:
        """Draw one event and let every view score it."""
        device = self.accelerator.device
        event = self.generator.draw(batch.sample, self.spec, batch.seeds).to(device)
        scores: dict[str, Score] = {}
        for view in sorted(self.objective.views, key=lambda v: v == "policy"):
            # an autocast block of its own: its cache of cast weights must not outlive a view
            with self.engine.autocast(), torch.set_grad_enabled(view == "policy"):
                scores[view] = self.generator.score(event, view)  # type: ignore[arg-type]
        return scored_batch(batch, scores, event.lam, device)

    def _guard(self, loss: Tensor, per_example: Tensor, batch: Batch) -> None:
        """Stop on NaN or infinity, naming the step and the records."""
        if not self._anyone(not bool(loss.isfinite())):
            return
        bad = (~per_example.detach().isfinite()).nonzero().flatten().tolist()
        names = [batch.record_ids[i] for i in bad if i < len(batch.record_ids)]
        raise self._broken("non-finite loss", names)

    def _broken(self, what: str, records: list[str], *, taken: bool = False) -> TrainingError:
        """The error of a step that cannot be taken, or that broke the weights."""
        named = ", ".join(records[:8]) or "on another process"
        step = self.engine.step_count + (0 if taken else 1)
        return TrainingError(
            f"{what} at step {step}; records: {named}; checkpoints are intact",
            "lower train.learning_rate or objective.beta, use mixed_precision bf16 instead of "
            "fp16, or drop those records; then continue with "
            "train.resume_from_checkpoint=latest",
        )

    def _anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        mine = torch.tensor(float(flag), device=self.accelerator.device)
        total: Any = self.accelerator.reduce(mine, "sum")
        return bool(total > 0)

    def _save(self) -> None:
        with self.phases("checkpoint"):
            if not self.engine.weights_finite():
                raise self._broken("non-finite weights", self.last_records, taken=True)
            if self.main:
                facts = {"data": self.data.identity()}
                self.checkpoints.save(self.engine.state(self.state, facts))
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
        self.accelerator.end_training()
        seconds = {k: round(v, 3) for k, v in self.phases.seconds.items()}
        trained = self.engine.step_count - self.log.first_step
        pairs = trained * self.records_per_step
        summary = {
            "format": 1,
            "t2i_align": t2i_align.__version__,
            "steps": self.engine.step_count,
            "samples_seen": self.engine.samples_seen,
            "trainable_parameters": trainable_count(self.generator.module),
            "records": len(self.data),
            "data": self.data.report.to_dict(),
            "seconds": seconds,
            "records_per_second": round(pairs / max(seconds.get("train", 0.0), 1e-9), 4),
            "last": self.log.last,
            **peak_memory(self.accelerator.device),
        }
        if self.main:
            view = "ema" if self.engine.ema else "policy"
            with self.generator.use(view), torch.no_grad():
                summary["exported"] = self.generator.export(str(self.folder))
            write_json(self.folder / "summary.json", summary)
            self.say(
                f"done: {summary['steps']} steps, wrote {', '.join(summary['exported'])} to "
                f"{self.folder}"
            )
        return summary
