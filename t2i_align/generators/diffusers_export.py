"""Trained weights in the formats stock diffusers loads."""

from __future__ import annotations

from typing import Any

from torch import nn

from t2i_align.generators.adapters import LoraOptions


def export_denoiser(
    index: dict[str, Any], component: str, module: nn.Module, lora: LoraOptions | None, folder: str
) -> list[str]:
    """Write an adapter or a denoiser folder.

    Returns:
        Names of what was written, relative to ``folder``.
    """
    if lora is None:
        module.save_pretrained(f"{folder}/{component}")  # type: ignore[operator]
        return [component]
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    pipeline = getattr(diffusers, index["_class_name"])
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    config = module.peft_config["default"].to_dict()  # type: ignore[index]
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    layers = {f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(folder, **layers)
    return ["pytorch_lora_weights.safetensors"]
