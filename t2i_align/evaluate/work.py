"""The two things an evaluation spends time on, in pieces of a fixed size: drawing and answering.

A piece is a function of its positions, the job and the number of threads, so it does not matter
which process does it, and with equal threads one process and many give equal bits. One process does
its pieces here; several are spawned, and each loads what it needs when it gets its first piece.
Whoever started them writes; Ctrl-C lets the pieces at hand finish, and a killed one takes its
processes along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.contract import MediaError
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.evaluate.benchmark import Answer, Benchmark, Picture
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.layouts import FOLDERS, Layout, located
from t2i_align.evaluate.pictures import noise_seeds, plan, save
from t2i_align.evaluate.sampling import Model, Sampling, load_model, sample
from t2i_align.quiet import hushing

if TYPE_CHECKING:
    from t2i_align.generators.diffusers_family import DiffusersGenerator

Piece = Sequence[int]


@dataclass(frozen=True)
class Job:
    """What a process must know to do any piece.

    Args:
        benchmark: its name.
        options: plain data.
        pictures: folder with one folder a prompt.
        model: that draws them; None: they are given.
        sampling: how.
        device: ``cpu`` or ``cuda``; processes share out the devices.
    """

    benchmark: str
    options: Mapping[str, Any]
    pictures: Path
    model: Model | None = None
    sampling: Sampling = field(default_factory=Sampling)
    device: str = "cpu"


class Worker:
    """Does pieces; loads the model and the benchmark when they are first needed."""

    def __init__(self, job: Job) -> None:
        """Load nothing yet."""
        self.job = job
        self._generator: DiffusersGenerator | None = None

    @cached_property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return build(self.job.benchmark, dict(self.job.options), self.job.device)

    @cached_property
    def located(self) -> tuple[Layout | None, list[Picture]]:
        """How the pictures are named, None where there are none yet, and every picture."""
        count = self.benchmark.images_per_prompt
        planned = plan(self.benchmark.items(), count, self.job.pictures)
        if self.job.model is not None:
            return FOLDERS, planned
        return located(planned, self.job.pictures, self.job.benchmark)

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, given ones with their own file."""
        return self.located[1]

    @cached_property
    def seeds(self) -> list[int]:
        """Of every picture's noise."""
        return noise_seeds(self.pictures, self.job.sampling.seed)

    def draw(self, piece: Piece) -> None:
        """Sample and save the pictures of a piece."""
        assert self.job.model is not None
        if self._generator is None:
            self._generator = load_model(self.job.model, self.job.sampling, self.job.device)
        part = [self.pictures[k] for k in piece]
        prompts, seeds = [p.item.prompt for p in part], [self.seeds[k] for k in piece]
        images = sample(self._generator, prompts, seeds, self.job.sampling)
        for picture, image in zip(part, images, strict=True):
            save(image, picture)

    def answer(self, piece: Piece) -> list[Answer]:
        """Raw answers about the pictures of a piece.

        Raises:
            DataError: a picture cannot be read, or the benchmark did not answer each.
        """
        part = [self.pictures[k] for k in piece]
        try:
            found = self.benchmark.answers(part)
        except MediaError as error:
            raise DataError(str(error), "delete the picture and run again") from error
        if len(found) != len(part):
            raise DataError(f"{self.job.benchmark} answered {len(found)} of {len(part)} pictures")
        return list(found)

    def release(self) -> None:
        """Give the generator's memory back."""
        import gc

        self._generator = None
        gc.collect()


def spread(
    worker: Worker,
    what: str,
    pieces: Sequence[Piece],
    num_processes: int = 1,
    num_threads: int | None = None,
) -> Iterator[tuple[Piece, Any]]:
    """Do pieces, here or in several processes; results as they are done.

    Args:
        worker: of this process.
        what: ``draw`` or ``answer``.
        pieces: of the work.
        num_processes: 1: here.
        num_threads: of each process; None: torch's own number, or an equal share of the cores.
    """
    if num_processes == 1 or not pieces:
        do: Callable[[Piece], Any] = {"draw": worker.draw, "answer": worker.answer}[what]
        with _threads(num_threads if pieces else None):
            for piece in pieces:
                yield piece, do(piece)
        return
    threads = num_threads or max(1, (os.cpu_count() or 1) // num_processes)
    yield from _elsewhere(worker.job, what, pieces, num_processes, threads)


def _elsewhere(
    job: Job, what: str, pieces: Sequence[Piece], num_processes: int, num_threads: int
) -> Iterator[tuple[Piece, Any]]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ranks = context.Queue()
    for rank in range(num_processes):
        ranks.put(rank)
    pool = ProcessPoolExecutor(
        min(num_processes, len(pieces)), context, _begin, (job, num_threads, ranks, hushing())
    )
    try:
        futures = {pool.submit(_do, what, piece): piece for piece in pieces}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # an error, Ctrl-C, or a reader that stopped: pieces at hand finish, others do not
        pool.shutdown(wait=True, cancel_futures=True)


_WORKERS: list[Worker] = []  # one, in a spawned process


def _begin(job: Job, num_threads: int, ranks: Any, quieten: Callable[[], None] | None) -> None:
    """Start a spawned process; Ctrl-C is left to the one that spawned it."""
    from dataclasses import replace

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if quieten is not None:
        quieten()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _set_threads(num_threads)  # for its life
    rank = ranks.get()
    if job.device == "cuda":
        import torch

        job = replace(job, device=f"cuda:{rank % torch.cuda.device_count()}")
    _WORKERS.append(Worker(job))


def _end_with_parent() -> None:
    """A killed parent cannot end its processes; without this they would wait for it forever."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _do(what: str, piece: Piece) -> Any:
    try:
        return {"draw": _WORKERS[0].draw, "answer": _WORKERS[0].answer}[what](piece)
    except RecipeError as error:  # its parts do not travel between processes
        raise UserError(error.message) from error


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads in a block; the caller's process goes on with its own number."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)
