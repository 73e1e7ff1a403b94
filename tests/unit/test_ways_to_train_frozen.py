"""Frozen parts that wait on the CPU, a VAE that overflows, and averages of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_align.contract import Encoded, Sample
from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.offload import visit
from t2i_align.generators.vae_guard import finite_pixels
from tests import runs
from tests.denoisers import PROMPTS, folders, generator, our_images, reloaded_images
from tests.tiny import pipeline_folder

# torch takes "cpu:0" for the CPU, and so tells the device of a visit from the home of the parts
DEVICE, HOME = "cpu:0", "cpu"
META = {"original_size": (64, 64), "crop_top_left": (0, 0), "target_size": (64, 64)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("tiny"), "sdxl", "sd3")


# -- offload


def made(folder: Path, **changes: Any) -> DiffusersGenerator:
    options = {"name_or_path": str(folder), "resolution": 64, **changes}
    return DiffusersGenerator(DiffusersOptions.model_validate(options), DEVICE)


def diary(g: DiffusersGenerator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each frozen part does from now on: ``NAME to DEVICE`` and ``NAME runs``."""
    events: list[str] = []
    for name, part in g.pipe.components.items():
        if isinstance(part, nn.Module) and name not in ("unet", "transformer"):
            monkeypatch.setattr(part, "to", _noted(events, name, part.to))
            halves = ("encoder", "decoder") if name == "vae" else ("",)
            for module in (part.get_submodule(half) for half in halves):
                hook = lambda *_, name=name: events.append(f"{name} runs")  # noqa: E731
                module.register_forward_pre_hook(hook)
    return events


def _noted(events: list[str], name: str, to: Any) -> Any:
    def moved(device: torch.device) -> nn.Module:
        events.append(f"{name} to {device}")
        return to(device)

    return moved


