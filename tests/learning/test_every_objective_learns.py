"""Every stored-record objective raises the true preference on a mixture, and not from coin flips.

The plane holds two modes, at (-1.5, 0) and (1.5, 0); a flow is fitted to their even mixture by the
suite's ``sft``. Right is preferred. After some dozen steps of an objective the share of samples on
the right must have risen by more than its standard error explains, and with labels drawn by a coin
it must not. Points, noise, order and steps are the same in both runs. Caption objectives learn
which side a caption names; token forms which codes are preferred.

The loop is the plain one (real source, cache, batches, draws, scores, objective; AdamW), so that
forty objectives take seconds each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2i_align.contract import DrawSpec, Score
from t2i_align.data import SOURCES
from t2i_align.data.batch import Prepared
from t2i_align.data.control import ShuffledLabels
from t2i_align.data.order import picks
from t2i_align.data.prepare import prepare
from t2i_align.data.source import Source
from t2i_align.generators.token_lm import TokenLM, TokenLMOptions
from t2i_align.generators.voxel_flow import VoxelFlow, VoxelFlowOptions
from t2i_align.objectives import OBJECTIVES
from t2i_align.objectives.links import LINKS
from t2i_align.protocols import Generator, Inverts, LocalStats, Objective
from t2i_align.registry import load, resolve
from t2i_align.train.offline import unscored
from t2i_align.train.options import CacheOptions
from tests import runs
from tests.tiny import llama_folder

BETA = 5.0
WIDE = 0.5  # where the optimum is a finite margin: a low beta lets it lie far from the reference
OPTIONS: dict[str, dict[str, Any]] = {  # where it is not BETA alone
    "capo": {"beta": WIDE},
    "d2o": {"beta": BETA, "alpha": BETA},
    "dspo": {"beta": 0.5},
    "inpo": {"beta": BETA, "inversion_steps": 4},
    "kto": {"beta": 2 * BETA},
    "llm_dro": {"tau": WIDE, "initial_value": 0.5},
    "mapo": {"error_scale": 0.5, "num_timesteps": 10.0, "beta": 1.0},
    "npo": {"beta": BETA, "layout": "pairs"},
    "rwl": {"tau": 0.2},
    "smpo": {"beta": BETA, "gamma": 2.0, "values": "from_data", "inversion_steps": 4},
    "tkto": {"beta": 2 * BETA},
    "asft": {"align_weight": 1.0},
    "orpo": {"odds_weight": 1.0},
    "simpo": {"beta": 5.0, "gamma": 0.5},
}
LINK_OPTIONS: dict[str, dict[str, Any]] = {
    "apo_down": {"sft_weight": 2.0},  # lowers both sides: nothing else holds the policy
    "cdpo": {"beta": WIDE},
    "ipo": {"beta": WIDE},
    "nca": {"beta": WIDE},
    "sppo": {"beta": WIDE},
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # what is not an objective's or a link's default
    "dpo f_dpo forward_kl": ("dpo", {"link": {"type": "f_dpo", "divergence": "forward_kl"}}),
    "dpo f_dpo js": ("dpo", {"link": {"type": "f_dpo", "divergence": "js"}}),
    "dpo f_dpo alpha": ("dpo", {"link": {"type": "f_dpo", "divergence": "alpha"}}),
    "dpo aot unpaired": ("dpo", {"link": {"type": "aot", "pairing": "unpaired"}}),
    "dpo smpo": ("dpo", {"weight": {"type": "smpo", "gamma": 2.0}}),
    "dpo madpo": ("dpo", {"weight": {"type": "madpo", "threshold": 1.0, "width": 1.0}}),
    "dpo noise_em": ("dpo", {"weight": "noise_em"}),
    "dpo modpo": ("dpo", {"modpo_weight": 0.7}),
    "dpop anchored": ("dpop", {"sft_weight": 0.5}),
    "dso_dro anchored": ("dso_dro", {"sft_weight": 0.5}),
    "dso_dro signed": ("dso_dro", {"form": "signed"}),
    "dspo sdxl": ("dspo", {"form": "sdxl", "beta": BETA}),
    "kto loss_averse": ("kto", {"halo": "loss_averse"}),
    # without a floor: in 50 steps both runs leave the data, the one with labels to the right
    "kto risk_seeking": ("kto", {"halo": "risk_seeking", "beta": WIDE}),
    "mapo paper": ("mapo", {"form": "paper", "exponent": 8.0}),
    "npo items": ("npo", {"layout": "items"}),
    "capo all": ("capo", {"pairs": "all"}),
    "rwl raw": ("rwl", {"weighting": "raw"}),
}
STEPS, PAIRS = 50, 64


def build(name: str, options: dict[str, Any]) -> Objective:
    """An objective by name."""
    cls = load(OBJECTIVES, name, "objective")
    return cls(cls.Options(type=name, **options))


def options_of(name: str) -> dict[str, Any]:
    """What an objective is given here: a beta for this plane, where it has one."""
    known = resolve(OBJECTIVES[name]).Options.model_fields
    return OPTIONS.get(name, {"beta": BETA} if "beta" in known else {})


NEEDS = {name: resolve(path).needs for name, path in OBJECTIVES.items()}
STORED = [name for name, needs in NEEDS.items() if not needs.online]  # the others learn elsewhere
ON_PLANE = [name for name in STORED if "elbo" in NEEDS[name].kinds]
TOKENS = [name for name in STORED if name not in ON_PLANE]


def points(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``num`` points of the right and of the left mode."""
    rng = np.random.default_rng(seed)
    right, left = 0.4 * rng.normal(size=(2, num, 2))
    center = np.array([1.5, 0.0])
    return right + center, left - center


