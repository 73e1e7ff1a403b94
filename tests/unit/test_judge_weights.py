"""Weights of judges: where they are looked for, what is refused, names mapped both ways."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import (
    CPU,
    EMBED,
    PROMPTS,
    SIDE,
    clip_config,
    open_clip_folder,
    open_clip_model,
    transformers_folder,
    transformers_model,
    write_config,
)
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.judges.clip_config import clip_config as found_config
from t2i_align.judges.clip_config import named_config
from t2i_align.judges.clip_layout import to_open_clip, to_transformers
from t2i_align.judges.trunks import clip_tokens, clip_trunk
from t2i_align.judges.weight_files import SOURCE
from t2i_align.judges.weights import (
    VARIABLE,
    WeightsOptions,
    hub_id,
    load_strict,
    load_tensors,
    locate,
    sha256_of,
    weights_home,
)


def options(**given: str) -> WeightsOptions:
    return WeightsOptions.model_validate(given)


def touch(path: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = tensors or {"a": torch.ones(2)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "home"


# --- where -------------------------------------------------------------------------------------


def test_the_order_of_places(tmp_path: Path, home: Path) -> None:
    """A path wins over the weights' home, the judge's folder there over the shared one."""
    given = options(name_or_path="org/net", filename="net.safetensors")
    card = tmp_path / "card"
    shared = touch(home / "net" / "net.safetensors")
    assert locate(given, card, "mine") == shared
    own = touch(home / "mine" / "model.safetensors")  # what `judges convert` writes
    assert locate(given, card, "mine") == own
    beside = touch(card / "org" / "net" / "net.safetensors")
    assert locate(given, card, "mine") == beside
    file = touch(tmp_path / "else.safetensors")
    assert locate(options(name_or_path=str(file)), card, "mine") == file
    assert locate(options(name_or_path=str(home / "mine")), card, "mine") == home / "mine"


def test_what_convert_wrote_is_taken_before_a_pickle(home: Path) -> None:
    pickled = touch(home / "mine" / "net.pth")
    given = options(filename="net.pth")
    assert locate(given, Path(), "mine") == pickled
    ours = touch(home / "mine" / "model.safetensors")
    assert locate(given, Path(), "mine") == ours


def test_what_was_converted_for_one_judge_is_not_anothers(tmp_path: Path, home: Path) -> None:
    """HPSv2 and v2.1 lie in one repository; numbers of the two must not be mixed."""
    touch(home / "HPSv2" / "model.safetensors")
    given = options(name_or_path="xswu/HPSv2", filename="HPS_v2.1_compressed.pt")
    with pytest.raises(ModelError, match=r"HPS_v2\.1_compressed\.pt"):
        locate(given, tmp_path, "hpsv2_1")
    own = touch(home / "hpsv2_1" / "model.safetensors")
    assert locate(given, tmp_path, "hpsv2_1") == own


def test_the_weights_home_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    assert weights_home() == Path.home() / ".cache/t2i-align/weights"


def test_a_path_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    names = ("org/net", "org/here", "./net", "/a/b", "net", "a/b/c", None)
    found = [hub_id(SimpleNamespace(name_or_path=n), tmp_path) for n in names]
    assert found == ["org/net", None, None, None, None, None, None]


def test_missing_files_are_told_with_what_to_bring(tmp_path: Path, home: Path) -> None:
    ask = f"bring net.safetensors of org/net .revision abc. and put it in {home}/mine/"
    with pytest.raises(ModelError, match=rf"net\.safetensors of 'org/net' is not(?s:.*){ask}"):
        locate(options(name_or_path="org/net", revision="abc"), tmp_path, "mine", "net.safetensors")
    with pytest.raises(ModelError, match=r"weights of 'mine': nothing at .*gone(?s:.*)bring the"):
        locate(options(name_or_path="./gone"), tmp_path, "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither a\.safetensors nor model\.safetensors in"):
        locate(options(name_or_path="./empty", filename="a.safetensors"), tmp_path, "mine")
    (tmp_path / "card.yaml").write_text(CARD.format(name=tmp_path.name))
    ask = r"bring net\.pth of github\.com/o/n and run `t2i-align judges convert mine FILE` once"
    with pytest.raises(ModelError, match=rf"the weights of 'mine' are missing(?s:.*){ask}"):
        locate(options(filename="net.pth"), tmp_path, "mine")


CARD = """name: {name}
version: 1
changelog: [{{version: 1, change: first}}]
sources: [{{id: github.com/o/n}}]
license: MIT
summary: a card
input: a
output: b
citation: c
"""


def test_a_hubs_pickle_without_hash_is_not_even_downloaded(tmp_path: Path) -> None:
    """The error comes before the network, with the command that makes it safe."""
    with pytest.raises(ModelError, match=r"no sha256 is known .* so it is not downloaded"):
        locate(options(name_or_path="org/net"), tmp_path, "mine", "net.pt")
    known = options(name_or_path="org/net", sha256="0" * 64)
    with pytest.raises(ModelError, match="could not be fetched"):
        locate(known, tmp_path, "mine", "net.pt")


# --- what --------------------------------------------------------------------------------------


def test_a_pickle_needs_its_hash(tmp_path: Path) -> None:
    path = touch(tmp_path / "net.pt", {"a": torch.arange(3.0)})
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=rf"net\.pt is a pickle(?s:.*)OUT --sha256 {own}`"):
        load_tensors(path)
    with pytest.raises(ModelError, match=rf"net\.pt has sha256 {own}, not {'0' * 64}"):
        load_tensors(path, "0" * 64)
    assert load_tensors(path, own)["a"].tolist() == [0, 1, 2]


def test_a_dict_under_state_dict_is_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, path)
    assert load_tensors(path, sha256_of(path)).keys() == {"a"}
    torch.save([torch.ones(1)], path)
    with pytest.raises(ModelError, match="holds a list, not names and tensors"):
        load_tensors(path, sha256_of(path))


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    """Not even with the right hash; nor is anything but tensors accepted (HPS_v2.pt's scalars)."""
    trace, path = tmp_path / "trace", tmp_path / "net.pt"
    torch.save({"a": torch.ones(1), "b": Attack(trace)}, path)
    with pytest.raises(ModelError, match=r"net\.pt holds more than tensors and is not read"):
        load_tensors(path, sha256_of(path))
    path.write_bytes(pickle.dumps({"b": Attack(trace)}, protocol=2))
    with pytest.raises(ModelError, match="holds more than tensors"):
        load_tensors(path, sha256_of(path))
    assert not trace.exists()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    for name, text in (("a.onnx", "no kind of weights file"), ("b.safetensors", "is no safetens")):
        (tmp_path / name).write_bytes(b"not it")
        with pytest.raises(ModelError, match=text):
            load_tensors(tmp_path / name)
    with pytest.raises(ModelError, match="no weights file at"):
        load_tensors(tmp_path / "none.pt", "0" * 64)


def test_a_converted_file_answers_to_the_hash_of_its_source(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={SOURCE: "1" * 64})
    assert load_tensors(path, "1" * 64).keys() == load_tensors(path, sha256_of(path)).keys()
    with pytest.raises(ModelError, match=f"not {'2' * 64}"):
        load_tensors(path, "2" * 64)


def test_hashes(tmp_path: Path) -> None:
    """The standard's own test vector; a folder's is one of names and contents, not of times."""
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "a.txt"
    file.write_bytes(b"abc")
    assert sha256_of(file).startswith("ba7816bf8f01cfea414140de5dae2223")
    first = sha256_of(tmp_path / "d")
    file.write_bytes(b"abd")
    second = sha256_of(tmp_path / "d")
    file.rename(tmp_path / "d" / "b.txt")
    third = sha256_of(tmp_path / "d")
    (tmp_path / "d" / "b.txt").rename(file)
    file.write_bytes(b"abc")
    assert sha256_of(tmp_path / "d") == first and len({first, second, third}) == 3


def test_loading_is_strict_in_both_directions() -> None:
    module = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    load_strict(module, good, "a line")
    assert module.weight.dtype == torch.float32 and module.weight.sum() == 6
    bad = {"weight": torch.ones(3, 2), "more": torch.ones(1)}
    text = (
        r"do not fit a line: bias missing; more unexpected; weight \(3, 2\) for \(2, 3\) of another"
    )
    with pytest.raises(ModelError, match=text):
        load_strict(module, bad, "a line")
    many = {f"k{i}": torch.ones(1) for i in range(5)}
    with pytest.raises(ModelError, match="k0, k1, k2 and 2 more unexpected"):
        load_strict(module, good | many, "a line")


# --- CLIP's two layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_open_clips_weights_in_transformers_network(quick: bool, tmp_path: Path) -> None:
    """Both networks, one set of weights: equal embeddings of pictures and texts."""
    theirs = open_clip_folder(tmp_path, quick, "open_clip_model.safetensors")
    trunk = clip_trunk(tmp_path / "open_clip_model.safetensors", None, CPU, torch.float32)
    inputs = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    ids = clip_tokens(PROMPTS, "ftfy")
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(PROMPTS))
    assert (trunk.images(inputs) - theirs.encode_image(inputs)).abs().max() <= 1e-5
    assert (trunk.texts(PROMPTS, "ftfy") - theirs.encode_text(ids)).abs().max() <= 1e-5
    assert trunk.scale == pytest.approx(float(theirs.logit_scale.exp()))
    assert not any(p.requires_grad for p in trunk.model.parameters())


