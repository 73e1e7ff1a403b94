"""``t2i-align eval``: a benchmark on a model, on pictures, or on stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from t2i_align.cli import options

if TYPE_CHECKING:
    from t2i_align.evaluate.run import Request


def evaluate(
    benchmark: options.Benchmark,
    name: options.Name = None,
    model: options.Model = None,
    out: options.Out = None,
    lora: options.Lora = None,
    denoiser: options.Denoiser = None,
    images: options.Images = None,
    detections: options.Detections = None,
    settings: options.Settings = None,
    per_task: options.PerTask = None,
    prompt_seed: options.PromptSeed = None,
    training_prompts: options.TrainingPrompts = False,
    seed: options.Seed = 0,
    num_inference_steps: options.NumInferenceSteps = None,
    guidance_scale: options.GuidanceScale = None,
    resolution: options.Resolution = None,
    negative_prompt: options.NegativePrompt = None,
    precision: options.Precision = "autocast_bf16",
    batch_size: options.BatchSize = None,
    max_sequence_length: options.MaxSequenceLength = None,
    num_processes: options.NumProcesses = 1,
    num_threads: options.NumThreads = None,
    allow_partial: options.AllowPartial = False,
    report: options.Report = None,
    beside: options.Beside = None,
    embedding: options.Embedding = "clip_i",
    despite: options.Despite = None,
    ray_workers: options.RayWorkers = None,
    ray_address: options.RayAddress = None,
) -> None:
    """Evaluate: pictures, raw answers, verdicts, a summary with intervals; may be continued."""
    if benchmark == "fetch":
        return _fetch(name)
    _consistent(model, out, ray_workers, ray_address)
    from t2i_align.evaluate.sampling import Model

    assert out is not None
    drawn_by = None if model is None else Model(model, lora, denoiser, max_sequence_length)
    sampling: dict[str, Any] = {
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "resolution": resolution,
        "negative_prompt": negative_prompt,
        "precision": precision,
        "batch_size": batch_size,
    }
    how = (num_processes, num_threads)
    if benchmark == "suite":
        alone = {"--set": settings, "--detections": detections, "--report": report}
        _alone(alone | {"--beside": beside, "--ray-workers": ray_workers})
        return _suite(name, drawn_by, images, out, sampling, how, allow_partial)
    if name is not None:
        raise typer.BadParameter(f"'{name}' follows neither 'suite' nor 'fetch'")
    from t2i_align.evaluate.run import Request
    from t2i_align.evaluate.sampling import defaults

    chosen = _chosen(settings, per_task, prompt_seed, training_prompts)
    drawn = defaults(benchmark).with_given(sampling)
    request = Request(benchmark, out, chosen, drawn_by, images, detections, drawn, how)
    ray = None if ray_workers is None else (ray_address, ray_workers)
    base = None if beside is None else (beside, embedding, despite or [])
    return _run(request, allow_partial, report, base, ray)


def _consistent(
    model: str | None, out: Path | None, ray_workers: int | None, ray_address: str | None
) -> None:
    """Refuse flags that do not go together."""
    if ray_workers is not None and model is None:
        raise typer.BadParameter("--ray-workers draws pictures, so it needs --model")
    if ray_address is not None and ray_workers is None:
        raise typer.BadParameter("--ray-address needs --ray-workers, the number of actors")
    if out is None:
        raise typer.BadParameter("give --out, the folder of the evaluation")


def _chosen(
    settings: list[str] | None, per_task: int | None, prompt_seed: int | None, training: bool
) -> dict[str, Any]:
    """The benchmark's options, those of ``scenes`` by flags of their own."""
    from t2i_align.evaluate.settings import read_settings

    found = read_settings(settings or [])
    for key, value in (("per_task", per_task), ("prompt_seed", prompt_seed)):
        found |= {} if value is None else {key: value}
    return found | ({"held_out": False} if training else {})


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

    from t2i_align.cli.show import print_pairs
    from t2i_align.evaluate.run import run
    from t2i_align.evaluate.run_report import build_run_report, lines
    from t2i_align.quiet import hush

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

    chosen = BesideOptions.model_validate({"embedding": embedding})
    write_beside(measured(out, base, chosen, device, despite), out)
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

    from t2i_align.cli.show import print_rows
    from t2i_align.evaluate.suites import Setting, run_suite
    from t2i_align.quiet import hush

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
