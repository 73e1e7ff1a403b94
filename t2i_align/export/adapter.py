"""A LoRA adapter as numbers, read from and written to the file stock diffusers loads.

With A (r, in) and B (out, r) of a layer, s its scale and W its frozen weight, its weight is

    (1)  W + dW,   dW = s B A,   s = alpha / r   (alpha / sqrt(r) for rank-stabilised LoRA)

and with DoRA (Liu et al. 2024, arXiv:2402.09353), m its magnitudes and norms over each output,

    (2)  m (W + s B A) / |W + s B A|

Files carry A and B by layer and alpha in their metadata (``lora_adapter_metadata``: peft's config,
its keys prefixed by the component). Without metadata a scale is 1, or given by tensors ``.alpha``.
Generators that no pipeline loads a LoRA into have peft's own folder instead: the same factors under
``base_model.model``, the config beside them in ``adapter_config.json``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_export import layer_name, refuse_empty
from t2i_align.plain_json import load_object, loads

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT = "base_model.model"
METADATA_KEY = "lora_adapter_metadata"
DOWN = re.compile(r"(lora_A|lora\.down|lora_linear_layer\.down|_lora\.down)(\.default)?\.weight$")
UP = re.compile(r"(lora_B|lora\.up|lora_linear_layer\.up|_lora\.up)(\.default)?\.weight$")
MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$")


@dataclass(frozen=True)
class LowRank:
    """One layer's update.

    Args:
        down: A, ``(r, in)`` or ``(r, in, k, k)``.
        up: B, ``(out, r)`` or ``(out, r, 1, 1)``.
        scale: s of Eq. (1).
        magnitude: m of Eq. (2), DoRA only.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Eq. (1): dW, ``(out, in)``; convolutions flattened."""
        return self.scale * (self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1))


@dataclass(frozen=True)
class Adapter:
    """Layers by full name, component first: ``unet.mid_block.attentions.0.proj_in``."""

    layers: dict[str, LowRank]

    @property
    def components(self) -> list[str]:
        """Names of the networks it changes."""
        return sorted({split(name)[0] for name in self.layers})

    @property
    def file(self) -> str:
        """The name its loader wants it under."""
        return PEFT_FILE if self.components == [PEFT] else FILE

    @property
    def is_dora(self) -> bool:
        """Whether any layer has magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same numbers in another precision."""
        move = lambda t: None if t is None else t.to(dtype)  # noqa: E731
        return Adapter(
            {
                name: LowRank(x.down.to(dtype), x.up.to(dtype), x.scale, move(x.magnitude))
                for name, x in self.layers.items()
            }
        )


def split(name: str) -> tuple[str, str]:
    """Component and name inside it; ``base_model.model`` is peft's word for the network."""
    if name.startswith(f"{PEFT}."):
        return PEFT, name.removeprefix(f"{PEFT}.")
    component, _, inner = name.partition(".")
    return component, inner


# -- from a network


def from_module(module: nn.Module, weights: Mapping[str, Tensor], component: str) -> Adapter:
    """The adapter of a network with LoRA layers.

    Args:
        module: tells each layer's scale; may be on the meta device.
        weights: values of its trained parameters by name.
        component: prefix of the names.

    Raises:
        ModelError: no LoRA layers, values are missing, or other parameters were trained too.
    """
    from peft.tuners.lora import LoraLayer

    layers, used = {}, set()
    for name, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.scaling:
            continue
        keys = [f"{name}.lora_{x}.default.weight" for x in ("A", "B", "magnitude_vector")]
        missing = [k for k in keys[:2] if k not in weights]
        if missing:
            raise ModelError(f"the run's weights lack {missing[0]}", "choose another checkpoint")
        down, up, magnitude = (weights.get(k) for k in keys)
        assert down is not None and up is not None
        layers[f"{component}.{name}"] = LowRank(
            down, up, float(layer.scaling["default"]), magnitude
        )
        used |= set(keys)
    refuse_empty(layers, type(module).__name__)
    other = sorted(weights.keys() - used)
    if other:
        raise ModelError(
            f"the run trained more than LoRA factors, e.g. {other[0]}, which no adapter file holds",
            "use --format merged",
        )
    return Adapter(layers)


# -- files


def find_file(path: Path) -> Path:
    """The adapter file a path means: itself, or the one of a folder.

    Raises:
        ModelError: there is none.
    """
    path = path.expanduser()
    names = (path / FILE, path / PEFT_FILE) if path.is_dir() else (path,)
    found = next((p for p in names if p.is_file()), None)
    if found is None:
        raise ModelError(
            f"no adapter file at '{path}'",
            f"give a .safetensors file, or a folder with {FILE} or {PEFT_FILE}",
        )
    return found


