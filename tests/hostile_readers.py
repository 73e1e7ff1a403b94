"""Every reader of the suite that takes a file a stranger may have written, under one signature.

A reader is given an empty folder and the bytes of the file, puts them where they belong, and reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_builders import source
from hostile import safetensors

Reader = Callable[[Path, bytes], Any]
TENSORS = safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4)
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def put(path: Path, raw: bytes | str) -> Path:
    """Write a file, its folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def records(kind: str, **options: Any) -> list[Any]:
    """What a source yields, every medium read and every picture decoded."""
    from t2i_align.contract import MediaError
    from t2i_align.data.images import open_image
    from t2i_align.data.media import resolve

    opened, found = [], source(kind, **options)
    found.check(found.options)
    for record in found:
        for item in record.items:
            item.prompt.encode()
            try:
                opened.append(open_image(resolve(item.media).data))
            except MediaError:
                continue
    return opened


def model_file(name: str) -> Reader:
    """A file of a pipeline folder."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.generators.diffusers_folder import describe, fingerprint, vae_config
        from t2i_align.generators.diffusers_options import DiffusersOptions

        put(folder / "model_index.json", json.dumps(INDEX))
        for part in ("unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"):
            put(folder / part, "{}")
        put(folder / name, raw)
        found = describe(DiffusersOptions.model_validate({"name_or_path": str(folder)}))
        vae_config(folder)
        return found, fingerprint(folder, ["unet"])

    return read


def checkpoint_file(name: str, *, honest: bool = True) -> Reader:
    """A file of a checkpoint; ``honest``: the manifest has its true hash."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.errors import TrainingError
        from t2i_align.train.checkpoint import Checkpoints
        from t2i_align.train.start import start_file

        place = folder / "run" / "checkpoints" / "step-00000001"
        files = {
            "weights.safetensors": TENSORS,
            "optimizer.safetensors": TENSORS,
            "optimizer.json": b'{"dict": []}',
            "trainer.json": b'{"step": 1, "samples_seen": 1}',
        }
        files |= {name: raw} if name != "manifest.json" else {}
        facts = {}
        for file, content in files.items():
            put(place / file, content)
            digest = hashlib.sha256(content if honest else b"").hexdigest()
            facts[file] = {"bytes": len(content), "sha256": digest}
        whole = json.dumps({"version": 1, "files": facts}).encode()
        put(place / "manifest.json", raw if name == "manifest.json" else whole)
        found = Checkpoints(place.parent, None)
        latest = None
        try:
            latest = found.load("latest")
        except TrainingError:
            pass
        if name in ("manifest.json", "weights.safetensors"):
            from safetensors.torch import load_file

            assert latest is None or load_file(place / "weights.safetensors")
        return latest, found.load(str(place)), start_file(str(folder / "run"))

    return read


def run_file(folder: Path, raw: bytes) -> Any:
    """``run.json``, as export and continuing a run read it."""
    from t2i_align.errors import UserError
    from t2i_align.export.trained import open_run
    from t2i_align.train.output import claim

    put(folder / "run.json", raw)
    put(folder / "metrics.jsonl", "")
    try:
        claim(folder, {"train": {}}, resume=True, version="0")
    except UserError:
        pass
    put(folder / "run.json", raw)
    return open_run(folder)


