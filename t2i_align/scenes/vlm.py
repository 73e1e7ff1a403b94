r"""Training the world's vision-language model: the tower first, then questions.

Two phases, both on pictures of ``vlm_pictures.py``. First the tower alone learns what the renderer
knows of every 8 x 8 patch, through linear heads that are thrown away: class and colour of the
object there, whether its centre lies there, and where the patch is. Then all of it learns to
answer, the heads staying on with a small weight:

    loss = mean_answers -log p(answer | picture, question) + 0.2 * patch loss

A run is a function of its plan: pictures of the seed, batches of (seed, step). It saves its state
and goes on from there when the same command is given again.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from t2i_align.errors import InterruptedRun, StorageError, UserError
from t2i_align.progress import progress
from t2i_align.scenes.grammar import COLORS
from t2i_align.scenes.questions import Question
from t2i_align.scenes.render import CLASSES
from t2i_align.scenes.vlm_model import WIDTH, new_model, save_folder, tokenizer
from t2i_align.scenes.vlm_pictures import GRID, Pictures, draw_pictures, joined, read_samples
from t2i_align.scenes.vlm_rows import NOTHING, Rows, pack_rows, questions_for

STATE = "training.pt"
PREFIX = 2 + GRID * GRID  # <s> <user> and the picture
PATCH_WEIGHT = 0.2
REPORT = 100  # steps between lines
EXAMINE = 200  # steps between saved states


@dataclass(frozen=True)
class Plan:
    """Sizes of a training run.

    Args:
        steps: of both phases together.
        seed: of weights, pictures, questions and order.
        warm_share: share of the steps in which the tower learns alone.
        batch: pictures a step; twice as many while the tower learns alone.
        questions: questions a picture.
        pictures: distinct pictures drawn before training.
        max_samples: most model samples read.
        sample_share: share of model samples among the pictures of a step.
        open_share: questions with a word for an answer.
        warm_rate: peak learning rate while the tower learns alone; falls to ``learning_rate``.
        learning_rate: peak learning rate afterwards; falls to zero.
    """

    steps: int
    seed: int = 0
    warm_share: float = 0.2
    batch: int = 16
    questions: int = 8
    pictures: int = 16000
    max_samples: int = 6000
    sample_share: float = 0.3
    open_share: float = 0.25
    warm_rate: float = 4e-3
    learning_rate: float = 1.5e-3


def to_pixels(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], as the processor does."""
    return images.float() / 127.5 - 1


