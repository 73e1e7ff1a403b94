r"""Questions about pictures, answered in batches by a plug-in: ``{"text": ..., "p": ...}`` each.

    vlm    any image-text-to-text model of transformers. ``reading: yes_no`` looks at its answer's
           first token,
               (1)  p = P(yes) / (P(yes) + P(no)),   text = "yes" if p > 1/2 else "no"
           and ``reading: text`` keeps what it writes, greedily
    blip   BlipForQuestionAnswering, which writes its answer; questions of equal length go together,
           since transformers' decoder would attend to padding

The released judges of DPG-Bench, TIFA and DSG (mPLUG-large of ModelScope, PaLI) are not in
transformers. What they answered elsewhere can be replayed with ``--detections``; the benchmark's
own rules apply to any text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field

from t2i_align.contract import MediaError
from t2i_align.errors import DataError, ModelError
from t2i_align.evaluate.sentences import weights_of
from t2i_align.judges.scale import expectation, level_logs
from t2i_align.judges.vlm_common import VLMOptions, capped, talk
from t2i_align.judges.vlm_model import load_vlm, model_name

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Asked = tuple["PILImage", str]
Reply = dict[str, Any]
YES, NO = ("Yes", "yes"), ("No", "no")
TEMPLATES = {
    "yes_no": "{question} Please answer yes or no.",
    "text": "{question} Answer with a single word or number.",
}


class AskOptions(VLMOptions):
    """Mix-in of benchmarks that ask about pictures."""

    judge: Literal["vlm", "blip"] = Field(
        default="vlm", description="vlm: image-text-to-text model; blip: BlipForQuestionAnswering"
    )
    reading: Literal["yes_no", "text"] | None = Field(
        default=None,
        description="yes_no: P(yes) of the first token; text: the answer as written; null: "
        "the benchmark's own",
    )
    template: str | None = Field(
        default=None, description="what a vlm is asked, {question} in it once; null: by the reading"
    )
    max_new_tokens: int = Field(default=20, ge=1, description="of a written answer")


class Answerer(Protocol):
    """Answers questions about pictures."""

    def ask(self, asked: Sequence[Asked]) -> list[Reply]:
        """A reply to each (picture, question)."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Model, hash of its weights, how it is asked."""
        ...


def answerer(options: AskOptions, name: str, reading: str, device: str) -> Answerer:
    """The plug-in of some options; loads nothing yet.

    Args:
        options: of the benchmark.
        name: of the benchmark, for ``$T2I_ALIGN_WEIGHTS/<name>``.
        reading: the benchmark's own, where the options leave it open.
        device: for the model.

    Raises:
        DataError: no model is named, the reading does not fit, or the template lacks its field.
    """
    if options.name_or_path is None:
        raise DataError(f"{name} needs a judge", "--set name_or_path=FOLDER or hub id of a model")
    if options.template is not None and options.template.count("{question}") != 1:
        raise DataError("template holds {question} exactly once", f"got {options.template!r}")
    if options.judge == "blip":
        if options.reading == "yes_no" or options.template is not None:
            raise DataError(
                "judge=blip writes its answers and is asked the bare question",
                "leave out reading=yes_no and template, or use judge=vlm",
            )
        return Blip(options, Path(name), device)
    return Language(options, Path(name), options.reading or reading, device)


