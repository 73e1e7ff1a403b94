"""Kohya's names, read back by diffusers' own converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.export import kohya
from t2i_align.export.adapter import Adapter, LowRank, from_module, write_adapter
from t2i_align.export.program import Request, export
from t2i_align.generators.diffusers_export import layer_name
from tests import export_runs, tiny

# SDXL's structure, thin; and FLUX's width, which diffusers' converter takes for granted
SDXL = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 2, 2),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
WIDTH = 3072


def layers_of(module: nn.Module, component: str) -> dict[str, LowRank]:
    """A rank-2 update, scale 2, of every linear and convolution."""
    torch.manual_seed(0)
    found = {}
    for name, m in module.named_modules():
        if not isinstance(m, nn.Linear | nn.Conv2d):
            continue
        inner = m.weight.shape[1:]
        up = torch.randn(m.weight.shape[0], 2, *[1] * (len(inner) - 1))
        found[f"{component}.{name}"] = LowRank(torch.randn(2, *inner), up, 2.0)
    return found


def by_layer(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a converter returned: down and up of each layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        role = "down" if any(x in key for x in ("lora_A", ".down.")) else "up"
        found.setdefault(layer_name(key), {})[role] = value
    return found


def test_every_layer_of_sdxl_comes_back_under_its_own_name() -> None:
    """794 linear and convolution layers of the full structure through diffusers' converter."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**SDXL)  # type: ignore[arg-type]
    adapter = Adapter(layers_of(unet, "unet"))
    assert len(adapter.layers) == 794
    tensors = kohya.convert(adapter, "StableDiffusionXLPipeline", unet.config)
    assert len(tensors) == 3 * 794
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)[:2]
    found = by_layer(state)
    assert found.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        assert torch.equal(found[name]["down"], layer.down), name
        assert torch.equal(found[name]["up"], layer.up), name
    assert alphas is not None and set(alphas.values()) == {4.0}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
            "middle_block.1.transformer_blocks.9.ff.net.2",
        ),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0",
            "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
    ],
)
def test_names_of_the_original_sdxl_checkpoint(name: str, original: str) -> None:
    """As they stand in sd_xl_base_1.0.safetensors, without ``model.diffusion_model``."""
    assert kohya.sgm_name(name, 2, list(SDXL["down_block_types"])) == original  # type: ignore[arg-type]


def test_stock_diffusers_misreads_alphas_that_differ() -> None:
    """Why all layers get one: of attention layers with alphas 2 and 8, both become 8."""
    from diffusers import StableDiffusionPipeline

    net = tiny.unet(16)
    names = [n for n, _ in net.named_modules() if n.endswith(("attn1.to_q", "attn1.to_v"))]
    ones = {n: LowRank(torch.ones(4, 8), torch.ones(8, 4), 2.0) for n in names}
    for name, x in ones.items():
        m = net.get_submodule(name)
        ones[name] = LowRank(
            x.down[:, :1].expand(4, m.in_features), x.up[:1].expand(len(m.weight), 4), 2.0
        )
    made = kohya.convert(
        Adapter({f"unet.{k}": v for k, v in ones.items()}), "StableDiffusionPipeline", {}
    )
    first = next(k for k in made if k.endswith(".alpha"))
    made[first] = torch.tensor(2.0)
    state, alphas = StableDiffusionPipeline.lora_state_dict(made)[:2]
    net.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    assert {net.get_submodule(n).scaling["default_0"] for n in names} == {2.0}


@pytest.mark.parametrize(
    ("pipeline", "key"),
    [
        ("StableDiffusionPipeline", "lora_unet_mid_block_attentions_0_proj_in"),
        ("StableDiffusionXLPipeline", "lora_unet_middle_block_1_proj_in"),
        ("FluxPipeline", "lora_unet_double_blocks_0_img_mlp_0"),
        ("StableDiffusion3Pipeline", "transformer.transformer_blocks.0.ff.net.2"),
    ],
)
def test_stock_diffusers_drops_the_magnitudes_of_dora(pipeline: str, key: str) -> None:
    """Why DoRA is refused: ``dora_scale``, ComfyUI's key, is filtered out before anything is read.

    What is left is a plain LoRA: another model, loaded without an error. Should this fail, DoRA can
    be written.
    """
    import diffusers

    stock: Any = getattr(diffusers, pipeline)
    ends = ("lora_down", "lora_up") if key.startswith("lora_") else ("lora_A", "lora_B")
    state = {
        f"{key}.{ends[0]}.weight": torch.ones(2, 8),
        f"{key}.{ends[1]}.weight": torch.ones(8, 2),
    }
    state |= {f"{key}.alpha": torch.tensor(2.0)} if ends[0] == "lora_down" else {}
    plain, dora = ({**state, **more} for more in ({}, {f"{key}.dora_scale": torch.ones(8, 1)}))
    seen = []
    for given in (plain, dora):
        read = stock.lora_state_dict(given)
        seen.append(read[0] if isinstance(read, tuple) else read)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 2
    assert not any("magnitude" in k or "dora" in k for k in seen[1])