def test_names_go_there_and_back() -> None:
    theirs = {k: v for k, v in open_clip_model(True).state_dict().items() if k != "attn_mask"}
    there = to_transformers(theirs, "it")
    assert there.keys() == transformers_model("quick_gelu").state_dict().keys()
    back = to_open_clip(there, "it")
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in back)
    again = to_transformers(there, "it")
    assert again.keys() == there.keys()
    wrapped = to_transformers({f"model.{k}": v for k, v in theirs.items()}, "it")  # a hub mixin's
    assert wrapped.keys() == there.keys()


def test_names_of_no_layout_are_refused() -> None:
    tensors = open_clip_model(True).state_dict() | {"logit_bias": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"it: 1 of \d+ weights have names outside .*: logit_bias"):
        to_transformers(tensors, "it")
    some = transformers_model("gelu").state_dict()
    some.pop("visual_projection.weight")
    made = to_transformers(some, "it")
    with pytest.raises(ModelError, match=r"do not fit a CLIP: visual_projection\.weight missing"):
        load_strict(transformers_model("gelu"), made, "a CLIP")


def test_one_network_for_equal_weights(tmp_path: Path) -> None:
    transformers_folder(tmp_path, "gelu")
    file = tmp_path / "model.safetensors"
    first = clip_trunk(file, None, CPU, torch.float32)
    assert clip_trunk(tmp_path / "." / "model.safetensors", None, CPU, torch.float32) is first
    half = clip_trunk(file, None, CPU, torch.bfloat16)
    assert half is not first and half.model.dtype == torch.bfloat16
    assert first.images(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, EMBED)


