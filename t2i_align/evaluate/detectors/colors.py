"""GenEval's colour classifier: CLIP (Radford et al. 2021) on the picture of one object.

    (1)  w_c = n(mean over 3 templates of n(g(template of colour c and the class))),  n(v) = v / |v|
    (2)  colour = argmax_c <f(x), w_c> over the ten colours; there is no "none" and no threshold

x is the object on a flat ground outside its mask, cut to its box (detections.crop), the shorter
side resized to the network's size (bicubic), cut in the centre. As released: open_clip's
``ViT-L-14`` with OpenAI's weights and their quick GELU, autocast on CUDA; on the CPU everything is
float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.evaluate.detections import Detection, crop
from t2i_align.evaluate.metrics.geneval import COLORS
from t2i_align.judges.dual_encoder import DualEncoder, DualEncoderOptions

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
BATCH = 32


class ColorClassifier:
    """Names the colour of objects."""

    def __init__(
        self, model: str, pretrained: str | None, ground: tuple[str, bool], device: str = "cpu"
    ) -> None:
        """Load nothing yet.

        Args:
            model: open_clip's name of the network, or a folder of one.
            pretrained: its tag or file of weights; None for a folder.
            ground: colour outside the mask, or ``original``; whether to cut to the box.
            device: for the network.
        """
        self.bgcolor, self.crop_to_box = ground
        self.device = device
        where: dict[str, Any] = {"model": model, "pretrained": pretrained}
        if Path(model).expanduser().is_dir():
            where = {"path": str(Path(model).expanduser().resolve())}
        options = DualEncoderOptions(**where)
        self.network = DualEncoder(Path(), options, torch.device(device), torch.float32)
        self._weights: dict[str, Tensor] = {}

    @torch.inference_mode()
    def weights(self, name: str) -> Tensor:
        """Eq. (1) ``(10, d)`` of a class."""
        if name not in self._weights:
            texts = [t.format(c=c, name=name) for c in COLORS for t in TEMPLATES]
            ids = self.network.tokenizer(texts).to(self.device)
            with torch.autocast("cuda", enabled=self.device.startswith("cuda")):
                said = F.normalize(self.network.model.encode_text(ids).float(), dim=-1)
            mean = said.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._weights[name] = F.normalize(mean, dim=-1)  # (1)
        return self._weights[name]

    @torch.inference_mode()
    def colors(self, image: Image, found: Sequence[Detection]) -> list[str]:
        """Eq. (2) for each object.

        Args:
            image: RGB.
            found: its objects.
        """
        shown = [crop(image, d, self.bgcolor, self.crop_to_box) for d in found]
        named: list[str] = []
        for start in range(0, len(shown), BATCH):
            inputs = torch.stack([self.network.prepare.image(x) for x in shown[start:][:BATCH]])
            with torch.autocast("cuda", enabled=self.device.startswith("cuda")):
                seen = self.network.model.encode_image(inputs.to(self.device)).float()
            for x, d in zip(F.normalize(seen, dim=-1), found[start:][:BATCH], strict=True):
                named.append(COLORS[int((self.weights(d.cls) @ x).argmax())])  # (2)
        return named

    @cached_property
    def sha256(self) -> str:
        """Over names and numbers of the network."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Name, weights, activation and ground; of a file its name, not where it lies."""
        options = self.network.options
        weights = options.pretrained
        if weights is not None and Path(weights).is_file():
            weights = Path(weights).name
        name = Path(options.path).name if options.path else f"{options.model} {weights}"
        layers = {type(layer).__name__ for layer in self.network.model.modules()}
        return {
            "color_classifier": f"open_clip {name}",
            "color_activation": "quick_gelu" if "QuickGELU" in layers else "gelu",
            "color_classifier_sha256": self.sha256,
            "bgcolor": self.bgcolor,
            "crop": self.crop_to_box,
        }
