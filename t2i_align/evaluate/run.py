"""Benchmark runs: prompts, pictures, answers, verdicts, a summary; every part may be continued.

    <out>/protocol.json                                     what is evaluated, how; refuses others
    <out>/images/00000/metadata.jsonl, samples/0000.png     GenEval's layout, one folder a prompt
    <out>/answers.jsonl                                     what models said, raw (answers.py)
    <out>/results.jsonl, summary.json                       verdicts and numbers (results.py)

Pictures come from a model, from a folder, or are not needed because answers are given. Verdicts are
always recomputed from the answers. No total is given while pictures are missing, unless that is
asked for; then it is marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from t2i_align.errors import DataError, InterruptedRun
from t2i_align.evaluate.answers import (
    AnswerFile,
    Key,
    Stored,
    answer_line,
    file_sha256,
    header_line,
    key_of,
    read_answers,
    write_answers,
    write_whole,
)
from t2i_align.evaluate.benchmark import Picture
from t2i_align.evaluate.layouts import none_found
from t2i_align.evaluate.pictures import chunks, given_folder
from t2i_align.evaluate.results import items_sha256, rows_of, summary_of, write_rows
from t2i_align.evaluate.sampling import Model, Sampling, model_facts
from t2i_align.evaluate.work import Job, Worker, spread
from t2i_align.progress import progress

ANSWERED = 32  # pictures that are answered at once, a whole number of a benchmark's batches
UNKNOWN = ("seed", "num_inference_steps", "guidance_scale", "resolution", "negative_prompt")


@dataclass(frozen=True)
class Request:
    """What is asked for; exactly one of model, images and answers is given.

    Args:
        benchmark: its name.
        out: folder of the evaluation.
        options: of the benchmark, as plain data.
        model: that draws the pictures.
        images: folder with pictures that were drawn elsewhere.
        answers: file of stored answers.
        sampling: how a model draws.
        processes: how many processes, and threads of each (None: see work.py).
    """

    benchmark: str
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Model | None = None
    images: Path | None = None
    answers: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    processes: tuple[int, int | None] = (1, None)

    def __post_init__(self) -> None:
        """One source.

        Raises:
            DataError: none or several are given.
        """
        given = [s for s in (self.model, self.images, self.answers) if s is not None]
        if len(given) != 1:
            raise DataError(
                f"eval needs one source of pictures, got {len(given)}",
                "give one of --model, --images and --detections",
            )


def run(
    request: Request, console: Console, device: str = "cpu", *, allow_partial: bool = False
) -> dict[str, Any]:
    """Evaluate; goes on where an interrupted run into the same folder stopped.

    Args:
        request: what.
        console: for progress.
        device: for the model and the benchmark's judges.
        allow_partial: give a total, marked as partial, although pictures are missing.

    Returns:
        What is written to ``summary.json``.

    Raises:
        DataError: ``out`` holds another evaluation, or pictures are missing.
        InterruptedRun: Ctrl-C; what is done is kept.
    """
    try:
        return _run(request, console, device, allow_partial)
    except KeyboardInterrupt as error:
        raise InterruptedRun(
            f"stopped; what is done is kept in {request.out}", "the same command goes on"
        ) from error


def _run(request: Request, console: Console, device: str, allow_partial: bool) -> dict[str, Any]:
    given = None if request.answers is None else _given(request)
    worker = Worker(_job(request, given, device))
    facts = facts_of(request, worker, given)
    claim(request.out, facts)
    if request.model is not None:
        draw(worker, request, console)
    if given is None:
        answered = answer(worker, request, facts, console, allow_partial)
    else:
        answered = dict(given.rows)
    header = header_line(request.benchmark, worker.job.options, facts["protocol"])
    write_answers(request.out / "answers.jsonl", header, worker.pictures, answered)
    return finish(worker, answered, facts, request.out, allow_partial)


def _given(request: Request) -> AnswerFile:
    """Stored answers of this benchmark.

    Raises:
        DataError: they are of another.
    """
    assert request.answers is not None
    found = read_answers(request.answers)
    named = found.header.get("benchmark", request.benchmark)
    if named != request.benchmark:
        raise DataError(
            f"{request.answers} holds answers of '{named}', not of '{request.benchmark}'",
            f"t2i-align eval {named} --detections {request.answers}",
        )
    return found


def _job(request: Request, given: AnswerFile | None, device: str) -> Job:
    """The job; replayed answers bring the options they were given under."""
    pictures = request.out / "images"
    options = dict(request.options)
    if given is not None:
        options = {**given.header.get("options", {}), **options}
        assert request.answers is not None
        beside = request.answers.resolve().parent
        pictures = Path(_read(beside / "protocol.json").get("pictures") or beside / "images")
    elif request.images is not None:
        pictures = given_folder(request.images.resolve())
    model, sampling = request.model, request.sampling
    return Job(request.benchmark, options, pictures, model, sampling, device)


def facts_of(request: Request, worker: Worker, given: AnswerFile | None) -> dict[str, Any]:
    """Protocol, model and hashes: what two runs share to be compared, and what they compare."""
    bench = worker.benchmark
    if given is not None:
        return _replayed(request, worker, given)
    identity = dict(bench.identity())
    identity.setdefault("prompts_sha256", items_sha256(bench.items()))
    protocol = {"benchmark": request.benchmark, **identity}
    protocol["images_per_prompt"] = bench.images_per_prompt
    made, facts = _drawn(request)
    if request.images is not None:
        facts |= {"layout": _layout(worker)}
    clash = sorted(protocol.keys() & made.keys())
    assert not clash, f"{request.benchmark}: identity names {clash}, which the runner says"
    facts |= {"prompts_sha256": identity["prompts_sha256"]}
    return {"protocol": protocol | made, "options": dict(worker.job.options), **facts}


def _drawn(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """How pictures are sampled, and what draws them; unknown for pictures of elsewhere."""
    if request.model is not None:
        facts = model_facts(request.model, request.sampling)
        made = request.sampling.protocol() | {"scheduler": facts.pop("scheduler")}
        return made, facts | {"batch_size": request.sampling.batch_size}
    assert request.images is not None
    known = _read(request.images / "protocol.json")
    names = (*UNKNOWN, "precision", "scheduler")
    made = {name: known.get("protocol", {}).get(name) for name in names}
    facts = {k: known.get(k) for k in ("model", "lora", "denoiser", "weights_sha256")}
    return made, facts | {"pictures": str(given_folder(request.images.resolve()))}


def _layout(worker: Worker) -> str:
    """How given pictures are named.

    Raises:
        DataError: there is none, or no single way.
    """
    layout, _ = worker.located
    if layout is None:
        raise none_found(worker.job.pictures, worker.job.benchmark)
    return layout.pattern


def _replayed(request: Request, worker: Worker, given: AnswerFile) -> dict[str, Any]:
    """The protocol that the answers' file names; options that are other now are said apart."""
    assert request.answers is not None
    protocol: dict[str, Any] = {"benchmark": request.benchmark, "prompts_sha256": None}
    protocol |= dict.fromkeys((*UNKNOWN, "precision", "scheduler"))
    protocol |= {"images_per_prompt": worker.benchmark.images_per_prompt}
    protocol |= dict(given.header.get("protocol", {}))
    then = given.header.get("options", {})
    other = {k: v for k, v in request.options.items() if k not in then or then[k] != v}
    if given.header:
        protocol |= {"replayed_with": other}
    else:
        protocol |= {"replayed_with": dict(request.options), "origin": "unknown"}
    beside = _read(request.answers.parent / "protocol.json")
    facts = {k: beside.get(k) for k in ("model", "lora", "denoiser", "weights_sha256")}
    facts |= {"prompts_sha256": protocol["prompts_sha256"], "replayed": str(request.answers)}
    facts |= {"answers_sha256": file_sha256(request.answers)}
    if worker.job.pictures.is_dir():
        facts |= {"pictures": str(worker.job.pictures)}
    return {"protocol": protocol, "options": dict(worker.job.options), **facts}


