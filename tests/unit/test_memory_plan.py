"""Predicted memory of a step against a real one on the CPU.

It is measured by torch's MemTracker around whole steps of the training loop (draw, reference,
policy, objective, backward, clipping, optimizer, average). The prediction sees no weights: the
network is on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.generators.attention import float32_on_cpu
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train import memory, trace
from t2i_align.train.options import TrainOptions
from t2i_align.train.plan import plan
from tests import measuring, runs
from tests.tiny import PIPELINES

LORA = {"r": 16, "lora_alpha": 16}
MIB = 2**20


def mid_unet(cross: int, **extra: Any) -> Any:
    """A UNet whose activations at 32 x 32 are tens of MB."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(96, 192),
        layers_per_block=2,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        **extra,
    )


def mid_sd3() -> Any:
    """Four joint blocks of width 256, 16 x 16 tokens."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        caption_projection_dim=256,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    )


MID: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd": ("unet", lambda: mid_unet(16, attention_head_dim=8)),
    "sdxl": (
        "unet",
        lambda: mid_unet(
            32,
            attention_head_dim=(4, 8),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
    ),
    "sd3": ("transformer", mid_sd3),
}


BF16 = {"train": {"mixed_precision": "bf16"}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd: full, float32": ("sd", {}, {}),
    "sd: full, autocast": ("sd", {}, BF16),
    "sd: full, accumulated, average": (
        "sd",
        {},
        {"train": {"gradient_accumulation_steps": 2, "ema_decay": 0.99}},
    ),
    "sd: full, 8-bit AdamW": ("sd", {}, {"train": {"optimizer": "adamw_8bit"}}),
    "sd: full, Adafactor": ("sd", {}, {"train": {"optimizer": "adafactor"}}),
    "sdxl: LoRA, autocast": ("sdxl", {"lora": LORA}, BF16),
    "sdxl: LoRA, bfloat16 weights": ("sdxl", {"lora": LORA, "dtype": "bfloat16"}, {}),
    "sdxl: LoRA, 2 draws": ("sdxl", {"lora": LORA}, {"draw": {"num_draws": 2}}),
    "sdxl: LoRA, frozen copy": ("sdxl", {"lora": LORA}, {"reference": {"mode": "frozen_copy"}}),
    "sdxl: LoRA, reference follows": (
        "sdxl",
        {"lora": LORA},
        {"reference": {"refresh": "hard", "refresh_steps": 1}},
    ),
    "sdxl: full, recomputed, autocast": ("sdxl", {"gradient_checkpointing": True}, BF16),
    "sdxl: full, no reference": ("sdxl", {}, {"objective": {"type": "mapo"}}),
    "sd3: LoRA, recomputed": ("sd3", {"lora": LORA, "gradient_checkpointing": True}, {}),
    "sd3: full": ("sd3", {}, {}),
}
FAST = ("sd: full, autocast", "sdxl: LoRA, autocast", "sd3: LoRA, recomputed", "sd3: full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of the three families with a denoiser large enough to be measured."""
    where = tmp_path_factory.mktemp("mid")
    for family, (part, make) in MID.items():
        torch.manual_seed(7)
        build: Any = PIPELINES[family]
        pipe = build()
        pipe.register_modules(**{part: make()})
        pipe.save_pretrained(where / family)
    return {family: where / family for family in MID}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.pickapic(tmp_path_factory.mktemp("data") / "pairs.parquet", 6)


def recipe_of(folder: Path, data: Path, name: str, sections: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "objective": {"type": "dpo"},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(data.parent / "cache")},
    }
    sections = base | sections
    sections["train"] = {"report_to": "none", "max_train_steps": 3} | sections.get("train", {})
    return load_recipe(runs.write_recipe(folder, name, sections))


