"""The models that answer for T2I-CompBench, loaded when first needed.

What a picture's answer holds follows from what its category needs:

    blip        "yes": P(yes) of every question of the item
    detector    "size": [width, height], "detections": in the picture's pixels, best first
    depth       "depth": {"straight": [...], "swapped": [...]}, mean depth inside every detection's
                box with rows as y and, as the released script slices it, as x; null: no pixel
    clip        "cosine": of the picture and the item's caption
    vlm         "description", "marks": as written
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.evaluate.benchmark import Answer, Item, Picture
from t2i_align.evaluate.benchmarks.compbench_files import NAME
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.compbench import PEOPLE, frame_of, mean_depth, rescaled
from t2i_align.evaluate.metrics.compbench_numeracy import ALIASES
from t2i_align.judges.weight_files import combined, sha256_of
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from t2i_align.evaluate.benchmarks.compbench_blip import Blip
    from t2i_align.evaluate.benchmarks.compbench_vision import Depth
    from t2i_align.evaluate.benchmarks.compbench_vlm import Marks
    from t2i_align.judges.clip_family import ClipJudge

NEEDS: dict[str, tuple[str, ...]] = {
    "color": ("blip",),
    "shape": ("blip",),
    "texture": ("blip",),
    "spatial": ("detector",),
    "3d_spatial": ("detector", "depth"),
    "numeracy": ("detector",),
    "non_spatial": ("clip",),
    "complex": ("blip", "detector", "clip"),
}
CLIP = "timm/vit_base_patch32_clip_224.openai"
CLIP_REVISION = "ab5b8ef490e86faa07d3523926b842c765de1de5"
WEIGHTS = (".safetensors", ".bin")
FLOAT = torch.float32
WANTED = ["*.json", "*.txt", "*.safetensors", "*.bin"]


class ExpertOptions(Options):
    """Which models answer."""

    scoring: Literal["experts", "vlm"] = Field(
        default="experts", description="a model a category, or marks by a vision-language model"
    )
    blip_path: str = Field(
        default="Salesforce/blip-vqa-capfilt-large", description="BlipForQuestionAnswering"
    )
    blip_size: int = Field(default=480, ge=1, description="side of the picture that BLIP is shown")
    detector: Literal["owl", "detr", "scenes"] = Field(
        default="owl", description="in place of UniDet; see compbench_vision.py"
    )
    detector_path: str = Field(
        default="google/owlv2-base-patch16-ensemble", description="folder or hub id of the detector"
    )
    threshold: float = Field(
        default=0.5, ge=0, lt=1, description="a kept detection scores more; 0.5 is UniDet's"
    )
    depth_path: str = Field(
        default="Intel/dpt-hybrid-midas", description="folder or hub id of the depth model"
    )
    depth_size: int | None = Field(
        default=480, ge=1, description="side it is shown; null: its processor's own resizing"
    )
    clip_path: str = Field(default=CLIP, description="ViT-B/32: file, folder or hub id")
    clip_architecture: str | None = Field(
        default="ViT-B-32-quickgelu", description="open_clip's name; null: config.json beside it"
    )
    clip_filename: str | None = Field(
        default="open_clip_model.safetensors", description="of the weights in clip_path"
    )
    vlm_path: str = Field(default="Qwen/Qwen3-VL-8B-Instruct", description="model of scoring: vlm")
    vlm_max_pixels: int = Field(default=1048576, ge=1, description="larger pictures are shrunk")
    vlm_max_new_tokens: int = Field(default=256, ge=1, description="of each of its answers")


def folder_of(name: str, option: str) -> Path:
    """The folder of a model: a path, else a hub id's snapshot.

    Raises:
        ModelError: neither.
    """
    from huggingface_hub import snapshot_download

    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # network, permission, no such repository: one remedy
        raise ModelError(
            f"no folder '{name}', and no such model on the hub: {str(error).splitlines()[0]}",
            f"name a folder with --set {option}=FOLDER; a hub id needs the network once",
        ) from error


def weights_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of a model's weight files."""
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS)
    return combined(f"{p.name}\0{sha256_of(p)}" for p in files)


