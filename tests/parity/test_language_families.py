"""What FLUX.2, Qwen-Image, Z-Image and HunyuanImage do that the common proofs do not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_align.contract import DrawSpec, Encoded
from t2i_align.errors import ModelError, RecipeError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.distilled import Described, distilled_reason, meanflow_reason
from t2i_align.process.seeds import normals
from t2i_align.recipe import load_recipe
from t2i_align.train.trace import example_event
from tests.backbones import PROMPTS, SEEDS, Case, events, generator, sections
from tests.cases_language import CASES
from tests.runs import write_recipe
from tests.tiny_language import hunyuan_image, qwen_template, qwen_tokenizer

CASE = {case.name: case for case in CASES}
QUOTED = ["a cat", 'a shop sign that says "open"']


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language")
    return {case.name: case.build(root / case.name) for case in CASES}


def test_the_templates_head_has_as_many_tokens_as_the_pipelines_cut_off() -> None:
    """34, as with the real vocabulary; so what is left begins with the prompt's first token."""
    tokenizer = qwen_tokenizer()
    ids = tokenizer(qwen_template().format("a cat")).input_ids
    assert tokenizer.decode(ids[34:]) == "a cat<|im_end|>"


# -- HunyuanImage: guiders, quoted text, distilled weights, plan


def hunyuan_loop(
    folder: Path, prompts: list[str], guidance: float, num_steps: int
) -> tuple[DiffusersGenerator, Any, Tensor, Tensor]:
    """Pictures of the suite's loop and of the stock pipeline, both guiders at one scale."""
    g = generator(CASE["hunyuan_image"], folder)
    inputs = g.prepare_sampling(prompts, num_steps=num_steps, guidance=guidance)
    ours = torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])
    stock = generator(CASE["hunyuan_image"], folder).pipe
    stock.guider = stock.guider.new(guidance_scale=guidance)
    stock.ocr_guider = stock.ocr_guider.new(guidance_scale=guidance)
    theirs = stock(
        prompt=prompts,
        height=64,
        width=64,
        num_inference_steps=num_steps,
        latents=normals(SEEDS, inputs.shape),
        output_type="pt",
    ).images
    return g, inputs, ours, theirs


def test_projected_guidance_and_its_momentum_equal_the_pipelines(folders: dict[str, Path]) -> None:
    """From the seventh step on the guider projects, and carries an average from the first one."""
    g, inputs, ours, theirs = hunyuan_loop(folders["hunyuan_image"], PROMPTS, 4.0, 7)
    assert (ours - theirs).abs().max().item() <= 1e-4
    again = g.decode(g.rollout(inputs, SEEDS, "policy").sample)
    assert torch.equal(again[0].data, ours[0])  # nothing is left of an earlier loop
    inputs.guider.adaptive_projected_guidance_start_step = 99
    plain = g.decode(g.rollout(inputs, SEEDS, "policy").sample)
    assert (plain[0].data - ours[0]).abs().max().item() > 1e-3  # the projection does something


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_quoted_text_is_guided_by_its_own_guider(folders: dict[str, Path], guidance: float) -> None:
    g, inputs, ours, theirs = hunyuan_loop(folders["hunyuan_image"], QUOTED, guidance, 5)
    assert (ours - theirs).abs().max().item() <= 1e-4
    glyphs = inputs.cond["encoder_attention_mask_2"].sum(1)
    assert glyphs.tolist() == [0, len('Text "open". ') + 1]  # bytes, and the end
    assert (inputs.negative is None) == (guidance == 1.0)
    if inputs.guider is not None:
        assert inputs.guider.config.adaptive_projected_guidance_start_step == 2
        plain = g.prepare_sampling(PROMPTS, num_steps=5, guidance=guidance).guider
        assert plain.config.adaptive_projected_guidance_start_step == 5


def test_a_plan_runs_as_many_text_tokens_as_the_network(folders: dict[str, Path]) -> None:
    g = generator(CASE["hunyuan_image"], folders["hunyuan_image"])
    plan = DiffusersGenerator(g.options, "meta")
    plan.load_module(0, reference=False)
    seen: list[int] = []

    def note(block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        seen.append(output[1].shape[1])

    cases = ((g, events(g)[1]), (plan, example_event(plan, 2, DrawSpec())))
    for made, event in cases:
        made.module.get_submodule("transformer_blocks.0").register_forward_hook(note)
        with torch.no_grad():
            made.score(event, "policy")
    assert seen == [1000 + 128] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"use_meanflow": True}, "use_meanflow"), ({"guidance_embeds": True}, "guidance_embeds")],
)
def test_hunyuan_images_distilled_weights_are_refused(
    tmp_path: Path, changes: dict[str, bool], said: str
) -> None:
    """Whatever is allowed: the loop could not tell the network what it asks for."""
    folder = hunyuan_image(tmp_path / "distilled", **changes)
    options = DiffusersOptions(name_or_path=str(folder), resolution=64, allow_distilled=True)
    with pytest.raises(ModelError, match=f"distilled.*{said}"):
        DiffusersGenerator(options)
    recipe = sections(CASE["hunyuan_image"], folder, tmp_path)
    recipe["model"]["allow_distilled"] = True
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, "refused", recipe))
    (problem,) = caught.value.problems
    assert said in str(problem) and "train the weights it was distilled from" in str(problem)
    index = json.loads((folder / "model_index.json").read_text())
    assert meanflow_reason(index, {}) is None
    assert meanflow_reason({"_class_name": "FluxPipeline"}, {"guidance_embeds": True}) is None


