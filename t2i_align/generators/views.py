"""Which weights score an event: the policy, its frozen reference, or an average of the policy.

With LoRA the reference is the policy with its adapters off, which costs no memory. For full
fine-tuning it is a frozen copy; until something is trained the network itself may stand for it, so
that no copy is made where nobody will ask (``reference_mode: borrowed``). ``ema`` swaps averaged
weights in for the duration of a block.

A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656) keeps values
of its own for what is trained. With p a trained parameter and p' its value in the reference,

    (1)  p' <- p                                  hard, every refresh_steps steps
    (2)  p' <- (1 - alpha) p' + alpha p           soft, likewise

With LoRA these values are a second set of adapter weights, swapped in while the reference scores:
a few megabytes and no second network. (1) is exact then. (2) averages the factors A and B apart,
which is not the average of their products; for that, train in full.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.contract import View
from t2i_align.errors import ModelError, TrainingError
from t2i_align.generators.adapters import AdaptOptions, LoraOptions
from t2i_align.generators.lora_targets import check_patterns, linear_names, target_names
from t2i_align.generators.trunk import Trunk

BORROWED = "borrowed"  # a mode of this package, not of recipes: see Views.settle_reference


class Views:
    """The views of one trainable module.

    Args:
        module: the policy network, adapters included.
        reference: None when the policy never needs one, ``module`` itself for adapters off, else a
            frozen copy.
    """

    def __init__(self, module: nn.Module, reference: nn.Module | None) -> None:
        """Policy in eval mode: scoring is deterministic, dropout never enters a likelihood."""
        self.module = module
        self.reference = reference
        self.wrapped: nn.Module = module
        self.ema: Mapping[str, Tensor] | None = None
        self.followed: dict[str, Tensor] = {}  # the reference's own values of what is trained
        self.trunk: Trunk | None = None  # what the views have in common, where it is shared
        self.borrowed = False  # the network stands for the copy that the reference will be
        self.left_out = False  # all that the reference would be asked is known

    def settle_reference(self, *, needed: bool) -> None:
        """End borrowing, before anything is trained: a frozen copy, or no reference."""
        if self.borrowed:
            self.borrowed = False
            copied = copy.deepcopy(self.module).requires_grad_(False) if needed else None
            self.reference = copied
            self.left_out = not needed

    @contextmanager
    def use(self, view: View) -> Iterator[nn.Module]:
        """Yield the network to call for ``view``."""
        if self.trunk is not None:
            self.trunk.view = view
        if view == "policy":
            yield self.wrapped if torch.is_grad_enabled() else self.module
        elif view == "reference":
            with self._reference() as module:
                yield module
        elif view == "ema":
            with self._swapped(self.ema) as module:
                yield module
        else:
            raise ValueError(f"this run keeps no '{view}' weights; known: policy, reference, ema")

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self.left_out:
            raise TrainingError(
                "the reference cache lacks an error that it had when the run began",
                "something removes files of cache.dir; when that has ended, go on with "
                "train.resume_from_checkpoint=latest",
            )
        if self.reference is None:
            raise ValueError(
                "no reference was set up; the objective must declare the view 'reference'"
            )
        if self.reference is not self.module:
            yield self.reference
            return
        if self.followed:
            with self._swapped(self.followed) as module:
                yield module
            return
        toggle_adapters(self.module, enabled=False)
        try:
            yield self.module
        finally:
            toggle_adapters(self.module, enabled=True)

    def sharing(self) -> AbstractContextManager[None]:
        """Around the scores of one event by several views, whose trunk then runs once."""
        return nullcontext() if self.trunk is None else self.trunk.shared()

    def trained(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters by name."""
        return {k: p for k, p in self.module.named_parameters() if p.requires_grad}

    def let_reference_follow(self) -> None:
        """Give the reference values of its own for what is trained, equal to the policy's now.

        Raises:
            ValueError: it is a copy without adapters, which has no place for them.
        """
        policy = self.trained()
        if self.reference is None:
            raise ValueError("no reference was set up, so none can follow the policy")
        if self.reference is self.module:
            self.followed = {k: p.detach().clone() for k, p in policy.items()}
            return
        own = dict(self.reference.named_parameters())
        if not policy.keys() <= own.keys():
            raise ValueError(
                "a frozen copy has no adapters, so with LoRA it cannot follow the policy; "
                "use reference.mode: auto"
            )
        self.followed = {k: own[k].detach() for k in policy}
        self.refresh(1.0)

    @torch.no_grad()
    def refresh(self, alpha: float) -> None:
        """Eq. (2), with ``alpha`` 1 Eq. (1); see :meth:`let_reference_follow`."""
        policy = self.trained()
        for k, value in self.followed.items():
            new = policy[k].detach().to(value.dtype)
            value.copy_(new if alpha == 1.0 else torch.lerp(value, new, alpha))

    @torch.no_grad()
    def restore_reference(self, values: Mapping[str, Tensor]) -> None:
        """Continue with the values a followed reference had; an empty mapping changes nothing."""
        for k, value in values.items():
            self.followed[k].copy_(value)

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        if weights is None:
            raise ValueError("no averaged weights; set train.ema_decay")
        live = {k: p for k, p in self.module.named_parameters() if k in weights}
        kept = {k: p.detach().clone() for k, p in live.items()}
        try:
            with torch.no_grad():
                for k, p in live.items():
                    p.copy_(weights[k])
            yield self.module
        finally:
            with torch.no_grad():
                for k, p in live.items():
                    p.copy_(kept[k])


