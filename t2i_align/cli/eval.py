"""``t2i-align eval``: a benchmark on a model, on pictures, or on stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from t2i_align.evaluate.run import Request


def evaluate(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="Which benchmark (`ls benchmarks`); 'suite NAME' runs several, 'fetch NAME' "
            "brings a benchmark's prompts."
        ),
    ],
    name: Annotated[
        str | None, typer.Argument(help="After 'suite' or 'fetch': which one.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the pipeline.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures, answers, verdicts and summary.")
    ] = None,
    lora: Annotated[str | None, typer.Option(help="Adapter to load on top.")] = None,
    denoiser: Annotated[
        str | None, typer.Option(help="unet/ or transformer/ folder of a full fine-tuning run.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Pictures made elsewhere, <id>/samples/0000.png, <id>.png, or as the benchmark's "
            "users name them; instead of --model."
        ),
    ] = None,
    detections: Annotated[
        Path | None, typer.Option(help="Stored answers.jsonl to judge again; instead of --model.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the benchmark, key=value; repeatable."),
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=2, help="scenes: pictures of each of the six tasks.")
    ] = None,
    prompt_seed: Annotated[
        int | None, typer.Option(min=0, help="scenes: which held-out prompts.")
    ] = None,
    training_prompts: Annotated[
        bool, typer.Option(help="scenes: training prompts instead of held-out ones.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps; left out: the benchmark's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=1, help="1 turns guidance off; left out: the benchmark's."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Side in pixels; left out: the benchmark's.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    precision: Annotated[
        Literal["autocast_bf16", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the model; autocast_bf16: float32 weights, bfloat16 arithmetic."),
    ] = "autocast_bf16",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures at once; a batch is never split over processes."),
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens of T5; left out: the pipeline's default.")
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that share out batches (and GPUs).")
    ] = 1,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Score though pictures are missing; marked.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Also write an HTML file: right and wrong verdicts.")
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Evaluation folder of the base model: diversity, drift and held-out judges "
            "beside the score."
        ),
    ] = None,
    embedding: Annotated[
        str, typer.Option(help="With --beside: judge whose picture embedding measures diversity.")
    ] = "clip_i",
    despite: Annotated[
        list[str] | None,
        typer.Option(help="With --beside: a setting in which the base differs on purpose."),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Draw on a Ray cluster with this many actors.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster; left out: a local one is started.")
    ] = None,
) -> None:
    """Evaluate: pictures, raw answers, verdicts, a summary with intervals; may be continued."""
    from t2i_align.evaluate.sampling import Model, Precision, defaults

    if benchmark == "fetch":
        _fetch(name)
        return
    if ray_workers is not None and model is None:
        raise typer.BadParameter("--ray-workers draws pictures, so it needs --model")
    if ray_address is not None and ray_workers is None:
        raise typer.BadParameter("--ray-address needs --ray-workers, the number of actors")
    if out is None:
        raise typer.BadParameter("give --out, the folder of the evaluation")
    drawn_by = None if model is None else Model(model, lora, denoiser, max_sequence_length)
    told: Precision = precision
    sampling: dict[str, Any] = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "resolution": resolution,
        "negative_prompt": negative_prompt,
        "precision": told,
        "batch_size": batch_size,
    }
    if benchmark == "suite":
        alone = {"--set": settings, "--detections": detections, "--report": report}
        _alone(alone | {"--beside": beside, "--ray-workers": ray_workers})
        how = (num_processes, num_threads)
        _suite(name, drawn_by, images, out, sampling, how, allow_partial)
        return
    if name is not None:
        raise typer.BadParameter(f"'{name}' follows neither 'suite' nor 'fetch'")
    options = _options(settings or [])
    for key, value in (("per_task", per_task), ("prompt_seed", prompt_seed)):
        options |= {} if value is None else {key: value}
    options |= {"held_out": False} if training_prompts else {}
    from t2i_align.evaluate.run import Request

    request = Request(
        benchmark,
        out,
        options,
        drawn_by,
        images,
        detections,
        defaults(benchmark).with_given(sampling),
        (num_processes, num_threads),
    )
    ray = None if ray_workers is None else (ray_address, ray_workers)
    base = None if beside is None else (beside, embedding, despite or [])
    _run(request, allow_partial, report, base, ray)


def _alone(given: dict[str, Any]) -> None:
    """Refuse what a suite does not pass on."""
    odd = [name for name, value in given.items() if value]
    if odd:
        raise typer.BadParameter(
            f"a suite takes no {', '.join(odd)}; options of its benchmarks stand in its file"
        )


def _run(
    request: Request,
    allow_partial: bool,
    report: Path | None,
    beside: tuple[Path, str, list[str]] | None,
    ray: tuple[str | None, int] | None,
) -> None:
    import torch
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.cli.show import print_pairs
    from t2i_align.evaluate.run import run
    from t2i_align.evaluate.run_report import build_run_report, lines

    hush()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True)
    if beside is not None:
        from t2i_align.evaluate.beside import pictures_of

        pictures_of(beside[0])  # said before hours of drawing
    if ray is not None:
        from t2i_align.evaluate.ray_run import Cluster, run_on_ray

        gpus = 1 if device == "cuda" else 0
        cluster = Cluster(*ray, request.processes[1] or 1, gpus)
        result = run_on_ray(request, cluster, console, device, allow_partial=allow_partial)
    else:
        result = run(request, console, device, allow_partial=allow_partial)
    source = request.model.name if request.model else str(request.images or request.answers)
    print_pairs(f"{request.benchmark}: {source}", lines(result))
    if beside is not None:
        _beside(request.out, *beside, device)
    if report is not None:
        build_run_report(request.out, report)
        typer.echo(f"wrote {report} ({report.stat().st_size / 1e6:.1f} MB)")


def _beside(out: Path, base: Path, embedding: str, despite: list[str], device: str) -> None:
    from t2i_align.cli.show import print_rows
    from t2i_align.evaluate.beside import BesideOptions, write_beside
    from t2i_align.evaluate.beside import beside as measured
    from t2i_align.evaluate.run_report import besides

    options = BesideOptions.model_validate({"embedding": embedding})
    write_beside(measured(out, base, options, device, despite), out)
    for section in besides(out):
        rows = [dict(zip(section.columns, cells, strict=True)) for cells in section.cells]
        if rows:
            print_rows(section.title, rows)


def _suite(
    name: str | None,
    model: Any,
    images: Path | None,
    out: Path,
    sampling: dict[str, Any],
    processes: tuple[int, int | None],
    allow_partial: bool,
) -> None:
    import torch
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.cli.show import print_rows
    from t2i_align.evaluate.suites import Setting, run_suite

    hush()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(model, images, out, sampling, processes, device, allow_partial)
    print_rows(f"suite {name}", run_suite(name or "", setting, Console(stderr=True)))


def _fetch(name: str | None) -> None:
    from t2i_align.evaluate.prompt_files import fetch

    if name is None:
        raise typer.BadParameter("fetch needs the name of a benchmark")
    for found in fetch(name):
        typer.echo(f"{found.path} (sha256 {found.sha256})")


def _options(given: list[str]) -> dict[str, Any]:
    from t2i_align.evaluate.settings import read_settings

    return read_settings(given)
