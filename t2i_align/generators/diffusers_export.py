"""Trained weights in the formats stock diffusers loads, and adapters that do not belong."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.views import save_peft_adapter

# where the name of a layer ends in the keys of an adapter file, in every spelling diffusers reads
LAYER_END = re.compile(
    r"[._]lora[._](A|B|down|up|magnitude_vector|linear_layer)\b|\.lo(kr|ha)_|\.(alpha|dora_scale)$"
)
NUM_EXAMPLES = 3


def export_denoiser(
    index: dict[str, Any], component: str, module: nn.Module, lora: LoraOptions | None, folder: str
) -> list[str]:
    """Write an adapter or a denoiser folder.

    Keys are peft's own (``lora_A``, ``lora_B``) for every layer: the older spelling exists for
    attention layers only, and a file that mixes both is misread.

    Returns:
        Names of what was written, relative to ``folder``.

    Raises:
        ModelError: there is no adapter to write.
    """
    if lora is None:
        module.save_pretrained(f"{folder}/{component}")  # type: ignore[operator]
        return [component]
    import diffusers
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(module)
    refuse_empty(state, type(module).__name__)
    pipeline = getattr(diffusers, index["_class_name"])
    if not hasattr(pipeline, "save_lora_weights"):  # PixArt: peft is how its adapters are read
        return save_peft_adapter(module, index.get("_name_or_path", ""), folder)
    config = module.peft_config["default"].to_dict()  # type: ignore[index]
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    layers = {f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers)
    return ["pytorch_lora_weights.safetensors"]


def refuse_empty(layers: dict[str, Any], where: str) -> None:
    """An adapter of nothing is a mistake, not a file.

    Raises:
        ModelError: it is one.
    """
    if not layers:
        raise ModelError(
            f"there are no LoRA layers in {where}, so there is no adapter to write",
            "check model.lora.target_modules of the run",
        )


def layer_name(key: str) -> str:
    """The layer an adapter's key belongs to: ``unet.mid.to_q.lora_A.weight -> unet.mid.to_q``."""
    found = LAYER_END.search(key)
    name = key if found is None else key[: found.start()]
    if "to_out_lora." in key:  # the oldest spelling leaves out which layer of to_out it is
        name += ".0"
    return name.replace(".processor.", ".")


def check_match(adapter: Iterable[str], network: Iterable[str], what: str) -> None:
    """Refuse an adapter none of whose layers a network has; say where some are missing.

    Stock loaders pass over keys they do not know, and the picture is the base model's.

    Args:
        adapter: names of the adapter's layers.
        network: names of the network's modules.
        what: the adapter, for the message.

    Raises:
        ModelError: no layer matches; with examples of both.
    """
    theirs, mine = sorted(set(adapter)), {n.replace(".base_layer", "") for n in network}
    unknown = [name for name in theirs if name not in mine]
    if not unknown and theirs:
        return
    if len(unknown) < len(theirs):
        warnings.warn(
            f"{what}: {len(unknown)} of {len(theirs)} layers are not in this network and have no "
            f"effect, e.g. {', '.join(unknown[:NUM_EXAMPLES])}",
            stacklevel=2,
        )
        return
    depth = max((name.count(".") for name in mine), default=0) // 2
    examples = [n for n in sorted(mine) if n.count(".") >= depth][:NUM_EXAMPLES]
    raise ModelError(
        f"{what}: none of its layers is in this network; the adapter has "
        f"{', '.join(theirs[:NUM_EXAMPLES]) or 'no LoRA keys'}; the network has "
        f"{', '.join(examples)}",
        "give the adapter of this model family, or the model the adapter was trained on",
    )


def check_adapter(pipe: Any, component: str, module: nn.Module, name_or_path: str) -> None:
    """Compare what ``pipe.load_lora_weights`` would read with the network it would go into.

    Args:
        pipe: a stock pipeline.
        component: name of its denoiser.
        module: the denoiser.
        name_or_path: adapter folder, file or hub id.

    Raises:
        ModelError: nothing of it would be loaded.
    """
    more = {"unet_config": module.config} if component == "unet" else {}
    read = pipe.lora_state_dict(name_or_path, **more)
    keys = read[0] if isinstance(read, tuple) else read
    names = {layer_name(key) for key in keys}
    # parts the pipeline also trains, such as text encoders, are not the denoiser's business
    others = [n for n in pipe.components if n != component]
    own = {n for n in names if n.split(".")[0] not in others}
    modules = [f"{component}.{name}" for name, _ in module.named_modules() if name]
    if own or not names:
        check_match(own, modules, f"adapter {name_or_path}")


def load_adapter(pipe: Any, component: str, module: nn.Module, name_or_path: str) -> None:
    """Load an adapter by ``pipe.load_lora_weights``, or by peft where the pipeline has none.

    Args:
        pipe: a stock pipeline.
        component: name of its denoiser.
        module: the denoiser.
        name_or_path: adapter folder, file or hub id.

    Raises:
        ModelError: nothing of it would be loaded.
    """
    setattr(pipe, component, module)
    if hasattr(pipe, "load_lora_weights"):
        check_adapter(pipe, component, module, name_or_path)
        pipe.load_lora_weights(name_or_path)
        return
    from peft import PeftModel
    from peft.utils import load_peft_weights

    keys = load_peft_weights(name_or_path, device="cpu")
    names = {layer_name(key.removeprefix("base_model.model.")) for key in keys}
    network = [name for name, _ in module.named_modules() if name]
    check_match(names, network, f"adapter {name_or_path}")
    PeftModel.from_pretrained(module, name_or_path)
