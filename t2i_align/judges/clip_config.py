"""The shape of a CLIP network, and that nothing known about it disagrees.

The shape comes from the architecture's name in open_clip's table, or from a ``config.json``
(transformers) or ``open_clip_config.json`` beside the weights; where both are known they must
agree. That matters for the activation, which no weights file tells: OpenAI's models have
quick_gelu, x sigmoid(1.702 x), LAION's and those trained from them the exact one, and the wrong one
loads without a word and gives wrong numbers. So it is also compared with what is known of the
publisher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_align.errors import ModelError
from t2i_align.optional import require
from t2i_align.plain_json import load_object

PUBLISHERS = {"openai": "quick_gelu", "laion": "gelu", "pickscore": "gelu", "hpsv2": "gelu"}
TOWERS = ("vision_config", "text_config")
FACTS = ("hidden_act", "hidden_size", "num_hidden_layers", "num_attention_heads")
VIT = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}


def named_config(architecture: str) -> Any:
    """The configuration, as transformers has it, of a network in open_clip's table.

    Raises:
        ModelError: no such name, or not a plain CLIP with vision transformer.
    """
    require("open_clip_torch", "judges", f"the architecture {architecture}")
    import open_clip

    found = open_clip.get_model_config(architecture)
    if found is None:
        raise ModelError(
            f"open_clip knows no architecture '{architecture}'",
            "e.g. ViT-B-32-quickgelu, ViT-L-14-quickgelu (OpenAI's weights), ViT-H-14",
        )
    return from_open_clip(found, architecture)


def from_open_clip(found: Mapping[str, Any], what: str) -> Any:
    """Transformers' configuration of one of open_clip.

    Args:
        found: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and perhaps ``quick_gelu``.
        what: the architecture, as messages call it.

    Raises:
        ModelError: not a plain CLIP with vision transformer.
    """
    from transformers import CLIPConfig

    sees, reads = found["vision_cfg"], found["text_cfg"]
    if not isinstance(sees.get("layers"), int) or set(sees) - VIT or "heads" not in reads:
        raise ModelError(f"'{what}' is not a plain CLIP", "this loader builds only those")
    activation = "quick_gelu" if found.get("quick_gelu") else "gelu"
    tower = {"hidden_act": activation, "projection_dim": found["embed_dim"]}
    vision = tower | {
        "hidden_size": sees["width"],
        "intermediate_size": int(sees["width"] * sees.get("mlp_ratio", 4.0)),
        "num_hidden_layers": sees["layers"],
        "num_attention_heads": sees["width"] // sees.get("head_width", 64),
        "image_size": sees["image_size"],
        "patch_size": sees["patch_size"],
    }
    text = tower | {
        "hidden_size": reads["width"],
        "intermediate_size": int(reads["width"] * reads.get("mlp_ratio", 4.0)),
        "num_hidden_layers": reads["layers"],
        "num_attention_heads": reads["heads"],
        "vocab_size": reads["vocab_size"],
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=found["embed_dim"])


def beside(file: Path) -> tuple[Any, Path]:
    """The configuration that lies beside a weights file, or None, and where it was looked for.

    A ``config.json`` of another library (timm writes one too) is left alone.
    """
    from transformers import CLIPConfig

    path, other = file.with_name("config.json"), file.with_name("open_clip_config.json")
    try:
        if path.is_file():
            told = load_object(path.read_bytes(), str(path), ModelError)
            if "vision_config" in told:
                return CLIPConfig.from_dict(told), path
        if other.is_file():
            told = load_object(other.read_bytes(), str(other), ModelError)["model_cfg"]
            return from_open_clip(told, str(other)), other
    except ModelError:
        raise
    except Exception as error:  # a config of wrong types fails anywhere inside the library
        raise ModelError(f"the configuration beside {file} is not CLIP's: {error}") from error
    return None, path


def clip_config(file: Path, architecture: str | None, published: str | None = None) -> Any:
    """The configuration of a weights file, and that everything known of it agrees.

    Args:
        file: the weights; a configuration beside them is read.
        architecture: open_clip's name, or None for what ``config.json`` says.
        published: hub id, if that is where the weights come from.

    Raises:
        ModelError: nothing known, or two sources that disagree.
    """
    told, where = beside(file)
    named = None if architecture is None else named_config(architecture)
    config = told or named
    if config is None:
        raise ModelError(
            f"the network behind {file.name} is unknown: no config.json beside it",
            "set architecture, e.g. ViT-H-14, or bring config.json",
        )
    if told is not None and named is not None:
        _agree(told, named, where, str(architecture))
    for publisher, activation in PUBLISHERS.items():
        for tower in TOWERS if publisher in (published or "").lower() else ():
            got = getattr(config, tower).hidden_act
            if got != activation:
                raise ModelError(
                    f"{published} was trained with {activation}, not {got} ({tower})",
                    "quick_gelu: the architecture whose name ends in -quickgelu; gelu: without",
                )
    return config


def _agree(told: Any, named: Any, where: Path, architecture: str) -> None:
    for tower in TOWERS:
        for fact in FACTS:
            ours, theirs = (getattr(getattr(c, tower), fact) for c in (named, told))
            if ours != theirs:
                raise ModelError(
                    f"{architecture} has {fact} {ours} ({tower}), {where} says {theirs}",
                    "name the architecture the weights were trained with",
                )
