"""Options a family has no use for are refused; those it has change what they should, caches too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.export.merge import fold
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.calling import stacked
from t2i_align.generators.capture import STATIC, flatten, unflatten
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.quantize import Int8Linear
from t2i_align.generators.views import add_lora
from tests import tiny, tiny_declared, tiny_flux, tiny_image
from tests.backbones import PROMPTS
from tests.cases_declared import CASES

BRIA = next(case for case in CASES if case.name == "BriaPipeline")
BUILDERS = {
    "flux": tiny_flux.flux,
    "pixart": lambda where: tiny_image.pixart(where, sized=True),
    "bria": tiny_declared.bria,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by name, built once."""

    @cache
    def build(name: str) -> Path:
        where = tmp_path_factory.mktemp(name)
        return BUILDERS[name](where) if name in BUILDERS else tiny.pipeline_folder(name, where)

    return build


def made(where: Path, **changes: Any) -> DiffusersGenerator:
    """A generator, nothing loaded."""
    return DiffusersGenerator(
        DiffusersOptions.model_validate({"name_or_path": str(where), "resolution": 64} | changes)
    )


IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("sd3", {"embedded_guidance": 3.5}, r"model\.embedded_guidance: .*told no guidance"),
    ("sdxl", {"timestep_shift": 3.0}, r"model\.timestep_shift: .*flow models"),
    ("sd3", {"prediction_type": "epsilon"}, r"model\.prediction_type: .*predicts velocity"),
    ("sdxl", {"frame_rate": 8.0}, r"model\.frame_rate: .*pictures"),
    ("sd3", {"time_ids": "constant"}, r"model\.time_ids: .*no size conditions"),
    ("sdxl", {"sample_size": (0, 64)}, r"model\.sample_size: 0 x 64 .*positive multiples of 8"),
    ("sdxl", {"resolution": 68}, r"model\.resolution: 68 is not a multiple of 8"),
    ("bria", {**BRIA.options, "family": "flux"}, r"model\.family: .*model\.layout"),
]


@pytest.mark.parametrize(("name", "changes", "said"), IDLE)
def test_what_a_family_has_no_use_for_is_refused(
    folder: Any, name: str, changes: dict[str, Any], said: str
) -> None:
    """With what to do about it."""
    with pytest.raises(ModelError, match=said) as caught:
        made(folder(name), **changes)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sd3", {"prediction_type": "velocity", "timestep_shift": 2.0}), ("sdxl", {})],
)
def test_what_it_has_a_use_for_is_not(folder: Any, name: str, changes: dict[str, Any]) -> None:
    made(folder(name), **changes)


@pytest.mark.parametrize(("asked", "told"), [(None, 3.5), (0.0, 0.0), (1.0, 1.0)])
def test_a_distilled_network_is_told_the_scale_asked_for(
    folder: Any, asked: float | None, told: float
) -> None:
    """Zero is a scale, too."""
    g = made(folder("flux"), embedded_guidance=asked)
    cond = {
        "encoder_hidden_states": torch.zeros(2, 8, 32),
        "pooled_projections": torch.zeros(2, 16),
    }
    given = g.call.arguments(torch.zeros(2, *g.latent_shape(g.size)), torch.ones(2), cond)
    assert given["guidance"].tolist() == [told] * 2


def test_no_negative_prompt_where_there_is_no_second_branch(folder: Any) -> None:
    g = made(folder("flux"))
    with pytest.raises(ModelError, match=r"negative_prompt: .*no branch"):
        g.prepare_sampling(PROMPTS, num_steps=2, guidance=3.5, negative_prompt="blurry")


def test_size_conditions_come_from_the_network_not_from_the_cache(folder: Any) -> None:
    """PixArt-alpha's 512 px model leaves none in the cache that its 1024 px model may share."""
    g = made(folder("pixart"))
    conds = g.encode_prompts(PROMPTS)
    smaller = [{k: v for k, v in c.items() if "added_cond" not in k} for c in conds]
    assert smaller[0].keys() < conds[0].keys()
    x_t, time = torch.zeros(2, *g.latent_shape(g.size)), torch.ones(2)
    given = [
        g.call.arguments(x_t, time, stacked(c, ragged=False))["added_cond_kwargs"]
        for c in (conds, smaller)
    ]
    assert given[0]["resolution"].tolist() == [[64.0, 64.0]] * 2
    for name, value in given[0].items():
        assert torch.equal(value, given[1][name])


def test_caches_know_what_a_declared_layout_encodes(folder: Any) -> None:
    """Another codec is another latent; ids follow the network's config and the frame rate."""
    where = folder("bria")
    g = made(where, **BRIA.options)
    layout = BRIA.options["layout"]
    other = made(where, **BRIA.options | {"layout": layout | {"codec": "patchified"}})
    assert g.media_key() != other.media_key()
    key = g.text_key()
    g.config = g.config | {"patch_size": 9}
    assert g.text_key() != key


def test_one_value_for_a_batch_is_one_for_all_its_prompts() -> None:
    """Else the first prompt's would silently stand for all; apart, each has its own."""
    ids = [{"txt_ids": torch.full((3, 2), float(n)), "length": n} for n in (7, 7, 12)]
    same, other = (
        [{k: v[0] for k, v in flatten(i, 1).items()} for i in part] for part in (ids[:2], ids)
    )
    back = unflatten(stacked(same, ragged=False))
    assert back["length"] == 7 and back["txt_ids"].tolist() == [[7.0, 7.0]] * 3
    with pytest.raises(ModelError, match=r"model\.layout: .*'(txt_ids|length)'"):
        stacked(other, ragged=False)
    apart = stacked(other, ragged=True)  # "7" beside the longer "12"
    assert apart[STATIC + "length"].shape == (3, 2)
    assert unflatten(apart)["length"] == 7


def test_a_pipeline_class_diffusers_lacks_is_named(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(ModelError, match=r"model\.layout: .*no pipeline NoSuchPipeline"):
        made(tmp_path, **BRIA.options)


def test_nothing_is_merged_into_rounded_weights() -> None:
    """Their ``weight`` is rebuilt at each look: what is added to it would be lost."""
    net = nn.Sequential(nn.Linear(8, 8))
    net[0] = Int8Linear(nn.Linear(8, 8))
    lora = LoraOptions(r=2, lora_alpha=2, target_modules=["0"])
    add_lora(net, lora, [], 0)
    with pytest.raises(ModelError, match="is quantised"):
        fold(net)