def cases() -> list[Any]:
    """All, those that add little to others marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in FAST else slow) for name in CASES]


@pytest.mark.parametrize("case", cases())
def test_the_peak_of_a_step_is_what_was_planned(
    tmp_path: Path, folders: dict[str, Path], pictures: Path, case: str
) -> None:
    """Within 15 % asked, 1 % seen; the CPU's MemTracker against the CPU's rules of autocast.

    bitsandbytes updates on the CPU in plain torch, with float32 temporaries of one parameter that
    its CUDA kernel does not have; they stay under the peak of the backward pass here.
    """
    family, model, sections = CASES[case]
    asked = {"name_or_path": str(folders[family]), "resolution": 256, **model}
    recipe = recipe_of(tmp_path, pictures, "run", {"model": asked, **sections})
    with float32_on_cpu():
        found, run = plan(recipe, "cpu").memory, measuring.started(recipe)
        real = measuring.most_bytes(run)
    run.feed.close()
    print(f"{case}: planned {found['peak'] / MIB:.1f} MiB, ratio {found['peak'] / real:.3f}")
    assert found["peak"] == pytest.approx(real, rel=0.15)
    assert found["peak"] == pytest.approx(real, rel=0.02)
    assert found["activations"] > 2 * MIB


def test_cuda_computes_norms_in_float32(folders: dict[str, Path], pictures: Path) -> None:
    """Under autocast they come out twice as wide there; without it nothing differs."""
    asked = {"name_or_path": str(folders["sd"]), "resolution": 256}
    where = pictures.parent
    half = recipe_of(where, pictures, "half", {"model": asked, **BF16})
    plain = recipe_of(where, pictures, "plain", {"model": asked})
    kept = {d: plan(half, d).memory["activations"] for d in ("cpu", "cuda")}
    assert 1.1 < kept["cuda"] / kept["cpu"] < 1.6
    assert plan(plain, "cuda").memory == plan(plain, "cpu").memory


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_optimizer_state_is_what_the_optimizer_makes(name: str) -> None:
    """Convolutions, vectors, and parameters on both sides of bitsandbytes' 4096 values."""
    from t2i_align.train.optim import build_optimizer

    net = torch.nn.Sequential(
        torch.nn.Conv2d(24, 40, 3), torch.nn.Linear(63, 65), torch.nn.Linear(64, 65)
    )
    options = TrainOptions.model_validate({"optimizer": name})
    optimizer = build_optimizer(options, list(net.parameters()), 1)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in net.parameters():
        states = [v for k, v in optimizer.state[p].items() if "qmap" not in k]
        made = sum(v.nbytes for v in states if isinstance(v, torch.Tensor) and v.numel() > 1)
        assert memory.state_bytes(name, p) == made, tuple(p.shape)


def test_adafactor_saves_little_on_convolutions() -> None:
    """A 3x3 kernel keeps two thirds of its size, a 1x1 kernel twice; a matrix next to nothing."""
    kernel, point, matrix = torch.ones(64, 64, 3, 3), torch.ones(64, 64, 1, 1), torch.ones(64, 64)
    assert memory.state_bytes("adafactor", kernel) == 4 * kernel.numel() * 2 // 3
    assert memory.state_bytes("adafactor", point) == 4 * point.numel() * 2
    assert memory.state_bytes("adafactor", matrix) == 4 * (64 + 64)


class Chain(torch.nn.Module):
    """Two layers of 1000 x 1000; the square keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(1000, 1000, bias=False, device="meta")
        self.b = torch.nn.Linear(1000, 1000, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).square())


@pytest.mark.parametrize(("half", "width"), [(None, 4), (torch.bfloat16, 2)])
def test_live_bytes_by_hand(half: torch.dtype | None, width: int) -> None:
    """100 rows of 1000: x in float32, and a(x), its square and b's output, each kept or returned.

    In bfloat16 x is cast too, which a's gradient needs, and both weights (2 MB each), which stay
    until the block ends; then b's stays for the gradient of its input, and a's is not needed, as x
    has no gradient. FLOPs are 2 x 100 x 1000 x 1000 a layer.
    """
    net = Chain()
    live, x = trace.Live(net.parameters()), torch.empty(100, 1000, device="meta")
    buffers = 400_000 + 3 * width * 100_000 + (200_000 if half else 0)
    with live:
        live.add(x)
        with trace.Precision(half, "cpu"):
            y = net(x)
            assert live.bytes == buffers + (4_000_000 if half else 0)
        assert live.bytes == buffers + (2_000_000 if half else 0)
        assert live.flops == 2 * 2 * 100 * 1000 * 1000
        del y
        assert live.bytes == 400_000


def test_fused_attention_keeps_no_square_of_the_length() -> None:
    """q, k, v, output, and a number a row; a masked, grouped or three-dimensional call likewise."""
    q = torch.empty(2, 4, 1000, 16, device="meta", requires_grad=True)
    live = trace.Live([q])
    with live, trace.Precision(None, "cuda"):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=None)
        assert live.bytes == q.nbytes + 4 * 2 * 4 * 1000
        assert live.flops == 2 * (2 * 2 * 4 * 1000 * 1000 * 16)  # two products
        few = torch.empty(2, 2, 1000, 16, device="meta")
        grouped = torch.nn.functional.scaled_dot_product_attention(q, few, few, enable_gqa=True)
        rows = q.flatten(0, 1)
        flat = torch.nn.functional.scaled_dot_product_attention(rows, rows, rows)
    assert out.shape == grouped.shape == q.shape and flat.shape == (8, 1000, 16)