# --- the activation ----------------------------------------------------------------------------


def test_the_architectures_have_the_published_shape() -> None:
    """Widths, layers, heads and activation of the networks that cards name."""
    facts = {
        "ViT-B-32-quickgelu": (768, 12, 12, 32, 512, 12, 8, 512, "quick_gelu"),
        "ViT-L-14-quickgelu": (1024, 24, 16, 14, 768, 12, 12, 768, "quick_gelu"),
        "ViT-H-14": (1280, 32, 16, 14, 1024, 24, 16, 1024, "gelu"),
    }
    for name, expected in facts.items():
        config = named_config(name)
        v, t = config.vision_config, config.text_config
        found = (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.patch_size)
        found += (t.hidden_size, t.num_hidden_layers, t.num_attention_heads)
        assert (*found, config.projection_dim, v.hidden_act) == expected
        assert t.hidden_act == v.hidden_act and v.layer_norm_eps == t.layer_norm_eps == 1e-5
        assert v.intermediate_size == 4 * v.hidden_size and v.image_size == 224


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-H-14"])
def test_the_full_networks_fit_open_clips(name: str) -> None:
    """Every tensor of the real architectures has a place of its own shape (no memory is taken)."""
    from transformers import CLIPModel

    with torch.device("meta"):
        theirs = open_clip.create_model(name, device="meta").state_dict()
        ours = CLIPModel(named_config(name)).state_dict()
    made = to_transformers(theirs, name)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in ours.items()}


