r"""Conditioning a CLIP vision tower on the noise level, from outside.

    e = W_2 silu(W_1 [cos(w t), sin(w t)]),   t = 1000 level, 256 numbers     (B, W)

    transformer, every layer (adaLN, arXiv:2212.09748; as in SPO's preference model)
    (1)  x <- x + (1 + g_1) attention((1 + a_1) norm_1(x) + b_1)
         x <- x + (1 + g_2) mlp((1 + a_2) norm_2(x) + b_2)
         and (1 + a) norm(x) + b after the last norm
    residual network, every stage
    (2)  x <- (1 + a) stage(x) + b, per channel (FiLM, arXiv:1709.07871)

All a, b, g are linear in silu(e) with weights and biases that start at zero, so the tower starts as
it was, to the last bit. SPO's code stores gates as 1 + g; nothing else differs. The tower's own
modules stay where they are and keep their names: they are modulated by hooks that do nothing
outside :meth:`Modulation.at`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.judges.weights import load_strict, load_tensors

FREQUENCIES = 256
FILE = "timed.safetensors"


@dataclass(frozen=True)
class Site:
    """A module whose output is modulated.

    Args:
        module: the module.
        channels: of its output.
        parts: 2 for scale and shift, 1 for a gate.
        maps: output ``(B, C, h, w)`` instead of ``(B, ..., C)``.
    """

    module: nn.Module
    channels: int
    parts: int
    maps: bool = False

    @property
    def size(self) -> int:
        """Numbers it needs."""
        return self.parts * self.channels


def blocks(layers: Any, norms: str, branches: str, last: nn.Module, width: int) -> list[list[Site]]:
    """Sites of a transformer, a list for each layer, then its last norm.

    Args:
        layers: its layers.
        norms: names of a layer's two norms.
        branches: names of the two modules whose outputs are added to the stream.
        last: the last norm.
        width: channels.
    """
    found = [
        [Site(getattr(layer, name), width, 2) for name in norms.split()]
        + [Site(getattr(layer, name), width, 1) for name in branches.split()]
        for layer in layers
    ]
    return [*found, [Site(last, width, 2)]]


def resnet_stages(visual: Any) -> list[list[Site]]:
    """Sites of CLIP's modified ResNet, one a stage."""
    stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
    return [[Site(s, s[-1].bn3.num_features, 2, maps=True)] for s in stages]


def sites_of(visual: nn.Module) -> list[list[Site]]:
    """Where a vision tower is modulated.

    Raises:
        ModelError: a tower of another kind.
    """
    if hasattr(visual, "attnpool") and hasattr(visual, "layer4"):
        return resnet_stages(visual)
    if hasattr(visual, "ln_post") and hasattr(visual, "transformer"):
        own: Any = visual
        width = own.ln_post.normalized_shape[0]
        return blocks(own.transformer.resblocks, "ln_1 ln_2", "ls_1 ls_2", own.ln_post, width)
    if hasattr(visual, "post_layernorm") and hasattr(visual, "encoder"):
        own = visual
        width, layers = own.config.hidden_size, own.encoder.layers
        return blocks(layers, "layer_norm1 layer_norm2", "self_attn mlp", own.post_layernorm, width)
    raise ModelError(
        f"a vision tower of class {type(visual).__name__} cannot be conditioned on a noise level",
        "allowed: open_clip's vision transformer and modified ResNet, transformers' CLIP",
    )


def linear(into: int, out: int, std: float) -> nn.Linear:
    """A linear layer with normal weights and no bias at the start."""
    made = nn.Linear(into, out)
    nn.init.normal_(made.weight, std=std)
    nn.init.zeros_(made.bias)
    return made


class Modulation(nn.Module):
    """Eq. (1) or (2) for one vision tower; holds the new weights only.

    Args:
        visual: the tower.
        width: W.
    """

    def __init__(self, visual: nn.Module, width: int) -> None:
        """Start at the identity; W_1 and W_2 have standard deviation 0.02."""
        super().__init__()
        self.width, self._sites = width, sites_of(visual)
        self.embed = nn.Sequential(
            linear(FREQUENCIES, width, 0.02), nn.SiLU(), linear(width, width, 0.02)
        )
        self.layers = nn.ModuleList(
            linear(width, sum(site.size for site in sites), 0.0) for sites in self._sites
        )
        self._now: list[Tensor] | None = None
        for i, site in enumerate(site for sites in self._sites for site in sites):
            site.module.register_forward_hook(partial(self._modulate, i, site))

    def forward(self, level: Tensor) -> list[Tensor]:
        """The numbers of every site, ``(B, parts, channels)``.

        Args:
            level: ``(B,)`` in [0, 1].
        """
        from diffusers.models.embeddings import get_timestep_embedding

        waves = get_timestep_embedding(
            1000 * level.float(), FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        e = nn.functional.silu(self.embed(waves))
        found = []
        for layer, sites in zip(self.layers, self._sites, strict=True):
            parts = layer(e).split([site.size for site in sites], -1)
            found += [p.unflatten(-1, (s.parts, -1)) for p, s in zip(parts, sites, strict=True)]
        return found

    @contextmanager
    def at(self, level: Tensor) -> Iterator[None]:
        """Condition the tower inside the block.

        Args:
            level: ``(B,)`` of the pictures it is going to see, or ``(1,)`` for all of them.

        Raises:
            ValueError: a level outside [0, 1].
        """
        if not bool(((level >= 0) & (level <= 1)).all()):
            raise ValueError(f"noise levels are in [0, 1], got {level.tolist()}")
        self._now = self(level)
        try:
            yield
        finally:
            self._now = None

    def _modulate(self, index: int, site: Site, _module: nn.Module, _args: Any, out: Any) -> Any:
        if self._now is None:
            return None
        value, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        numbers = self._now[index].to(value.dtype)
        middle = [1] * (value.dim() - 2)
        shape = [-1, site.channels, *middle] if site.maps else [-1, *middle, site.channels]
        scale, *shift = (n.reshape(shape) for n in numbers.unbind(1))
        value = value * (1 + scale) + shift[0] if shift else value * (1 + scale)
        return value if rest is None else (value, *rest)


def save_modulation(modulation: Modulation, path: Path) -> None:
    """Write the weights as safetensors."""
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu() for k, v in modulation.state_dict().items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner only


def load_modulation(visual: nn.Module, path: Path) -> Modulation:
    """Read the weights for a tower of the same kind.

    Raises:
        ModelError: no such file, or of another tower.
    """
    tensors = load_tensors(path)
    modulation = Modulation(visual, len(tensors.get("embed.0.weight", (0,))))
    load_strict(modulation, tensors, f"the modulation of a {type(visual).__name__}")
    return modulation
