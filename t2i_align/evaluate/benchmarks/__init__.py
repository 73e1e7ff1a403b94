"""Benchmarks by name. A class is built from ``(its Options, device)`` and loads nothing then.

One line a benchmark; see :class:`t2i_align.evaluate.benchmark.Benchmark` for what it promises, and
:mod:`t2i_align.evaluate.prompt_files` for how it finds its prompts.
"""

from __future__ import annotations

from typing import Any

from t2i_align.errors import RecipeError
from t2i_align.evaluate.benchmark import Benchmark
from t2i_align.explain import validate
from t2i_align.registry import Table, load

BENCHMARKS: Table = {
    "dpg_bench": "t2i_align.evaluate.benchmarks.dpg:DPGBench",
    "drawbench": "t2i_align.evaluate.benchmarks.drawbench:DrawBench",
    "dsg": "t2i_align.evaluate.benchmarks.dsg:DSG",
    "genai_bench": "t2i_align.evaluate.benchmarks.genai_bench:GenAIBench",
    "genai_bench_527": "t2i_align.evaluate.benchmarks.genai_bench:GenAIBench527",
    "geneval": "t2i_align.evaluate.benchmarks.geneval:GenEval",
    "geneval_long": "t2i_align.evaluate.benchmarks.geneval:GenEvalLong",
    "geneval_plus_plus": "t2i_align.evaluate.benchmarks.geneval_plus_plus:GenEvalPlusPlus",
    "hpsv2_bench": "t2i_align.evaluate.benchmarks.hpsv2_bench:HpsV2Benchmark",
    "parti_prompts": "t2i_align.evaluate.benchmarks.parti_prompts:PartiPrompts",
    "scenes": "t2i_align.evaluate.benchmarks.scenes:Scenes",
    "t2i_compbench": "t2i_align.evaluate.benchmarks.compbench:CompBench",
    "text_rendering": "t2i_align.evaluate.benchmarks.text_rendering:TextRendering",
    "tifa": "t2i_align.evaluate.benchmarks.tifa:TIFA",
    "unigenbench": "t2i_align.evaluate.benchmarks.unigenbench:UniGenBench",
    "unigenbench_long": "t2i_align.evaluate.benchmarks.unigenbench:UniGenBenchLong",
}


def build(name: str, given: dict[str, Any], device: str = "cpu") -> Benchmark:
    """A benchmark by its name.

    Args:
        name: of :data:`BENCHMARKS`.
        given: its options as plain data; what is left out has its default.
        device: for its detectors and judges.

    Raises:
        UserError: no such benchmark; lists them and the nearest match.
        RecipeError: an option is unknown or not of its kind; names the nearest match.
    """
    cls = load(BENCHMARKS, name, "benchmark")
    options, problems = validate(cls.Options, given, (), lambda _: "--set")
    if options is None:
        raise RecipeError(problems, f"benchmark {name}")
    return cls(options, device)
