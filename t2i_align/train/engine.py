"""The engine: gradients, precision, optimizer and averaging around one trainable module.

It knows nothing of objectives, likelihoods or modalities. A program (offline.py) hands it losses;
it turns them into steps. Progress is counted in records, randomness lives in events, so a
checkpoint needs no generator state.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from t2i_align.errors import TrainingError
from t2i_align.generators.views import Views
from t2i_align.train.checkpoint import TrainState
from t2i_align.train.optim import Ema, build_optimizer, build_schedule
from t2i_align.train.options import TrainOptions


class RankStats:
    """Global statistics for objectives, over all processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Keep the process group."""
        self.accelerator = accelerator

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all elements and ranks, detached."""
        local = torch.stack([x.detach().float().sum(), x.new_tensor(x.numel()).float()])
        total: Any = self.accelerator.reduce(local, "sum")
        return total[0] / total[1]

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' values, detached."""
        gathered: Any = self.accelerator.gather(x.detach())
        return gathered


class Engine:
    """Steps for one trainable module.

    Args:
        options: the ``train`` section.
        views: the module and its views; wrapped for several processes.
        accelerator: accelerate's process group and precision.
        records_per_step: records of one step over all processes.
    """

    def __init__(
        self, options: TrainOptions, views: Views, accelerator: Accelerator, records_per_step: int
    ) -> None:
        """Build optimizer, schedule and averages over what requires gradients."""
        self.options = options
        self.views = views
        self.accelerator = accelerator
        if options.channels_last:
            for net in {id(n): n for n in (views.module, views.reference) if n}.values():
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = {k: p for k, p in views.module.named_parameters() if p.requires_grad}
        parameters = list(self.trained.values())
        optimizer = build_optimizer(options, parameters, records_per_step)
        self.schedule = build_schedule(options, optimizer)
        views.wrapped, self.optimizer = accelerator.prepare(views.module, optimizer)
        self.ema = Ema(options.ema_decay, self.trained) if options.ema_decay else None
        self.views.ema = self.ema.shadow if self.ema else None
        self.step_count = 0
        self.samples_seen = 0

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The recipe's mixed precision."""
        return self.accelerator.autocast()

    def micro(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; processes talk only on a step's last one.

        Forward belongs inside: DistributedDataParallel decides there whether to reduce.
        """
        if last:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.views.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        self.accelerator.backward(loss)

    def step(self, records: int) -> float:
        """Clip, update, average; returns the gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; no weight was touched. (Under float16 the
                loss scaler skips such a step instead.)
        """
        limit = self.options.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(
            self.trained.values(), float("inf") if limit is None else limit
        )
        value = float(norm) if norm is not None else 0.0
        if self.accelerator.scaler is None and not math.isfinite(value):
            raise FloatingPointError(f"gradient norm {value}")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.samples_seen += records
        if self.ema is not None:
            self.ema.update(self.trained, self.step_count)
        return value

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def gather_metrics(self, metrics: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Per-example metrics of all micro-batches and ranks, concatenated."""
        local = {k: torch.cat([v.flatten() for v in vs]).cpu() for k, vs in metrics.items()}
        if self.accelerator.num_processes == 1:
            return local
        parts = gather_object([{k: v.tolist() for k, v in local.items()}])
        return {k: torch.tensor([x for part in parts for x in part[k]]) for k in local}

    def weights_finite(self) -> bool:
        """Whether every trained weight is a number."""
        return all(bool(p.isfinite().all()) for p in self.trained.values())

    def state(self, objective: dict[str, Tensor], extra: dict[str, Any]) -> TrainState:
        """Everything a checkpoint holds."""
        scaler = self.accelerator.scaler
        return TrainState(
            step=self.step_count,
            samples_seen=self.samples_seen,
            weights=dict(self.trained),
            optimizer=self.optimizer.state_dict(),
            trainer=extra | {"scaler": scaler.state_dict() if scaler else None},
            ema=self.ema.shadow if self.ema else {},
            objective=objective,
        )

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint.

        Raises:
            TrainingError: its parameters or averages are not those of this run.
        """
        mine = {k: tuple(p.shape) for k, p in self.trained.items()}
        theirs = {k: tuple(v.shape) for k, v in state.weights.items()}
        odd = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if odd:
            raise TrainingError(
                f"the checkpoint trains other parameters than this recipe, e.g. {odd[0]}: "
                f"{theirs.get(odd[0])} there, {mine.get(odd[0])} here",
                "resume with the model and lora options the checkpoint was made with",
            )
        if bool(state.ema) != (self.ema is not None):
            raise TrainingError(
                "train.ema_decay: the checkpoint "
                + ("holds averaged weights" if state.ema else "holds no averaged weights"),
                "keep ema_decay as it was",
            )
        with torch.no_grad():
            for k, p in self.trained.items():
                p.copy_(state.weights[k])
            if self.ema is not None:
                for k, v in self.ema.shadow.items():
                    v.copy_(state.ema[k])
        self.optimizer.load_state_dict(state.optimizer)
        if self.accelerator.scaler and state.trainer.get("scaler"):
            self.accelerator.scaler.load_state_dict(state.trainer["scaler"])
        self.step_count, self.samples_seen = state.step, state.samples_seen
        if state.step:  # the schedule is a function of the count alone
            self.schedule.last_epoch = state.step - 1
            with warnings.catch_warnings():  # torch warns that no optimizer step came before
                warnings.simplefilter("ignore", UserWarning)
                self.schedule.step()


def trainable_count(module: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