def pair_file(path: Path) -> Path:
    """Right over left, with scores 1 and 0."""
    rows = []
    for i, (w, l) in enumerate(zip(*points(600, 2), strict=True)):  # noqa: E741
        facts = {"id": str(i), "prompt": "p", "score_chosen": 1.0, "score_rejected": 0.0}
        rows.append(facts | {"chosen": runs.point(w), "rejected": runs.point(l)})
    return runs.write_jsonl(path, rows)


def caption_file(path: Path) -> Path:
    """Each point under the name of its side and under the other's."""
    rows = []
    for i, (a, b) in enumerate(zip(*points(300, 2), strict=True)):
        for side, other, xy in (("right", "left", a), ("left", "right", b)):
            row = {"id": f"{i}{side}", "prompt": side, "negative_prompt": other}
            rows.append(row | {"image": runs.point(xy)})
    return runs.write_jsonl(path, rows)


def own_caption_file(path: Path) -> Path:
    """The right point beats the left one, each under a caption of its own."""
    rows = []
    for i, (w, l) in enumerate(zip(*points(600, 2), strict=True)):  # noqa: E741
        captions = {"chosen_prompt": "right", "rejected_prompt": "right or left"}
        images = {"image_chosen": runs.point(w), "image_rejected": runs.point(l)}
        rows.append({"id": str(i)} | captions | images)
    return runs.write_jsonl(path, rows)


