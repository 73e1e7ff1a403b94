"""Every objective on every kind of generator: it trains, or the recipe check says why it cannot.

Scores are real: tiny networks of the real classes, policy equal to its frozen copy. An objective
that names a generator's kind must give a finite loss with finite gradients that reach most of the
network, take a step, and stay finite; those that are -log sigmoid of a difference of margins give
ln 2 before the step and less after it. One that does not is refused before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align import checks
from t2i_align.contract import LossOutput, Score, ScoredBatch
from t2i_align.objectives import OBJECTIVES
from t2i_align.objectives.links import LINKS
from t2i_align.protocols import Inverts, LocalStats, Needs
from t2i_align.recipe import Recipe
from t2i_align.registry import resolve
from tests.kinds import KINDS, built, event, items, transitions

# what an objective must be defined for, at least; those of ONLY, no more. Unpaired speech (RIO) is
# kto on tokens, continuous tokens (ARDM-DPO) and 3D (DSO-DPO) are dpo on elbo. Policy gradients
# (grpo) and kernels between the two predictions of a pair (KC-DPO) are no objectives of the suite.
TABLE: dict[str, set[str]] = {
    "d3po": {"transition"},
    "diffusion_dro": {"elbo"},
    "dpo": {"elbo", "masked", "token"},
    "dso_dro": {"elbo"},
    "inpo": {"elbo"},
    "kto": {"elbo", "token"},
    "mapo": {"elbo"},
    "smpo": {"elbo"},
    "spo": {"transition"},
}
ONLY = {"d3po", "diffusion_dro", "dso_dro", "inpo", "mapo", "smpo", "spo"}
SMPO = {"type": "smpo", "value_min": 0.1, "value_max": 0.3}
MADPO = {"type": "madpo", "threshold": 0.08, "width": 0.02}
DPO_FORMS: list[dict[str, Any]] = [
    {"weight": SMPO},
    {"weight": MADPO},
    {"weight": "noise_em"},
    {"modpo_weight": 0.6},
    {"sft_weight": 0.01},
    *({"link": {"type": "f_dpo", "divergence": d}} for d in ("forward_kl", "js", "alpha")),
    {"link": {"type": "aot", "pairing": "unpaired"}},
]
# options beside the defaults: other forms, and fewer network calls where events are inverted
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "d3po": [{"beta": 1.0}],
    "dpo": [*({"link": name} for name in LINKS), *DPO_FORMS],
    "dso_dro": [{}, {"form": "signed"}],
    "inpo": [{"inversion_steps": 2}],
    "mapo": [{}, {"form": "paper"}],
    "npo": [{}, {"layout": "pairs"}],
    "rwl": [{}, {"layout": "groups"}],
    "smpo": [{"inversion_steps": 2}],
}
STRENGTHS = ("beta", "alpha", "tau")  # each in the unit of a log-likelihood
BETAS = {"token": 0.1, "masked": 10.0}
CASES = [(name, given) for name in OBJECTIVES for given in VARIANTS.get(name, [{}])]
LN2 = {"d3po", "dcpo", "dpo sigmoid", "dpo_safeguard", "inpo", "spo", "tdpo"}
LN2 |= {"dpo smpo", "dpo noise_em", "dpo f_dpo forward_kl", "dpo f_dpo js", "dpo f_dpo alpha"}
VALUES = torch.tensor([0.27, 0.22, 0.19, 0.14])


def label(case: tuple[str, dict[str, Any]]) -> str:
    words = [case[0]]
    for key, value in case[1].items():
        words += [key] if key.endswith("_weight") else []
        inner = value.values() if isinstance(value, dict) else [value]
        words += [word for word in inner if isinstance(word, str)]
    return " ".join(words)


def made(name: str, given: dict[str, Any], kind: str = "elbo") -> tuple[Any, Any]:
    """An objective and its options, with the beta that a kind's papers use."""
    cls = resolve(OBJECTIVES[name])
    own = {}
    if kind in BETAS and "elbo" in cls.needs.kinds:  # whose defaults are for errors
        own = {key: BETAS[kind] for key in STRENGTHS if key in cls.Options.model_fields}
    options = cls.Options.model_validate(own | given)
    return cls(options), options


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Generators and their random items, built once."""

    @cache
    def get(kind: str) -> tuple[Any, Any]:
        generator = built(kind, tmp_path_factory.mktemp("zoo") / "model")
        return generator, items(generator)

    return get


@pytest.fixture(scope="module")
def scored(zoo: Any) -> Any:
    """Events with their scores by view, shared by all objectives that draw alike."""

    @cache
    def get(kind: str, coupling: str, want: frozenset[str], inversion: Any, steps: bool) -> Any:
        generator, sample = zoo(kind)
        if steps:
            drawn = transitions(generator, sample)
        else:
            drawn = event(generator, sample, coupling, inversion)  # type: ignore[arg-type]
        policy = generator.score(drawn, "policy", want)
        with torch.no_grad():
            reference = generator.score(drawn, "reference", want)
        return drawn, {"policy": policy, "reference": reference, "old": reference}

    return get


def batch(objective: Any, scores: dict[str, Score], lam: Tensor | None) -> ScoredBatch:
    """Four items as the data loader lays them out: items 0, 1 win against 2, 3."""
    needs: Needs = objective.needs
    pairs = needs.layout == "pairs" or needs.feed == "replay"
    index = torch.arange(2 if pairs else 0)
    items, groups = needs.layout == "items", needs.layout == "groups"
    captions = type(objective).__module__.endswith(".captions")  # sides differ in their text
    return ScoredBatch(
        scores=scores,
        chosen=index,
        rejected=index + 2,
        preference=torch.ones(len(index)),
        labels=torch.tensor([1, 1, -1, -1]) if items else None,
        groups=torch.tensor([0, 1, 0, 1]) if groups else None,
        ranks=torch.tensor([0, 0, 1, 1]) if groups else None,
        values=VALUES,
        prompts=torch.tensor([11, 12, 13, 14] if captions else [11, 12, 11, 12]),
        records=torch.tensor([0, 1, 0, 1]),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        lam=lam,
    )


def supported(needs: Needs, kind: str) -> bool:
    """Whether the declared kinds hold the generator's, or its trajectories' where it walks."""
    own = {kind} | ({"transition"} if kind == "elbo" and needs.feed == "trajectory" else set())
    return bool(own & needs.kinds)


def loss_of(objective: Any, scores: dict[str, Score], lam: Tensor | None) -> LossOutput:
    given = batch(objective, scores, lam)
    return objective(given, objective.init_state(), LocalStats())


def refusals(generator: Any, options: Any) -> list[Any]:
    """What the recipe check says of the objective on the generator."""
    recipe = Recipe.model_construct(model=generator.options, objective=options)
    return [p for p in checks.run(recipe, {"model", "objective"}) if p.key == "objective.type"]


@contextmanager
def stepped(
    trained: list[torch.nn.Parameter], gradients: Sequence[Tensor | None], length: float
) -> Iterator[None]:
    """Weights down the gradient, so far that a linear loss would fall by ``length``.

    They are exchanged, not changed, so that graphs made before stay valid.
    """
    square = sum(float(g.double().square().sum()) for g in gradients if g is not None)
    before = [p.data for p in trained]
    for p, g in zip(trained, gradients, strict=True):
        p.data = p.data if g is None else p.data - g * (length / square)
    try:
        yield
    finally:
        for p, old in zip(trained, before, strict=True):
            p.data = old


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_it_trains_or_is_refused(
    case: tuple[str, dict[str, Any]], kind: str, zoo: Any, scored: Any
) -> None:
    own, (generator, _) = KINDS[kind][0], zoo(kind)
    objective, options = made(*case, own)
    needs: Needs = objective.needs
    assert generator.kind == own
    refused = refusals(generator, options)
    if not supported(needs, own):
        (problem,) = refused
        known = ", ".join(sorted(needs.kinds))
        assert problem.message.startswith(f"works on {known} likelihoods")
        assert needs.only  # a refusal says why
        assert problem.message.endswith(f"{type(generator).__name__} has {own}; {needs.only}")
        assert "ls objectives" in problem.fix
        return
    assert refused == []
    inversion = objective.inversion if isinstance(objective, Inverts) else None
    steps = own not in needs.kinds
    drawn, scores = scored(kind, needs.coupling, needs.want, inversion, steps)
    out = loss_of(objective, scores, drawn.lam)
    assert out.loss.isfinite() and out.per_example.isfinite().all()
    assert [k for k, v in out.metrics.items() if v.isinf().any()] == []
    trained = [p for p in generator.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.loss, trained, retain_graph=True, allow_unused=True)
    reached = [g for g in gradients if g is not None and bool((g != 0).any())]
    assert all(g.isfinite().all() for g in reached)
    assert len(reached) > 0.5 * len(trained)
    with stepped(trained, gradients, 0.005), torch.no_grad():
        moved = generator.score(drawn, "policy", needs.want)
    after = loss_of(objective, scores | {"policy": moved}, drawn.lam).loss
    assert after.isfinite() and after != out.loss
    if label(case) in LN2:
        assert out.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert 5e-4 < out.loss.item() - after.item() < 0.01


def test_objectives_work_on_the_kinds_of_the_table() -> None:
    known = {name: resolve(path).needs.kinds for name, path in OBJECTIVES.items()}
    missing = {n: want - known[n] for n, want in TABLE.items() if n in known and want - known[n]}
    assert missing == {}
    more = {n: known[n] - TABLE[n] for n in ONLY if n in known and known[n] - TABLE[n]}
    assert more == {}
    assert set(TABLE) <= set(known)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_say_the_same_of_one_event(kind: str, scored: Any) -> None:
    """Bit for bit before training; the shape is items by units, whatever the latent's rank."""
    drawn, scores = scored(kind, "time+noise", frozenset(), None, False)
    policy, reference = scores["policy"], scores["reference"]
    assert torch.equal(policy.logp.detach(), reference.logp)
    assert policy.logp.shape == policy.mask.shape == policy.dims.shape == drawn.mask.shape
    assert policy.logp.dtype == torch.float32 and len(policy.logp) == 4
    assert (policy.error is not None) == (policy.kind == "elbo")
    assert not reference.logp.requires_grad and policy.logp.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_pair_share_what_they_are_told_to(kind: str, zoo: Any) -> None:
    """Noise level and noise (or mask) by coupling; an item alone is the item in its batch."""
    generator, sample = zoo(kind)
    both, time, none = (event(generator, sample, c, None) for c in ("time+noise", "time", "none"))
    if both.kind == "token":
        assert both.lam is None
        return
    assert both.lam is not None and time.lam is not None and none.lam is not None
    assert torch.equal(both.lam[:2], both.lam[2:]) and torch.equal(time.lam[:2], time.lam[2:])
    assert not torch.equal(none.lam[:2], none.lam[2:])
    if both.kind == "masked":
        assert torch.equal(both.mask[:2], both.mask[2:])
        assert not torch.equal(time.mask[:2], time.mask[2:])
        assert torch.equal(time.mask.sum(1)[:2], time.mask.sum(1)[2:])
    else:
        shared, own = (noise_of(generator, e, sample) for e in (both, time))
        torch.testing.assert_close(shared[:2], shared[2:], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(own[:2], own[2:], atol=0.1)


def noise_of(generator: Any, drawn: Any, sample: Any) -> Tensor:
    """The noise in an event's states, from (x_t, target) alone."""
    from t2i_align.process.convert import to_x0_eps

    alpha, sigma = generator.process.coefficients(drawn.time)
    return to_x0_eps(generator.prediction, drawn.target, drawn.x_t, alpha, sigma)[1]


def test_a_pair_loss_does_not_look_at_the_kind(zoo: Any, scored: Any) -> None:
    """The same log-ratios give the same DPO loss whether they came as tokens or as masked ones."""
    objective, _ = made("dpo", {"beta": 0.3})
    _, scores = scored("llama tokens", "time+noise", frozenset(), None, False)
    shift = torch.tensor([[0.2], [-0.1], [0.05], [0.3]])
    policy = replace(scores["policy"], logp=scores["reference"].logp + shift)
    losses = []
    for kind in ("token", "masked"):
        views = {"policy": policy, "reference": scores["reference"]}
        views = {name: replace(score, kind=kind) for name, score in views.items()}
        losses.append(loss_of(objective, views, None).loss.item())
    count = scores["policy"].mask.sum(1)
    rho = 0.3 * shift[:, 0] * count
    want = torch.log1p(torch.exp(-(rho[:2] - rho[2:]))).mean().item()
    assert losses == pytest.approx([want, want], abs=1e-5)