class Language:
    """A vision-language model; see the module."""

    def __init__(self, options: AskOptions, folder: Path, reading: str, device: str) -> None:
        """Load nothing yet."""
        self.options, self.folder, self.reading, self.device = options, folder, reading, device
        self.template = options.template or TEMPLATES[reading]

    @cached_property
    def vlm(self) -> Any:
        """The model, in bfloat16 on a GPU."""
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        return load_vlm(self.options, self.folder, torch.device(self.device), dtype)

    @cached_property
    def words(self) -> list[list[int]]:
        """First tokens of no and yes."""
        return self.vlm.first_tokens({"no": NO, "yes": YES})

    def ask(self, asked: Sequence[Asked]) -> list[Reply]:
        """Eq. (1) or the written answer of each (picture, question).

        Raises:
            DataError: a question holds a control token of the model.
        """
        found: list[Reply] = []
        for start in range(0, len(asked), self.options.batch_size):
            found += self._batch(asked[start : start + self.options.batch_size])
        return found

    def _batch(self, asked: Sequence[Asked]) -> list[Reply]:
        for _, question in asked:
            self._check(question)
        talks = [
            talk([capped(image, self.options.max_pixels)], self.template.replace("{question}", q))
            for image, q in asked
        ]
        if self.reading == "text":
            return [{"text": t} for t in self.vlm.texts(talks, self.options.max_new_tokens)]
        p = expectation(level_logs(self.vlm.slot(talks), self.words), (0.0, 1.0))  # (1)
        if not bool(torch.isfinite(p).all()):
            raise DataError(
                "the judge gives neither yes nor no any probability", "use reading=text"
            )
        return [{"text": "yes" if x > 0.5 else "no", "p": x} for x in p.tolist()]

    def _check(self, question: str) -> None:
        try:
            self.vlm.check(question)
        except MediaError as error:
            raise DataError(f"question {question!r}: {error}", "use another judge") from error

    def identity(self) -> Mapping[str, Any]:
        """Model, weights and question."""
        o = self.options
        return {
            "judge": o.name_or_path,
            "judge_sha256": self.vlm.weights_sha256,
            "judge_reading": self.reading,
            "template": self.template,
            "max_pixels": o.max_pixels,
        } | ({"max_new_tokens": o.max_new_tokens} if self.reading == "text" else {})


class Blip:
    """BlipForQuestionAnswering as transformers runs it; see the module."""

    def __init__(self, options: AskOptions, folder: Path, device: str) -> None:
        """Load nothing yet."""
        self.options, self.device = options, device
        self.name = model_name(options.name_or_path, folder)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Model and processor.

        Raises:
            ModelError: nothing to load there.
        """
        from transformers import BlipForQuestionAnswering, BlipProcessor

        where: dict[str, Any] = {"revision": self.options.revision}
        try:
            model: Any = BlipForQuestionAnswering.from_pretrained(self.name, **where)
            processor: Any = BlipProcessor.from_pretrained(self.name, **where)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no BlipForQuestionAnswering at '{self.name}': {str(error).splitlines()[0]}",
                "e.g. Salesforce/blip-vqa-capfilt-large; a hub id needs the network once",
            ) from error
        return model.to(self.device).eval(), processor

    def ask(self, asked: Sequence[Asked]) -> list[Reply]:
        """The written answer to each (picture, question)."""
        _, processor = self.parts
        lengths: dict[int, list[int]] = defaultdict(list)
        for k, (_, question) in enumerate(asked):
            lengths[len(processor.tokenizer(question).input_ids)].append(k)
        found: dict[int, str] = {}
        for positions in lengths.values():
            for start in range(0, len(positions), self.options.batch_size):
                part = positions[start : start + self.options.batch_size]
                found |= dict(zip(part, self._batch([asked[k] for k in part]), strict=True))
        return [{"text": found[k]} for k in range(len(asked))]

    @torch.inference_mode()
    def _batch(self, asked: Sequence[Asked]) -> list[str]:
        model, processor = self.parts
        images = [capped(image, self.options.max_pixels) for image, _ in asked]
        inputs = processor(images=images, text=[q for _, q in asked], return_tensors="pt")
        ids = model.generate(
            **inputs.to(self.device),
            max_new_tokens=self.options.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)]

    def _weights(self) -> str:
        assert self.parts is not None  # so that a hub id is fetched
        return weights_of(self.name, self.options.revision)

    def identity(self) -> Mapping[str, Any]:
        """Model and weights."""
        return {
            "judge": self.options.name_or_path,
            "judge_sha256": self._weights(),
            "judge_reading": "text",
            "max_pixels": self.options.max_pixels,
            "max_new_tokens": self.options.max_new_tokens,
        }
