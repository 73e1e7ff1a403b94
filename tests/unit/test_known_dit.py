"""Architectures of released transformers against the sizes of their published weights."""

from __future__ import annotations

import pytest

from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.known_dit import TRANSFORMERS

TOTALS = {  # scalars; the nominal size of each in billions is in the comment
    "Alpha-VLLM/Lumina-Image-2.0": 2_609_769_152,  # 2.6
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1_604_462_752,  # 1.6
    "Lightricks/LTX-Video": 1_923_385_472,  # 2
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 610_856_096,  # a file of 2,443,492,488 bytes, fp32
    "Qwen/Qwen-Image": 20_430_401_088,  # 20
    "THUDM/CogVideoX-2b": 1_693_783_872,  # 2
    "THUDM/CogView4-6B": 6_369_118_272,  # 6
    "Tongyi-MAI/Z-Image": 6_154_908_736,  # 6
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,  # 1.3 by its name
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,  # 12
    "black-forest-labs/FLUX.2-dev": 32_223_281_152,  # 32
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": 17_425_795_520,  # 34.9 GB, bf16
    "lodestones/Chroma1-HD": 8_899_983_424,  # 8.9
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sizes(name: str) -> None:
    g = DiffusersGenerator(DiffusersOptions(name_or_path=name), "meta")
    g.load_module(0, reference=False)
    assert sum(p.numel() for p in g.module.parameters()) == TOTALS[name]
