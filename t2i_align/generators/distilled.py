"""Models whose denoising error says little of what they generate.

A few-step distilled model (adversarial, consistency or score distillation) was trained at a handful
of noise levels to jump to the end. Its error at any other level is that of no model of the data, so
objectives that compare errors compare noise. SDXL's refiner was trained on low noise levels only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# the words by which published few-step models call themselves
WORDS = re.compile(r"(?<![a-z])(turbo|lightning|schnell|lcm|hyper[-_]?sd|dmd2?|tcd)(?![a-z])")
FEW_STEP_SCHEDULERS = frozenset({"LCMScheduler", "TCDScheduler"})
TRAILING = frozenset({"EulerDiscreteScheduler", "DDIMScheduler"})
REFINER = "StableDiffusionXLImg2ImgPipeline"
MEANFLOW_FIX = "train the weights it was distilled from: HunyuanImage-2.1-Diffusers"
EXPERTS_FIX = "train a version with one denoiser: Wan 2.1, or the 5B of Wan 2.2"


@dataclass(frozen=True)
class Described:
    """What is known of a pipeline before its weights are loaded.

    Args:
        names: hub ids or paths the weights come from.
        index: model_index.json.
        denoiser: the denoiser's config.
        scheduler: the scheduler's config.
    """

    names: tuple[str, ...]
    index: Mapping[str, Any] = field(default_factory=dict)
    denoiser: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def refiner_reason(index: Mapping[str, Any]) -> str | None:
    """Why a pipeline is a refiner, which cannot be trained on pairs, or None."""
    if index.get("_class_name") == REFINER or index.get("requires_aesthetics_score"):
        return (
            "this is SDXL's refiner: it knows low noise levels only, and its conditions hold an "
            "aesthetic score that pairs do not have"
        )
    return None


def experts_reason(index: Mapping[str, Any]) -> str | None:
    """Why a pipeline has two denoisers, of which a run would train one, or None."""
    if index.get("transformer_2", [None, None])[0] is not None:
        return (
            "this pipeline has two experts (transformer for high noise, transformer_2 for low), "
            "and a run trains one denoiser at all noise levels"
        )
    return None


def meanflow_reason(index: Mapping[str, Any], denoiser: Mapping[str, Any]) -> str | None:
    """Why a network is asked for more than a noise level, or None.

    HunyuanImage's distilled weights are told where the step ends and how strong guidance was.
    """
    if denoiser.get("use_meanflow"):
        return (
            "this network is distilled to few steps (use_meanflow): it predicts the mean velocity "
            "of a step whose end it is told, so its error at one noise level is no likelihood bound"
        )
    if index.get("_class_name") == "HunyuanImagePipeline" and denoiser.get("guidance_embeds"):
        return (
            "this is HunyuanImage's distilled version (guidance_embeds), whose error at a noise "
            "level is that of guided samples, not of data"
        )
    return None


def distilled_reason(model: Described) -> str | None:
    """Why a model is taken for few-step distilled, or None."""
    for name in model.names:
        found = WORDS.search(_own_name(name).lower())
        if found:
            return f"'{name}' calls itself {found.group(1)}"
    kind = str(model.scheduler.get("_class_name", ""))
    if kind in FEW_STEP_SCHEDULERS:
        return f"its scheduler is {kind}"
    spacing = model.scheduler.get("timestep_spacing")
    if kind == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
        return f"its scheduler is {kind} with timestep_spacing trailing, as of the turbo models"
    return _flux_reason(str(model.index.get("_class_name", "")), model)


def few_step_sampler(model: Described) -> str | None:
    """What a scheduler's config has in common with those of distilled adapters, or None.

    SDXL-Lightning is run by EulerDiscreteScheduler, Hyper-SD by DDIMScheduler, both with trailing
    timesteps; a pipeline saved after such an adapter was merged into it keeps that. So does many a
    plain pipeline, and models of zero terminal SNR need it: a doubt, no reason to refuse.
    """
    s = model.scheduler
    trailing = s.get("timestep_spacing") == "trailing" and not s.get("rescale_betas_zero_snr")
    if trailing and s.get("_class_name") in TRAILING:
        return f"its scheduler is {s['_class_name']} with timestep_spacing trailing"
    return None


def _flux_reason(pipeline: str, model: Described) -> str | None:
    if model.index.get("is_distilled"):
        return f"its {pipeline} says is_distilled, as FLUX.2 [klein] does and its base does not"
    untold = model.denoiser.get("guidance_embeds") is False
    if untold and pipeline.startswith("Flux2Pipeline"):
        return "a FLUX.2 transformer without guidance_embeds is not [dev] but a [klein]"
    if untold and pipeline.startswith("Flux") and not pipeline.startswith("Flux2"):
        return "a FLUX transformer without guidance_embeds is FLUX.1 [schnell]"
    return None


def _own_name(name: str) -> str:
    """A hub id, or the last part of a path: where a folder lies says nothing of the model."""
    parts = [p for p in name.rstrip("/").split("/") if p]
    local = name.startswith((".", "/", "~")) or len(parts) != 2
    return parts[-1] if local and parts else name