def test_sd15_keeps_diffusers_names() -> None:
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    layer = LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.5)
    made = kohya.convert(Adapter({f"unet.{name}": layer}), "StableDiffusionPipeline", {})
    key = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    assert set(made) == {f"{key}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert made[f"{key}.alpha"].item() == 3.0


def test_layers_get_one_alpha_and_keep_their_updates() -> None:
    """Scales 1 and 3 of ranks 2 and 4: alpha 2 for both, B of the second times 6."""
    layers = {
        "unet.mid_block.a": LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0),
        "unet.mid_block.b": LowRank(torch.ones(4, 3), torch.ones(4, 4), 3.0),
    }
    made = kohya.convert(Adapter(layers), "StableDiffusionPipeline", {})
    for name, layer in (("a", layers["unet.mid_block.a"]), ("b", layers["unet.mid_block.b"])):
        key = f"lora_unet_mid_block_{name}"
        down, up = made[f"{key}.lora_down.weight"], made[f"{key}.lora_up.weight"]
        assert made[f"{key}.alpha"].item() == 2.0
        torch.testing.assert_close(2.0 / len(down) * up @ down, layer.delta(torch.float32))


# -- FLUX


def flux_net(width: int, num_double: int, num_single: int) -> Any:
    """The real transformer; heads of 128 at full width, of 16 when tiny."""
    from diffusers import FluxTransformer2DModel

    dim = 128 if width == WIDTH else 16
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=num_double,
        num_single_layers=num_single,
        attention_head_dim=dim,
        num_attention_heads=width // dim,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56) if dim == 128 else (4, 6, 6),
    )


@pytest.fixture(scope="module")
def wide() -> tuple[Adapter, Any]:
    """A random adapter of every linear layer at FLUX's width, the network without weights."""
    with torch.device("meta"):
        net = flux_net(WIDTH, 1, 1)
    return Adapter(layers_of(net, "transformer")), net.config


def probed(down: Tensor, up: Tensor) -> Tensor:
    """B A x for a few fixed x."""
    torch.manual_seed(1)
    return up @ (down @ torch.randn(down.shape[1], 3))


def read_back(adapter: Adapter, config: Any) -> dict[str, dict[str, Tensor]]:
    """Kohya's tensors through diffusers' FLUX converter, names without the component.

    It leaves the component out for layers outside the blocks.
    """
    from diffusers import FluxPipeline

    state: Any = FluxPipeline.lora_state_dict(kohya.convert(adapter, "FluxPipeline", config))
    return {k.removeprefix("transformer."): v for k, v in by_layer(state).items()}


def test_every_layer_of_flux_comes_back(wide: tuple[Adapter, Any]) -> None:
    """Fused and plain layers alike, and the swapped halves of the last modulation."""
    from diffusers import FluxPipeline

    from t2i_align.export.kohya_flux import WHOLE

    adapter, config = wide
    tensors = kohya.convert(adapter, "FluxPipeline", config)
    fused = {"double_blocks_0_img_attn_qkv", "double_blocks_0_txt_attn_qkv"}
    fused |= {"single_blocks_0_linear1"}
    keys = {k.partition(".")[0].removeprefix("lora_unet_") for k in tensors}
    assert fused < keys and len(keys) == len(adapter.layers) - 2 - 2 - 3
    found = read_back(adapter, config)
    assert {f"transformer.{name}" for name in found} == adapter.layers.keys()
    bare = FluxPipeline.lora_state_dict({k: v.clone() for k, v in tensors.items()})
    outside = {layer_name(k) for k in bare if not k.startswith("transformer.")}
    assert outside == WHOLE.keys()  # stock diffusers reads these, then does not load them
    for name, layer in adapter.layers.items():
        parts = found[name.removeprefix("transformer.")]
        expected = layer.scale * probed(layer.down, layer.up)
        torch.testing.assert_close(
            probed(parts["down"], parts["up"]), expected, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("which", [("attn.to_q",), ("attn.to_q", "attn.to_k", "attn.to_v")])
def test_parts_without_an_adapter_stay_as_they_are(
    wide: tuple[Adapter, Any], which: tuple[str, ...]
) -> None:
    """The attention preset adapts three of the four parts of a single block's first layer."""
    adapter, config = wide
    few = {k: v for k, v in adapter.layers.items() if k.endswith(which)}
    found = read_back(Adapter(few), config)
    for name, parts in found.items():
        product = probed(parts["down"], parts["up"])
        layer = few.get(f"transformer.{name}")
        if layer is None:
            assert product.abs().max().item() == 0.0
        else:
            expected = layer.scale * probed(layer.down, layer.up)
            torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-3)


def test_fusing_is_block_diagonal() -> None:
    """Two parts of ranks 1 and 2, a third without an adapter; by hand."""
    from t2i_align.export.kohya_flux import fuse

    parts = {
        "q": LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]), 3.0),
        "v": LowRank(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1.0),
    }
    down, up = fuse(parts, {"q": 2, "k": 2, "v": 2})
    assert down.tolist() == [[1, 2], [1, 0], [0, 1]]
    assert up.tolist() == [[3, 0, 0], [6, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 2], [0, 3, 4]]
    with pytest.raises(ModelError, match="layer q has 2 outputs, not 3"):
        fuse(parts, {"q": 3, "v": 2})


