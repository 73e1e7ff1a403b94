"""The HPS v2 benchmark (Wu et al. 2023, arXiv:2306.09341): 4 styles x 800 prompts, a picture each.

A picture's score is 100 times the cosine of HPS v2.1 (or v2.0: the two do not compare, the protocol
names which); equations of the table are in metrics/hpsv2.py. Another judge keeps its own scale.
Prompts are four files, ``<style>.json`` with a list of texts each; whether they are the published
ones is told by a hash of the texts, not of the files.

The released script evaluates whatever style folders exist and passes over missing pictures with a
message; here both are an error unless ``--allow-partial`` marks the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Item, Picture, Summary, Verdict
from t2i_align.evaluate.benchmarks.judged import (
    Judged,
    JudgedOptions,
    by_task,
    held_out_tables,
    mean_of_pictures,
)
from t2i_align.evaluate.metrics.hpsv2 import CHUNK, STYLES, style
from t2i_align.evaluate.prompt_files import CUSTOM, OFFICIAL, home, texts_sha256
from t2i_align.options import Options

SCALE = {"hpsv2": 100.0, "hpsv2_1": 100.0}
FOLDER = "hpdv2"
DEVIATION = {
    "official": f"deviation of the means of {CHUNK} pictures",
    "fixed": "deviation of the pictures",
}


class HpsV2Options(JudgedOptions):
    """Prompts, judges, which table."""

    prompts: str | None = Field(
        None, description="folder with <style>.json; null: hpdv2 in $T2I_ALIGN_BENCHMARKS"
    )
    images_per_prompt: int = Field(1, ge=1, description="the protocol: 1; diversity needs 2")
    judge: str = Field("hpsv2_1", description="hpsv2_1 or hpsv2, times 100; others as they are")
    held_out: list[str] = Field(
        ["pickscore"], description="judges that look on; not those a model was trained with"
    )
    styles: list[Literal["anime", "concept-art", "paintings", "photo"]] = Field(
        list(STYLES), min_length=1, description="which; the published Average is over all four"
    )
    variant: Literal["official", "fixed"] = Field(
        "official", description="mean and deviation: Eq. (1), (2) or (4), (5) of metrics/hpsv2.py"
    )


class HpsV2Benchmark(Judged):
    """Four styles under HPS v2."""

    Options: ClassVar[type[Options]] = HpsV2Options
    name: ClassVar[str] = "hpsv2_bench"

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """Prompts by style.

        Raises:
            DataError: a file is missing or is no list of texts.
        """
        given = self.options.prompts
        folder = Path(given).expanduser() if given else home() / FOLDER
        return {name: read_style(folder / f"{name}.json") for name in self.options.styles}

    def read_items(self) -> list[Item]:
        """Style by style; ``anime-00012`` is the file 00012.jpg of the style's folder."""
        return [
            Item(f"{name}-{k:05d}", text, name, {"style": name, "index": k})
            for name, texts in self.texts.items()
            for k, text in enumerate(texts)
        ]

    def scale(self) -> float:
        """100 for HPS v2, as printed."""
        return SCALE.get(self.options.judge, 1.0)

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """The script's table; the total is its Average, the mean of all pictures."""
        variant, values = self.options.variant, [v.score for v in verdicts]
        lines = {k: style(v, variant) for k, v in by_task(pictures, values).items()}
        tables = {DEVIATION[variant]: {name: line.deviation for name, line in lines.items()}}
        tables |= held_out_tables(pictures, verdicts)
        tasks = {name: line.mean for name, line in lines.items()}
        return Summary(tasks, mean_of_pictures(pictures, values), tables)

    def prompt_identity(self) -> dict[str, Any]:
        """A hash of the texts; official if every style is the published one."""
        from t2i_align.catalog import find_root, read_card

        card = read_card(find_root() / "eval" / self.name / "card.yaml")
        pinned = {Path(f["file"]).stem: f["texts_sha256"] for f in card.details["files"]}
        found = {name: texts_sha256(texts) for name, texts in self.texts.items()}
        official = all(pinned[name] == digest for name, digest in found.items())
        return {
            "prompts": OFFICIAL if official else CUSTOM,
            "prompts_sha256": texts_sha256(list(found.values())),
            "styles": list(self.texts),
            "variant": self.options.variant,
        }


def read_style(file: Path) -> list[str]:
    """Prompts of a style.

    Raises:
        DataError: no such file, or no list of texts.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"prompts: cannot read {file}: {error}",
            "run `t2i-align eval fetch hpsv2_bench`, or bring benchmark/<style>.json of "
            "zhwang/HPDv2 on the Hugging Face hub and name their folder with --set prompts=PATH",
        ) from error
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise DataError(f"prompts: {file} holds no list of texts")
    return found