def test_the_wrong_activation_is_refused(tmp_path: Path) -> None:
    """Weights do not tell it; the architecture, config.json and the publisher must not differ."""
    file = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match=r"openai/clip.* trained with quick_gelu, not gelu"):
        found_config(file, "ViT-L-14", "openai/clip-vit-large-patch14")
    with pytest.raises(ModelError, match="was trained with gelu, not quick_gelu"):
        found_config(file, "ViT-L-14-quickgelu", "yuvalkirstain/PickScore_v1")
    assert found_config(file, "ViT-H-14", "xswu/HPSv2").vision_config.hidden_act == "gelu"
    real = named_config("ViT-B-32")
    real.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ViT-B-32-quickgelu has hidden_act quick_gelu \(vision_"):
        found_config(file, "ViT-B-32-quickgelu")
    write_config(tmp_path, "gelu")
    with pytest.raises(ModelError, match=r"ViT-B-32 has hidden_size 768 .*config\.json says 32"):
        found_config(file, "ViT-B-32")
    with pytest.raises(ModelError, match="trained with quick_gelu, not gelu"):
        found_config(file, None, "timm/vit_base_patch32_clip_224.openai")


def test_the_wrong_activation_would_have_given_other_numbers(tmp_path: Path) -> None:
    """Why the check: equal weights, no error, another cosine."""
    inputs = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    seen = []
    for activation in ("gelu", "quick_gelu"):
        folder = tmp_path / activation
        transformers_folder(folder, activation)
        trunk = clip_trunk(folder / "model.safetensors", None, CPU, torch.float32)
        seen.append(trunk.images(inputs))
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_where_the_shape_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match=r"network behind model\.safetensors is unknown"):
        found_config(file, None)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')  # timm's
    with pytest.raises(ModelError, match="is unknown"):
        found_config(file, None)
    vision = '{"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}'
    text = '{"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}'
    cfg = f'{{"embed_dim": 512, "quick_gelu": true, "vision_cfg": {vision}, "text_cfg": {text}}}'
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {cfg}}}')
    found = found_config(file, "ViT-B-32-quickgelu", "timm/vit_base_patch32_clip_224.openai")
    assert found.to_dict() == named_config("ViT-B-32-quickgelu").to_dict()
    with pytest.raises(ModelError, match="knows no architecture 'ViT-X'"):
        named_config("ViT-X")
    with pytest.raises(ModelError, match="'RN50' is not a plain CLIP"):
        named_config("RN50")
    assert clip_config("gelu").text_config.hidden_act == "gelu"


# --- tokens ------------------------------------------------------------------------------------


def test_plain_cleaning_gives_transformers_ids() -> None:
    """transformers' tokenizer built from the same merges; curly quotes and entities stay."""
    from open_clip.tokenizer import default_bpe
    from transformers import CLIPTokenizer

    ours: Any = open_clip.get_tokenizer("ViT-B-32")
    names = {k.replace("<start_of_text>", "<|startoftext|>"): v for k, v in ours.encoder.items()}
    names = {k.replace("<end_of_text>", "<|endoftext|>"): v for k, v in names.items()}
    lines = gzip.open(default_bpe(), "rt", encoding="utf-8").read().split("\n")[1:48895]
    merges: Any = [tuple(line.split()) for line in lines]
    theirs = CLIPTokenizer(vocab=names, merges=merges)
    texts = [
        *PROMPTS,
        "it\u2019s \u201cred\u201d &amp; blue",
        "CAFE\u0301, na\u00efve",
        "\u732b 12 3",
    ]
    asked: Any = {"padding": "max_length", "truncation": True, "max_length": 77}
    expected = torch.tensor(theirs(texts, **asked)["input_ids"])
    found = clip_tokens(texts, "plain")
    ends = found.argmax(-1)
    assert torch.equal(ends, expected.argmax(-1)) and ends[4] == 76  # a long text keeps its end
    assert all(
        torch.equal(f[: e + 1], x[: e + 1]) for f, x, e in zip(found, expected, ends, strict=True)
    )
    assert not torch.equal(found[5], clip_tokens(texts, "ftfy")[5])