def read(kind: str, file: Path, media: str, *, shuffled: bool = False) -> Source:
    """A source, through the suite's own control where labels are shuffled."""
    cls = load(SOURCES, kind, "source")
    source = cls(cls.Options(type=kind, path=str(file), media=media))
    return ShuffledLabels(source) if shuffled else source


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow fitted to the even mixture under every caption."""
    folder = tmp_path_factory.mktemp("mixture")
    rows = []
    for i, (a, b) in enumerate(zip(*points(1000, 1), strict=True)):
        for prompt in ("p", "right", "left", "right or left"):
            for k, (first, second) in enumerate(((a, b), (b, a))):
                pair = {"chosen": runs.point(first), "rejected": runs.point(second)}
                rows.append({"id": f"{i}{k}{prompt}", "prompt": prompt} | pair)
    data = runs.write_jsonl(folder / "all.jsonl", rows)
    flow = VoxelFlow(VoxelFlowOptions(name_or_path=str(runs.point_model(folder / "init"))))
    cached = prepare(read("trl", data, "voxels"), flow, "winners", cache(folder))
    train(flow, build("sft", {}), cached, steps=500, size=128, rate=2e-3)
    flow.export(str(folder / "base"))
    return folder / "base"


def cache(folder: Path) -> CacheOptions:
    """A cache of full precision."""
    return CacheOptions(dir=str(folder / "cache"), dtype="float32")


def train(
    generator: Generator,
    objective: Objective,
    data: Prepared,
    *,
    steps: int = STEPS,
    size: int = PAIRS,
    rate: float = 1e-3,
) -> None:
    """Plain AdamW on the objective."""
    generator.load_module(0, reference="reference" in objective.needs.views)
    inversion = objective.inversion if isinstance(objective, Inverts) else None
    spec, coupling = DrawSpec(inversion=inversion), objective.needs.coupling
    optimizer = torch.optim.AdamW(generator.module.parameters(), lr=rate)
    state, stats = objective.init_state(), LocalStats()
    for step in range(steps):
        found = picks(step * size, size, len(data), 0)
        batch = data.batch(found, run_seed=0, coupling=coupling, empty_prompts=0.0)
        event = generator.draw(batch.sample, spec, batch.seeds)
        scores: dict[str, Score] = {}
        for view in objective.needs.views:
            with torch.set_grad_enabled(view == "policy"):
                scores[view] = generator.score(event, view, objective.needs.want)
        labelled = unscored(batch, event, torch.device("cpu"))
        out = objective(replace(labelled, scores=scores), state, stats)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        state = out.state


def right_share(flow: VoxelFlow, prompt: str, num: int = 400) -> float:
    """Share of samples on the right, from fixed noise."""
    inputs = flow.prepare_sampling([prompt] * num, num_steps=20, guidance=1.0)
    sample = flow.rollout(inputs, torch.arange(num), "policy").sample
    return (sample.state["x0"].reshape(num, 2)[:, 0] > 0).float().mean().item()


def truth(flow: VoxelFlow, name: str) -> float:
    """What the labels prefer: the right side, or the side a caption names."""
    if name in ("tdpo", "tkto"):
        return (right_share(flow, "right") + 1 - right_share(flow, "left")) / 2
    return right_share(flow, "right" if name == "dcpo" else "p")


FILES = {"tdpo": caption_file, "tkto": caption_file, "dcpo": own_caption_file}


def gains(base: Path, folder: Path, name: str, options: dict[str, Any]) -> dict[bool, float]:
    """Change of the true preference, with true and with shuffled labels."""
    found = {}
    kind = "captions" if name in FILES else "trl"
    file = FILES.get(name, pair_file)(folder / "pairs.jsonl")
    for shuffled in (False, True):
        flow = VoxelFlow(VoxelFlowOptions(name_or_path=str(base)))
        flow.load_module(0, reference=False)
        before = truth(flow, name)
        objective = build(name, options)
        source = read(kind, file, "voxels", shuffled=shuffled)
        train(flow, objective, prepare(source, flow, objective.needs.layout, cache(folder)))
        found[shuffled] = truth(flow, name) - before
    return found


def learned(gain: dict[bool, float]) -> bool:
    """Over four standard errors (.03) with labels, and not with coins."""
    return gain[False] > 0.12 and gain[True] < 0.1 and gain[False] - gain[True] > 0.1


def test_the_base_is_an_even_mixture(base: Path) -> None:
    flow = VoxelFlow(VoxelFlowOptions(name_or_path=str(base)))
    flow.load_module(0, reference=False)
    assert abs(right_share(flow, "p") - 0.5) < 0.08


# losses that hold the winner too; and the same without what is theirs
ANCHORED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "mapo": ("mapo", OPTIONS["mapo"], "mapo", OPTIONS["mapo"] | {"beta": 1e-9}),
    "apo_down": (
        "dpo",
        {"beta": BETA, "link": "apo_down", "sft_weight": 2.0},
        "dpo",
        {"beta": 1e-9, "link": "apo_down", "sft_weight": 2.0},
    ),
    "dpop": (  # the default penalty of 50 pulls a fallen winner 51 times as hard as its loser
        "dpop",
        {"beta": WIDE, "penalty": 1.0, "sft_weight": 0.05},
        "dpop",
        {"beta": 1e-9, "sft_weight": 0.05},
    ),
    "dso_dro": ("dso_dro", {"sft_weight": 0.5}, "dpo", {"beta": 1e-9, "sft_weight": 0.5}),
}


@pytest.mark.parametrize("name", ANCHORED)
def test_what_it_adds_to_its_anchor_learns(base: Path, tmp_path: Path, name: str) -> None:
    """Winners are the even mixture, so only losers, all on the left, can teach anything.

    ``mapo`` of form paper has no such test: its margin's gradient is phi^(k - 1) |phi'| sigmoid(-D)
    of an error, at most 1/4 of the anchor's whatever k, so it learns from winners.
    """
    whole, options, anchor, of_anchor = ANCHORED[name]
    gain = {}
    for part, objective in (("whole", build(whole, options)), ("anchor", build(anchor, of_anchor))):
        flow = VoxelFlow(VoxelFlowOptions(name_or_path=str(base)))
        flow.load_module(0, reference=False)
        before = right_share(flow, "p")
        rows = []
        for i, (a, b) in enumerate(zip(*points(600, 2), strict=True)):
            w, l = (a, b) if i % 2 else (b, points(1, 1000 + i)[1][0])  # noqa: E741
            pair = {"chosen": runs.point(w), "rejected": runs.point(l)}
            rows.append({"id": str(i), "prompt": "p"} | pair)
        file = runs.write_jsonl(tmp_path / f"{part}.jsonl", rows)
        cached = prepare(read("trl", file, "voxels"), flow, "pairs", cache(tmp_path))
        train(flow, objective, cached)
        gain[part] = right_share(flow, "p") - before
    assert gain["whole"] > gain["anchor"] + 0.08, gain


@pytest.mark.parametrize("name", ON_PLANE)
def test_it_learns_from_labels_and_not_from_coins(base: Path, tmp_path: Path, name: str) -> None:
    gain = gains(base, tmp_path, name, options_of(name))
    assert learned(gain), gain


@pytest.mark.parametrize("link", LINKS)
def test_every_link_learns(base: Path, tmp_path: Path, link: str) -> None:
    gain = gains(base, tmp_path, "dpo", {"beta": BETA, "link": link} | LINK_OPTIONS.get(link, {}))
    assert learned(gain), gain


@pytest.mark.parametrize("form", FORMS)
def test_every_other_form_learns(base: Path, tmp_path: Path, form: str) -> None:
    name, options = FORMS[form]
    gain = gains(base, tmp_path, name, options_of(name) | options)
    assert learned(gain), gain


Codes = list[tuple[list[int], list[int]]]


def low_share(folder: Path, objective: Objective, rows: Codes, *, shuffled: bool = False) -> float:
    """Share of codes below 16 among samples of a tiny language model trained on pairs of codes."""
    lm = TokenLM(TokenLMOptions(name_or_path=str(llama_folder(folder / "llama")), num_codes=32))
    named = [
        {"id": str(i), "prompt": "say", "chosen": winner, "rejected": loser}
        for i, (winner, loser) in enumerate(rows)
    ]
    file = runs.write_jsonl(folder / "codes.jsonl", named)
    source = read("trl", file, "codes", shuffled=shuffled)
    train(lm, objective, prepare(source, lm, "pairs", cache(folder)), steps=40, size=32)
    inputs = lm.prepare_sampling(["say"] * 48, num_steps=8, guidance=1.0)
    sample = lm.rollout(inputs, torch.arange(48), "policy").sample
    codes = torch.cat([m.data for m in lm.decode(sample)])
    return (codes < 16).float().mean().item()


def codes(low: int, rng: np.random.Generator) -> list[int]:
    """Eight codes, ``low`` to ``low + 15``."""
    return rng.integers(low, low + 16, 8).tolist()


@pytest.mark.parametrize("name", TOKENS)
def test_token_forms_learn(tmp_path: Path, name: str) -> None:
    """Codes below 16 are preferred: their share among fresh samples rises, or a coin decides."""
    rng = np.random.default_rng(4)
    rows = [(codes(0, rng), codes(16, rng)) for _ in range(400)]
    objective = build(name, options_of(name))
    assert low_share(tmp_path, objective, rows) > 0.7
    assert abs(low_share(tmp_path, objective, rows, shuffled=True) - 0.5) < 0.15


def test_what_orpo_adds_to_its_anchor_learns(tmp_path: Path) -> None:
    """Winners are low and high codes alike, so only losers, all high, can teach anything.

    ``asft`` has no such test: its loser's gradient is p / (1 - p) of the loser's mean probability
    of a token, here some .003, so what it learns from these pairs it learns from winners.
    """
    rng = np.random.default_rng(5)
    rows = [(codes(16 * (i % 2), rng), codes(16, rng)) for i in range(400)]
    whole, anchor = (
        low_share(tmp_path, build("orpo", {"odds_weight": weight}), rows) for weight in (2.0, 0.0)
    )
    assert abs(anchor - 0.5) < 0.15 and whole > anchor + 0.15, (whole, anchor)