def flux_folder(folder: Path) -> Path:
    """A tiny FluxPipeline with CLIP and T5, saved."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(7)
    words = {c: i for i, c in enumerate(["<pad>", "</s>", "<unk>", *tiny.alphabet()])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    t5 = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    build: Any = FluxPipeline
    pipe = build(
        transformer=flux_net(32, 2, 1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(4, shift=0.1159),
        text_encoder=CLIPTextModel(tiny.clip_config(32, 32)).eval(),
        tokenizer=tiny.clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=PreTrainedTokenizerFast(tokenizer_object=fast, **special),
    )
    pipe.save_pretrained(folder)
    return folder


def pictures(pipe: Any) -> Tensor:
    """Two images, fixed noise."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3}
    prompts = export_runs.PROMPTS
    return pipe(prompt=prompts, latents=latents, output_type="pt", **call).images


# A single block's first layer is left out: stock diffusers reads it at FLUX's own width only, where
# the tests above read it.
TINY_TARGETS = r".*\.(attn\.(add_.*_proj|to_add_out|to_out\.0)|ff\.net\.2|norm1?\.linear)|"
TINY_TARGETS += r"transformer_blocks\..*to_[qkv]|single_transformer_blocks\.0\.proj_out"


@pytest.mark.parametrize("form", ["peft", "kohya", "merged"])
def test_flux_exports_make_the_same_pictures(form: Any, tmp_path: Path) -> None:
    """An adapter on the stock transformer, then its exports in fresh stock pipelines."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, inject_adapter_in_model

    base = flux_folder(tmp_path / "base")
    load: Any = FluxPipeline.from_pretrained
    pipe = load(base)
    plain = pictures(pipe)
    net = pipe.transformer
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=TINY_TARGETS), net)
    net.requires_grad_(False)
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    adapter = from_module(net, export_runs.randomise(net), "transformer")
    assert len(adapter.layers) == 2 * (8 + 1 + 1) + 2
    expected = pictures(pipe)
    assert (plain - expected).abs().max().item() > 1e-2
    write_adapter(adapter, tmp_path / "a" / "pytorch_lora_weights.safetensors")
    out = tmp_path / "out"
    export(Request(tmp_path / "a", form, out, model=str(base)))
    other = load(out if form == "merged" else base)
    if form != "merged":
        other.load_lora_weights(out)
    assert (pictures(other) - expected).abs().max().item() <= 1e-4


# -- what has no such format, and metadata


def test_families_without_a_format_say_so() -> None:
    layer = {"transformer.a": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    with pytest.raises(ModelError, match="no kohya format for PixArtSigmaPipeline"):
        kohya.convert(Adapter(layer), "PixArtSigmaPipeline", {})
    with pytest.raises(ModelError, match=r"transformer\.a is not in the unet"):
        kohya.convert(Adapter(layer), "StableDiffusionPipeline", {})
    for name, pipeline in [
        ("unet.odd", "StableDiffusionXLPipeline"),
        ("transformer.odd", "FluxPipeline"),
    ]:
        config = {**SDXL, "layers_per_block": 2, "num_attention_heads": 1, "attention_head_dim": 2}
        with pytest.raises(ModelError, match="layer odd has no name"):
            kohya.convert(Adapter({name: layer["transformer.a"]}), pipeline, config)
    dora = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, torch.ones(2))
    with pytest.raises(ModelError, match="drops its magnitudes"):
        kohya.convert(Adapter({"unet.a": dora}), "StableDiffusionPipeline", {})


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """``ss_`` and ModelSpec fields, all strings, none of them diffusers' own key."""
    from safetensors import safe_open

    base = tiny.pipeline_folder("sdxl", tmp_path / "base")
    run = export_runs.make(tmp_path / "x", base, {"r": 4, "lora_alpha": 8})
    export(Request(run.folder, "kohya", tmp_path / "mine", dtype="float16"))
    with safe_open(tmp_path / "mine" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
        dtypes = {file.get_tensor(k).dtype for k in file.keys()}
    assert dtypes == {torch.float16}
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_steps": "3",
        "ss_sd_model_name": "base",
        "ss_output_name": "mine",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.title": "mine",
    }
    assert {k: metadata[k] for k in expected} == expected
    assert str(tmp_path) not in json.dumps(metadata)


def test_versions_that_share_a_pipeline_class() -> None:
    sd, flux = (kohya.format_of(n) for n in ("StableDiffusionPipeline", "FluxPipeline"))
    assert kohya.versioned(sd, {"cross_attention_dim": 768}).base == "sd_v1"
    assert kohya.versioned(sd, {"cross_attention_dim": 1024}).base == "sd_v2"
    assert kohya.versioned(flux, {"guidance_embeds": True}).architecture == "flux-1-dev/lora"
    assert kohya.versioned(flux, {"guidance_embeds": False}).architecture == "flux-1-schnell/lora"
