"""The step-wise resampler and its relatives on a flow over the plane."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import Event, Sample, Score
from t2i_align.errors import DataError, ModelError
from t2i_align.generators.voxel_flow import VoxelFlow, VoxelFlowOptions
from t2i_align.process.elbo import flat
from t2i_align.process.transition import log_prob
from t2i_align.rollout.compare import Asked, Found, compare, thresholds, trained_steps
from t2i_align.rollout.judging import LatentJudge
from t2i_align.rollout.options import RolloutOptions
from t2i_align.rollout.prompts import encode, texts_of
from t2i_align.rollout.replay import Replayer
from t2i_align.rollout.rows import joined, take, tensors
from t2i_align.rollout.stepwise import Resampler
from t2i_align.rollout.versus import Versus
from t2i_align.rollout.walk import Draws, Steps, Walk, grid_of
from tests import runs
from tests.judged_points import PointJudge, judge_by

CPU = torch.device("cpu")
PROMPTS = ["p", "a longer prompt", "q"]
SHAPE = (2, 1, 1, 1)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> VoxelFlow:
    made = VoxelFlow(
        VoxelFlowOptions(name_or_path=str(runs.point_model(tmp_path_factory.mktemp("point"))))
    )
    made.load_module(0, reference=True)
    return made


def options(**more: Any) -> RolloutOptions:
    given = {
        "prompts": PROMPTS,
        "judge": "jpeg",
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "kernel": "flow_sde",
        "divert_start_step": 2,
        "threshold": 0.0,
        "num_candidates": 3,
    }
    return RolloutOptions.model_validate(given | more)


class Scene:
    """A walk, its prompts and a judge."""

    def __init__(
        self, flow: VoxelFlow, patch: pytest.MonkeyPatch, judge: PointJudge, o: RolloutOptions
    ) -> None:
        self.options, self.flow = o, flow
        self.prompts = encode(flow, o, 2)
        grid = grid_of(flow.process, o.num_inference_steps, None)
        self.steps = Steps(flow.process, grid, o.kernel, o.amount, o.log_prob)
        self.calls: list[int] = []
        self.walk = Walk(self.steps, self.score, "velocity", torch.float32, CPU)
        judge_by(patch, judge)
        self.judge = LatentJudge("jpeg", flow, CPU, torch.float32)

    def score(self, event: Event, want: frozenset[str]) -> Score:
        self.calls.append(event.batch)
        with torch.no_grad():
            return self.flow.score(event, "policy", want)

    def asked(self, visit: int = 0, rows: slice = slice(None)) -> Asked:
        index = torch.arange(len(PROMPTS))[rows]
        texts = PROMPTS[rows]
        visits = torch.full_like(index, visit)
        draws = Draws(5, texts, visits.tolist())
        return Asked(index, visits, texts, self.prompts.condition(index), SHAPE, draws)

    def found(self, maker: Any, asked: Asked | None = None) -> Found:
        found = Found()
        maker(self.walk, self.judge, self.options)(asked or self.asked(), found)
        return found


@pytest.fixture
def scene(flow: VoxelFlow, monkeypatch: pytest.MonkeyPatch) -> Any:
    return partial(Scene, flow, monkeypatch)


def test_every_pair_leaves_one_state_and_the_winner_scores_more(scene: Any) -> None:
    judge = PointJudge()
    s = scene(judge, options())
    found = s.found(Resampler)
    pairs = found.joined()
    assert pairs is not None
    assert found.num_compared == 3 * 4  # steps 2, 3, 4, 5 of three prompts
    assert found.num_kept == len(pairs) == 12
    assert pairs.x_t.shape == (12, 1, *SHAPE) and pairs.x_next.shape == (12, 2, *SHAPE)
    assert bool((pairs.score[:, 0] > pairs.score[:, 1]).all())
    assert sorted(set(pairs.step.tolist())) == [2, 3, 4, 5]
    levels = [0.5 - k / 6 for k in range(4) for _ in range(9)]  # of where a candidate stands
    assert judge.levels == pytest.approx(levels, abs=1e-6)


def test_scores_are_the_judges_of_the_predicted_data(scene: Any) -> None:
    """Recomputed by hand from the kept next states; at the last step, of the state itself."""
    s = scene(PointJudge(), options())
    pairs = s.found(Resampler).joined()
    for row in range(len(pairs)):
        i = int(pairs.step[row]) + 1
        for k in (0, 1):
            x = pairs.x_next[row, k][None]
            if i < len(s.steps.grid):
                cond = s.prompts.condition(pairs.prompt[row : row + 1])
                _, x = s.walk.predict(i, x, cond)
            torch.testing.assert_close(pairs.score[row, k], x.flatten()[0], atol=1e-5, rtol=1e-5)


def test_old_likelihoods_are_the_policys(scene: Any) -> None:
    s = scene(PointJudge(), options())
    pairs = s.found(Resampler).joined()
    event = pairs.event(s.steps, s.prompts.condition(pairs.prompt), CPU, detach=False)
    with torch.no_grad():
        logp = s.flow.score(event, "policy").logp[:, 0]
    torch.testing.assert_close(logp, pairs.old.T.flatten(), atol=1e-4, rtol=0)
    assert event.inputs["same"].tolist() == [*range(12), *range(12)]
    batch = pairs.batch(s.prompts.numbers(pairs.prompt), event.lam, CPU)
    assert batch.values is not None and batch.prompts is not None
    assert bool((batch.values[batch.chosen] > batch.values[batch.rejected]).all())
    assert torch.equal(batch.prompts[:12], batch.prompts[12:])


def test_a_step_costs_one_forward_of_its_candidates(scene: Any) -> None:
    """Two plain steps of 3 prompts, one more prediction, then 9 candidates at 3 of 4 levels."""
    s = scene(PointJudge(), options())
    s.found(Resampler)
    assert s.calls == [3, 3, 3, 9, 9, 9]


def test_the_trajectory_goes_on_from_a_random_candidate(scene: Any) -> None:
    """Over many visits the chain continues from the winner as often as from the others."""
    s = scene(PointJudge(), options(num_candidates=2, divert_start_step=0, num_inference_steps=3))
    went = []
    for visit in range(60):
        pairs = s.found(Resampler, s.asked(visit, slice(1))).joined()
        chain = dict(zip(pairs.step.tolist(), range(len(pairs)), strict=True))
        nxt = pairs.x_t[chain[1], 0]
        won = torch.equal(nxt, pairs.x_next[chain[0], 0])
        assert won or torch.equal(nxt, pairs.x_next[chain[0], 1])
        went.append(won)
    assert 0.3 < sum(went) / 60 < 0.7


def test_randomness_is_a_prompts_own(scene: Any) -> None:
    """Another batch gives a prompt the same pairs; another visit gives others."""
    s = scene(PointJudge(), options())
    whole, alone = (
        s.found(Resampler, s.asked(0, rows)).joined() for rows in (slice(None), slice(1, 2))
    )
    mine = take(whole, whole.prompt == 1)
    torch.testing.assert_close(mine.x_next, alone.x_next, atol=1e-5, rtol=1e-5)
    other = s.found(Resampler, s.asked(1, slice(1, 2))).joined()
    assert (other.x_next[:, :1] - alone.x_next[:, :1]).abs().max() > 0.1


def test_failures_of_the_judge_never_win_or_lose(scene: Any) -> None:
    s = scene(PointJudge(broken=0.5), options())
    found = s.found(Resampler)
    pairs = found.joined()
    assert pairs.score.isfinite().all()
    assert 0 < found.num_kept < found.num_compared
    assert s.judge.num_failed > 0 and s.judge.last_reason == "broken on purpose"
    assert abs(torch.cat(found.scores).nanmean()) < 5


def test_compare_by_hand() -> None:
    """tanh((s_w - s_l)/2) > .3 means a gap of more than .6190; .4 means .8473."""
    scores = torch.tensor([[0.0, 0.62, 0.3], [0.0, 0.61, 0.3], [torch.nan, 1.0, 0.0]])
    both, keep = compare(scores, 1.0, torch.tensor(0.3))
    assert both.tolist() == [[1, 0], [1, 0], [1, 2]] and keep.tolist() == [True, False, True]
    gap = torch.tensor([[0.0, 0.8473], [0.0, 0.8472]])
    assert compare(gap, 1.0, torch.tensor(0.4))[1].tolist() == [True, False]
    failed = torch.tensor([[torch.nan, torch.nan, 1.0], [torch.nan] * 3])
    assert not compare(failed, 1.0, torch.tensor(0.0))[1].any()
    assert not compare(torch.zeros(1, 3), 1.0, torch.tensor(0.0))[1].any()  # equal scores
    assert compare(gap, 2.0, torch.tensor(0.6))[1].all()  # the judge's scale


def test_lpos_threshold_rises_with_the_noise_of_the_step(flow: VoxelFlow) -> None:
    """Eq. (2): .35 at the trained step of least noise, .5 at the one of most, linear between."""
    o = options(threshold=0.35, threshold_max=0.5)
    grid = grid_of(flow.process, 6, None)
    steps = Steps(flow.process, grid, "flow_sde", 0.7, "full")
    trained, found = trained_steps(steps, o), thresholds(steps, o)
    std = steps.table["std"]
    assert trained.tolist() == [False, False, True, True, True, True]
    assert found[trained].min().item() == pytest.approx(0.35)
    assert found[trained].max().item() == pytest.approx(0.5)
    low, high = std[trained].min(), std[trained].max()
    expected = 0.35 + (std - low) / (high - low) * 0.15
    torch.testing.assert_close(found[trained], expected[trained])
    assert thresholds(steps, options(threshold=0.2)).tolist() == pytest.approx([0.2] * 6)


def test_branches_that_run_on_alone(scene: Any) -> None:
    """Two inner steps: candidates of step 2 are judged after step 4, of step 5 at the end.

    Each transition of winner and loser is a pair, from one state at the first only, and every
    branch is a chain.
    """
    s = scene(PointJudge(), options(num_inner_steps=2))
    found = s.found(Resampler)
    pairs = found.joined()
    assert found.num_compared == 3 * 2 and len(pairs) == 3 * (3 + 1)
    assert pairs.x_t.shape[:2] == (12, 2)
    for p in range(3):
        at = {int(i): n for n, i in enumerate(pairs.step) if pairs.prompt[n] == p}
        assert torch.equal(pairs.x_t[at[2], 0], pairs.x_t[at[2], 1])
        for i in (2, 3):
            assert torch.equal(pairs.x_next[at[i]], pairs.x_t[at[i + 1]])
        assert (pairs.x_t[at[3], 0] - pairs.x_t[at[3], 1]).abs().max() > 1e-3
        assert torch.equal(pairs.x_t[at[5], 0], pairs.x_t[at[5], 1])
    event = pairs.event(s.steps, s.prompts.condition(pairs.prompt), CPU, detach=False)
    assert "same" not in event.inputs
    with torch.no_grad():
        logp = s.flow.score(event, "policy").logp[:, 0]
    torch.testing.assert_close(logp, pairs.old.T.flatten(), atol=1e-4, rtol=0)


def test_a_deterministic_last_step_is_left_out(scene: Any) -> None:
    s = scene(PointJudge(), options(kernel="cps"))
    pairs = s.found(Resampler).joined()
    assert sorted(set(pairs.step.tolist())) == [2, 3, 4]
    assert pairs.old.isfinite().all()


def test_whole_trajectories_against_each_other(scene: Any) -> None:
    """D3PO: two paths from their own noise; the end decides every step."""
    s = scene(PointJudge(), options(num_candidates=2, divert_start_step=0))
    found = s.found(Versus)
    pairs = found.joined()
    assert found.num_compared == 3 and len(pairs) == 3 * 6
    for p in range(3):
        mine = take(pairs, pairs.prompt == p)
        assert mine.step.tolist() == list(range(6))
        assert torch.equal(mine.x_next[:-1], mine.x_t[1:])
        ends = mine.x_next[-1, :, 0, 0, 0, 0]
        assert torch.equal(mine.score, ends.expand(6, 2)) and ends[0] > ends[1]
        assert (mine.x_t[0, 0] - mine.x_t[0, 1]).abs().max() > 1e-2
    event = pairs.event(s.steps, s.prompts.condition(pairs.prompt), CPU, detach=True)
    assert "same" not in event.inputs and bool(event.inputs["detach_negative"].all())


def test_pairs_survive_joining_and_taking(scene: Any) -> None:
    s = scene(PointJudge(), options())
    pairs = s.found(Resampler).joined()
    again = joined([take(pairs, slice(0, 5)), take(pairs, slice(5, None))])
    assert all(torch.equal(v, tensors(again)[k]) for k, v in tensors(pairs).items())


def test_prompts_encoded_in_parts_are_those_encoded_together(flow: VoxelFlow) -> None:
    """Two and one at a time: rows of different lengths are padded, predictions do not change."""
    parts, whole = encode(flow, options(), 2), encode(flow, options(), 8)
    assert all(torch.equal(parts.cond[k], whole.cond[k]) for k in whole.cond)
    assert parts.negative is None and parts.identity() == whole.identity()
    guided = encode(flow, options(guidance_scale=3.0), 2)
    assert guided.negative is not None
    assert all(len(v) == 1 for v in guided.negative.values())
    other = encode(flow, options(prompts=list(reversed(PROMPTS))), 2)
    assert other.identity() != whole.identity()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"text": "x"}\n')
    assert texts_of(str(tmp_path / "p.txt")) == ["a cat", "a dog"]
    (tmp_path / "p.json").write_text('[{"caption": "a cat"}, {"caption": "a dog"}, "a cat"]')
    assert texts_of(str(tmp_path / "p.json")) == ["a cat", "a dog"]
    assert len(texts_of("bundled/scenes/pairs_repairs.parquet")) == 648  # of 4,011 rows
    (tmp_path / "q.json").write_text('[{"text": "a cat"}]')
    with pytest.raises(DataError, match=r"q.json: row 0 has no prompt or caption"):
        texts_of(str(tmp_path / "q.json"))
    with pytest.raises(DataError, match=r"rollout.prompts: .*p.jsonl:2 is no JSON object"):
        texts_of(str(tmp_path / "p.jsonl"))


# --- replay ---


def replayer(flow: VoxelFlow, **more: Any) -> Replayer:
    def score(event: Event, want: frozenset[str]) -> Score:
        with torch.no_grad():
            return flow.score(event, "policy", want)

    given = {"num_steps": 6, "keep": 2, "low": 0.0, "high": 1.0} | more
    return Replayer(flow.process, score, SHAPE, dtype=torch.float32, device=CPU, **given)


def replayed(flow: VoxelFlow, visit: int = 0, **more: Any) -> Any:
    cond = flow.prepare_sampling(PROMPTS, num_steps=1, guidance=1.0).cond
    index, visits = torch.arange(3), torch.full((3,), visit)
    return replayer(flow, **more)(index, visits, cond, Draws(5, PROMPTS, visits.tolist())), cond


def test_kept_predictions_are_the_policys_at_the_kept_states(flow: VoxelFlow) -> None:
    """So the second error of the objective starts at exactly 0."""
    made, cond = replayed(flow)
    assert made.record.tolist() == [0, 0, 1, 1, 2, 2]
    time = flow.process.time(made.level)
    rows = {k: v[made.record] for k, v in cond.items()}
    with torch.no_grad(), flow.use("policy") as net:
        pred = flow.denoise(net, made.x_t, time, rows)
    torch.testing.assert_close(pred, made.pred, atol=1e-5, rtol=1e-5)


def test_replayed_levels_are_spread_evenly_and_inside_the_range(flow: VoxelFlow) -> None:
    levels = torch.cat([replayed(flow, v, keep=1)[0].level for v in range(150)])
    counts = torch.histc(levels.float(), 5, 0, 1) / len(levels)
    assert (counts - 0.2).abs().max() < 0.06
    narrow = {"low": 0.2, "high": 0.7, "num_steps": 9}
    inside = torch.cat([replayed(flow, v, **narrow)[0].level for v in range(40)])
    assert inside.min() >= 0.2 and inside.max() < 0.7
    made = replayed(flow)[0]
    assert (made.level.view(3, 2)[:, 0] != made.level.view(3, 2)[:, 1]).all()


def test_too_narrow_a_range_is_refused(flow: VoxelFlow) -> None:
    with pytest.raises(ModelError, match=r"replay_steps: 2 states .* at least 1 lie between"):
        replayer(flow, low=0.4, high=0.7)


def test_replayed_states_are_the_samplers(flow: VoxelFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the velocity of a flow to one point every state lies on the line to it."""
    goal = torch.full((1, *SHAPE), 0.3)

    def velocity(net: object, x: Tensor, time: Tensor, cond: object) -> Tensor:
        return (x - goal) / (time.view(-1, 1, 1, 1, 1) / 1000)

    monkeypatch.setattr(flow, "_velocity", velocity)
    made, _ = replayed(flow)
    start = Draws(5, PROMPTS, [0, 0, 0]).normal("start", SHAPE)[made.record]
    s = flow.process.level(flow.process.time(made.level)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(made.x_t, (1 - s) * goal + s * start, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.pred, start - goal, atol=1e-4, rtol=1e-4)


def test_a_judge_sees_decoded_latents_with_their_level(
    flow: VoxelFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_by(monkeypatch, PointJudge())
    made = LatentJudge("jpeg", flow, CPU, torch.float32)
    x = torch.randn(2, *SHAPE)
    found = made(x, ["p", "q"], 0.25)
    assert torch.equal(found, x.flatten(1)[:, 0]) and judge.levels == [0.25, 0.25]
    assert flow.decode(Sample({"x0": x}, {}))[0].meta == {}
    lower = LatentJudge("nsfw", flow, CPU, torch.float32)  # less is better there
    assert torch.equal(lower(x, ["p", "q"], 0.0), -x.flatten(1)[:, 0])


def test_log_prob_of_a_walk_is_that_of_its_event(flow: VoxelFlow) -> None:
    grid = grid_of(flow.process, 4, None)
    steps = Steps(flow.process, grid, "dance", 0.3, "full")
    x, mean = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    walk = Walk(steps, lambda e, w: None, "velocity", torch.float32, CPU)  # type: ignore[arg-type]
    event = steps.event(torch.full((3, 1), 2), x[:, None], x[:, None], {})
    n = event.inputs
    expected = log_prob(x[:, None], mean[:, None], n["scale"], n["offset"])
    assert torch.equal(walk.logp(2, x, mean), flat(expected))
