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
from t2i_align.train import sharding
from t2i_align.train.checkpoint import TrainState
from t2i_align.train.compiled import compile_views
from t2i_align.train.optim import Ema, build_optimizer, build_schedule
from t2i_align.train.options import TrainOptions
from t2i_align.train.zero import Zero


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
        """All ranks' values, detached; they may have different numbers of rows, also none."""
        x = x.detach() if x.ndim else x.detach()[None]
        if self.accelerator.num_processes == 1:
            return x
        counts: Any = self.accelerator.gather(torch.tensor([len(x)], device=x.device))
        padded = x.new_zeros(int(counts.max()), *x.shape[1:])
        padded[: len(x)] = x
        every: Any = self.accelerator.gather(padded[None])
        return torch.cat([row[:n] for row, n in zip(every, counts.tolist(), strict=True)])


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
        self.sharded = options.distributed.backend == "fsdp2"
        if self.sharded:
            sharding.shard(views, accelerator.device)
        self.trained = {k: p for k, p in views.module.named_parameters() if p.requires_grad}
        parameters = list(self.trained.values())
        optimizer = build_optimizer(options, parameters, records_per_step)
        self.schedule = build_schedule(options, optimizer)
        compile_views(views, options.compile)
        self.optimizer: Any
        self.zero: Zero | None = None
        if options.distributed.backend == "deepspeed":
            self.zero, self.optimizer = Zero(options, views, optimizer), optimizer
        elif self.sharded:
            views.wrapped, self.optimizer = views.module, accelerator.prepare_optimizer(optimizer)
        else:
            with warnings.catch_warnings():  # of how accelerate words its options for torch
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                views.wrapped, self.optimizer = accelerator.prepare(views.module, optimizer)
        self.ema = Ema(options.ema_decay, self.trained) if options.ema_decay else None
        self.views.ema = self.ema.shadow if self.ema else None
        self.step_count = 0
        self.samples_seen = 0
        self._gathered: dict[str, Any] | None = None  # what is sharded, made whole for a checkpoint

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The recipe's mixed precision."""
        return self.accelerator.autocast()

    def micro(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; processes talk only on a step's last one.

        Forward belongs inside: DistributedDataParallel decides there whether to reduce.
        """
        if self.zero is not None:
            self.zero.micro(last=last)
        elif self.sharded:
            self.views.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        if last or self.sharded or self.zero is not None:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.views.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.accelerator.backward(loss)

    def step(self, records: int) -> float:
        """Clip, update, average; returns the gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite, with the module where it begins; no weight
                was touched. (Under float16 the loss scaler skips such a step instead.)
        """
        value = self._update() if self.zero is None else self.zero.step()
        if self.zero is not None and not math.isfinite(value):
            raise FloatingPointError("gradient norm is no number")
        self.schedule.step()
        self.step_count += 1
        self.samples_seen += records
        if self.ema is not None:
            self.ema.update(self.trained, self.step_count)
        return value

    def _update(self) -> float:
        """Clip and update; returns the gradient norm before."""
        limit, gradients = self.options.max_grad_norm, self._gradients()
        norm = nn.utils.get_total_norm(gradients.values())
        value = float(sharding.whole(norm))
        if self.accelerator.scaler is None and not math.isfinite(value):
            raise FloatingPointError(f"gradient norm {value}{where_not(gradients)}")
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), limit, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def skip(self, records: int) -> None:
        """Count a step that is not taken: its records are seen, the schedule moves on."""
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():  # torch warns where the very first step is skipped
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()
        self.step_count += 1
        self.samples_seen += records

    def _gradients(self) -> dict[str, Tensor]:
        """Of the step, by parameter, at their true scale."""
        self.accelerator.unscale_gradients()
        return {k: p.grad for k, p in self.trained.items() if p.grad is not None}

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def gather_metrics(self, metrics: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Per-example metrics of all micro-batches and ranks, concatenated.

        A rank may lack a metric: one without losers says nothing of them.
        """
        local = {k: torch.cat([v.flatten() for v in vs]).cpu() for k, vs in metrics.items()}
        if self.accelerator.num_processes == 1:
            return local
        parts = gather_object([{k: v.tolist() for k, v in local.items()}])
        names = dict.fromkeys(k for part in parts for k in part)
        return {k: torch.tensor([x for part in parts for x in part.get(k, ())]) for k in names}

    def weights_finite(self) -> bool:
        """Whether every trained weight is a number.

        All processes ask before the first one saves, so what is sharded is gathered here for
        :meth:`state`; after the last step for good, for the export.
        """
        if self.zero is not None:
            return self._gather_zero(self.zero)
        good = all(finite(p) for p in self.trained.values())
        if self.sharded and good:
            self._gather()
        return good

    def _gather(self) -> None:
        averages = self.ema.shadow if self.ema else {}
        kept = {
            "weights": {k: whole_cpu(v) for k, v in self.trained.items()},
            "optimizer": sharding.whole_tree(self.optimizer.state_dict()),
            "ema": {k: whole_cpu(v) for k, v in averages.items()},
        }
        self._gathered = kept if self.accelerator.is_main_process else None
        if self.step_count >= self.options.max_train_steps:
            sharding.settle(self.views)

    def _gather_zero(self, zero: Zero) -> bool:
        kept = zero.gather() | {"ema": dict(self.views.ema or {})}
        self._gathered = kept if self.accelerator.is_main_process else None
        if self.step_count >= self.options.max_train_steps:
            zero.settle(kept["weights"])
        return all(bool(w.isfinite().all()) for w in kept["weights"].values())

    def state(self, objective: dict[str, Tensor], extra: dict[str, Any]) -> TrainState:
        """Everything a checkpoint holds."""
        scaler = self.accelerator.scaler
        parts = self._gathered or {
            "weights": dict(self.trained),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.shadow if self.ema else {},
        }
        self._gathered = None
        return TrainState(
            step=self.step_count,
            samples_seen=self.samples_seen,
            trainer=extra | {"scaler": scaler.state_dict() if scaler else None},
            objective=objective,
            **parts,
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
                p.copy_(sharding.like(state.weights[k], p))
            if self.ema is not None:
                for k, v in self.ema.shadow.items():
                    v.copy_(sharding.like(state.ema[k], v))
        if self.zero is None:
            self._restore_optimizer(state)
        elif state.step < self.options.max_train_steps:  # else nothing is left but the export
            self.zero.restore(state.optimizer)
        self.step_count, self.samples_seen = state.step, state.samples_seen
        if state.step:  # the schedule is a function of the count alone
            self.schedule.last_epoch = state.step - 1
            with warnings.catch_warnings():  # torch warns that no optimizer step came before
                warnings.simplefilter("ignore", UserWarning)
                self.schedule.step()
        if self.sharded and state.step >= self.options.max_train_steps:
            sharding.settle(self.views)  # nothing is left but the export

    def _restore_optimizer(self, state: TrainState) -> None:
        own = list(self.trained.values())
        kept = sharding.split_state(state.optimizer, own) if self.sharded else state.optimizer
        self.optimizer.load_state_dict(kept)
        if self.accelerator.scaler and state.trainer.get("scaler"):
            self.accelerator.scaler.load_state_dict(state.trainer["scaler"])


def where_not(gradients: dict[str, Tensor]) -> str:
    """The module whose gradient is not finite, of several the last one of the forward."""
    odd = [k for k, x in gradients.items() if not finite(x)]
    if not odd:
        return ""
    module = odd[-1].rpartition(".")[0] or odd[-1]
    return f", in {module} and {len(odd) - 1} other parameters" if odd[1:] else f", in {module}"


def finite(x: Tensor) -> bool:
    """Whether all of a tensor is numbers, its shards on other processes included."""
    return bool(sharding.whole(x.isfinite().all()))


def whole_cpu(x: Tensor) -> Tensor:
    """All of a tensor, in main memory."""
    return sharding.whole(x).cpu()


def trainable_count(module: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
