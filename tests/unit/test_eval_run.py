"""Runs of any benchmark: resumed, shared out, refused; what is stored and what is done again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from t2i_align.contract import MediaError
from t2i_align.errors import DataError, InterruptedRun, UserError
from t2i_align.evaluate import answers as stored
from t2i_align.evaluate import run as runner
from t2i_align.evaluate.benchmark import Item
from t2i_align.evaluate.pictures import chunks, draws, noise_seeds, plan
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.sampling import Model, Sampling, defaults
from t2i_align.evaluate.settings import read_settings
from t2i_align.evaluate.work import Job, Worker
from t2i_align.process.seeds import derive
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.render import render
from tests.tiny import pipeline_folder

OPTIONS = {"per_task": 2}
QUICK = defaults("scenes").with_given({"num_inference_steps": 1, "batch_size": 5})


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(str(pipeline_folder("sdxl", tmp_path_factory.mktemp("m") / "sdxl")))


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody disturbed, on one thread."""
    out = tmp_path_factory.mktemp("whole")
    request = Request("scenes", out, OPTIONS, model, sampling=QUICK, processes=(1, 1))
    run(request, quiet())
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Everything an evaluation wrote, by name."""
    files = (p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


# --- pictures and noise


def test_noise_depends_on_the_prompt_and_how_often_it_came() -> None:
    """The k-th picture of a prompt text has the k-th noise, wherever it stands."""
    items = [Item(f"{k}", text, "t") for k, text in enumerate("abac")]
    pictures = plan(items, 2, Path())
    assert draws(pictures) == [0, 1, 0, 1, 2, 3, 0, 1]
    seeds = noise_seeds(pictures, 7)
    assert seeds[4] == derive(7, "a", 2, "evaluate") and len(set(seeds)) == 8
    turned = plan(items[::-1], 2, Path())
    assert sorted(noise_seeds(turned, 7)) == sorted(seeds)


def test_scenes_repeat_a_prompt_with_the_noise_they_always_had() -> None:
    items = fixed_prompts(25, 3, held_out=True)
    worker = Worker(Job("scenes", {"per_task": 25, "prompt_seed": 3}, Path()))
    assert draws(worker.pictures) == [k for _, k in items]
    assert max(draws(worker.pictures)) == 2


def test_pieces_have_a_fixed_size() -> None:
    assert [list(c) for c in chunks(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_ids_are_unique_and_there_are_prompts() -> None:
    with pytest.raises(DataError, match="twice: x"):
        plan([Item("x", "a", "t"), Item("x", "b", "t")], 1, Path())
    with pytest.raises(DataError, match="twice: none"):
        plan([], 1, Path())


# --- interrupted and continued


def test_an_interrupted_run_goes_on_to_the_same_bits(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while drawing, then while answering, then a torn line; the third run ends it."""
    request = Request("scenes", tmp_path / "o", OPTIONS, model, sampling=QUICK, processes=(1, 1))
    draw, answer = Worker.draw, Worker.answer

    def once(method: Any) -> Any:
        def stop(self: Worker, piece: Any) -> Any:
            if piece[0] > 0:
                raise KeyboardInterrupt
            return method(self, piece)

        return stop

    monkeypatch.setattr(Worker, "draw", once(draw))
    with pytest.raises(InterruptedRun, match=r"(?s)stopped; .*the same command goes on"):
        run(request, quiet())
    assert len(list(tmp_path.rglob("*.png"))) == 5
    monkeypatch.setattr(Worker, "draw", draw)
    monkeypatch.setattr(runner, "ANSWERED", 4)
    monkeypatch.setattr(Worker, "answer", once(answer))
    with pytest.raises(InterruptedRun):
        run(request, quiet())
    file = tmp_path / "o" / "answers.jsonl"
    assert len(file.read_text().splitlines()) == 1 + 4
    file.write_text(file.read_text() + '{"id": "00004", "num')
    asked: list[Any] = []
    monkeypatch.setattr(Worker, "answer", lambda s, p: asked.append(list(p)) or answer(s, p))
    run(request, quiet())
    assert asked == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert contents(tmp_path / "o") == contents(whole)


