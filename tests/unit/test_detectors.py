"""Detectors with class names or torchvision's numbers: every box, class and score accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.errors import ModelError, UserError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors import DETECTORS, build
from t2i_align.evaluate.detectors.base import CLASSES, best
from t2i_align.evaluate.detectors.grounding_dino import CAPTION, GroundingDino, class_tokens
from t2i_align.evaluate.detectors.owlv2 import Owlv2
from t2i_align.evaluate.detectors.torchvision import LEFT_OUT, NAME_OF, NUMBERS, Torchvision
from t2i_align.evaluate.detectors.zero_shot import corners
from t2i_align.scenes.render import Scene, Thing, render
from tests.tiny_detectors import (
    bert_tokenizer,
    detector_options,
    grounding_dino_folder,
    owlv2_folder,
)


def noise(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [noise(60, 40, 0), noise(33, 64, 1), noise(50, 50, 2)]


def test_class_names_are_cocos_in_order() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[64:67], CLASSES[-1]) == (
        "person",
        ("computer mouse", "tv remote", "computer keyboard"),
        "toothbrush",
    )


def test_class_names_are_the_released_list(benchmarks_dir: Path) -> None:
    text = (benchmarks_dir / "geneval" / "object_names.txt").read_text()
    assert list(CLASSES) == text.split("\n")[:80]


def test_torchvisions_numbers_are_the_classes_in_order() -> None:
    """Against torchvision's own list of 91 names; three of GenEval's are renamed."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights as Weights

    names = Weights.COCO_V1.meta["categories"]
    assert [k for k, name in enumerate(names) if name == "N/A"] == sorted(LEFT_OUT)
    renamed = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    for number in NUMBERS:
        assert NAME_OF[number] == renamed.get(names[number], names[number])


def test_torchvisions_answers_are_read_literally() -> None:
    answer = {
        "labels": torch.tensor([18, 12, 1]),  # dog, a number left out, person
        "scores": torch.tensor([0.4, 0.9, 0.8]),
        "boxes": torch.tensor([[1.0, 2, 5, 6], [0, 0, 9, 9], [0, 0, 3, 3]]),
        "masks": torch.tensor([0.6, 0.9, 0.5]).view(3, 1, 1, 1).expand(3, 1, 4, 5),
    }
    found = Torchvision(detector_options())._read(answer)
    assert [(d.cls, d.box) for d in found] == [("person", (0, 0, 3, 3)), ("dog", (1, 2, 5, 6))]
    assert [d.mask.decode().all() for d in found if d.mask] == [False, True]  # above 1/2, not at it


@pytest.mark.slow
def test_mask_rcnn_of_torchvision_from_a_file(tmp_path: Path) -> None:
    """The full network with random weights whose class head always says dog."""
    from safetensors.torch import save_file
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    head: Any = model.roi_heads.box_predictor
    with torch.no_grad():
        head.cls_score.weight.zero_()
        head.cls_score.bias.zero_()
        head.cls_score.bias[18] = 6.0
    file = tmp_path / "mask_rcnn.safetensors"
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, file)
    detector = Torchvision(detector_options(name_or_path=str(file)))
    found = detector.detect([IMAGES[0]])[0]
    assert found and {d.cls for d in found} == {"dog"}
    expected = np.exp(6) / (np.exp(6) + 90)
    assert all(d.score == pytest.approx(expected, abs=1e-4) for d in found)
    assert all(d.mask is not None and d.mask.size == (40, 60) for d in found)
    assert len(detector.identity()["detector_sha256"]) == 64


def test_boxes_are_cut_to_the_picture_and_empty_ones_left_out() -> None:
    size, scale = (60, 40), (60.0, 60.0)  # padded to a square below
    assert corners(torch.tensor([0.5, 0.5, 0.5, 0.5]), scale, size) == (15, 15, 45, 40)
    assert corners(torch.tensor([0.5, 0.9, 0.2, 0.1]), scale, size) is None  # in the padding


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return owlv2_folder(tmp_path_factory.mktemp("owl"))


