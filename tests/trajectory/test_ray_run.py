"""Pictures of an evaluation over a local Ray cluster of two nodes: bit-equal to one process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from t2i_align.errors import MissingDependencyError
from t2i_align.evaluate import ray_run
from t2i_align.evaluate.ray_run import Cluster, draw_on_ray, run_on_ray
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.sampling import Model, Sampling
from t2i_align.evaluate.work import Job, Worker
from tests.tiny import pipeline_folder

SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0, resolution=64, batch_size=3)
OPTIONS = {"per_task": 2}  # 12 pictures: four pieces of three


def quiet() -> Console:
    return Console(file=io.StringIO())


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.png"))}


def request(out: Path, model: Path, threads: int = 1) -> Request:
    drawn_by = Model(str(model))
    return Request("scenes", out, OPTIONS, drawn_by, sampling=SAMPLING, processes=(1, threads))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_align import optional

    monkeypatch.setattr(optional, "version_of", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"(?s)drawing on a cluster.*t2i-align\[ray\]"):
        list(ray_run.drawn(request(tmp_path, tmp_path), [{}], Cluster()))


@pytest.mark.slow
def test_a_cluster_of_its_own_is_started_and_stopped(tmp_path: Path) -> None:
    """Without an address: one worker draws a piece; afterwards nothing runs."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    rows = [{"piece": [7], "prompts": ["a red car"], "seeds": [str(2**62 + 1)]}]
    (found,) = ray_run.drawn(request(tmp_path / "out", model), rows, Cluster(num_workers=1))
    assert list(found["piece"]) == [7] and bytes(found["files"][0]).startswith(b"\x89PNG")
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Any:
    """A head and a second node of one CPU each, in processes of their own."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    pytest.importorskip("ray.data")
    from ray.cluster_utils import Cluster as LocalCluster  # type: ignore[import-not-found]

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    local = LocalCluster(initialize_head=True, head_node_args=node)
    del node["include_dashboard"]
    local.add_node(**node)
    ray.init(address=local.address, log_to_driver=False)
    # on a busy machine the first actor would have drawn everything before the second is there
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600
    yield ray
    ray.shutdown()
    local.shutdown()


@pytest.mark.slow
def test_two_nodes_draw_what_one_process_draws(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of every file, verdicts too; both nodes drew; nothing is drawn twice."""
    assert len([n for n in cluster.nodes() if n["Alive"]]) == 2
    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    alone, spread = tmp_path / "alone", tmp_path / "ray"
    run(request(alone, model), quiet())
    nodes: list[str] = []

    def noted(*given: Any) -> list[str]:
        nodes.extend(draw_on_ray(*given))
        return nodes

    monkeypatch.setattr(ray_run, "draw_on_ray", noted)
    result = run_on_ray(request(spread, model), Cluster(num_workers=2), quiet())
    assert len(files(alone)) == 12 and files(alone) == files(spread)
    assert len(nodes) == 4 and len(set(nodes)) == 2
    rows = [(f / "results.jsonl").read_text() for f in (alone, spread)]
    assert rows[0] == rows[1]
    known = json.loads((alone / "summary.json").read_text())
    assert {k: v for k, v in result.items() if k != "versions"} == {
        k: v for k, v in known.items() if k != "versions"
    }
    # a run that was cut off: only the piece that lost a picture is drawn again, whole
    kept = files(spread)
    worker = Worker(Job("scenes", OPTIONS, spread / "images", Model(str(model)), SAMPLING))
    worker.pictures[4].file.unlink()
    again = draw_on_ray(worker, request(spread, model), Cluster(num_workers=2), quiet())
    assert len(again) == 1 and files(spread) == kept
    assert draw_on_ray(worker, request(spread, model), Cluster(), quiet()) == []


@pytest.mark.slow
def test_the_verb_draws_on_a_cluster(cluster: Any, tmp_path: Path) -> None:
    """`eval --ray-workers --beside`: the pictures of one process, compared with themselves."""
    from typer.testing import CliRunner

    from t2i_align.cli import build_app

    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    sampler = ["--num-inference-steps", "1", "--batch-size", "3", "--num-threads", "1"]
    words = ["eval", "scenes", "--model", str(model), "--per-task", "2", *sampler]
    more = ["--ray-workers", "2", "--beside", str(tmp_path / "alone"), "--embedding", "scenes_clip"]
    for out, added in (("alone", []), ("spread", more)):
        done = CliRunner().invoke(build_app(), [*words, "--out", str(tmp_path / out), *added])
        assert done.exit_code == 0, done.output
    assert len(files(tmp_path / "alone")) == 12
    assert files(tmp_path / "alone") == files(tmp_path / "spread")
    found = json.loads((tmp_path / "spread" / "beside.json").read_text())
    assert {row["distance"] for row in found["drift"]} == {0.0}
