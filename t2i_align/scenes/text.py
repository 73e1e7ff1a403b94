"""The world's language: a whole-word CLIP tokenizer and two small CLIP text encoders.

The encoders are trained once on the grammar itself, before any picture: at every class word the
penultimate hidden state must tell its class, the colour said of it, how many, and its part in a
relation; the pooled vector must tell the same of the whole prompt. A frozen encoder that has
resolved who is what colour leaves the denoiser only the drawing. Only training prompts are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from string import ascii_lowercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_align.scenes.grammar import COLORS, NUMBERS, RELATIONS, TASKS, Metadata, flat_prompts
from t2i_align.scenes.render import CLASSES

Merge = tuple[str, str]
END = "</w>"  # marks a piece that ends a word
LENGTH = 16
DIM = 96
FACTS = {"cls": len(CLASSES), "color": len(COLORS) + 1, "count": 4, "part": 2 * len(RELATIONS) + 1}


def words() -> list[str]:
    """Every word of the grammar."""
    small = ["a", "an", "photo", "of", "and", *NUMBERS.values(), "left", "right", "above", "below"]
    return [*small, *COLORS, *CLASSES, *(f"{c}s" for c in CLASSES)]


def split(word: str, merges: Sequence[Merge]) -> list[str]:
    """A word in the pieces that byte-pair merges leave, the earliest merge first."""
    pieces = [*word[:-1], f"{word[-1]}{END}"]
    rank = {pair: i for i, pair in enumerate(merges)}
    while True:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: rank.get(pair, len(rank)), default=None)
        if best not in rank:
            return pieces
        i = pairs.index(best)
        pieces[i : i + 2] = ["".join(best)]


def merges_of(vocabulary: Sequence[str]) -> list[Merge]:
    """Merges that make one token of each word.

    What earlier merges leave of a word is joined from the left by new, later ones. Those cannot
    spoil an earlier word: while it has pieces an earlier merge fits them, and goes first.
    """
    merges: list[Merge] = []
    for word in vocabulary:
        pieces = split(word, merges)
        heads = accumulate(pieces)
        merges += [(head, piece) for head, piece in zip(heads, pieces[1:], strict=False)]
    return merges


def tokenizer() -> Any:
    """A stock CLIPTokenizer in which each word is one token; other text falls back to letters.

    Ids are fixed: two special tokens, letters, letters that end a word, merges of the sorted words.
    """
    from transformers import CLIPTokenizer

    merges = merges_of(sorted(words()))
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = [f"{letter}{end}" for end in ("", END) for letter in ascii_lowercase]
    tokens = dict.fromkeys([*special, *letters, *("".join(pair) for pair in merges)])
    build: Any = CLIPTokenizer
    vocab = {token: i for i, token in enumerate(tokens)}
    return build(vocab=vocab, merges=merges, model_max_length=LENGTH)


def encoder_config(vocab: int, bos: int, eos: int) -> Any:
    """Config of both towers: width 96, three layers."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=DIM,
        intermediate_size=3 * DIM,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        projection_dim=DIM,
        hidden_act="gelu",
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def facts(metadata: Metadata) -> list[dict[str, int]]:
    """What each class word of a prompt means, in the order of the words."""
    clauses = metadata["include"]
    rows = []
    for number, c in enumerate(clauses):
        part = 0
        if metadata["tag"] == "position":
            relation = RELATIONS.index(clauses[1]["position"][0])
            part = 1 + relation + (len(RELATIONS) if number == 0 else 0)
        color = COLORS.index(c["color"]) + 1 if "color" in c else 0
        cls = CLASSES.index(c["class"])
        rows.append({"cls": cls, "color": color, "count": c["count"] - 1, "part": part})
    return rows[::-1] if metadata["tag"] == "position" else rows  # the subject is said first


class Probe(nn.Module):
    """Linear read-outs of one encoder.

    At class words, and of the pooled vector (two slots and the task).
    """

    def __init__(self) -> None:
        """Heads by fact."""
        super().__init__()
        self.word = nn.ModuleDict({k: nn.Linear(DIM, n) for k, n in FACTS.items()})
        self.pooled = nn.ModuleDict({k: nn.Linear(DIM, 2 * n) for k, n in FACTS.items()})
        self.task = nn.Linear(DIM, len(TASKS))


def targets(items: list[Metadata], ids: Tensor, nouns: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Facts ``(N, 2)`` of both class words (-100 where there is none), and their places."""
    slots = {k: torch.full((len(items), 2), -100) for k in FACTS}
    where = torch.zeros(len(items), 2, dtype=torch.int64)
    for i, item in enumerate(items):
        places = torch.isin(ids[i], nouns).nonzero().flatten().tolist()
        for j, (place, row) in enumerate(zip(places, facts(item), strict=True)):
            where[i, j] = place
            for k, v in row.items():
                slots[k][i, j] = v
    return slots, where


def train_encoders(
    steps: int = 1200, batch: int = 256, seed: int = 0
) -> tuple[Any, Any, Any, float]:
    """Train both towers on the grammar.

    Returns:
        tokenizer, CLIPTextModel, CLIPTextModelWithProjection, and the share of held-out prompts all
        of whose facts are read off right.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tok = tokenizer()
    config = encoder_config(len(tok), tok.bos_token_id, tok.eos_token_id)
    towers = [CLIPTextModel(config), CLIPTextModelWithProjection(config)]
    probes = [Probe(), Probe()]
    nouns = torch.tensor(
        [tok.convert_tokens_to_ids(f"{w}</w>") for w in words() if w.rstrip("s") in CLASSES]
    )
    sides = [flat_prompts(held_out=h) for h in (False, True)]
    packs = [pack(tok, items, nouns) for items in sides]
    parameters = [p for m in (*towers, *probes) for p in m.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    shares = torch.tensor([1.0 / sum(x["tag"] == m["tag"] for x in sides[0]) for m in sides[0]])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.multinomial(shares, batch, replacement=True)
        loss = sum(read(t, p, packs[0], index)[0] for t, p in zip(towers, probes, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        every = torch.arange(len(sides[1]))
        right = [read(t, p, packs[1], every)[1] for t, p in zip(towers, probes, strict=True)]
    return tok, towers[0].eval(), towers[1].eval(), float((right[0] & right[1]).float().mean())


def pack(tok: Any, items: list[Metadata], nouns: Tensor) -> dict[str, Any]:
    """Token ids, facts, positions and tasks of prompts."""
    texts = [m["prompt"] for m in items]
    ids = tok(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    slots, where = targets(items, ids, nouns)
    task = torch.tensor([TASKS.index(m["tag"]) for m in items])
    return {"ids": ids, "slots": slots, "where": where, "task": task}


def read(tower: Any, probe: Probe, data: dict[str, Any], index: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the read-outs, and whether all of a prompt's word facts are right ``(n,)``."""
    out = tower(input_ids=data["ids"][index], output_hidden_states=True)
    hidden = out.hidden_states[-2]
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    where = data["where"][index]
    at_words = hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, DIM))
    loss = F.cross_entropy(probe.task(pooled), data["task"][index])
    right = torch.ones(len(index), dtype=torch.bool)
    for k, n in FACTS.items():
        want = data["slots"][k][index]
        said = probe.word[k](at_words)
        loss = loss + F.cross_entropy(said.flatten(0, 1), want.flatten(), ignore_index=-100)
        whole = probe.pooled[k](pooled).view(-1, n)
        loss = loss + 0.3 * F.cross_entropy(whole, want.flatten(), ignore_index=-100)
        right &= ((said.argmax(-1) == want) | (want == -100)).all(1)
    return loss, right
