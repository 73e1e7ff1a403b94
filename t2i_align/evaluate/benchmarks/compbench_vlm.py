"""T2I-CompBench's marks by a vision-language model: describe the picture, then give a mark.

The released script asks ShareGPT4V-7B (temperature 0.2, top_p 0.7, so it answers differently every
time). Here any image-text-to-text model is asked greedily, in questions of our own words with the
same turns, criteria and scale; numbers compare among models asked here, not with the paper's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from t2i_align.judges.vlm_common import VLMOptions, capped, talk

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

ATTRIBUTES = ("color", "shape", "texture")
LOOK = "Describe this picture in at most 50 words. Name {what}."
WHAT = {
    **{name: f"the objects and the {name} of each" for name in ATTRIBUTES},
    "spatial": "the objects and where they are",
    "3d_spatial": "the objects and which is in front of which",
    "numeracy": "the objects and how many there are of each",
    "non_spatial": "the objects, what happens and who does what",
    "complex": "the objects, their color, shape and texture, where they are and what happens",
}
CRITERIA = {
    "attribute": "4: it is there, just as described; 3: it is there, mostly as described; "
    "2: it is there, but not as described; 1: it is not there.",
    "spatial": "5: every object is where the text says; 4: nearly so; 3: the objects are there, "
    "but not where the text says; 2: little fits; 1: nothing fits.",
    "3d_spatial": "5: every object is as near or far as the text says; 4: nearly so; 3: the "
    "objects are there, but not as the text says; 2: little fits; 1: nothing fits.",
    "numeracy": "5: every number is right; 4: nearly so; 3: the objects are there, but the "
    "numbers are wrong; 2: little fits; 1: nothing fits.",
    "non_spatial": "5: all that the text says happens; 4: most of it; 3: the objects are there, "
    "but what they do is wrong; 2: little fits; 1: nothing fits.",
    "complex": "5: all is as the text says; 4: most of it; 3: important parts are missing; "
    "2: little fits; 1: nothing fits.",
}
MARK = (
    'How well does the picture show "{text}"? Give a mark. {criteria} Answer in JSON with the keys '
    '"score" (a whole number) and "explanation" (at most 20 words).'
)


def questions(category: str, prompt: str, chunks: list[str]) -> list[str]:
    """What is asked after the description: for each noun phrase, or once for the prompt."""
    if category in ATTRIBUTES:
        criteria = CRITERIA["attribute"]
        return [MARK.replace("{criteria}", criteria).replace("{text}", c) for c in chunks]
    criteria = CRITERIA[category]
    return [MARK.replace("{criteria}", criteria).replace("{text}", prompt)]


class Marks:
    """Describes and marks pictures; see the module."""

    def __init__(self, name: str, max_pixels: int | None, max_new_tokens: int, device: str) -> None:
        """Load the model.

        Raises:
            ModelError: nothing to load there, or no chat template.
        """
        from t2i_align.catalog import find_root
        from t2i_align.judges.vlm_model import load_vlm

        options = VLMOptions(name_or_path=name, max_pixels=max_pixels)
        folder = find_root() / "eval" / "t2i_compbench"
        self.vlm = load_vlm(options, folder, torch.device(device), torch.float32)
        self.max_pixels, self.max_new_tokens = max_pixels, max_new_tokens

    @property
    def weights_sha256(self) -> str:
        """Hash of the model's weights."""
        return self.vlm.weights_sha256

    def __call__(
        self, image: PILImage, category: str, prompt: str, chunks: list[str]
    ) -> dict[str, Any]:
        """The description and the written marks.

        Raises:
            MediaError: the prompt holds a control token of the model.
        """
        self.vlm.check(prompt)
        shown = capped(image, self.max_pixels)
        look = LOOK.replace("{what}", WHAT[category])
        said = self.vlm.texts([talk([shown], look)], self.max_new_tokens)[0]
        begun = [*talk([shown], look), _turn("assistant", said)]
        talks = [[*begun, _turn("user", q)] for q in questions(category, prompt, chunks)]
        marks = [self.vlm.texts([t], self.max_new_tokens)[0] for t in talks]
        return {"description": said, "marks": marks}


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
