"""CLIP-I, DINO, the NSFW classifier and the safety checker against literal formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    clip_config,
    judge_of,
    media,
    open_clip_folder,
    pictures,
    shaken,
    tensor_of,
    values,
)
from torch import Tensor
from torchvision.transforms import v2

from t2i_align.catalog import find_root, read_card
from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from t2i_align.judges.safety_checker import SafetyChecker, SafetyOptions
from t2i_align.judges.weight_files import SOURCE, sha256_of

CUBIC = v2.InterpolationMode.BICUBIC
FLOATS = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def vit(classes: int | None) -> Any:
    """transformers' ViT or a classifier around it, small."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    names = {0: "normal", 1: "nsfw"}
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    torch.manual_seed(1)
    if classes is None:
        return shaken(ViTModel(config, add_pooling_layer=False))
    return shaken(ViTForImageClassification(config), seed=3)


OLD = (  # names of published ViTs, and since transformers 5
    ("encoder.layer.", "layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def published_name(name: str) -> str:
    for old, new in OLD:
        name = name.replace(new, old)
    return name


def vit_folder(folder: Path, classes: int | None) -> Any:
    """A folder with the names that published ViTs have."""
    model = vit(classes)
    folder.mkdir(parents=True)
    tensors = {published_name(k): v.clone() for k, v in model.state_dict().items()}
    assert any("attention.attention.query" in k for k in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return model


def safety_file(folder: Path) -> Any:
    """Diffusers' checker under the names of transformers 4: its vision model stands twice."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(2)
    model = shaken(StableDiffusionSafetyChecker(clip_config("quick_gelu")))
    model.concept_embeds.copy_(torch.randn(17, EMBED))
    model.concept_embeds_weights.copy_(torch.rand(17) * 0.3)
    twice = {k.replace("vision_model.", "vision_model.vision_model.", 1): v.clone()
             for k, v in model.state_dict().items()}  # fmt: skip
    twice["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    folder.mkdir(parents=True)
    save_file(twice, folder / "model.safetensors")
    clip_config("quick_gelu").save_pretrained(folder)
    return model


def cosines(first: Tensor, second: Tensor) -> Tensor:
    first, second = (x / x.norm(dim=-1, keepdim=True) for x in (first, second))
    return (first * second).sum(-1)


def clip_i_literal(model: Any, images: list[Any], references: list[Any]) -> Tensor:
    steps = [v2.Resize(SIDE, CUBIC), v2.CenterCrop(SIDE), *FLOATS]
    prepare = v2.Compose([*steps, v2.Normalize(CLIP_MEAN, CLIP_STD)])
    first, second = (torch.stack([prepare(i) for i in s]) for s in (images, references))
    return cosines(model.encode_image(first), model.encode_image(second))


def dino_literal(model: Any, images: list[Any], references: list[Any]) -> Tensor:
    """Resize 256, crop 224 (here of 32), ImageNet's mean, first token after the last norm."""
    steps = [v2.Resize(round(SIDE * 256 / 224), CUBIC), v2.CenterCrop(SIDE), *FLOATS]
    prepare = v2.Compose([*steps, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    first, second = (torch.stack([prepare(i) for i in s]) for s in (images, references))
    return cosines(*(model(x).last_hidden_state[:, 0] for x in (first, second)))


def nsfw_literal(model: Any, images: list[Any], _: list[Any]) -> Tensor:
    bilinear = v2.InterpolationMode.BILINEAR
    prepare = v2.Compose([v2.Resize((SIDE, SIDE), bilinear), *FLOATS, v2.Normalize(HALF, HALF)])
    logits = model(torch.stack([prepare(i) for i in images])).logits
    return logits.exp()[:, 1] / logits.exp().sum(-1)


def safety_literal(model: Any, images: list[Any], _: list[Any]) -> Tensor:
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
    from transformers import CLIPImageProcessorPil

    size: Any = {"shortest_edge": SIDE}
    prepare: Any = CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
    pooled = model.vision_model(prepare(images, return_tensors="pt")["pixel_values"])[1]
    cosine = cosine_distance(model.visual_projection(pooled), model.concept_embeds)
    return torch.stack([max(c - t for c, t in zip(row, model.concept_embeds_weights, strict=True))
                        for row in cosine])  # fmt: skip


LITERAL: dict[str, Any] = {
    "clip_i": clip_i_literal,
    "dino": dino_literal,
    "nsfw": nsfw_literal,
    "safety_checker": safety_literal,
}
COMPARES = ("clip_i", "dino")
BUILD: dict[str, Any] = {
    "clip_i": lambda f: open_clip_folder(f, True, "open_clip_model.safetensors"),
    "dino": lambda f: vit_folder(f, None),
    "nsfw": lambda f: vit_folder(f, 2),
    "safety_checker": safety_file,
}


@pytest.fixture(scope="module", params=sorted(LITERAL))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(card, network, judge, folder)."""
    card, folder = request.param, tmp_path_factory.mktemp("reference")
    model = BUILD[card](folder / card)
    changed: dict[str, Any] = {"name_or_path": ".", "revision": None}
    if card == "clip_i":
        changed["architecture"] = None
    if card == "safety_checker":
        changed["filename"] = "model.safetensors"
    return card, model, judge_of(card, folder, **changed), folder / card


def referenced(images: list[Any], references: list[Any]) -> list[Media]:
    pairs = zip(media(images), media(references), strict=True)
    return [Media("image", m.data, {"reference": r}) for m, r in pairs]


def test_a_published_checkpoint_gives_the_literal_score(made: Any) -> None:
    card, model, judge, folder = made
    images = pictures()
    with torch.no_grad():
        expected = LITERAL[card](model, images, images[::-1])
    found = values(judge.score(referenced(images, images[::-1]), PROMPTS))
    assert (found - expected).abs().max() <= 1e-5 and expected.std() > 1e-3
    whole = folder if card in ("dino", "nsfw") else next(folder.glob("*.safetensors"))
    assert judge.weights_sha256 == sha256_of(whole)


def test_nothing_beside_a_sample_matters(made: Any) -> None:
    images = pictures()
    check_independence(made[2], referenced(images, images[::-1]), PROMPTS)


def test_tensors_follow_pictures_and_carry_gradients(made: Any) -> None:
    card, _, judge, _ = made
    images = pictures(((40, 56),) * 4)
    more: Any = (tensor_of(images[::-1]),) if card in COMPARES else ()
    found = judge.score_tensor(tensor_of(images), PROMPTS[:4], *more)
    seen = values(judge.score(referenced(images, images[::-1]), PROMPTS[:4]))
    tolerance = read_card(find_root() / "reward_models" / card / "card.yaml").details
    assert (found - seen).abs().max() <= tolerance["tensor_tolerance"]
    check_slope(lambda x: judge.score_tensor(x, PROMPTS[:4], *more), tensor_of(images))
    if card in COMPARES:
        check_slope(
            lambda x: judge.score_tensor(tensor_of(images), PROMPTS[:4], x), tensor_of(images[::-1])
        )


@pytest.mark.parametrize("made", COMPARES, indirect=True)
def test_a_picture_is_most_like_itself_and_needs_a_reference(made: Any) -> None:
    judge, images = made[2], pictures()
    same = values(judge.score(referenced(images, images), PROMPTS))
    assert same.tolist() == pytest.approx([1] * 5, abs=1e-5)
    broken = Media("image", b"no")
    two = [media(images)[0], Media("image", media(images)[0].data, {"reference": broken})]
    found = judge.score(two, ["", ""])
    assert found.values.isnan().all()
    assert found.reasons[0] == "no reference picture: this judge compares with meta['reference']"
    assert str(found.reasons[1]).startswith("the reference: not an image")


def test_the_checkers_sign_is_the_pipelines_verdict(tmp_path: Path) -> None:
    """Without its two steps (rounding, special care), s > 0 is has_nsfw_concepts."""
    model = safety_file(tmp_path / "safety_checker")
    judge = judge_of("safety_checker", tmp_path, name_or_path=".", filename="model.safetensors")
    images = pictures()
    found = values(judge.score(media(images), PROMPTS))
    model.special_care_embeds_weights.fill_(9)  # never
    inputs = torch.stack([judge.prepare.image(i) for i in images])
    near = model.concept_embeds_weights.clone()
    for shift in (-0.1, 0.0, 0.1):
        model.concept_embeds_weights.copy_(near + found.median() + shift)
        _, verdict = model(inputs, inputs.clone())
        margin = found - found.median() - shift
        clear = margin.abs() > 1e-3
        assert (margin[clear] > 0).tolist() == [v for v, c in zip(verdict, clear, strict=True) if c]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "nsfw"
    vit_folder(folder, 2)
    asked = judge_of("nsfw", tmp_path, name_or_path=".", label="blood")
    with pytest.raises(ModelError, match=r"no class 'blood' in .*; known: normal, nsfw"):
        _ = asked.model
    told = {"image_mean": [0.485, 0.456, 0.406], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    judge = judge_of("nsfw", tmp_path, name_or_path=".")
    with pytest.raises(ModelError, match=r"says image_mean \[0\.485, .*; this judge prepares with"):
        _ = judge.model
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"no ViTModel in (?s:.*)judges convert"):
        _ = judge_of("dino", tmp_path, name_or_path=".", revision=None).tower
    tensors = {published_name(k): v.clone() for k, v in vit(None).state_dict().items()}
    tensors.pop("layernorm.bias")
    save_file(tensors, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit a ViTModel: layernorm\.bias missing"):
        _ = judge_of("dino", tmp_path, name_or_path=".", revision=None).tower


def test_the_checker_is_refused_with_another_activation(tmp_path: Path) -> None:
    safety_file(tmp_path / "safety_checker")
    clip_config("gelu").save_pretrained(tmp_path / "safety_checker")
    judge = judge_of("safety_checker", tmp_path, name_or_path=".", filename="model.safetensors")
    with pytest.raises(ModelError, match="safety checker was trained with quick_gelu, not gelu"):
        _ = judge.model


def test_thresholds_and_concepts_stay_float32(tmp_path: Path) -> None:
    published = safety_file(tmp_path / "safety_checker")
    given = {"name_or_path": ".", "filename": "model.safetensors"}
    options = SafetyOptions.model_validate(given)
    judge = SafetyChecker(tmp_path / "safety_checker", options, torch.device("cpu"), torch.bfloat16)
    assert judge.model.visual_projection.weight.dtype == torch.bfloat16
    for name in ("concept_embeds", "concept_embeds_weights"):
        assert torch.equal(getattr(judge.model, name), getattr(published, name))


def test_a_folder_of_another_hash_is_refused(tmp_path: Path) -> None:
    vit_folder(tmp_path / "nsfw", 2)
    file = tmp_path / "nsfw/model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", SOURCE: "ab" * 32})  # as convert
    right = sha256_of(file)
    for given in (right, "ab" * 32):
        assert judge_of("nsfw", tmp_path, name_or_path=".", sha256=given).model is not None
    wrong = judge_of("nsfw", tmp_path, name_or_path=".", sha256="0" * 64)
    with pytest.raises(ModelError, match=rf"has sha256 {right}, not 0000"):
        _ = wrong.model
