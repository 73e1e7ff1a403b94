"""Pictures of an evaluation drawn by a Ray cluster: Ray Data actors, one piece of work at a time.

    missing pieces (fixed size, never split) -> actors: model, pictures -> here: files

A piece is a batch of the same pictures that one process would draw together (work.py), so with
equal threads the pictures are bit-equal to those of ``t2i-align eval`` without Ray; otherwise they
differ by rounding. Actors need the model's files (a hub id, or a folder every node has) but no
shared folder for pictures: these travel back as PNG and are written here, so a run that is stopped
goes on where it was, with Ray or without. Answers and verdicts are made here afterwards.
"""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2i_align.errors import InterruptedRun
from t2i_align.evaluate.pictures import chunks, save
from t2i_align.evaluate.run import Request, claim, facts_of, run
from t2i_align.evaluate.sampling import Model, Sampling, load_model, sample
from t2i_align.evaluate.work import Job, Worker
from t2i_align.optional import require
from t2i_align.progress import progress

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Cluster:
    """Where pieces are drawn.

    Args:
        address: of a cluster that runs (``auto``: the one of this machine); None: a local one,
            started now and stopped in the end. A cluster this process is connected to is used.
        num_workers: actors; each loads the model once.
        num_threads: CPU threads of each, also what Ray reserves.
        num_gpus: GPUs of each, 0 draws on the CPU.
    """

    address: str | None = None
    num_workers: int = 2
    num_threads: int = 1
    num_gpus: float = 0


class Drawer:
    """An actor: the model on some node of the cluster."""

    def __init__(self, model: Model, sampling: Sampling, device: str, num_threads: int) -> None:
        """Load the model.

        Args:
            model: that draws.
            sampling: how.
            device: ``cpu`` or ``cuda``, of this actor.
            num_threads: of torch.
        """
        import torch

        torch.set_num_threads(num_threads)
        self.sampling = sampling
        self.generator = load_model(model, sampling, device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """PNG files of a piece.

        Args:
            batch: one row, ``{piece, prompts, seeds}``.
        """
        ((piece,), (prompts,), (seeds,)) = (batch[k] for k in ("piece", "prompts", "seeds"))
        asked = [str(p) for p in prompts], [int(s) for s in seeds]
        files = [_png(image) for image in sample(self.generator, *asked, self.sampling)]
        node = _ray().get_runtime_context().get_node_id()
        return {"piece": [[int(k) for k in piece]], "files": [files], "node": [node]}


def _ray() -> Any:
    """Ray with its data module, which the tools that check this file do without."""
    require("ray", "ray", "drawing on a cluster")
    importlib.import_module("ray.data")
    return importlib.import_module("ray")


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def drawn(
    request: Request, rows: Sequence[Mapping[str, Any]], cluster: Cluster
) -> Iterator[dict[str, Any]]:
    """Draw pieces; ``{piece, files, node}`` of each as it is done, in no order.

    Args:
        request: with a model.
        rows: ``{piece, prompts, seeds}``, positions of pictures with what they are drawn from.
        cluster: where.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    device = "cuda" if cluster.num_gpus else "cpu"
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        # a block a piece: Ray moves blocks, so none is split and none is joined to another
        data = ray.data.from_items(list(rows), override_num_blocks=len(rows))
        found = data.map_batches(
            Drawer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(cluster.num_workers, len(rows))),
            fn_constructor_args=(request.model, request.sampling, device, cluster.num_threads),
            num_cpus=cluster.num_threads,
            num_gpus=cluster.num_gpus or None,
        )
        yield from found.iter_rows()
    finally:
        if started:
            ray.shutdown()


def draw_on_ray(worker: Worker, request: Request, cluster: Cluster, console: Console) -> list[str]:
    """Draw what is missing, a whole piece at a time.

    Args:
        worker: of this process; it loads no model.
        request: what is evaluated.
        cluster: where.
        console: for progress.

    Returns:
        The node that drew each piece.
    """
    from PIL import Image

    pictures, seeds = worker.pictures, worker.seeds
    pieces = chunks(len(pictures), request.sampling.batch_size)
    missing = [c for c in pieces if not all(pictures[k].file.exists() for k in c)]
    rows = [
        {
            "piece": list(piece),
            "prompts": [pictures[k].item.prompt for k in piece],
            "seeds": [str(seeds[k]) for k in piece],  # as text: they may have 64 bits
        }
        for piece in missing
    ]
    nodes: list[str] = []
    done = len(pictures) - sum(map(len, missing))
    with progress(console, "pictures", len(pictures), done) as bar:
        for row in drawn(request, rows, cluster) if rows else ():
            for k, data in zip(row["piece"], row["files"], strict=True):
                save(Image.open(io.BytesIO(data)), pictures[int(k)])
            nodes.append(str(row["node"]))
            bar.advance(len(row["piece"]))
    return nodes


def run_on_ray(
    request: Request,
    cluster: Cluster,
    console: Console,
    device: str = "cpu",
    *,
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Evaluate a model whose pictures a cluster draws; goes on where an earlier run stopped.

    Args:
        request: with a model.
        cluster: where its pictures are drawn.
        console: for progress.
        device: of the benchmark's judges, which run here.
        allow_partial: as for :func:`~t2i_align.evaluate.run.run`.

    Returns:
        What is written to ``summary.json``.

    Raises:
        DataError: ``out`` holds another evaluation.
        InterruptedRun: Ctrl-C; whole pieces are kept.
    """
    assert request.model is not None, "pictures are drawn by a model"
    pictures, options = request.out / "images", dict(request.options)
    worker = Worker(
        Job(request.benchmark, options, pictures, request.model, request.sampling, device)
    )
    claim(request.out, facts_of(request, worker, None))
    try:
        draw_on_ray(worker, request, cluster, console)
    except KeyboardInterrupt as error:
        raise InterruptedRun(
            f"stopped; what is done is kept in {request.out}", "the same command goes on"
        ) from error
    return run(request, console, device, allow_partial=allow_partial)