def encoded(g: DiffusersGenerator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(g.encode_media([Encoded({"pixels": torch.rand(3, 64, 64)}, META)])[0].state)


def decoded(g: DiffusersGenerator) -> Tensor:
    torch.manual_seed(1)
    return g.decode(Sample({"x0": torch.randn(1, 4, 8, 8)}, {}))[0].data


def visits(*names: str, runs_: Sequence[str] = ()) -> list[str]:
    """All come, they run, all go home."""
    ran = [f"{n} runs" for n in runs_ or names]
    return [f"{n} to {DEVICE}" for n in names] + ran + [f"{n} to {HOME}" for n in names]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_parts_come_for_their_work_alone_and_change_nothing(
    family: str, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proven by the order of moves and calls: there is no second device here."""
    stays, goes = made(tiny[family]), made(tiny[family], offload_frozen=True)
    still, events = diary(stays, monkeypatch), diary(goes, monkeypatch)
    a, b = encoded(stays), encoded(goes)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert events == visits("vae")
    events.clear()
    assert torch.equal(decoded(stays), decoded(goes))
    assert events == visits("vae")
    events.clear()
    for one, two in zip(stays.encode_prompts(PROMPTS), goes.encode_prompts(PROMPTS), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    encoders = ["text_encoder", "text_encoder_2"]
    first, last = len(encoders), -len(encoders)
    assert sorted(events[:first]) == [f"{n} to {DEVICE}" for n in encoders]
    assert set(events[first:last]) == {f"{n} runs" for n in encoders}
    assert sorted(events[last:]) == [f"{n} to {HOME}" for n in encoders]
    assert all(e.endswith("runs") for e in still)


@pytest.mark.parametrize("offload", [False, True])
def test_parts_are_loaded_where_they_wait(
    offload: bool, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 10 GB of a T5 never pass through the device before they are needed."""
    asked: list[str] = []
    to = nn.Module.to

    def noted(module: nn.Module, *args: Any) -> nn.Module:
        asked.extend(str(x) for x in args if isinstance(x, torch.device))
        return to(module, *args)

    g = made(tiny["sdxl"], offload_frozen=offload)
    for cls in {type(p) for p in made(tiny["sdxl"]).pipe.components.values()}:
        if issubclass(cls, nn.Module):
            monkeypatch.setattr(cls, "to", noted)
    assert g.pipe is not None
    assert asked and set(asked) == {HOME if offload else DEVICE}


def test_parts_go_home_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    part, events = nn.Linear(1, 1), []
    monkeypatch.setattr(part, "to", _noted(events, "part", part.to))
    with pytest.raises(ZeroDivisionError), visit([part], torch.device(DEVICE)):
        assert events == [f"part to {DEVICE}"] and 1 / 0
    assert events[1:] == [f"part to {HOME}"]


# -- a VAE that overflows


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose VAE leaves the range of float16 in its last layers, both ways."""
    from diffusers import AutoencoderKL

    folder = pipeline_folder("sd", tmp_path_factory.mktemp("loud"))
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        for last in (vae.encoder.conv_out, vae.decoder.conv_out):
            last.weight.mul_(3e4 / last.weight.abs().max())
    vae.save_pretrained(folder / "vae")
    return folder


def sections(model: Path, data: Path, cache: Path, vae_dtype: str) -> dict[str, Any]:
    return {
        "model": {
            "name_or_path": str(model),
            "resolution": 64,
            "lora": {"r": 2},
            "vae_dtype": vae_dtype,
        },
        "objective": {"type": "dpo", "beta": 1e-12},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(cache), "dtype": "float32"},
        "train": {"train_batch_size": 2, "max_train_steps": 1, "report_to": "none"},
    }


def test_overflowing_latents_name_record_precision_and_fix(loud: Path, tmp_path: Path) -> None:
    data, cache = runs.pickapic(tmp_path / "pairs.parquet", 2), tmp_path / "cache"
    with pytest.raises(ModelError) as caught:
        runs.train(tmp_path, "half", sections(loud, data, cache, "float16"))
    text = str(caught.value)
    assert text.startswith("record '0': non-finite ")
    assert "from the frozen encoder (model.vae_dtype: float16)" in text
    assert "set model.vae_dtype: float32 or bfloat16, or model.vae_name_or_path: made" in text
    for fine in ("float32", "bfloat16"):  # its values are large, not broken
        summary = runs.train(tmp_path, fine, sections(loud, data, cache, fine))
        assert summary["steps"] == 1


def test_overflowing_pixels_are_no_picture(loud: Path) -> None:
    with pytest.raises(ModelError) as caught:
        decoded(made(loud, vae_dtype="float16"))
    assert str(caught.value).startswith(
        "the VAE decoded non-finite pixels in float16 (model.vae_dtype), items 0 of 1\n  fix: set "
        "model.vae_dtype: float32 or bfloat16"
    )
    for fine in ("float32", "bfloat16"):
        assert decoded(made(loud, vae_dtype=fine)).isfinite().all()


def test_items_that_broke_are_counted_out() -> None:
    pixels = torch.zeros(4, 3, 2, 2)
    assert finite_pixels(pixels, torch.float16) is pixels
    pixels[1, 0, 0, 0], pixels[3, 2, 1, 1] = float("inf"), float("nan")
    with pytest.raises(ModelError, match=r"in bfloat16 .*, items 1, 3 of 4"):
        finite_pixels(pixels, torch.bfloat16)


# -- averages


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_the_export_is_the_average_of_the_adapters(
    use_dora: bool, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """shadow <- d shadow + (1 - d) w, d = min(decay, (1 + n) / (10 + n)), from every checkpoint."""
    from safetensors.torch import load_file

    data = runs.pickapic(tmp_path / "pairs.parquet", 4)
    recipe = sections(tiny["sdxl"], data, tmp_path / "cache", "float32")
    recipe["model"]["lora"] = {"r": 2, "use_dora": use_dora}
    recipe["objective"]["beta"] = 500.0
    recipe["train"] |= {
        "learning_rate": 1e-2,
        "max_train_steps": 3,
        "checkpointing_steps": 1,
        "ema_decay": 0.15,
    }
    runs.train(tmp_path, "run", recipe)
    start = generator(tiny["sdxl"], lora={"r": 2, "use_dora": use_dora}).views.trained()
    shadow = {k: p.detach().clone() for k, p in start.items()}
    assert any("magnitude" in k for k in shadow) == use_dora
    for n in (1, 2, 3):
        d = min(0.15, (1 + n) / (10 + n))
        live = runs.weights(tmp_path / "run", n)
        shadow = {k: d * v + (1 - d) * live[k] for k, v in shadow.items()}
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    averaged = load_file(folder / "ema.safetensors")
    torch.testing.assert_close(averaged, shadow)
    assert any(not torch.equal(averaged[k], live[k]) for k in live)

    g = generator(tiny["sdxl"], lora={"r": 2, "use_dora": use_dora})
    with torch.no_grad():
        for k, p in g.views.trained().items():
            p.copy_(averaged[k])
    noise, ours = our_images(g)
    without, theirs = reloaded_images(tiny["sdxl"], str(tmp_path / "run"), noise)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (without - theirs).abs().max() > 1e-3
