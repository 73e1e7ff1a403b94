"""Layouts of one DPO step side by side: what each thing that is not computed again saves.

    live           reference, VAE and recomputed activations every step (the usual script)
    latents        latents from the cache
    activations    and no gradient checkpointing
    errors         and the reference's errors from the cache: policy forward and backward are left
    trunk, live    adapters from the mid block on; the reference runs, the trunk is shared
    trunk          the same, reference errors from the cache

All layouts run in one process, in turns, a record a round, so that whatever else the machine does
hits them alike; wall ratios are medians of a round's ratio. Weights are put back after each step,
so the layouts that train the same adapters must find the same loss and gradient norm, which is
looked at. Latents and reference errors of cached layouts are computed before the clock starts:
reading them from disk is not in the numbers. Text is cached everywhere. Round 0 counts FLOPs and is
not timed. ``bench_train.json`` is written after every step; a later call goes on where it was
stopped.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from t2i_align.errors import OutputError
from t2i_align.train.accounting import Account, Work, peak_of, tera, wait
from t2i_align.train.bench_model import build
from t2i_align.train.bench_step import LAYOUTS, Layout, Settings, Side
from t2i_align.train.log import write_json
from t2i_align.train.trace import Live, tensors

FILE = "bench_train.json"
AGREE = 1e-3  # relative difference of losses and norms of layouts that train the same
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """Measurements of one layout.

    Args:
        flops: of a pair by kind.
        floor: what the same adapters need at least; of a pair.
        loss: of round 0.
        norm: of its gradient.
        peak: most bytes alive beside the weights (CPU, traced) or allocated (CUDA).
        seconds: of each timed step.
        phases: seconds of each timed step by phase.
    """

    flops: dict[str, float]
    floor: float
    loss: float
    norm: float
    peak: int
    seconds: list[float]
    phases: list[dict[str, float]]


class Bench:
    """Measures layouts, and keeps what it found.

    Args:
        out: folder of the bench.
        settings: of it.
        layouts: to compare; the first is what others are compared with.
    """

    def __init__(
        self, out: Path, settings: Settings, layouts: tuple[Layout, ...] = LAYOUTS
    ) -> None:
        """Read what is there.

        Raises:
            OutputError: the folder holds a bench of other settings.
        """
        self.out, self.settings, self.layouts = out, settings, layouts
        self.rows: dict[str, Row] = {}
        self.facts: dict[str, Any] = {}
        self._sides: dict[bool, Side] = {}
        path = out / FILE
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] != asdict(settings):
                raise OutputError(
                    f"--out: {path} is a bench of other settings: {found['settings']}",
                    "choose another folder, or the same settings",
                )
            self.rows = {k: Row(**v) for k, v in found["layouts"].items()}
            self.facts = found["facts"]

    def run(self, rounds: int, console: Console) -> None:
        """Take what is missing of a number of timed rounds."""
        for number in range(rounds + 1):
            for layout in self.layouts:
                row = self.rows.get(layout.name)
                if row is not None and len(row.seconds) >= number:
                    continue
                self._measure(layout, number)
                self._save()
                told = self.rows[layout.name].seconds
                text = f"{told[-1]:.2f} s" if told else "FLOPs counted"
                console.print(f"round {number}/{rounds}  {layout.name}: {text}", highlight=False)

    def _side(self, layout: Layout) -> Side:
        if layout.late not in self._sides:
            from diffusers import AutoencoderKL

            folder = self.settings.model or str(build(self.out / "model", seed=self.settings.seed))
            vae: Any = next((s.vae for s in self._sides.values()), None)
            if vae is None:
                vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
                vae = vae.requires_grad_(False).to(self.settings.device).eval()
            side = Side(self.settings, folder, vae, late=layout.late)
            self._sides[layout.late] = side
            self._describe(side, vae)
        return self._sides[layout.late]

    def _describe(self, side: Side, vae: nn.Module) -> None:
        dtype = DTYPES[self.settings.precision]
        if not self.facts:
            peak = peak_of(side.device, dtype)
            cuda = side.device.type == "cuda"
            self.facts = {
                "device": torch.cuda.get_device_name(side.device) if cuda else "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "parameters": num_base(side.generator.module),
                "vae_parameters": sum(p.numel() for p in vae.parameters()),
                "peak_flops": peak.flops,
                "peak_from": peak.source,
            }

    def _measure(self, layout: Layout, number: int) -> None:
        """One step of one layout: counted in round 0, timed in others."""
        side, device = self._side(layout), torch.device(self.settings.device)
        pair = side.pair(number)
        kept = None
        if not layout.live:
            kept = side.score(side.event(pair, pair.sample.state["x0"]), "reference")
        trunk = side.generator.views.trunk
        account = Account(
            device,
            DTYPES[self.settings.precision],
            self.settings.pairs,
            in_trunk=None if trunk is None else lambda: trunk.recording,
            counted=number == 0,
        )
        side.recompute(on=layout.recompute)
        live = Live(tensors(side.generator)) if number == 0 and device.type == "cpu" else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        wait(device)
        start = time.perf_counter()
        with ExitStack() as stack:
            if live is not None:
                stack.enter_context(live)
            stack.enter_context(account.step())
            loss, norm = side.step(layout, pair, kept, account)
        wait(device)
        seconds = time.perf_counter() - start
        side.restore()
        if account.work is not None:
            peak = torch.cuda.max_memory_allocated(device) if live is None else live.peak
            flops, floor = account.work.by_kind, account.work.floor
            self.rows[layout.name] = Row(dict(flops), floor, loss, norm, peak, [], [])
            return
        row = self.rows[layout.name]
        row.seconds.append(seconds)
        row.phases.append(dict(account.clock.seconds))

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / FILE, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": 1,
            "settings": asdict(self.settings),
            "facts": self.facts,
            "layouts": {k: asdict(v) for k, v in self.rows.items()},
            "table": self.table(),
            "differences": self.differences(),
        }

    def differences(self) -> dict[str, float]:
        """Largest relative difference of loss and norm to the first layout of the same adapters."""
        found = {}
        for late in (False, True):
            same = [
                self.rows[x.name] for x in self.layouts if x.late == late and x.name in self.rows
            ]
            for row in same[1:]:
                for name in ("loss", "norm"):
                    first, value = getattr(same[0], name), getattr(row, name)
                    found[name] = max(found.get(name, 0.0), abs(value - first) / abs(first))
        return found

    def table(self) -> list[dict[str, str]]:
        """A row a layout."""
        rows = []
        first = self.rows.get(self.layouts[0].name)
        for layout in self.layouts:
            row = self.rows.get(layout.name)
            if row is not None and first is not None:
                rows.append({"layout": layout.name, **self._cells(row, first)})
        return rows

    def _cells(self, row: Row, first: Row) -> dict[str, str]:
        work, whole = Work(row.flops).total, Work(first.flops).total
        cells = {
            "a pair": tera(work),
            "of first": f"{work / whole:.3f}",
            "of its floor": f"{work / row.floor:.3f}",
            "peak": f"{row.peak / 1e9:.2f} GB",
        }
        if not row.seconds:
            return cells | dict.fromkeys(("s a step", "wall ratio", "pairs/s", "MFU"), "")
        seconds = statistics.median(row.seconds)
        ratios = [a / b for a, b in zip(row.seconds, first.seconds, strict=False)]
        rate = self.settings.pairs / seconds
        return cells | {
            "s a step": f"{seconds:.2f}",
            "wall ratio": f"{statistics.median(ratios):.2f}",
            "pairs/s": f"{rate:.3f}",
            "MFU": f"{100 * row.floor * rate / self.facts['peak_flops']:.0f} %",
        }

    def encode_share(self) -> float | None:
        """FLOPs of an encode in denoiser forwards, where both were counted in one layout."""
        for row in self.rows.values():
            if row.flops.get("encode") and row.flops.get("reference"):
                return row.flops["encode"] / row.flops["reference"]
        return None


def num_base(net: nn.Module) -> int:
    """Parameters of a network without its adapters."""
    return sum(p.numel() for n, p in net.named_parameters() if "lora_" not in n)


def notes(bench: Bench) -> list[str]:
    """What a table needs beside it."""
    facts, share, apart = bench.facts, bench.encode_share(), bench.differences()
    lines = [
        f"{facts['date']}, {facts['device']}, {facts['threads']} threads, torch {facts['torch']}; "
        f"peak {tera(facts['peak_flops'])}/s {facts['peak_from']}",
        f"denoiser {facts['parameters'] / 1e6:.1f} M parameters"
        + ("" if share is None else f"; one encode costs {share:.3f} of its forward"),
        "latents and reference errors of cached layouts were computed before the clock started",
    ]
    if apart:
        told = ", ".join(f"{k} {v:.1e}" for k, v in apart.items())
        lines.append(f"layouts that train the same adapters differ by (relative): {told}")
    odd = {k: v for k, v in apart.items() if not v <= AGREE}
    if odd:
        lines.append(f"WARNING: that is more than {AGREE}: the layouts did not do the same work")
    return lines


def markdown(bench: Bench) -> str:
    """The table as a file."""
    rows = bench.table()
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row[k] for k in head) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(bench)), ""])
