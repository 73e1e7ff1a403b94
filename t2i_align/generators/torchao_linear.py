"""torchao's weights under LoRA: its int8 or float8 (e4m3) numbers with a scale a row.

    int8    W_ij ~ s_i q_ij,  s_i = max_j |W_ij| / 127.5                                       (1)
    float8  W_ij ~ s_i q_ij,  s_i = max_j |W_ij| / 448,   q_ij the nearest e4m3 number         (2)

(1) has one step for the whole row; the steps of (2) grow with the weight, finer than those of (1)
below a 14th of the row's largest and coarser above. So float8 suits rows with outliers; where a
row is normally distributed int8 is nearer to it.

The numbers are torchao's (``quantize_`` makes them, ``dequantize`` reads them), the layer is the
suite's. torchao's own product keeps the rebuilt weight of every layer, in the network's precision,
from the forward to the backward pass, so training holds the model twice; here a weight is rebuilt
in the backward pass again. Its tensors are taken apart into plain buffers, which checkpoints, moves
between devices and the memory plan know.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_align.generators.quantize import Rounded


class TorchaoLinear(Rounded):
    """Eq. (1) or (2).

    Args:
        linear: the layer it replaces; on the meta device only shapes are found.
        kind: ``int8`` or ``float8``.
    """

    def __init__(self, linear: nn.Linear, kind: Literal["int8", "float8"] | str) -> None:
        """Let torchao round the weights of ``linear``, which is left with them."""
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        super().__init__(linear)
        config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]
        quantize_(linear, config(set_inductor_config=False))  # that would be for the whole process
        made: Any = linear.weight.detach()
        self.format = type(made)
        self.names, self.context = made.__tensor_flatten__()
        self.layout = made.shape, made.stride()
        for name in self.names:
            self.register_buffer(name, getattr(made, name))

    def rebuilt(self, dtype: torch.dtype) -> Tensor:
        """As torchao's tensor says."""
        parts = {name: getattr(self, name) for name in self.names}
        tensor = self.format.__tensor_unflatten__(parts, self.context, *self.layout)
        return tensor.dequantize(dtype)
