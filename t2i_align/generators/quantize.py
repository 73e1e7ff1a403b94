"""A frozen network with its linear layers in few bits, for LoRA on top.

    nf4   blocks of 64 weights share a scale s; a weight is s c, c one of 16 quantiles of a normal
          (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes' kernels          (1)
    int8  W_ij ~ s_i q_ij,  s_i = max_j |W_ij| / 127,  q_ij = round(W_ij / s_i)              (2)
    ao    torchao's int8 or float8 weights, see torchao_linear.py                            (3)

All leave activations as they are and rebuild a weight where it is used, so a score is a function
of the item alone. (LLM.int8() rounds activations too, and which of their columns are exempt is
decided over the whole batch: an item's likelihood would depend on its neighbours.)

The same layer serves CPU and CUDA, with and without gradients. The loader of diffusers
(``quantization_config``) refuses to quantise without an accelerator, so a run could not be checked
where it is written; and bitsandbytes' own layers take another kernel where no gradient is asked,
whose rounding is another, and on the CPU rebuild rows that are no multiple of 64 with their
neighbours' scales. Convolutions and norms stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.generators.lora_targets import has_suffix
from t2i_align.optional import require

if TYPE_CHECKING:
    from t2i_align.generators.diffusers_options import QuantizationOptions

BLOCK = 64  # weights that share a scale in nf4
BLOCK_2 = 256  # scales that share a scale with double_quant


class _Product(torch.autograd.Function):
    """``x W^T`` with a rounded W, rebuilt in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Rounded) -> Tensor:
        """``(..., n) -> (..., m)``."""
        ctx.layer = layer
        return x @ layer.rebuilt(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Of x alone; the weight is frozen."""
        return grads[0] @ ctx.layer.rebuilt(grads[0].dtype), None


class Rounded(nn.Linear, ABC):
    """A linear layer ``(..., n) -> (..., m)`` whose weight is kept in few bits.

    Args:
        linear: the layer it replaces.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the bias."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kept_dtype = linear.weight.dtype
        self.bias = linear.bias

    @abstractmethod
    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """The weight ``(m, n)`` it computes with."""

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight, rebuilt at each call; peft reads its rows (DoRA), dtype and device here."""
        return self.rebuilt(self.kept_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Like the layer it replaced, autocast included."""
        device = input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        out = _Product.apply(input, self)
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Int8Linear(Rounded):
    """Eq. (2)."""

    codes: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of ``linear``."""
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("codes", (weight / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """Codes times scales."""
        return (self.codes * self.scale).to(dtype)


class Nf4Linear(Rounded):
    """Eq. (1); ``double`` keeps the scales in 8 bits, as differences from their mean."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, linear: nn.Linear, *, double: bool) -> None:
        """Round the weights of ``linear``, where they are."""
        super().__init__(linear)
        self.nested = double
        flat = linear.weight.detach().float().reshape(-1)
        for name, value in (
            _planned(flat, double) if flat.is_meta else _coded(flat, double)
        ).items():
            self.register_buffer(name, value)

    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """Codes' quantiles times scales."""
        if self.codes.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        from bitsandbytes import functional

        absmax = self.absmax
        if self.nested:
            kept = dict(self.named_buffers())
            absmax = kept["mean"] + functional.dequantize_blockwise(
                absmax, absmax=kept["absmax_2"], code=kept["code_2"], blocksize=BLOCK_2
            )
        state = functional.QuantState(
            absmax=absmax,
            # one row, so that no block crosses its end; torch.compile expects two dimensions
            shape=torch.Size([1, self.out_features * self.in_features]),
            dtype=dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        flat = functional.dequantize_4bit(self.codes, state)
        return flat.view(self.out_features, self.in_features)


def _coded(flat: Tensor, double: bool) -> dict[str, Tensor]:
    """What is kept of weights ``(n,)``."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        flat, blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    second: Any = state.state2
    parts = {"codes": codes, "absmax": state.absmax}
    if double:
        parts |= {"mean": state.offset, "absmax_2": second.absmax, "code_2": second.code}
    return parts


def _planned(flat: Tensor, double: bool) -> dict[str, Tensor]:
    """The same without values, on the meta device and without bitsandbytes."""
    num = -(-len(flat) // BLOCK)
    parts = {
        "codes": flat.new_empty(-(-len(flat) // 2), 1, dtype=torch.uint8),
        "absmax": flat.new_empty(num, dtype=torch.uint8 if double else torch.float32),
    }
    if double:
        sizes = {"mean": (), "absmax_2": (-(-num // BLOCK_2),), "code_2": (256,)}
        parts |= {name: flat.new_empty(size) for name, size in sizes.items()}
    return parts


def by_torchao(options: QuantizationOptions) -> bool:
    """Whether a recipe's numbers are torchao's."""
    return options.type == "float8" or options.backend == "torchao"


def rounded(linear: nn.Linear, options: QuantizationOptions) -> Rounded:
    """A layer in the bits a recipe asks for, on the device the layer is on."""
    if by_torchao(options):
        from t2i_align.generators.torchao_linear import TorchaoLinear

        return TorchaoLinear(linear, options.type)
    if options.type == "int8":
        return Int8Linear(linear)
    return Nf4Linear(linear, double=options.double_quant)


def quantized_names(net: nn.Module, options: QuantizationOptions) -> list[str]:
    """Full names of the layers that are quantised.

    All linear layers but ``skip_modules`` and those the family itself keeps in float32.
    """
    kept = list(getattr(net, "_keep_in_fp32_modules", None) or [])
    return [
        name
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear)
        and not has_suffix(name, options.skip_modules)
        and not any(k in name.split(".") for k in kept)
    ]


def quantize(net: nn.Module, options: QuantizationOptions, device: torch.device) -> nn.Module:
    """Replace a loaded network's linear layers, one at a time; the rest moves with ``.to``.

    Args:
        net: not quantised, on the CPU (or the meta device, for planning); changed in place.
        options: the recipe's.
        device: where these layers are quantised and left.

    Raises:
        MissingDependencyError: nf4 without bitsandbytes, float8 without torchao.
        ModelError: no layer is left to quantise.
    """
    if options.type == "nf4" and device.type != "meta":
        require("bitsandbytes", "quant", "model.quantization.type: nf4")
    if by_torchao(options):  # for planning, too: only it knows what its formats hold
        require("torchao", "torchao", f"model.quantization: {options.type} by torchao")
    names = quantized_names(net, options)
    if not names:
        raise ModelError(
            f"model.quantization: {type(net).__name__} has no linear layer to quantise",
            "shorten model.quantization.skip_modules, or remove model.quantization",
        )
    for name in names:
        old = net.get_submodule(name)
        assert isinstance(old, nn.Linear)
        net.set_submodule(name, rounded(old.to(device), options))
    return net
