"""The token likelihood is a probability.

It sums to one, sees only its mask, and matches a literal loop.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_align.contract import DrawSpec, Event, Media, MediaError, Sample, Seeds
from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.token_lm import TokenLM, TokenLMOptions
from tests.tiny import llama_folder

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "GPTNeoXForCausalLM")
ZERO = torch.zeros(64, dtype=torch.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny language models of several architectures, over bytes, START, END and 32 codes.

    Qwen2 has biases in attention, fewer key heads than heads and its input embedding for output;
    GPT-NeoX has one matrix for queries, keys and values, rotates a quarter of them and calls its
    output ``embed_out``. Weights are ten times the usual, for logits of the size of 1.
    """
    import transformers

    name, folder = request.param, tmp_path_factory.mktemp("family")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    own = {"num_key_value_heads": 1, "tie_word_embeddings": True} if name[:4] == "Qwen" else {}
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        vocab_size=290, num_attention_heads=2, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=257, pad_token_id=0, initializer_range=0.2, **sizes, **own,
    )  # fmt: skip
    torch.manual_seed(11)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def model(folder: Path, num_codes: int = 32, lora: LoraOptions | None = None) -> TokenLM:
    made = TokenLM(TokenLMOptions(name_or_path=str(folder), num_codes=num_codes, lora=lora))
    made.load_module(0, reference=lora is not None)
    return made


def draw(g: TokenLM, codes: list[list[int]], prompts: list[str]) -> tuple[Sample, Event]:
    loaded = [g.load_media(Media("codes", c), "") for c in codes]
    sample = g.assemble([e.state for e in loaded], g.encode_prompts(prompts), [{}] * len(codes))
    seeds = Seeds(ZERO[: len(codes)], ZERO[: len(codes)])
    return sample, g.draw(sample, DrawSpec(), seeds)


def test_literal_log_probabilities_with_padding(family: Path) -> None:
    """Items of different lengths in one batch equal each item alone, one logit at a time."""
    g = model(family)
    codes, prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], ["hi", "a longer prompt", ""]
    _, event = draw(g, codes, prompts)
    with torch.no_grad():
        score = g.score(event, "policy")
    for b, (row, prompt) in enumerate(zip(codes, prompts, strict=True)):
        ids = [*prompt.encode(), 256, *(258 + c for c in row), 257]
        start = len(prompt.encode()) + 1
        with torch.no_grad():
            logits = g.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [logits[i - 1, ids[i]].item() for i in range(start, len(ids))]
        got = score.logp[b][score.mask[b]].tolist()
        assert got == pytest.approx(want, abs=1e-5)
        assert score.per_item()[b].item() == pytest.approx(sum(want), abs=1e-4)


def test_probabilities_of_all_sequences_sum_to_one(family: Path) -> None:
    """Over allowed ids, sequences that end within three codes plus those still running are every
    outcome, so their probabilities sum to 1. A shift by one fails.
    """
    g = model(family, num_codes=2)
    net = g.module
    assert type(net).__name__ in ARCHITECTURES
    allowed = torch.tensor([257, 258, 259])

    def hook(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(out, float("-inf"))
        masked[..., allowed] = out[..., allowed]
        return masked

    output: torch.nn.Module = net.get_output_embeddings()  # type: ignore[operator]
    handle = output.register_forward_hook(hook)
    sequences = [list(s) for n in (1, 2, 3) for s in itertools.product([0, 1], repeat=n)]
    _, event = draw(g, sequences, ["x"] * len(sequences))
    with torch.no_grad():
        logp = g.score(event, "policy").logp.double()
    handle.remove()
    total = 0.0
    for b, s in enumerate(sequences):
        codes_only = logp[b, : len(s)].sum().exp().item()
        total += codes_only if len(s) == 3 else logp[b, : len(s) + 1].sum().exp().item()
    ids = torch.tensor([[120, 256]])
    with torch.no_grad():
        empty = net(input_ids=ids).logits[0, -1][allowed].softmax(0)[0].item()
    assert total + empty == pytest.approx(1.0, abs=1e-5)


def test_only_label_positions_matter(folder: Path) -> None:
    g = model(folder)
    _, event = draw(g, [[1, 2], [3, 4, 5]], ["p", "p"])
    assert event.labels is not None
    padding = event.labels.clone()
    padding[0, 3] = 300 % 290  # beyond the first item's END
    changed = event.labels.clone()
    changed[0, 1] += 1
    with torch.no_grad():
        base = g.score(event, "policy").per_item()
        same = g.score(replace(event, labels=padding), "policy").per_item()
        other = g.score(replace(event, labels=changed), "policy").per_item()
        flipped = replace(event, mask=~event.mask)
    assert torch.equal(base, same)
    assert base[0] != other[0] and base[1] == other[1]
    with torch.no_grad():
        assert not torch.equal(g.score(flipped, "policy").per_item(), base)


def test_rollout_depends_on_its_own_seed_and_decodes(folder: Path) -> None:
    g = model(folder)
    inputs = g.prepare_sampling(["ab", "ab", "c"], num_steps=6, guidance=1.0)
    first = g.decode(g.rollout(inputs, torch.tensor([5, 6, 7]), "policy").sample)
    second = g.decode(g.rollout(inputs, torch.tensor([6, 5, 7]), "policy").sample)
    assert first[0].data.tolist() == second[1].data.tolist()
    assert first[1].data.tolist() == second[0].data.tolist()
    assert all(0 <= c < 32 for m in first for c in m.data.tolist())


def test_lora_reference_and_bad_codes(folder: Path) -> None:
    g = model(folder, lora=LoraOptions(r=2, lora_alpha=4))
    _, event = draw(g, [[1, 2]], ["p"])
    with torch.no_grad():
        assert torch.equal(g.score(event, "policy").logp, g.score(event, "reference").logp)
    for bad in ([], [32], [-1], [[1]]):
        with pytest.raises(MediaError, match=r"integers in \[0, 32\)"):
            g.load_media(Media("codes", bad), "")
    with pytest.raises(ModelError, match="vocabulary has 290"):
        TokenLM(TokenLMOptions(name_or_path=str(folder), num_codes=33))
    with pytest.raises(ModelError, match="no language model at"):
        TokenLM(TokenLMOptions(name_or_path=str(folder / "nowhere"), num_codes=3))
    with pytest.raises(ValueError, match="without guidance"):
        g.score(event, "policy", guidance=2.0)
