"""DrawBench (Saharia et al. 2022, arXiv:2205.11487): 200 prompts in 11 categories.

It has no metric of its own: people compared models side by side. Here a judge gives each picture a
number; reported are its mean by category and over all pictures (as the HPS v2 script does it), and
the share of prompts on which one model beats another. Seven to 38 prompts a category: read the
intervals.
"""

from __future__ import annotations

from typing import ClassVar

from t2i_align.evaluate.benchmark import Item
from t2i_align.evaluate.benchmarks.judged import Judged, read_table

COLUMNS = ("Prompts", "Category")


class DrawBench(Judged):
    """DrawBench under a judge."""

    name: ClassVar[str] = "drawbench"

    def read_items(self) -> list[Item]:
        """A row an item, numbered from 0."""
        rows = read_table(self.prompts, COLUMNS)
        return [
            Item(f"{k:05d}", row["Prompts"], row["Category"].strip()) for k, row in enumerate(rows)
        ]