def _read(file: Path) -> dict[str, Any]:
    from t2i_align.evaluate.provenance import read_object

    return read_object(file)


def claim(out: Path, facts: Mapping[str, Any]) -> None:
    """Write ``protocol.json``, or check that the one there says the same.

    Raises:
        DataError: ``out`` holds a run of another protocol or model.
    """
    marker = out / "protocol.json"
    before = _read(marker)
    begun = (out / "answers.jsonl").exists() or any(out.glob("images/*/samples/*"))
    odd = differences(before, facts) if before and begun else []
    if odd:
        raise DataError(
            f"{out} holds an evaluation of another model or protocol: {'; '.join(odd)}",
            "choose another --out; nothing in it was touched",
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(marker, [json.dumps(facts, indent=1)])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What an earlier ``protocol.json`` says otherwise; fields it does not know are no matter."""
    plain = json.loads(json.dumps(now))
    pairs = [(k, v, plain.get(k)) for k, v in before.items() if k not in ("protocol", "options")]
    fields = plain["protocol"]
    told = before.get("protocol", {})
    told = told if isinstance(told, dict) else {"protocol": told}
    pairs += [(k, v, fields.get(k)) for k, v in told.items()]
    return [f"{k}: {a} and {b}" for k, a, b in pairs if a != b]


def draw(worker: Worker, request: Request, console: Console) -> None:
    """Generate what is missing, a whole piece at a time."""
    pictures = worker.pictures
    pieces = chunks(len(pictures), request.sampling.batch_size)
    missing = [c for c in pieces if not all(pictures[k].file.exists() for k in c)]
    done = len(pictures) - sum(map(len, missing))
    with progress(console, "pictures", len(pictures), done) as bar:
        for piece, _ in spread(worker, "draw", missing, *request.processes):
            bar.advance(len(piece))
    worker.release()


def answer(
    worker: Worker,
    request: Request,
    facts: Mapping[str, Any],
    console: Console,
    allow_partial: bool,
) -> dict[Key, Stored]:
    """Answers about every picture that is there; those of unchanged pictures are kept.

    Raises:
        DataError: pictures are missing and no partial result is asked for.
    """
    there = [k for k, p in enumerate(worker.pictures) if p.file.is_file()]
    _refuse_missing(len(there), worker, allow_partial)
    file = request.out / "answers.jsonl"
    kept = dict(read_answers(file).rows) if file.is_file() else {}
    hashes = {k: file_sha256(worker.pictures[k].file) for k in there}
    done = {k for k in there if _same(kept, worker.pictures[k], hashes[k])}
    answered = {key_of(worker.pictures[k]): kept[key_of(worker.pictures[k])] for k in done}
    header = header_line(request.benchmark, worker.job.options, facts["protocol"])
    write_answers(file, header, worker.pictures, answered)
    pieces = [[k for k in c if k in hashes] for c in chunks(len(worker.pictures), ANSWERED)]
    missing = [c for c in pieces if not done.issuperset(c)]
    done_before = len(there) - sum(map(len, missing))
    with progress(console, "answers", len(there), done_before) as bar, file.open("a") as stream:
        for piece, found in spread(worker, "answer", missing, *request.processes):
            for k, value in zip(piece, found, strict=True):
                picture, stored = worker.pictures[k], Stored(value, hashes[k])
                if key_of(picture) not in answered:
                    stream.write(answer_line(picture, stored))
                answered[key_of(picture)] = stored
            stream.flush()
            bar.advance(len(piece))
    return answered


def _same(kept: Mapping[Key, Stored], picture: Picture, sha256: str) -> bool:
    found = kept.get(key_of(picture))
    return found is not None and found.sha256 == sha256


def _refuse_missing(
    found: int, worker: Worker, allow_partial: bool, what: str = "pictures"
) -> None:
    expected = len(worker.pictures)
    if found == expected or (allow_partial and found):
        return
    raise DataError(
        f"{expected - found} of {expected} {what} are missing in {worker.job.pictures}",
        "bring them, or score what is there, marked as partial, with --allow-partial",
    )


def finish(
    worker: Worker,
    answered: Mapping[Key, Stored],
    facts: Mapping[str, Any],
    out: Path,
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Verdicts from answers, rows and summary.

    Raises:
        DataError: answers are missing and no partial result is asked for.
    """
    pictures = [p for p in worker.pictures if key_of(p) in answered]
    _refuse_missing(len(pictures), worker, allow_partial, "answers")
    raw = [answered[key_of(p)].answer for p in pictures]
    verdicts = worker.benchmark.verdicts(pictures, raw)
    root = out if worker.job.pictures.is_relative_to(out) else worker.job.pictures
    rows = rows_of(pictures, raw, verdicts, root)
    summary = worker.benchmark.summary(pictures, verdicts)
    result = summary_of(summary, rows, facts, len(worker.pictures))
    write_rows(rows, out)
    write_whole(out / "summary.json", [json.dumps(result, indent=1)])
    return result