def test_owlv2_is_transformers_own_post_processing(owl: Path) -> None:
    """Same scores and classes; same boxes up to the cut, in pixels of the padded square."""
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    found = Owlv2(detector_options(name_or_path=str(owl), floor=0.0)).detect(IMAGES)
    model: Any = Owlv2ForObjectDetection.from_pretrained(owl).eval()
    processor: Any = Owlv2Processor.from_pretrained(owl)
    texts = [[f"a photo of a {name}" for name in CLASSES]]
    for image, own in zip(IMAGES, found, strict=True):
        inputs = processor(text=texts, images=[image], return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        (theirs,) = processor.image_processor.post_process_object_detection(
            out, threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        rows = zip(theirs["scores"], theirs["labels"], theirs["boxes"], strict=True)
        expected = {(CLASSES[c], round(float(s), 4)): b.tolist() for s, c, b in rows}
        assert own and len({d.cls for d in own}) > 1
        for d in own:
            box = expected[d.cls, round(d.score, 4)]
            limits = (image.width, image.height) * 2
            cut = [min(max(v, 0), limit) for v, limit in zip(box, limits, strict=True)]
            assert d.box == pytest.approx(cut, abs=1e-2)


def test_each_class_has_its_own_tokens() -> None:
    tokens: Any = bert_tokenizer()(CAPTION, return_offsets_mapping=True)
    offsets = [(int(a), int(b)) for a, b in tokens["offset_mapping"]]
    spans = class_tokens(offsets)
    words = bert_tokenizer().convert_ids_to_tokens(tokens["input_ids"])
    assert [" ".join(words[k] for k in span) for span in spans] == list(CLASSES)
    assert len({k for span in spans for k in span}) == sum(map(len, spans))
    with pytest.raises(ModelError, match="cut the 80 class names"):
        class_tokens(offsets[:100])


def test_grounding_dino_scores_a_class_by_its_best_token(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    folder = grounding_dino_folder(tmp_path_factory.mktemp("dino"))
    found = GroundingDino(detector_options(name_or_path=str(folder), floor=0.0)).detect(IMAGES[:2])
    model: Any = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    processor: Any = GroundingDinoProcessor.from_pretrained(folder)
    inputs = processor(images=IMAGES[:2], text=[CAPTION] * 2, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    for k, own in enumerate(found):
        assert own
        literal = []
        for query in range(out.logits.shape[1]):
            scores: dict[str, float] = {}
            name: list[str] = []
            at: list[float] = []
            for token, logit in zip(words[1:], out.logits[k, query, 1:], strict=False):
                if token in (".", "[SEP]"):
                    if name:
                        scores[" ".join(name)] = max(at)
                    name, at = [], []
                    continue
                name.append(token)
                at.append(float(logit.sigmoid()))
            winner = max(scores, key=lambda c: scores[c])
            literal.append((winner, round(scores[winner], 4)))
        assert {(d.cls, round(d.score, 4)) for d in own} <= set(literal)
        assert all(0 <= d.box[0] < d.box[2] <= IMAGES[k].width for d in own)


def test_what_is_kept() -> None:
    made = [Detection("dog", s, (0, 0, 1, 1)) for s in (0.05, 0.2, 0.9, *[0.1] * 120)]
    kept = best(made, 0.05)
    assert len(kept) == 100 and kept[0].score == 0.9 and all(d.score > 0.05 for d in kept)


def test_the_worlds_detector_names_colours() -> None:
    rng = np.random.default_rng(0)
    scene = Scene((Thing("car", "red", (20.0, 20.0), 26), Thing("bed", "blue", (46.0, 46.0), 26)))
    found = build("scenes", detector_options()).detect([Image.fromarray(render(scene, rng))])[0]
    assert {(d.cls, d.color) for d in found} == {("car", "red"), ("bed", "blue")}
    assert build("scenes", detector_options()).identity()["detector_sha256"] is None


def test_detectors_are_found_by_name() -> None:
    assert list(DETECTORS) == sorted(DETECTORS)
    with pytest.raises(UserError, match="did you mean 'owlv2'"):
        build("owlv", detector_options())
