"""Many processes: started for the user, watched, and what a lost one means for the others.

On one machine the processes are started here. When one dies the others would wait for it in the
next exchange, so they are given a moment to say what they saw and are then ended. Several machines
are left to torchrun, which finds them and watches them in the same way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from t2i_align.errors import Problem, RecipeError, TrainingError

GRACE_SECONDS = 10.0  # for the others, after the first process has ended badly
SHOWN = 20  # lines of another process's output
CONTINUE = "checkpoints are intact: continue with train.resume_from_checkpoint=latest"
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out wait")


@dataclass(frozen=True)
class Launch:
    """Where the processes of a run are, in accelerate's names.

    Args:
        num_processes: of all machines.
        num_machines: taking part; each is told its own rank.
        machine_rank: of this one, from 0.
        main_process_ip: of machine 0.
        main_process_port: free on machine 0; on one machine any free one is taken.
    """

    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def problems(self, num_devices: int) -> list[Problem]:
        """What cannot be started.

        Args:
            num_devices: CUDA devices of this machine, 0 for the CPU.
        """
        found = []
        here, rest = divmod(self.num_processes, self.num_machines)
        if "WORLD_SIZE" in os.environ:
            found.append(("--num-processes", "another launcher has started this process already"))
        if rest:
            found.append(("--num-processes", f"must be a multiple of {self.num_machines} machines"))
        if num_devices and here > num_devices:
            found.append(
                ("--num-processes", f"{here} on a machine with {num_devices} CUDA devices")
            )
        if not 0 <= self.machine_rank < self.num_machines:
            found.append(
                ("--machine-rank", f"got {self.machine_rank}; 0 to {self.num_machines - 1}")
            )
        if self.num_machines > 1 and not (self.main_process_ip and self.main_process_port):
            found.append(("--main-process-ip", "several machines need the address of machine 0"))
        return [Problem(key, message, "command line") for key, message in found]

    @property
    def alone(self) -> bool:
        """Nothing to start."""
        return self.num_processes == 1 and self.num_machines == 1


def launch(arguments: Sequence[str], how: Launch) -> int:
    """Run ``t2i-align train`` in several processes.

    Args:
        arguments: of the verb, without those of the launch.
        how: how many, and where.

    Returns:
        The exit code: 0, or that of the process that ended first with another.

    Raises:
        RecipeError: they cannot be started so.
        TrainingError: one was killed.
    """
    import torch

    devices = torch.cuda.device_count()
    if problems := how.problems(devices):
        raise RecipeError(problems, "command line")
    worker = ["-m", "t2i_align", "train", *arguments]
    environment = dict(os.environ)
    if not devices:
        environment["ACCELERATE_USE_CPU"] = "true"
    per_machine = how.num_processes // how.num_machines
    threads = max(1, (os.cpu_count() or 1) // per_machine)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if how.num_machines > 1:
        return subprocess.call([*torchrun(how), *worker], env=environment)
    with contextlib.ExitStack() as stack:
        outputs = [None, *(stack.enter_context(_sink()) for _ in range(per_machine - 1))]
        environment |= _address(how)
        processes = [
            _start(worker, environment, rank, per_machine, output)
            for rank, output in enumerate(outputs)
        ]
        with _forwarding(processes):
            return _supervise(processes, outputs)


def torchrun(how: Launch) -> list[str]:
    """The command for one of several machines."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={how.num_machines}",
        f"--node_rank={how.machine_rank}",
        f"--nproc_per_node={how.num_processes // how.num_machines}",
        f"--master_addr={how.main_process_ip}",
        f"--master_port={how.main_process_port}",
    ]


def _sink() -> IO[bytes]:
    """Where a further process writes: what it says is shown only if it is the one that failed."""
    return tempfile.TemporaryFile()


def _address(how: Launch) -> dict[str, str]:
    port = how.main_process_port
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    return {"MASTER_ADDR": how.main_process_ip or "127.0.0.1", "MASTER_PORT": str(port)}


def _start(
    worker: list[str], environment: dict[str, str], rank: int, world: int, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """One process, in a group of its own: Ctrl-C reaches it through :func:`_forwarding` alone."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return subprocess.Popen(
        [sys.executable, *worker],
        env=environment | own | sizes,
        stdout=output,
        stderr=output,
        process_group=0,
    )


@contextlib.contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass requests to stop on; the run answers them with a checkpoint."""

    def handle(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(processes: list[subprocess.Popen[bytes]], outputs: list[IO[bytes] | None]) -> int:
    """Wait for all, or for the first that ends badly and a moment for the others."""
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(0.05)
        codes = [p.poll() for p in processes]
    if not any(codes):
        return 0
    first = codes
    end = time.monotonic() + GRACE_SECONDS
    while None in codes and time.monotonic() < end:
        time.sleep(0.05)
        codes = [p.poll() for p in processes]
    # a killed process is the cause, and what the others say of it the consequence
    rank = next((i for i, c in enumerate(codes) if c is not None and c < 0), None)
    if rank is not None:
        raise TrainingError(
            f"process {rank} of {len(processes)} was killed "
            f"({signal.Signals(-(codes[rank] or 0)).name}; SIGKILL is what a machine short of "
            "memory does); the others were stopped",
            CONTINUE,
        )
    rank = cause(first, codes)
    if rank:
        _show(outputs[rank], rank)
    return codes[rank] or 1


def cause(first: Sequence[int | None], last: Sequence[int | None]) -> int:
    """The rank whose words explain the end of a run.

    Args:
        first: exit codes by rank when one was neither None (still running) nor 0.
        last: the same once the others had their moment; a process that lost another one ends with
            the code of a :class:`TrainingError`, so any other code is nobody's consequence.
    """
    own = [rank for rank, code in enumerate(last) if code and code != TrainingError.exit_code]
    return (own or [rank for rank, code in enumerate(first) if code])[0]


def _show(output: IO[bytes] | None, rank: int) -> None:
    """The last lines of a process that spoke into a file."""
    if output is None:
        return
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()[-SHOWN:]
    print(f"process {rank} said:", *lines, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say in our words that another process is gone or has stopped answering.

    Raises:
        TrainingError: an exchange between processes failed.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in LOST):
            raise
        rank, world = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
        raise TrainingError(
            f"process {rank} of {world}: another process is gone or did not answer in time "
            f"({first})",
            CONTINUE + "; train.distributed.timeout_minutes is how long one waits",
        ) from error
