"""Options of ``t2i-align eval``; some of them are those of ``generate`` too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Benchmark = Annotated[
    str,
    typer.Argument(
        help="Which benchmark (`ls benchmarks`); 'suite NAME' runs several, 'fetch NAME' "
        "brings a benchmark's prompts."
    ),
]
Name = Annotated[
    str | None, typer.Argument(help="After 'suite' or 'fetch': which one.", show_default=False)
]
Model = Annotated[str | None, typer.Option(help="Folder or hub id of the pipeline.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for pictures, answers, verdicts and summary.")
]
Lora = Annotated[
    str | None, typer.Option(help="Adapter folder, file or hub id (load_lora_weights).")
]
Denoiser = Annotated[
    str | None, typer.Option(help="unet/ or transformer/ folder of a full fine-tuning run.")
]
Images = Annotated[
    Path | None,
    typer.Option(
        help="Pictures made elsewhere, <id>/samples/0000.png, <id>.png, or as the benchmark's "
        "users name them; instead of --model."
    ),
]
Detections = Annotated[
    Path | None, typer.Option(help="Stored answers.jsonl to judge again; instead of --model.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the benchmark, key=value; repeatable."),
]
PerTask = Annotated[
    int | None, typer.Option(min=2, help="scenes: pictures of each of the six tasks.")
]
PromptSeed = Annotated[int | None, typer.Option(min=0, help="scenes: which held-out prompts.")]
TrainingPrompts = Annotated[
    bool, typer.Option(help="scenes: training prompts instead of held-out ones.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
NumInferenceSteps = Annotated[
    int | None, typer.Option(min=1, help="Sampler steps; left out: the benchmark's.")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(min=1, help="1 turns guidance off; left out: the benchmark's."),
]
Resolution = Annotated[
    int | None, typer.Option(min=16, help="Side in pixels; left out: the benchmark's.")
]
NegativePrompt = Annotated[str | None, typer.Option(help="What to avoid.")]
Precision = Annotated[
    Literal["autocast_bf16", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the model; autocast_bf16: float32 weights, bfloat16 arithmetic."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Pictures at once; a batch is never split over processes."),
]
MaxSequenceLength = Annotated[
    int | None, typer.Option(min=1, help="Text tokens of T5; left out: the pipeline's default.")
]
NumProcesses = Annotated[
    int, typer.Option(min=1, help="Processes that share out batches (and GPUs).")
]
NumThreads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Score though pictures are missing; marked.")
]
Report = Annotated[
    Path | None, typer.Option(help="Also write an HTML file: right and wrong verdicts.")
]
Beside = Annotated[
    Path | None,
    typer.Option(
        help="Evaluation folder of the base model: diversity, drift and held-out judges "
        "beside the score."
    ),
]
Embedding = Annotated[
    str, typer.Option(help="With --beside: judge whose picture embedding measures diversity.")
]
Despite = Annotated[
    list[str] | None,
    typer.Option(help="With --beside: a setting in which the base differs on purpose."),
]
RayWorkers = Annotated[
    int | None, typer.Option(min=1, help="Draw on a Ray cluster with this many actors.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Of a running cluster; left out: a local one is started.")
]