def toggle_adapters(module: nn.Module, *, enabled: bool) -> None:
    """Switch every peft layer of a module on or off; what is trained stays marked so.

    Peft's own switch takes the marks off and on again; a sharded parameter, which is another object
    in between, would lose its own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._disable_adapters = not enabled


def add_lora(module: nn.Module, options: LoraOptions, preset: list[str], seed: int) -> None:
    """Freeze a module and inject LoRA layers, float32, initialised from ``seed``.

    Args:
        module: the network, changed in place.
        options: the recipe's LoRA options.
        preset: what ``target_modules: attention`` means for this family.
        seed: of the initialisation of A; B is zero.

    Raises:
        ModelError: no module matches ``target_modules``, or other options fit no module.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = target_names(module, options, preset)
    module.requires_grad_(False)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        target_modules=targets,
        init_lora_weights="gaussian" if options.init_lora_weights == "gaussian" else True,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, module, adapter_name="default")
    except ValueError as error:
        suffixes = sorted({".".join(n.split(".")[-2:]) for n in linear_names(module)})[:20]
        raise ModelError(
            f"model.lora.target_modules={options.target_modules!r} matches no layer of "
            f"{type(module).__name__} ({error})",
            f"use 'attention', 'all-linear', or suffixes such as {', '.join(suffixes)}",
        ) from error
    adapted = (n for n, m in module.named_modules() if isinstance(m, BaseTunerLayer))
    check_patterns(options, adapted)
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    if options.use_dora:
        measure_rows(module)


def measure_rows(module: nn.Module) -> None:
    """Let DoRA's magnitudes be the rows' lengths in float32.

    Peft measured them in the precision of the base; so rounded they would move it from the start.
    """
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_magnitude_vector:
            magnitudes: Any = layer.lora_magnitude_vector["default"]
            magnitudes.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A["default"].weight,
                lora_B=layer.lora_B["default"].weight,
                scaling=layer.scaling["default"],
            )


def build_views(
    module: nn.Module,
    lora: LoraOptions | None,
    preset: list[str],
    seed: int,
    *,
    reference: bool,
    reference_mode: str = "auto",
) -> Views:
    """Prepare a freshly loaded network for training.

    Adapters or full, and the reference it is compared with.
    """
    module.eval()
    frozen: nn.Module | None = None
    borrowed = reference and lora is None and reference_mode == BORROWED
    if reference and not borrowed and (lora is None or reference_mode == "frozen_copy"):
        frozen = copy.deepcopy(module).requires_grad_(False)
    if lora is None:
        module.requires_grad_(True)
    else:
        add_lora(module, lora, preset, seed)
        if reference and frozen is None:
            frozen = module
    module.eval()
    views = Views(module, module if borrowed else frozen)
    views.borrowed = borrowed
    if lora is not None and lora.from_block is not None and frozen is module:
        views.trunk = Trunk(module)
    return views


def refuse_checkpointing(options: AdaptOptions, generator: str, why: str) -> None:
    """Say that a generator has no gradient checkpointing, where the recipe asks for it.

    Raises:
        ModelError: it does.
    """
    if options.gradient_checkpointing:
        raise ModelError(
            f"model.gradient_checkpointing: not available for {generator}{why}", "set it to false"
        )


def export_trained(
    module: Any, options: AdaptOptions, folder: str, whole: Sequence[str]
) -> list[str]:
    """LoRA: a peft adapter folder; full: the network's own folder, by its ``save_pretrained``.

    Args:
        module: the trained network.
        options: of the generator.
        folder: to write into.
        whole: files that ``save_pretrained`` writes.
    """
    if options.lora is None:
        module.save_pretrained(folder)
        return list(whole)
    return save_peft_adapter(module, options.name_or_path, folder)


def save_peft_adapter(module: nn.Module, base: str, folder: str) -> list[str]:
    """Write an injected adapter as a stock peft folder (``PeftModel.from_pretrained`` reads it)."""
    from pathlib import Path

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(module)
    state = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(state, f"{folder}/adapter_model.safetensors")
    config: Any = module.peft_config["default"]  # type: ignore[index]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)
    return ["adapter_model.safetensors", "adapter_config.json"]
