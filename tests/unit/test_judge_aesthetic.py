"""Aesthetic heads: folded exactly, read in every published layout, literal on both towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import (
    EMBED,
    HEADS,
    LAYERS,
    PATCH,
    PROMPTS,
    SIDE,
    WIDTH,
    check_independence,
    check_slope,
    judge_of,
    media,
    pictures,
    shaken,
    tensor_of,
    transformers_folder,
    values,
)
from torch import Tensor, nn
from torchvision.transforms import v2

from t2i_align.catalog import find_root, read_card
from t2i_align.errors import ModelError
from t2i_align.judges.aesthetic import fold
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD, HALF
from t2i_align.judges.weights import VARIABLE, combined, sha256_of

CUBIC = v2.InterpolationMode.BICUBIC
CARDS = ("aesthetic_v1", "aesthetic_v2", "aesthetic_v2_5")


class Predictor(nn.Module):
    """LAION's MLP: linear layers, dropout between, no activation (``layers.{0,2,4,6,7}``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for given, out, drop in ((width, 12, 0.2), (12, 8, 0.2), (8, 6, 0.1)):
            parts += [nn.Linear(given, out), nn.Dropout(drop)]
        self.layers = nn.Sequential(*parts, nn.Linear(6, 4), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Scorer(nn.Module):
    """v2.5's head: one dropout more (``scoring_head.{0,2,4,6,8}``)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for given, out in ((width, 12), (12, 8), (8, 6), (6, 4)):
            parts += [nn.Linear(given, out), nn.Dropout(0.2)]
        self.scoring_head = nn.Sequential(*parts, nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scoring_head(x)


def head(card: str) -> Any:
    torch.manual_seed(1)
    width = WIDTH if card == "aesthetic_v2_5" else EMBED
    kinds: dict[str, Any] = {"aesthetic_v2": Predictor, "aesthetic_v2_5": Scorer}
    return shaken(kinds.get(card, lambda w: nn.Linear(w, 1))(width))


def siglip_folder(folder: Path) -> Any:
    """A whole SigLIP in transformers' layout; its vision tower is returned."""
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    tower |= {"num_attention_heads": HEADS}
    vision = tower | {"image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(2)
    model = shaken(SiglipModel(SiglipConfig(text_config=tower, vision_config=vision)))
    folder.mkdir(parents=True)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return model.vision_model


def literal(card: str, tower: Any, predictor: Any, images: list[Image.Image]) -> Tensor:
    """The published pipelines: embed, divide by the norm, run the layers."""
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if card == "aesthetic_v2_5":
        prepare = v2.Compose([v2.Resize((SIDE, SIDE), CUBIC), *floats, v2.Normalize(HALF, HALF)])
        seen = tower(torch.stack([prepare(i) for i in images])).pooler_output
    else:
        steps = [v2.Resize(SIDE, CUBIC), v2.CenterCrop(SIDE), *floats]
        prepare = v2.Compose([*steps, v2.Normalize(CLIP_MEAN, CLIP_STD)])
        inputs = torch.stack([prepare(i) for i in images])
        seen = tower.visual_projection(tower.vision_model(inputs).pooler_output)
    return predictor(seen / seen.norm(dim=-1, keepdim=True))[:, 0]


@pytest.fixture(scope="module", params=CARDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(card, tower, head, judge): everything in the weights' home, as an error would ask."""
    card, home = request.param, tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(home))
        options = read_card(find_root() / "reward_models" / card / "card.yaml").details["options"]
        if card == "aesthetic_v2_5":
            tower = siglip_folder(home / "siglip-so400m-patch14-384")
        else:
            tower = transformers_folder(home / "clip-vit-large-patch14", "quick_gelu")
        predictor = head(card)
        (home / card).mkdir()
        file = home / card / options["filename"]
        torch.save(predictor.state_dict(), file)
        trunk = {k: v for k, v in options["trunk"].items() if k != "architecture"}
        judge = judge_of(card, home, sha256=sha256_of(file), trunk=trunk)
        yield card, tower, predictor, judge


def test_the_literal_score(made: Any) -> None:
    card, tower, predictor, judge = made
    images = pictures()
    with torch.no_grad():
        expected = literal(card, tower, predictor, images)
    found = values(judge.score(media(images), PROMPTS))
    assert (found - expected).abs().max() <= 1e-5
    assert judge.weights_sha256 == combined((sha256_of(judge.file), sha256_of(judge.tower.source)))


def test_nothing_beside_a_sample_matters(made: Any) -> None:
    check_independence(made[3], media(pictures()), PROMPTS)


def test_tensors_follow_pictures_and_carry_gradients(made: Any) -> None:
    card, _, _, judge = made
    images = pictures(((40, 56),) * 3)
    tolerance = read_card(find_root() / "reward_models" / card / "card.yaml").details
    found = judge.score_tensor(tensor_of(images), PROMPTS[:3])
    apart = (found - values(judge.score(media(images), PROMPTS[:3]))).abs().max()
    assert apart <= tolerance["tensor_tolerance"]
    check_slope(lambda x: judge.score_tensor(x, PROMPTS[:3]), tensor_of(images))


@pytest.mark.parametrize("card", CARDS)
def test_folding_is_exact(card: str) -> None:
    """w x + b against the layers one after the other: 1e-12 in float64, 1e-6 in float32."""
    predictor = head(card)
    weight, bias = fold(predictor.state_dict(), "it")
    seen = torch.randn(50, weight.shape[0], generator=torch.Generator().manual_seed(3))
    single = predictor(seen)[:, 0]
    double = predictor.double()(seen.double())[:, 0]
    assert (seen.double() @ weight + bias - double).abs().max() <= 1e-12
    assert (seen @ weight.float() + bias.float() - single).abs().max() <= 1e-6
    again = fold({"weight": weight[None], "bias": bias[None]}, "it")
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)


def test_what_cannot_be_folded_is_refused() -> None:
    """Layers around ReLUs have other numbers; other heads have other shapes."""
    relu = {f"layers.{i}.{x}": torch.ones(1) for i in (0, 3, 6, 9, 10) for x in ("weight", "bias")}
    with pytest.raises(
        ModelError, match=r"the file is no affine aesthetic head: it holds layers\.0"
    ):
        fold(relu, "the file")
    two = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    with pytest.raises(ModelError, match=r"\[\(2, 3\)\] make no head with one output"):
        fold(two, "the file")
    broken = dict(Predictor(5).state_dict())
    broken["layers.2.weight"] = torch.ones(8, 13)
    with pytest.raises(ModelError, match=r"\(12, 5\), \(8, 13\).* make no head"):
        fold(broken, "the file")


def test_a_head_of_another_tower_is_refused(made: Any, tmp_path: Path) -> None:
    card, _, _, judge = made
    width = judge.head[0].shape[0]
    save_file(
        {"weight": torch.ones(1, width + 1), "bias": torch.ones(1)}, tmp_path / "h.safetensors"
    )
    own = judge.options.trunk.model_dump(exclude_defaults=True)
    own["name_or_path"] = str(judge.tower.source.parent)
    name = str(tmp_path / "h.safetensors")
    other = judge_of(card, tmp_path, name_or_path=name, trunk=own, sha256=None)
    with pytest.raises(ModelError, match=f"of {width + 1} numbers, .* gives {width}"):
        other.score_tensor(tensor_of(pictures(((40, 40),))), [""])


def test_a_missing_head_is_told_before_the_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v2.5 is never fetched: its licence is the user's choice."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    judge = judge_of("aesthetic_v2_5", find_root() / "reward_models")
    ask = r"bring aesthetic_predictor_v2_5\.pth of github\.com/discus0434"
    with pytest.raises(ModelError, match=rf"weights of 'aesthetic_v2_5' are missing(?s:.*){ask}"):
        judge.score(media(pictures()), PROMPTS)