class Experts:
    """Answers about pictures; see the module."""

    def __init__(self, options: ExpertOptions, device: str) -> None:
        """Load nothing yet."""
        self.options, self.device = options, device
        self.ways: dict[str, Callable[[Picture, PILImage, Answer], Answer]] = {
            "blip": self._attributes,
            "detector": self._detections,
            "depth": self._depths,
            "clip": self._cosine,
            "vlm": self._marks,
        }
        self.facts: dict[str, Callable[[], dict[str, Any]]] = {
            "blip": lambda: self._fact("blip_path") | {"size": options.blip_size},
            "detector": self._detector_fact,
            "depth": lambda: self._fact("depth_path") | {"size": options.depth_size},
            "clip": self._clip_fact,
            "vlm": self._vlm_fact,
        }

    def needs(self, category: str) -> tuple[str, ...]:
        """Names of the models that a category asks, in this order."""
        return ("vlm",) if self.options.scoring == "vlm" else NEEDS[category]

    def answer(self, picture: Picture, image: PILImage) -> Answer:
        """What the models of a picture's category say of it."""
        found: Answer = {}
        for need in self.needs(picture.item.task):
            found |= self.ways[need](picture, image, found)
        return found

    def identity(self, categories: tuple[str, ...]) -> dict[str, Any]:
        """Every model that some categories ask, with the hash of its weights."""
        names = sorted({need for category in categories for need in self.needs(category)})
        return {name: self.facts[name]() for name in names}

    # --- what each says

    def _attributes(self, picture: Picture, image: PILImage, _: Answer) -> Answer:
        return {"yes": self.blip.ask(image, picture.item.metadata["questions"])}

    def _detections(self, picture: Picture, image: PILImage, _: Answer) -> Answer:
        found = self.detector(image, wanted(picture.item))
        return {"size": list(image.size), "detections": [d.to_dict() for d in found]}

    def _depths(self, _: Picture, image: PILImage, found: Answer) -> Answer:
        return {"depth": depths(self.depth(image), found["detections"], image.size)}

    def _cosine(self, picture: Picture, image: PILImage, _: Answer) -> Answer:
        scores = self.clip.score(
            [Media("image", picture.file.read_bytes())], [picture.item.metadata["caption"]]
        )
        if scores.reasons[0] is not None:
            raise ModelError(f"no cosine of {picture.file}: {scores.reasons[0]}")
        return {"cosine": float(scores.values[0])}

    def _marks(self, picture: Picture, image: PILImage, _: Answer) -> Answer:
        item = picture.item
        return self.vlm(image, item.task, item.prompt, item.metadata["chunks"])

    # --- the models

    @cached_property
    def blip(self) -> Blip:
        """BLIP."""
        from t2i_align.evaluate.benchmarks.compbench_blip import Blip

        folder = str(folder_of(self.options.blip_path, "blip_path"))
        return Blip(folder, self.device, self.options.blip_size)

    @cached_property
    def detector(self) -> Callable[[PILImage, list[str]], list[Detection]]:
        """The detector."""
        from t2i_align.evaluate.benchmarks.compbench_vision import DETECTORS

        options = self.options
        name = ""
        if options.detector != "scenes":
            name = str(folder_of(options.detector_path, "detector_path"))
        return DETECTORS[options.detector](name, options.threshold, self.device)

    @cached_property
    def depth(self) -> Depth:
        """The depth model."""
        from t2i_align.evaluate.benchmarks.compbench_vision import Depth

        folder = str(folder_of(self.options.depth_path, "depth_path"))
        return Depth(folder, self.device, self.options.depth_size)

    @cached_property
    def clip(self) -> ClipJudge:
        """CLIP, as a plain cosine."""
        from t2i_align.judges.clip_family import ClipJudge, ClipOptions

        o = self.options
        named = {"name_or_path": o.clip_path, "filename": o.clip_filename}
        named |= {"revision": CLIP_REVISION if o.clip_path == CLIP else None}
        options = ClipOptions.model_validate(named | {"architecture": o.clip_architecture})
        return ClipJudge(find_root() / "eval" / NAME, options, torch.device(self.device), FLOAT)

    @cached_property
    def vlm(self) -> Marks:
        """The vision-language model."""
        from t2i_align.evaluate.benchmarks.compbench_vlm import Marks

        o = self.options
        return Marks(o.vlm_path, o.vlm_max_pixels, o.vlm_max_new_tokens, self.device)

    # --- what a result says of them

    def _fact(self, option: str) -> dict[str, Any]:
        name = getattr(self.options, option)
        return {"name": name, "weights_sha256": weights_sha256(folder_of(name, option))}

    def _detector_fact(self) -> dict[str, Any]:
        facts = {"kind": self.options.detector, "threshold": self.options.threshold}
        return facts if self.options.detector == "scenes" else facts | self._fact("detector_path")

    def _clip_fact(self) -> dict[str, Any]:
        return {"name": self.options.clip_path, "weights_sha256": self.clip.weights_sha256}

    def _vlm_fact(self) -> dict[str, Any]:
        o = self.options
        facts = {"max_pixels": o.vlm_max_pixels, "max_new_tokens": o.vlm_max_new_tokens}
        return facts | {"name": o.vlm_path, "weights_sha256": self.vlm.weights_sha256}


def wanted(item: Item) -> list[str]:
    """Names that a detector is asked for: the item's objects after the scripts' aliases."""
    if item.task == "numeracy":
        return [ALIASES.get(word) or word for word, _ in item.metadata["targets"]]
    return [PEOPLE.get(word) or word for word in item.metadata["words"]]


def depths(
    depth: NDArray[np.float64], found: Sequence[dict[str, Any]], size: tuple[int, int]
) -> dict[str, list[float | None]]:
    """Mean depth inside every detection's box, rows taken for y and for x.

    Args:
        depth: map in the detector's frame.
        found: detections as plain data, boxes in the picture's pixels.
        size: (width, height) of the picture.
    """
    boxes = [
        d.box for d in rescaled([Detection.from_dict(d) for d in found], size, frame_of(*size))
    ]
    made: dict[str, list[float | None]] = {}
    for name, swapped in (("straight", False), ("swapped", True)):
        means = [mean_depth(depth, box, swapped=swapped) for box in boxes]
        made[name] = [None if math.isnan(mean) else mean for mean in means]
    return made
