"""DeepSpeed ZeRO: gradients and optimizer state (stage 2), parameters too (stage 3), split.

DeepSpeed is given the network and torch's own AdamW, and a configuration that is a function of the
``train`` section alone, see :func:`config`. What it would decide by itself is decided there:

- precision stays that of ``ddp``: weights keep their dtype, forwards run in autocast, gradients are
  exchanged in float32 (DeepSpeed's ``bf16`` section would round the trained weights instead);
- losses come divided by the number of micro-batches, so nothing is scaled again;
- a step whose gradient norm is no number is left out by DeepSpeed, and told as everywhere else.

Initialised by ``deepspeed.initialize`` on accelerate's process group, not by accelerate's plugin,
which turns accelerate's autocast off and steps in every backward pass.

Checkpoints are those of one process: whole float32 weights and moments, gathered parameter by
parameter through DeepSpeed's public accessors. So a run goes on with any backend and number of
processes. Weights are put in before DeepSpeed begins, which it does with the first micro-batch.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2i_align.optional import require

if TYPE_CHECKING:
    from t2i_align.generators.views import Views
    from t2i_align.train.options import TrainOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
FEATURE = "train.distributed.backend: deepspeed"


def _deepspeed() -> Any:
    """The package, where it is needed and not before."""
    return importlib.import_module("deepspeed")


def config(options: TrainOptions) -> dict[str, Any]:
    """DeepSpeed's configuration of a run; it multiplies the batch by the processes itself.

    Args:
        options: the ``train`` section, whose backend is deepspeed.
    """
    how = options.distributed
    zero: dict[str, Any] = {"stage": how.stage}
    for key, asked in (
        ("offload_optimizer", how.offload_optimizer),
        ("offload_param", how.offload_parameters),
    ):
        if asked:
            zero[key] = {"device": "cpu", "pin_memory": True}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "gradient_clipping": options.max_grad_norm or 0.0,
        "zero_optimization": zero,
    }
    if options.mixed_precision == "bf16":
        found["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # of which gradients would travel rounded
        }
    if how.offload_optimizer:
        found["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW; DeepSpeed's is compiled
    return found


class Zero:
    """One network under DeepSpeed.

    Args:
        options: the ``train`` section.
        views: of the network; its wrapper is DeepSpeed's engine once that has begun.
        optimizer: over what is trained; its groups go on to hold the learning rate.
    """

    def __init__(
        self, options: TrainOptions, views: Views, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin with the first micro-batch, or a restored checkpoint."""
        require("deepspeed", "deepspeed", FEATURE)
        self.config = config(options)
        self.views, self.optimizer = views, optimizer
        self.trained = views.trained()
        self.engine: Any = None

    @property
    def split(self) -> bool:
        """Whether parameters are split too."""
        return self.config["zero_optimization"]["stage"] == 3

    def _begin(self) -> None:
        views = self.views
        self.engine, *_ = _deepspeed().initialize(
            model=views.module,
            optimizer=self.optimizer,
            config=self.config,
            dist_init_required=False,
        )
        if hasattr(self.engine.optimizer, "check_grad_overflow"):
            self.engine.optimizer.check_grad_overflow = True  # else not looked at in bfloat16
        views.wrapped = self.engine

    def micro(self, *, last: bool) -> None:
        """Before each micro-batch; gradients are a step's after the last one."""
        if self.engine is None:
            self._begin()
            assert self.engine is not None
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss that is divided already."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip and update.

        Returns:
            The gradient norm before; where it is no number, no weight was touched.
        """
        self.engine.step()
        if not self.engine.was_step_applied():  # the norm may be that of the step before
            return math.inf
        norm = self.engine.get_global_grad_norm()
        return math.inf if norm is None else float(norm)

    def gather(self) -> dict[str, Any]:
        """Whole weights and the optimizer's state as torch has it, on the CPU; all must ask."""
        utils = _deepspeed().utils
        weights, rows = {}, {}
        step = torch.tensor(float(self._counts()[0]))
        for i, (name, p) in enumerate(self.trained.items()):
            weights[name] = utils.safe_get_full_fp32_param(p).detach().cpu()
            moments = {k: utils.safe_get_full_optimizer_state(p, k).cpu() for k in MOMENTS}
            rows[i] = {"step": step.clone(), **moments}
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        groups = [group | {"params": list(rows)}]
        return {"weights": weights, "optimizer": {"state": rows, "param_groups": groups}}

    def _counts(self) -> list[float]:
        """Steps that each of the optimizer's tensors has taken."""
        return [float(state["step"]) for state in self.engine.optimizer.state.values()]

    def restore(self, kept: dict[str, Any]) -> None:
        """Begin with the weights the network has now, and an optimizer's state.

        Args:
            kept: as :meth:`gather` or torch's optimizer gives it.
        """
        for group, theirs in zip(self.optimizer.param_groups, kept["param_groups"], strict=True):
            group.update({k: v for k, v in theirs.items() if k != "params"})
        self._begin()
        if not kept["state"]:
            return
        self._idle_step()
        for i, p in enumerate(self.trained.values()):
            for key in MOMENTS:
                if i in kept["state"]:
                    self._put(p, key, kept["state"][i][key].to(self.engine.device).float())
        step = max(float(row["step"]) for row in kept["state"].values())
        for state in self.engine.optimizer.state.values():
            state["step"].fill_(step)

    def _idle_step(self) -> None:
        """Let the optimizer make its state: gradients and rate are 0, so no weight moves."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.micro(last=True)
        whole = _deepspeed().zero.GatheredParameters
        with whole(list(self.trained.values()), enabled=self.split):
            nothing = torch.stack([0 * p.sum() for p in self.trained.values()]).sum()
            self.backward(nothing)
        self.engine.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _put(self, p: Tensor, key: str, whole: Tensor) -> None:
        """Give every process its part of a moment; under stage 3 the last part is padded."""
        utils = _deepspeed().utils
        if not self.split:
            utils.safe_set_full_optimizer_state(p, whole, key)
            return
        part = utils.safe_get_local_optimizer_state(p, key)
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        flat = whole.new_zeros(world, part.numel())
        flat.view(-1)[: whole.numel()] = whole.flatten()
        utils.safe_set_local_optimizer_state(p, flat[rank].view_as(part), key)

    def settle(self, weights: dict[str, Tensor]) -> None:
        """Give the network whole, plain parameters for good, to be exported; it trains no more."""
        self.views.wrapped = self.views.module
        for name, p in self.trained.items() if self.split else ():
            owner, _, own = name.rpartition(".")
            plain = nn.Parameter(weights[name].to(p.device, p.dtype), requires_grad=True)
            setattr(self.views.module.get_submodule(owner), own, plain)