class PatchHeads(nn.Module):
    """Linear read-outs of patch tokens, for training only."""

    def __init__(self) -> None:
        """Class, colour, centre and place."""
        super().__init__()
        self.sizes = (len(CLASSES) + 1, len(COLORS) + 1, 2, 2)
        self.read = nn.Linear(WIDTH, sum(self.sizes))
        side = torch.linspace(-1, 1, GRID)
        self.register_buffer("place", torch.cartesian_prod(side, side), persistent=False)

    def loss(self, tokens: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Patch loss, and the share of object patches with class and colour right.

        Args:
            tokens: ``(B, 64, WIDTH)`` of the tower.
            maps: ``(B, 64, 3)`` of :class:`t2i_align.scenes.vlm_pictures.Pictures`.
        """
        *said, place = self.read(tokens.float()).split(self.sizes, -1)
        parts = [
            F.cross_entropy(s.flatten(0, 1), maps[..., k].flatten()) for k, s in enumerate(said)
        ]
        where = F.mse_loss(place, self.place.expand_as(place))  # type: ignore[operator]
        thing = maps[..., 0] < len(CLASSES)
        right = (said[0].argmax(-1) == maps[..., 0]) & (said[1].argmax(-1) == maps[..., 1])
        return sum(parts, where), right[thing].float().mean()


class Trainer:
    """Model, heads and optimiser of a run; one method a phase's step."""

    def __init__(
        self, plan: Plan, pictures: Pictures, num_samples: int, samples: Path | None = None
    ) -> None:
        """Fresh weights; the last ``num_samples`` pictures are model samples, of ``samples``."""
        self.plan, self.pictures, self.num_samples = plan, pictures, num_samples
        self.samples = None if samples is None else [samples.name, samples.stat().st_size]
        self.model, self.heads = new_model(plan.seed), PatchHeads()
        self.tokenizer = tokenizer()
        self.assistant = self.tokenizer.convert_tokens_to_ids("<assistant>")
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.02, fused=True
        )
        self.num_warm = round(plan.steps * plan.warm_share)
        self.num_joint = plan.steps - self.num_warm

    def rate(self, step: int) -> float:
        """Learning rate: 50 steps of warm-up and half a cosine in each phase."""
        warm = step < self.num_warm
        since, length = (step, self.num_warm) if warm else (step - self.num_warm, self.num_joint)
        peak = self.plan.learning_rate
        high, low = (self.plan.warm_rate, peak) if warm else (peak, 0.0)
        fall = 0.5 * (1 + math.cos(math.pi * since / length))
        return min(1.0, (since + 1) / 50) * (low + (high - low) * fall)

    def step(self, step: int) -> dict[str, float]:
        """One update; metrics. What is drawn is a function of (seed, step)."""
        rng = np.random.default_rng([self.plan.seed, 11, step])
        warm = step < self.num_warm
        index = self.draw(self.plan.batch * (2 if warm else 1), rng)
        self.optimizer.param_groups[0]["lr"] = self.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            pixels = to_pixels(self.pictures.images[index])
            tokens = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[
                -1
            ]
            patch, read = self.heads.loss(tokens, self.pictures.maps[index])
            loss, metrics = (patch, {}) if warm else self.answers(tokens, index, rng)
        if not warm:
            loss = loss + PATCH_WEIGHT * patch
        if not torch.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss.item()}", "lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {"patch": patch.item(), "patches_right": read.item()} | metrics

    def draw(self, num: int, rng: np.random.Generator) -> list[int]:
        """Numbers of the pictures of a step."""
        own = rng.random(num) < (self.plan.sample_share if self.num_samples else 0.0)
        renders = len(self.pictures) - self.num_samples
        low, high = np.where(own, renders, 0), np.where(own, len(self.pictures), renders)
        return rng.integers(low, high).tolist()

    def answers(
        self, tokens: Tensor, index: list[int], rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Answer loss of packed questions about pictures already read."""
        plan = self.plan
        asked = [
            questions_for(self.pictures, i, plan.questions, rng, plan.open_share) for i in index
        ]
        rows = pack_rows(asked, self.tokenizer, PREFIX, self.assistant)
        hidden = self.hidden(tokens, rows)
        said = self.model.lm_head(hidden[rows.labels != NOTHING]).float()
        want = rows.labels[rows.labels != NOTHING]
        weight = torch.where(rows.is_answer[rows.labels != NOTHING], 1.0, 0.05)
        loss = (F.cross_entropy(said, want, reduction="none") * weight).sum() / weight.sum()
        return loss, self.tally(said.argmax(-1) == want, rows, asked)

    def hidden(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Last hidden states ``(B, L, WIDTH)`` of rows behind the pictures ``(B, 64, WIDTH)``."""
        core, names = self.model.model, ["<s>", "<user>"]
        embed = core.get_input_embeddings()
        opening = embed(torch.tensor(self.tokenizer.convert_tokens_to_ids(names)))
        picture = core.multi_modal_projector(tokens)
        opening = opening.expand(len(tokens), -1, -1).to(picture.dtype)
        inputs = torch.cat([opening, picture, embed(rows.ids).to(picture.dtype)], 1)
        out = core.language_model(
            inputs_embeds=inputs, attention_mask=rows.mask, position_ids=rows.positions
        )
        return out.last_hidden_state[:, PREFIX:]

    def tally(self, right: Tensor, rows: Rows, asked: list[list[Question]]) -> dict[str, float]:
        """Shares of answers right, yes/no and open ones apart."""
        hits = right[rows.is_answer[rows.labels != NOTHING]]
        free = torch.tensor([q.wording == "open" for row in asked for q in row])
        return {
            "yes_no": hits[~free].float().mean().item(),
            "open": hits[free].float().mean().item(),
        }

    def save(self, folder: Path, step: int) -> None:
        """Write the state of a run, whole or not at all."""
        state = {
            "plan": asdict(self.plan),
            "samples": self.samples,
            "step": step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / f"{STATE}.new")
        (folder / f"{STATE}.new").replace(folder / STATE)

    def resume(self, folder: Path) -> int:
        """Read a saved state; the step to go on with, 0 where there is none.

        Raises:
            StorageError: the state belongs to another plan or other samples.
        """
        if not (folder / STATE).is_file():
            return 0
        state = torch.load(folder / STATE, weights_only=True)
        plan, samples = state["plan"], state.get("samples")
        if (plan, samples) != (asdict(self.plan), self.samples):
            raise StorageError(
                f"{folder / STATE} belongs to another run: {plan}, samples {samples}",
                f"go on with the same settings and samples, or delete {folder / STATE}",
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def bundled_vae() -> Any:
    """The world's autoencoder."""
    from diffusers import AutoencoderKL

    from t2i_align.generators.diffusers_folder import BUNDLED, local_path

    return AutoencoderKL.from_pretrained(local_path(f"{BUNDLED}scenes_sdxl") / "vae").eval()


def gather(plan: Plan, samples: Path | None, console: Console) -> tuple[Pictures, int]:
    """Pictures of a run, and how many of them, the last ones, are model samples."""
    with progress(console, "pictures", plan.pictures) as bar:
        drawn = draw_pictures(plan.pictures, plan.seed, bundled_vae(), bar.advance)
    if samples is None:
        return drawn, 0
    with progress(console, "samples", None) as bar:
        own = read_samples(samples, plan.max_samples, bar.advance)
    return joined([drawn, own]), len(own)


def train_vlm(
    out: Path,
    *,
    steps: int = 5000,
    seed: int = 0,
    samples: Path | None = None,
    console: Console,
    plan: Plan | None = None,
    stop_after: float | None = None,
) -> Path:
    """Train the model into a folder; goes on where an interrupted run stopped.

    Args:
        out: folder to write; holds ``training.pt`` until the run is complete.
        steps: of both phases together.
        seed: of weights, pictures, questions and order.
        samples: parquet of scenes pairs, whose pictures and verdicts join the training.
        console: for progress.
        plan: all sizes at once; overrides ``steps`` and ``seed``.
        stop_after: stop after so many seconds of training, the state saved; for trials.

    Raises:
        StorageError: ``out`` holds the state of another run.
        DataError: ``samples`` cannot be used.
        InterruptedRun: Ctrl-C; the state saved last stands.
    """
    plan = plan or Plan(steps, seed)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, *gather(plan, samples, console), samples)
    first = trainer.resume(out)
    if first:
        console.print(f"going on after step {first} of {plan.steps}")
    done = first + run(trainer, first, out, console, stop_after)
    if done < plan.steps:
        console.print(f"stopped after step {done} of {plan.steps}; the same command goes on")
        return out
    save_folder(trainer.model, out)
    (out / STATE).unlink(missing_ok=True)
    return out


def run(trainer: Trainer, first: int, out: Path, console: Console, stop_after: float | None) -> int:
    """Steps from ``first`` on; how many were made. A line every 100 steps.

    Raises:
        InterruptedRun: Ctrl-C.
    """
    start, sums, saved, total = time.monotonic(), [], first, trainer.plan.steps
    with progress(console, "vlm", total, first) as bar:
        try:
            for step in range(first, total):
                sums.append(trainer.step(step))
                bar.advance()
                seconds = time.monotonic() - start
                if (step + 1) % REPORT == 0:
                    rate = (step + 1 - first) / seconds
                    console.print(f"step {step + 1}  {means(sums)}  {rate:.2f} steps/s")
                    sums = []
                late = stop_after is not None and seconds > stop_after
                if late or (step + 1) % EXAMINE == 0:
                    trainer.save(out, step + 1)
                    saved = step + 1
                if late:
                    return step + 1 - first
        except KeyboardInterrupt as error:  # perhaps inside a step: what was saved last stands
            told = f"stopped; step {saved} of {total} is saved"
            raise InterruptedRun(told, "the same command goes on") from error
    return total - first


def means(rows: list[dict[str, float]]) -> str:
    """Means of metrics over steps, NaN and absent ones left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {n: [row[n] for row in rows if n in row and row[n] == row[n]] for n in names}
    return "  ".join(f"{n} {np.mean(v):.3f}" for n, v in found.items() if v)