def test_only_a_changed_picture_is_answered_again(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    out = tmp_path / "o"
    shutil.copytree(whole, out)
    rng = np.random.default_rng(0)
    metadata = fixed_prompts(2, 0, held_out=True)[6][0]
    file = out / "images" / "00006" / "samples" / "0000.png"
    Image.fromarray(render(scene_for(metadata, rng), rng)).save(file)
    answer, asked = Worker.answer, []
    monkeypatch.setattr(runner, "ANSWERED", 4)
    monkeypatch.setattr(Worker, "answer", lambda s, p: asked.append(list(p)) or answer(s, p))
    request = Request("scenes", out, OPTIONS, model, sampling=QUICK, processes=(1, 1))
    run(request, quiet())
    assert asked == [[4, 5, 6, 7]]
    rows = [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
    assert rows[6]["correct"] and rows[6]["detections"]


def test_two_processes_draw_and_answer_as_one(model: Model, whole: Path, tmp_path: Path) -> None:
    """Bit-equal pictures, answers and results with one thread each: pieces are never split."""
    request = Request("scenes", tmp_path / "o", OPTIONS, model, sampling=QUICK, processes=(2, 1))
    run(request, quiet())
    assert contents(tmp_path / "o") == contents(whole)


def test_another_protocol_is_refused_by_name(model: Model, whole: Path) -> None:
    other = QUICK.with_given({"guidance_scale": 4.5})
    request = Request("scenes", whole, OPTIONS, model, sampling=other)
    with pytest.raises(DataError, match=r"guidance_scale: 3\.0 and 4\.5"):
        run(request, quiet())
    known = json.loads((whole / "protocol.json").read_text())
    assert runner.differences(known, known) == []
    old = {"protocol": {"benchmark": "scenes", "seed": 0}, "model": known["model"]}
    assert runner.differences(old, known) == []  # written by a version that said less


def test_a_folder_without_pictures_is_free(model: Model, tmp_path: Path) -> None:
    """A first try that failed before any picture does not hold the folder."""
    facts = {"protocol": {"seed": 1}}
    runner.claim(tmp_path, facts)
    runner.claim(tmp_path, {"protocol": {"seed": 2}})
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(DataError, match="seed: 2 and 1"):
        runner.claim(tmp_path, facts)


def test_a_summary_says_what_its_number_depends_on(whole: Path) -> None:
    found = json.loads((whole / "summary.json").read_text())
    assert set(found["protocol"]) == {
        *("benchmark", "per_task", "prompt_seed", "held_out", "prompts_sha256"),
        *("images_per_prompt", "seed", "num_inference_steps", "guidance_scale", "resolution"),
        *("negative_prompt", "precision", "scheduler"),
    }
    assert found["protocol"]["scheduler"] and len(found["weights_sha256"]) == 64
    assert found["batch_size"] == 5 and {"torch", "diffusers"} <= found["versions"].keys()
    assert (found["images"], found["images_expected"], found["partial"]) == (12, 12, False)


def test_one_source_is_given(tmp_path: Path) -> None:
    for images in (None, tmp_path):
        model = None if images is None else Model("x")
        with pytest.raises(DataError, match=r"one source of pictures, got [02]"):
            Request("scenes", tmp_path, {}, model, images)


def test_what_a_benchmark_must_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few answers, or a picture it cannot read: named, not swallowed."""
    worker = Worker(Job("scenes", OPTIONS, tmp_path))
    bench: Any = worker.benchmark
    monkeypatch.setattr(bench, "answers", lambda pictures: [{}])
    with pytest.raises(DataError, match="scenes answered 1 of 2 pictures"):
        worker.answer([0, 1])

    def broken(pictures: Any) -> Any:
        raise MediaError("cut short")

    monkeypatch.setattr(bench, "answers", broken)
    with pytest.raises(DataError, match=r"(?s)cut short.*delete the picture"):
        worker.answer([0])


# --- stored answers


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"id": 3, "number": 0, "answer": {}}', "an answer is"),
        ('{"id": "a", "number": -1, "answer": {}}', "an answer is"),
        ('{"id": "a", "number": 0, "answer": [1]}', "an answer is"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "answers.jsonl"
    good = '{"id": "a", "number": 0, "answer": {"x": 1}}\n'
    file.write_text(stored.header_line("b", {}, {}) + line + "\n" + good)
    with pytest.raises(DataError, match=rf"answers\.jsonl:2.*{why}"):
        stored.read_answers(file)
    file.write_text(good + good)
    with pytest.raises(DataError, match="comes twice"):
        stored.read_answers(file)
    file.write_text(json.dumps({"answers": 9}) + "\n")
    with pytest.raises(DataError, match="has format 9"):
        stored.read_answers(file)


def test_answers_read_back_as_written(tmp_path: Path) -> None:
    pictures = plan([Item("a", "p", "t"), Item("b", "q", "t")], 2, tmp_path)
    rows = {stored.key_of(p): stored.Stored({"k": k}, f"{k}") for k, p in enumerate(pictures)}
    header = stored.header_line("bench", {"o": 1}, {"seed": 3})
    stored.write_answers(tmp_path / "a.jsonl", header, pictures, rows)
    found = stored.read_answers(tmp_path / "a.jsonl")
    assert found.rows == rows and found.header["protocol"] == {"seed": 3}
    assert list(found.rows) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


# --- settings


def test_settings_are_read_as_yaml() -> None:
    given = ["a=1", "b=0.5", "c=text", "d=", "e=[1, 2]", "f.g=true", "f.h=x=y", "when=2020-01-01"]
    assert read_settings(given) == {
        **{"a": 1, "b": 0.5, "c": "text", "d": None, "e": [1, 2]},
        **{"f": {"g": True, "h": "x=y"}, "when": "2020-01-01"},
    }
    for bad, why in ((["a"], "takes key=value"), (["a=1", "a=2"], "twice"), (["a=["], "no YAML")):
        with pytest.raises(UserError, match=why):
            read_settings(bad)
    with pytest.raises(UserError, match="is no section"):
        read_settings(["a=1", "a.b=2"])


def test_what_is_not_given_stays_the_benchmarks_own() -> None:
    assert defaults("geneval").num_inference_steps == 50 and defaults("geneval").guidance_scale == 9
    assert defaults("other") == Sampling()
    assert QUICK.resolution == 64 and "batch_size" not in QUICK.protocol()