def adapter_config(folder: Path, raw: bytes) -> Any:
    """The config of a peft folder."""
    from t2i_align.export.adapter import PEFT_CONFIG, PEFT_FILE, read_adapter

    layer = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    names = [f"base_model.model.a.lora_{x}.weight" for x in "AB"]
    header = {n: layer | {"data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    put(folder / PEFT_FILE, safetensors(header, b"\0" * 8))
    put(folder / PEFT_CONFIG, raw)
    return read_adapter(folder)


def adapter_metadata(folder: Path, raw: bytes) -> Any:
    """The metadata in an adapter's header."""
    from t2i_align.export.adapter import FILE, METADATA_KEY, read_adapter

    layer = {"dtype": "F32", "shape": [1, 1]}
    names = [f"unet.a.lora_{x}.weight" for x in "AB"]
    header: dict[str, Any] = {
        n: layer | {"data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)
    }
    header["__metadata__"] = {METADATA_KEY: raw.decode(errors="surrogateescape")}
    put(folder / FILE, safetensors(header, b"\0" * 8))
    return read_adapter(folder)


def processor(folder: Path, raw: bytes) -> Any:
    """A judge's ``preprocessor_config.json``."""
    from t2i_align.judges.classifier import check_processor
    from t2i_align.judges.preprocess import Preprocess

    put(folder / "preprocessor_config.json", raw)
    return check_processor(folder, Preprocess(4, "squash"))


def judge_config(name: str) -> Reader:
    """A configuration beside a judge's weights."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.judges.clip_config import clip_config

        put(folder / name, raw)
        return clip_config(put(folder / "model.safetensors", TENSORS), None)

    return read


def siglip_config(folder: Path, raw: bytes) -> Any:
    """The same of SigLIP."""
    import torch

    from t2i_align.judges.siglip import siglip_trunk

    put(folder / "config.json", raw)
    file = put(folder / "model.safetensors", TENSORS)
    return siglip_trunk(file, torch.device("meta"), torch.float32)


def dreamsim_config(folder: Path, raw: bytes) -> Any:
    """The config of DreamSim's LoRA."""
    from t2i_align.judges.dreamsim_merge import _lora

    put(folder / "adapter_config.json", raw)
    put(folder / "adapter_model.safetensors", TENSORS)
    return _lora(folder)


def results(name: str) -> Reader:
    """A file of an evaluation folder, as ``compare`` and ``report`` read it."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.evaluate.compare import compare
        from t2i_align.evaluate.provenance import facts_of
        from t2i_align.export.card import read_summary

        row = {"prompt": "a", "image": 0, "tag": "t", "score": 1.0, "correct": True, "graded": 1}
        for side in ("a", "b"):
            rows = [row, row | {"prompt": "b"}]
            put(folder / side / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
            put(folder / side / "protocol.json", '{"protocol": {}}')
            put(folder / side / "summary.json", '{"overall": {"mean": 1.0}}')
        put(folder / "a" / name, raw)
        found = compare(folder / "a", folder / "b")
        return found, facts_of(folder / "a"), read_summary(folder / "a")

    return read


def answers(folder: Path, raw: bytes) -> Any:
    """Stored answers."""
    from t2i_align.evaluate.answers import read_answers

    return read_answers(put(folder / "answers.jsonl", raw + b"\n"))


def scored(folder: Path, raw: bytes) -> Any:
    """A file written by ``score``."""
    from t2i_align.evaluate.score_compare import is_scored, read_side

    file = put(folder / "scores.jsonl", raw)
    return is_scored(file), read_side(file)


def pictures(name: str) -> Reader:
    """A table or a metadata file, as ``score`` reads it."""

    def read(folder: Path, raw: bytes) -> Any:
        from data_builders import image_bytes

        from t2i_align.evaluate.score_source import Pictures

        if name == "metadata.jsonl":
            put(folder / "x" / "samples" / "0.png", image_bytes(0, kind="PNG"))
            put(folder / "x" / name, raw)
            place = folder
        else:
            place = put(folder / name, raw)
        found = Pictures([place])
        found.survey()
        return list(found)

    return read


def shard(folder: Path, raw: bytes) -> Any:
    """The .json member of a WebDataset shard."""
    import io
    import tarfile

    from data_builders import image_bytes

    from t2i_align.evaluate.score_source import Pictures

    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("0.png", image_bytes(0, kind="PNG")), ("0.json", raw)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = Pictures([folder / "a.tar"])
    found.survey()
    return list(found)


def published(layout: str, name: str, split: str = "test") -> Reader:
    """The annotations of a published set of preferences."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.evaluate.human_layouts import layout_of

        return list(layout_of(layout).read(put(folder / name, raw).parent, split))

    return read


def prompts(name: str) -> Reader:
    """A file of prompts for rollouts and for ``generate``."""

    def read(folder: Path, raw: bytes) -> Any:
        from t2i_align.rollout.prompts import texts_of

        return [text.encode() for text in texts_of(str(put(folder / name, raw)))]

    return read


def given_pictures(folder: Path, raw: bytes) -> Any:
    """The metadata beside pictures that are handed to a benchmark."""
    from t2i_align.evaluate.benchmark import Item
    from t2i_align.evaluate.layouts import located
    from t2i_align.evaluate.pictures import plan

    put(folder / "0" / "metadata.jsonl", raw)
    return located(plan([Item("0", "a", "t", {})], 1, folder), folder, "geneval")


def begun(folder: Path, raw: bytes) -> Any:
    """The protocol of an evaluation that is continued."""
    from t2i_align.evaluate.run import claim

    put(folder / "protocol.json", raw)
    put(folder / "answers.jsonl", "")
    return claim(folder, {"protocol": {"a": 1}})


def table(kind: str, name: str, **options: Any) -> Reader:
    """Rows of a source."""

    def read(folder: Path, raw: bytes) -> Any:
        file = put(folder / name, raw)
        path = folder if kind == "folder" else file
        return records(kind, path=str(path), **options)

    return read


def manifest(folder: Path, raw: bytes) -> Any:
    """The report beside a cached manifest; broken ones count as absent."""
    from t2i_align.data.manifest import load

    put(folder / "m.arrow", raw)
    put(folder / "m.json", raw)
    return load(folder / "m.arrow")


SOURCES = {
    "trl": {},
    "pickapic": {},
    "binary": {},
    "captions": {},
    "ranked": {"format": "generic"},
    "ranked hpdv2": {"format": "hpdv2"},
    "ranked hpdv3": {"format": "hpdv3"},
    "ranked imagerewarddb": {"format": "imagerewarddb"},
}
JSON: dict[str, Reader] = {
    "model_index.json": model_file("model_index.json"),
    "unet/config.json": model_file("unet/config.json"),
    "scheduler_config.json": model_file("scheduler/scheduler_config.json"),
    "vae/config.json": model_file("vae/config.json"),
    "manifest.json": checkpoint_file("manifest.json"),
    "trainer.json": checkpoint_file("trainer.json"),
    "optimizer.json": checkpoint_file("optimizer.json"),
    "run.json": run_file,
    "adapter_config.json": adapter_config,
    "adapter metadata": adapter_metadata,
    "preprocessor_config.json": processor,
    "judge config.json": judge_config("config.json"),
    "judge open_clip_config.json": judge_config("open_clip_config.json"),
    "judge siglip config.json": siglip_config,
    "judge dreamsim config": dreamsim_config,
    "results.jsonl": results("results.jsonl"),
    "protocol.json": results("protocol.json"),
    "summary.json": results("summary.json"),
    "protocol.json, continued": begun,
    "answers.jsonl": answers,
    "scores.jsonl": scored,
    "score table.jsonl": pictures("t.jsonl"),
    "score table.json": pictures("t.json"),
    "score metadata.jsonl": pictures("metadata.jsonl"),
    "score shard": shard,
    "published hpdv2": published("hpdv2", "test.json"),
    "published imagereward": published("imagereward", "test.json"),
    "published hpdv3": published("hpdv3", "test.json"),
    "published mjbench": published("mjbench", "test.json"),
    "published mmrb2": published("mmrb2", "t2i.json", "t2i"),
    "published genai_bench": published("genai_bench", "genai_image.json"),
    "prompts.json": prompts("p.json"),
    "prompts.jsonl": prompts("p.jsonl"),
    "given metadata.jsonl": given_pictures,
    "folder metadata.jsonl": table("folder", "metadata.jsonl"),
    **{
        f"{name} {suffix}": table(name.split()[0], f"d{suffix}", **options)
        for name, options in SOURCES.items()
        for suffix in (".jsonl", ".json")
    },
}
