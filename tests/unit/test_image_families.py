"""Rules of single families: CogView4's clock, PixArt's text and adapters, LoRA presets.

That a family's pictures and scores are its pipeline's is proven in parity/test_backbones.py.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.families.cogview import cogview4_shift
from t2i_align.generators.families.pixart import pixart_shapes
from t2i_align.process.schedule import Rectified
from t2i_align.rollout.walk import grid_of, sampled_process
from tests import tiny_image as tiny

HUB = {  # zai-org/CogView4-6B's scheduler
    "base_image_seq_len": 256,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "time_shift_type": "linear",
    "use_dynamic_shifting": True,
}
LORA = LoraOptions(r=2, lora_alpha=2)
SINGLE = ("sd3", "lumina2", "cogview4")  # one attention a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by builder, built once."""

    @cache
    def build(name: str) -> Path:
        return vars(tiny)[name](tmp_path_factory.mktemp(name))

    return build


def generator(where: Path, **changes: Any) -> DiffusersGenerator:
    """Loaded, adapters as asked."""
    options = DiffusersOptions(name_or_path=str(where), resolution=128, **changes)
    made = DiffusersGenerator(options)
    made.load_module(0, reference=False)
    return made


@pytest.mark.parametrize("told_level", [False, True])
def test_a_warped_clock_says_the_same_level_both_ways(told_level: bool) -> None:
    """Levels of a process do not depend on what the network is told of them.

    With k = 3 the middle s = 1/2 is sigma = 3 / 2 / (1 + 1) = 3/4; it is told 750, or 500.
    """
    process = Rectified(1000.0, 3.0, told_level=told_level)
    middle = process.time(torch.tensor(0.5))
    assert middle.item() == (500.0 if told_level else 750.0)
    alpha, sigma = process.coefficients(middle)
    assert (alpha.item(), sigma.item()) == (0.25, 0.75)
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    plain = Rectified(1000.0, 3.0)
    torch.testing.assert_close(process.level(process.time(levels)), plain.level(plain.time(levels)))


def test_cogview4s_shift_at_its_native_size() -> None:
    """1024 px are 64 x 64 tokens: k = 1/4 + 3/4 sqrt(4096 / 256) = 3.25; exponential e^3.25."""
    assert cogview4_shift(HUB, 4096) == 3.25
    grown = HUB | {"time_shift_type": "exponential"}
    assert cogview4_shift(grown, 4096) == pytest.approx(math.exp(3.25))
    assert cogview4_shift({"use_dynamic_shifting": False, "shift": 2.0}, 4096) == 2.0


def test_cogview4s_warp_is_no_choice_of_the_recipe(folder: Any) -> None:
    where = folder("cogview4")
    with pytest.raises(ModelError, match=r"timestep_shift.*belongs to the network"):
        DiffusersGenerator(
            DiffusersOptions(name_or_path=str(where), resolution=64, timestep_shift=3.0)
        )


@pytest.mark.parametrize("size", [None, (64, 192)])
def test_cogview4s_trajectories_have_the_clock_of_their_own_size(
    folder: Any, size: tuple[int, int] | None
) -> None:
    """A run samples at ``sample_size`` and stores at ``resolution``: each has a warp of its own.

    The grid of a walk has the levels of the pipeline's scheduler, which was told the sampled size.
    """
    g = generator(folder("cogview4"), sample_size=size)
    plan = g.prepare_sampling(["a cat"], num_steps=5, guidance=1.0).plan
    own = sampled_process(g.process, plan)
    grid = grid_of(own, 5, plan)
    torch.testing.assert_close(grid.sigma, torch.as_tensor(plan.sigmas).double(), atol=1e-5, rtol=0)
    off = (grid_of(g.process, 5, plan).sigma - grid.sigma).abs().max().item()
    assert off < 1e-5 if size is None else off > 1e-3
    tokens = 64 if size is None else 48  # of 2 x 2 latent pixels of 8 x 8
    assert isinstance(own, Rectified) and own.told_level
    assert own.shift == pytest.approx(cogview4_shift(plan.config, tokens), rel=1e-4)


def test_clocks_that_know_no_size_are_left_alone() -> None:
    plain = Rectified(shift=3.0)
    assert sampled_process(plain, None) is plain
    told = Rectified(shift=3.0, told_level=True)
    assert sampled_process(told, None) is told


def test_cogview4_pictures_do_not_depend_on_the_prompts_beside_them(folder: Any) -> None:
    """Its pipeline pads a short prompt to the longest and masks nothing; the suite asks apart."""
    g = generator(folder("cogview4"))
    prompts, seeds = ["a cat", "two dogs and a red umbrella on a boat"], torch.tensor([3, 4])
    both = g.prepare_sampling(prompts, num_steps=2, guidance=3.0)
    one = g.prepare_sampling(prompts[:1], num_steps=2, guidance=3.0)
    together = g.rollout(both, seeds, "policy").sample.state["x0"]
    alone = g.rollout(one, seeds[:1], "policy").sample.state["x0"]
    torch.testing.assert_close(together[:1], alone)


def test_pixart_says_by_its_config_how_much_text_it_takes() -> None:
    """Alpha 120 tokens, at 1024 px (sample_size 128) its size conditions too; sigma 300."""
    config = {"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": None}
    large = pixart_shapes(config)
    assert large["encoder_hidden_states"] == (120, 4096)
    assert large["added_cond_kwargs.resolution"] == (2,)
    assert pixart_shapes(config | {"sample_size": 64}).keys() == {
        "encoder_hidden_states",
        "encoder_attention_mask",
    }
    sigma = pixart_shapes(config | {"use_additional_conditions": False})
    assert sigma["encoder_attention_mask"] == (300,) and len(sigma) == 2
    assert pixart_shapes(config, 77)["encoder_attention_mask"] == (77,)


def test_an_adapter_of_another_network_is_refused_by_pixart(folder: Any, tmp_path: Path) -> None:
    """Peft reads PixArt's adapters, and would pass over what it does not find."""
    from safetensors.torch import load_file, save_file

    g = generator(folder("pixart"), lora=LORA)
    names = g.export(str(tmp_path))
    assert sorted(names) == ["adapter_config.json", "adapter_model.safetensors"]
    path = tmp_path / "adapter_model.safetensors"
    renamed = {k.replace("transformer_blocks", "others"): v for k, v in load_file(path).items()}
    save_file(renamed, path)
    with pytest.raises(ModelError, match=r"none of its layers.*others\.0\.attn1"):
        generator(folder("pixart")).load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "sd35", "pixart", "sana", "lumina2", "cogview4"]
)
def test_the_attention_preset_adapts_every_attention_layer(folder: Any, name: str) -> None:
    """Of SD3.5 medium's dual blocks the second attention, too."""
    from peft.tuners.lora import LoraLayer

    net = generator(folder(name), lora=LORA).module
    layers = {n: m for n, m in net.named_modules() if hasattr(m, "to_q")}
    assert len(layers) >= 2 and any(n.endswith("attn2") for n in layers) is (name not in SINGLE)
    for layer, attention in layers.items():
        projections: list[Any] = [attention.to_q, attention.to_k, attention.to_v]
        projections.append(attention.to_out[0])  # type: ignore[index]
        more = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        own = dict(attention.named_children())
        projections += [own[n] for n in more if n in own]
        assert all(isinstance(p, LoraLayer) for p in projections), layer