@pytest.mark.parametrize(
    ("pipeline", "index", "told", "said"),
    [
        ("Flux2KleinPipeline", {"is_distilled": True}, False, "is_distilled"),
        ("Flux2KleinPipeline", {"is_distilled": False}, False, None),  # klein's base
        ("Flux2Pipeline", {}, False, "[klein]"),
        ("Flux2Pipeline", {}, True, None),
    ],
)
def test_flux_2_klein_is_told_from_dev_and_from_its_base(
    pipeline: str, index: dict[str, Any], told: bool, said: str | None
) -> None:
    model = Described(("mine",), {"_class_name": pipeline} | index, {"guidance_embeds": told})
    reason = distilled_reason(model)
    assert reason is None if said is None else reason is not None and said in reason


def test_klein_takes_no_negative_prompt(folders: dict[str, Path]) -> None:
    g = generator(CASE["flux2_klein"], folders["flux2_klein"])
    said = "negative_prompt: Flux2KleinPipeline does not take it"
    with pytest.raises(ModelError, match=said):
        g.prepare_sampling(PROMPTS, num_steps=2, guidance=4.0, negative_prompt="blurry")


# -- Qwen-Image: prompts alone and together


def test_prompts_encoded_alone_make_the_pipelines_padded_batch(folders: dict[str, Path]) -> None:
    """Its mask, which it leaves out for one prompt, comes back when prompts are put together."""
    g = generator(CASE["qwen_image"], folders["qwen_image"])
    sample, _ = events(g)
    together = g.prepare_sampling(PROMPTS, num_steps=2, guidance=1.0).cond
    assert sample.cond.keys() == together.keys()
    name = "encoder_hidden_states_mask"
    assert torch.equal(sample.cond[name], together[name])
    assert not together[name].all()
    torch.testing.assert_close(
        sample.cond["encoder_hidden_states"], together["encoder_hidden_states"]
    )
    alone = g.prepare_sampling(PROMPTS[:1], num_steps=2, guidance=1.0).cond
    assert alone.keys() == together.keys()  # so that batches of prompts can be joined
    assert alone[name].all()


# -- sizes and codecs


@pytest.mark.parametrize(
    ("name", "fits", "not_fit"), [("qwen_image", 1328, 1336), ("z_image", 1040, 1048)]
)
def test_sizes_go_by_tokens(folders: dict[str, Path], name: str, fits: int, not_fit: int) -> None:
    """1328 is Qwen-Image's own side; a token covers 16 pixels there and in Z-Image."""
    fitting, other = (
        DiffusersOptions(name_or_path=str(folders[name]), resolution=side)
        for side in (fits, not_fit)
    )
    assert DiffusersGenerator(fitting, "meta").size.height == fits
    with pytest.raises(ModelError, match="not a multiple of 16"):
        DiffusersGenerator(other, "meta")


def encoded(case: Case, folder: Path, pixels: Tensor) -> tuple[DiffusersGenerator, Tensor]:
    g = generator(case, folder)
    states = g.encode_media([Encoded({"pixels": pixels}, {})])
    return g, states[0].state["mean"]


def test_pictures_become_the_latents_of_the_pipelines_own_encoder(
    folders: dict[str, Path],
) -> None:
    from diffusers import QwenImageImg2ImgPipeline

    torch.manual_seed(1)
    pixels = torch.rand(3, 64, 64) * 2 - 1
    g, mean = encoded(CASE["flux2"], folders["flux2"], pixels)
    theirs = g.pipe._encode_vae_image(pixels[None], generator=None)
    torch.testing.assert_close(mean, theirs[0])

    g, mean = encoded(CASE["qwen_image"], folders["qwen_image"], pixels)
    stock: Any = QwenImageImg2ImgPipeline(**g.pipe.components)
    stock.vae.encode = of_mean(stock.vae.encode)
    theirs = stock._encode_vae_image(pixels[None, :, None], torch.Generator())
    torch.testing.assert_close(mean, theirs[0, :, 0])


def of_mean(encode: Any) -> Any:
    """An encoder whose posterior always gives its mean."""

    def found(x: Tensor) -> Any:
        output = encode(x)
        output.latent_dist.sample = lambda generator=None: output.latent_dist.mode()
        return output

    return found