def read_adapter(path: Path) -> Adapter:
    """Read an adapter in peft's keys, with or without metadata.

    Raises:
        ModelError: no such file, or it holds something else.
    """
    from safetensors import SafetensorError, safe_open

    file = find_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}
            metadata = loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapter {file}: {error}") from error
    if any(k.endswith(".lora_down.weight") for k in tensors):
        raise ModelError(
            f"{file} is in kohya's format; this needs peft's keys",
            f"give the {FILE} of the run it was exported from",
        )
    if any(k.startswith(f"{PEFT}.") for k in tensors):
        metadata = _folder_config(file)
    try:
        return Adapter(_layers(tensors, metadata, file))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"the scales in {file} cannot be read: {error!r}") from error


def _folder_config(file: Path) -> dict[str, Any]:
    """The config beside a peft folder's weights, without which no scale is known."""
    path = file.parent / PEFT_CONFIG
    try:
        config = load_object(path.read_bytes(), str(path), ModelError)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}, which holds the scale of {file.name}: {error}",
            "keep the two files of a peft folder together",
        ) from error
    return {f"{PEFT}.{k}": v for k, v in config.items()}


def _layers(tensors: dict[str, Tensor], metadata: dict[str, Any], file: Path) -> dict[str, LowRank]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if ".base_layer." in key:  # peft saves the frozen weights of adapted embeddings and heads
            continue
        kind = next((p for p in (DOWN, UP, MAGNITUDE) if p.search(key)), None)
        if kind is None and not key.endswith(".alpha"):
            raise ModelError(
                f"{file} holds {key}, which is no LoRA factor",
                "give a LoRA adapter that load_lora_weights reads",
            )
        role = {DOWN: "down", UP: "up", MAGNITUDE: "magnitude", None: "alpha"}[kind]
        parts.setdefault(layer_name(key), {})[role] = value
    if not parts:
        raise ModelError(f"{file} holds no LoRA layers")
    for name, part in parts.items():
        if not {"down", "up"} <= part.keys():
            raise ModelError(f"{file}: layer {name} has {', '.join(sorted(part))} only")
    return {name: _layer(name, part, metadata) for name, part in sorted(parts.items())}


def _layer(name: str, part: dict[str, Tensor], metadata: dict[str, Any]) -> LowRank:
    rank = part["down"].shape[0]
    scale = float(part["alpha"]) / rank if "alpha" in part else 1.0
    component, inner = split(name)
    config = {
        k.removeprefix(f"{component}."): v
        for k, v in metadata.items()
        if k.startswith(f"{component}.")
    }
    if config:
        alpha = _by_pattern(inner, config.get("alpha_pattern") or {}, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(part["down"], part["up"], scale, part.get("magnitude"))


def _by_pattern(name: str, patterns: Mapping[str, float], default: float) -> float:
    """The value peft gives a layer: of the first pattern that ends its name."""
    found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
    return float(next(found, default))


def write_adapter(adapter: Adapter, file: Path) -> None:
    """Write an adapter for ``load_lora_weights``, its scales in the metadata; or a peft folder.

    Raises:
        ModelError: it has no layers.
    """
    from safetensors.torch import save_file

    refuse_empty(adapter.layers, "the adapter")
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down.detach().cpu().contiguous().clone()
        tensors[f"{name}.lora_B.weight"] = layer.up.detach().cpu().contiguous().clone()
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude.detach().cpu().clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    if adapter.file == PEFT_FILE:
        config = {"peft_type": "LORA", "inference_mode": True, **peft_config(adapter, PEFT)}
        (file.parent / PEFT_CONFIG).write_text(json.dumps(config, indent=1))
    metadata: dict[str, Any] = {}
    for component in adapter.components:
        config = peft_config(adapter, component)
        metadata |= {f"{component}.{k}": v for k, v in config.items()}
    text = json.dumps(metadata, sort_keys=True)
    save_file(tensors, file, metadata={"format": "pt", METADATA_KEY: text})


def peft_config(adapter: Adapter, component: str) -> dict[str, Any]:
    """Arguments of peft's ``LoraConfig`` that give a component's layers their ranks and scales."""
    prefix = f"{component}."
    own = {k.removeprefix(prefix): v for k, v in adapter.layers.items() if k.startswith(prefix)}
    ranks = {k: v.rank for k, v in own.items()}
    alphas = {k: exact(v.scale * v.rank) for k, v in own.items()}
    rank, alpha = common(ranks.values()), common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        # "^": without it the pattern of proj_out would also fit the proj_out inside other layers
        "rank_pattern": {f"^{re.escape(k)}": v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {f"^{re.escape(k)}": v for k, v in alphas.items() if v != alpha},
        "target_modules": sorted(own),
        "use_dora": any(v.magnitude is not None for v in own.values()),
    }


def exact(value: float) -> float | int:
    """An integer where the value is one up to rounding, as ``lora_alpha`` usually is."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def common(values: Iterable[Any]) -> Any:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]
