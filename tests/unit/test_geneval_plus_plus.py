"""GenEval++: what counts as a verdict in a judge's answer, the aggregation, a real small judge."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from t2i_align.catalog import find_root
from t2i_align.errors import DataError
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.benchmarks.geneval_plus_plus import verdict_of
from t2i_align.evaluate.run import Request, run
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.render import render

VLM = find_root() / "reward_models" / "scenes_vlm"


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize(
    ("text", "correct", "unread"),
    [
        ('{"correct": true, "reason": ""}', True, 0),
        ('Sure: ```json\n{"correct": 1, "reason": "ok"}\n```', True, 0),
        ('{"correct": "True"}', True, 0),
        ('{"correct": false, "reason": "two dogs"}', False, 0),
        ('{"correct": 0}', False, 0),
        ('{"reason": "x"} {"correct": true}', True, 0),
        ('{"correct": "perhaps"}', False, 1),
        ('{"correct": 0.5}', False, 1),
        ('{"correct": null}', False, 1),
        ("correct: true", False, 1),
        ('{"correct": tru', False, 1),
        ("", False, 1),
        (None, False, 1),
    ],
)
def test_the_verdict_in_an_answer(text: str | None, correct: bool, unread: int) -> None:
    found = verdict_of(text)
    assert found.correct is correct and found.score == float(correct)
    assert found.parts["unread"] == unread and bool(found.reason) == (
        not correct and text != '{"correct": 0}'
    )


def prompts_of(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(m) + "\n" for m in items))
    return str(path)


def test_the_total_is_the_mean_of_the_tags(tmp_path: Path) -> None:
    """Random verdicts of uneven tags against the two means written out."""
    rng = np.random.default_rng(0)
    tags = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    items = [{"tag": t, "prompt": f"p{k}", "include": []} for k, t in enumerate(tags)]
    options = {"prompts": prompts_of(tmp_path / "p.jsonl", items)}
    right = rng.random(10) < 0.5
    said = [json.dumps({"correct": bool(r), "reason": "no"}) for r in right]
    said[4] = "I cannot tell"
    right[4] = False
    rows = [{"id": f"{k:05d}", "number": 0, "answer": {"text": s}} for k, s in enumerate(said)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    request = Request("geneval_plus_plus", tmp_path / "out", options, answers=file)
    result = run(request, quiet())
    means = [right[:5].mean(), right[5:8].mean(), right[8:].mean()]
    assert result["tasks"] == pytest.approx(dict(zip("abc", means, strict=True)))
    assert result["overall"]["mean"] == pytest.approx(np.mean(means))
    table = result["tables"]["plain"]
    assert table["accuracy over all pictures"] == pytest.approx(right.mean())
    assert table["answers that say nothing"] == 1


def test_a_real_judge_is_asked_about_every_picture(tmp_path: Path) -> None:
    """The bundled vision-language model, greedy; what it wrote is stored and judged as it is."""
    metadata = [m for m, _ in fixed_prompts(2, 0, held_out=True)][:3]
    rng = np.random.default_rng(0)
    for number, item in enumerate(metadata):
        folder = tmp_path / "pictures" / f"{number:05d}" / "samples"
        folder.mkdir(parents=True)
        Image.fromarray(render(scene_for(item, rng), rng)).save(folder / "0000.png")
    options = {
        "prompts": prompts_of(tmp_path / "p.jsonl", metadata),
        "name_or_path": str(VLM),
        "template": 'Does this figure show "{prompt}"? {clauses}',
        "max_new_tokens": 3,
    }
    request = Request("geneval_plus_plus", tmp_path / "o", options, images=tmp_path / "pictures")
    result = run(request, quiet())
    bench: Any = build("geneval_plus_plus", options)
    answers = [json.loads(x) for x in (tmp_path / "o" / "answers.jsonl").read_text().splitlines()]
    assert [isinstance(a["answer"]["text"], str) for a in answers[1:]] == [True] * 3
    assert result["protocol"]["judge_sha256"] == bench.judge.weights_sha256
    assert result["protocol"]["template"] == options["template"]
    assert result["tables"]["plain"]["answers that say nothing"] == 3  # it knows no JSON
    assert result["overall"]["mean"] == 0


def test_a_judge_and_a_whole_template_are_needed(tmp_path: Path) -> None:
    items = [{"tag": "a", "prompt": "p", "include": [{"class": "dog", "count": 2}]}]
    options = {"prompts": prompts_of(tmp_path / "p.jsonl", items)}
    bench: Any = build("geneval_plus_plus", options)
    with pytest.raises(DataError, match="needs a judge"):
        bench.identity()
    question = bench.question(bench.items()[0])
    assert "The prompt was: p\n" in question and '[{"class": "dog", "count": 2}]' in question
    with pytest.raises(DataError, match=r"template holds \{clauses\} exactly once"):
        build("geneval_plus_plus", options | {"template": "{prompt}"})
