"""``t2i-align score``: where prompts come from, what is printed and written, what is an error."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.cli import guarded
from t2i_align.cli.score import score
from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.pair_accuracy import pair_accuracy
from t2i_align.evaluate.scoring import collect, device_of, score_entries, table, totals
from t2i_align.judges.base import load
from t2i_align.scenes import grammar
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import render

RUNNER = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
CAR, BED, TIES = "a photo of a red car", "a photo of a bed", "a photo of three ties"


def app() -> Any:
    import typer

    made = typer.Typer()
    made.command("score")(guarded(score))
    made.command("other")(lambda: None)
    return made


def call(*args: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app(), ["score", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def picture(path: Path, prompt: str, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(grammar.scene_for(parse(prompt), rng), rng)).save(path)
    return path


def prompts_of(*paths: Path) -> list[tuple[str, str | None]]:
    return [(Path(e.name).name, e.prompt) for e in collect(paths)]


def test_every_layout_gives_the_same_prompts(tmp_path: Path) -> None:
    names = {"a.png": CAR, "b.png": BED}
    for folder in ("hf", "sidecar", "table"):
        for name, text in names.items():
            picture(tmp_path / folder / name, text)
    lines = [{"file_name": n, "text": t} for n, t in names.items()]
    (tmp_path / "hf" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, text in names.items():
        (tmp_path / "sidecar" / name).with_suffix(".txt").write_text(text + "\n")
    rows = [{"filename": n, "prompt": t, "seed": 1} for n, t in names.items()]
    (tmp_path / "table" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = list(names.items())
    assert prompts_of(tmp_path / "hf") == expected
    assert prompts_of(tmp_path / "sidecar") == expected
    assert prompts_of(tmp_path / "table" / "rows.jsonl") == expected
    assert prompts_of(tmp_path / "sidecar" / "b.png") == expected[1:]
    for number, (name, text) in enumerate(names.items()):
        folder = tmp_path / "geneval" / "images" / f"{number:05d}"
        picture(folder / "samples" / name, text)
        (folder / "metadata.jsonl").write_text(json.dumps(parse(text)))
    assert prompts_of(tmp_path / "geneval") == expected
    data = [(tmp_path / "hf" / n).read_bytes() for n in names]
    written = pa.table({"image": data, "caption": list(names.values())})
    pq.write_table(written, tmp_path / "t.parquet")
    assert [e.prompt for e in collect([tmp_path / "t.parquet"])] == [CAR, BED]


def test_prompts_given_on_the_command_line_win(tmp_path: Path) -> None:
    files = [picture(tmp_path / n, BED) for n in ("a.png", "b.png")]
    files[0].with_suffix(".txt").write_text(BED)
    assert [e.prompt for e in collect(files, prompt=CAR)] == [CAR, CAR]
    lines = tmp_path / "lines"
    lines.write_text(f"{TIES}\n{BED}\n")
    assert [e.prompt for e in collect([tmp_path], prompts=lines)] == [TIES, BED]
    lines.write_text(f"{TIES}\n")
    with pytest.raises(DataError, match="has 1 lines and there are 2 pictures"):
        collect([tmp_path], prompts=lines)
    with pytest.raises(UserError, match="--prompt and --prompts were both given"):
        collect([tmp_path], CAR, lines)


def test_numbers_means_and_failures(tmp_path: Path) -> None:
    """Two right pictures, one wrong, one broken: judged, averaged and counted apart."""
    for name, drawn, asked in (("a", CAR, CAR), ("b", TIES, TIES), ("c", BED, CAR)):
        picture(tmp_path / f"{name}.png", drawn)
        (tmp_path / f"{name}.txt").write_text(asked)
    (tmp_path / "d.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "d.txt").write_text(CAR)
    code, out, err = call(
        tmp_path, "--judge", "scenes_exact", "--judge", "saturation", "--json",
        "--csv", tmp_path / "o.csv", "--jsonl", tmp_path / "o.jsonl",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    values = [row["scenes_exact"] for row in found["rows"]]
    assert values[0] > 0.8 and values[1] > 0.8 and values[2] == 0 and values[3] is None
    assert found["judges"]["scenes_exact"] == {
        "mean": pytest.approx(sum(values[:3]) / 3),
        "scored": 3,
        "failed": 1,
    }
    assert found["rows"][3]["reason"].startswith("not an image")
    assert "4/4" in err and "/s" in err
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert lines == found["rows"]
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [r["scenes_exact"] for r in rows] == ["" if v is None else str(v) for v in values]
    code, out, _ = call(tmp_path, "--judge", "scenes_exact")
    assert code == 0 and "4 pictures" in out and "(3 scored, 1 failed)" in out
    assert "NaN" in out and "not an image" in out


def test_normalised_scores_are_the_cards_map(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", CAR)
    plain, scaled = (
        json.loads(call(tmp_path, "--prompt", CAR, "--judge", "saturation", "--json", *more)[1])
        for more in ((), ("--normalized",))
    )
    value, z = (found["rows"][0]["saturation"] for found in (plain, scaled))
    assert z == pytest.approx((value - 0.131) / 0.0501, rel=1e-4)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("{a}", "--judge", "saturation"), "no prompt is known for"),
        (("{tmp}/gone", "--judge", "saturation"), "nothing at"),
        (("{tmp}/empty", "--judge", "saturation"), "no pictures in"),
        (("{tmp}/x.doc", "--judge", "saturation"), "neither a picture nor a table"),
        (("{tmp}/x.jsonl", "--judge", "saturation"), "no column 'image'"),
        (("{a}", "--prompt", "x", "--judge", "satration"), "did you mean 'saturation'?"),
        (("{a}", "--prompt", "x", "--judge", "saturation", "--device", "moon"), "device 'moon'"),
        (("{tmp}/g", "--judge", "saturation"), "its first line has no prompt"),
    ],
)
def test_user_errors(tmp_path: Path, args: tuple[str, ...], text: str) -> None:
    a = picture(tmp_path / "a" / "a.png", CAR)
    picture(tmp_path / "g" / "samples" / "a.png", CAR)
    (tmp_path / "g" / "metadata.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.doc").touch()
    (tmp_path / "x.jsonl").write_text('{"picture": "a.png", "prompt": "x"}\n')
    code, out, err = call(*(x.format(a=a, tmp=tmp_path) for x in args))
    assert code != 0 and text in err and out == ""


def test_rows_without_a_picture_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", CAR)
    rows = [{"image": "a.png", "prompt": CAR}, {"image": None, "prompt": CAR}]
    rows += [{"image": "gone.png", "prompt": CAR}, {"image": "https://x/y.png", "prompt": CAR}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entries = collect([tmp_path / "t.jsonl"])
    columns = score_entries(entries, ["scenes_exact"], Console(quiet=True), device="cpu")
    assert totals(columns)["scenes_exact"]["failed"] == 3
    reasons = [r["reason"] for r in table(entries, columns)]
    assert reasons[0] == "" and reasons[1] == "no image in this row"
    assert "missing file" in reasons[2] and "is a URL; download the media first" in reasons[3]


def test_devices_are_checked() -> None:
    assert device_of("cpu") == "cpu"
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        device_of("cuda:99")


def pair_file(path: Path, flipped: bool = False) -> Path:
    """Right render against wrong render for four prompts, one tie, one broken picture."""
    texts = [CAR, BED, TIES, "a photo of a bed left of a car"]
    rows = []
    for seed, text in enumerate(texts):
        good = picture(path.parent / "p.png", text, seed).read_bytes()
        bad = picture(path.parent / "p.png", "a photo of an elephant", seed).read_bytes()
        sides = (bad, good) if seed % 2 else (good, bad)
        label = float((seed % 2 == 0) != flipped)
        rows.append({"caption": text, "jpg_0": sides[0], "jpg_1": sides[1], "label_0": label})
    rows.append(rows[0] | {"label_0": 0.5})
    rows.append(rows[0] | {"jpg_0": b"broken"})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_pair_accuracy_counts_agreement(tmp_path: Path) -> None:
    judge = load("scenes_exact")
    found = pair_accuracy(judge, pair_file(tmp_path / "p.parquet"))
    assert found["overall"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "pairs": 4}
    assert found["failed"] == 1 and found["ties"] == 0
    assert found["tasks"]["position"] == {"mean": 1.0, "low": None, "high": None, "pairs": 1}
    against = pair_accuracy(judge, pair_file(tmp_path / "q.parquet", flipped=True))
    assert against["overall"]["mean"] == 0.0
    pq.write_table(pa.table({"caption": ["x"], "jpg_0": [b""]}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match="no column jpg_1, label_0; it has: caption, jpg_0"):
        pair_accuracy(judge, tmp_path / "r.parquet")
