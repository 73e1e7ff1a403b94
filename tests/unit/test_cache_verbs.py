"""``t2i-align cache``: build, inspect, verify and prune on real stores of a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

from t2i_align.cli import build_app
from t2i_align.data.cache import NO_HASH, TensorStore, problem_of
from t2i_align.data.share import owner
from t2i_align.errors import ModelError
from t2i_align.recipe import load_recipe
from t2i_align.train.cache_build import guarded
from tests import runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.point_model(tmp_path_factory.mktemp("model"))


def recipe_file(folder: Path, model: Path, cache: Path, **reference: Any) -> Path:
    data = folder / "pairs.jsonl"
    if not data.exists():
        runs.point_pairs(data, 6, seed=0)
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        runs.write_jsonl(data, [row | {"prompt": f"p{k % 4}"} for k, row in enumerate(rows)])
    made = runs.voxel_sections(model, data, cache, train_batch_size=2, max_train_steps=6)
    made["cache"] |= {"reference": "always"} | reference
    return runs.write_recipe(folder, f"run-{cache.name}", made)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), ["cache", *map(str, arguments)])


def ok(*arguments: object) -> str:
    found = call(*arguments)
    assert found.exit_code == 0, found.output + repr(found.exception)
    return found.output


Contents = dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]


def contents(cache: Path) -> Contents:
    """Every entry of every space, whatever the shards: name -> type, shape, bytes."""
    found: Contents = {}
    for shard in sorted((cache / "v1").glob("*/*.safetensors")):
        space = found.setdefault(shard.parent.name, {})
        with safe_open(shard, framework="pt") as file:
            if shard.parent.name.startswith("reference-"):
                rows = file.get_tensor("values").view(len(file.get_tensor("keys")), -1)
                names = map(str, file.get_tensor("keys").tolist())
                entries = dict(zip(names, rows, strict=True))
            else:
                entries = {name: file.get_tensor(name) for name in file.keys()}
        for name, x in entries.items():
            plain = (str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes())
            assert space.setdefault(name, plain) == plain, "two writers, two values"
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, Path]:
    """A recipe and the cache that one uninterrupted build made of it."""
    folder = tmp_path_factory.mktemp("built")
    path = recipe_file(folder, model, folder / "cache")
    text = ok("build", path)
    assert "12 media, 5 prompts, 24 reference" in text  # p0 to p3 and the empty prompt
    return path, folder / "cache"


def test_a_second_build_finds_everything_and_a_run_pays_nothing(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    from rich.console import Console

    from t2i_align.train.run import train

    path, cache = built
    before = contents(cache)
    assert "0 media, 0 prompts, 0 reference" in ok("build", path)
    assert contents(cache) == before
    assert not (path.parent / "run-cache").exists()  # the output folder is left alone
    recipe = load_recipe(path, [f"output_dir={tmp_path / 'run'}"])
    summary = train(recipe, Console(file=open(os.devnull, "w")))
    assert summary["reference_cache"] == {"read": 24, "scored": 0}
    assert runs.losses(tmp_path / "run")[0] == pytest.approx(0.6931472, abs=1e-6)


def test_several_processes_build_the_same(
    built: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    path = recipe_file(tmp_path, model, tmp_path / "cache")
    text = ok("build", path, "--num-processes", 2)
    assert "12 media" in text and "24 reference" in text
    owners = {owner(f"p{k}", 2) for k in range(4)}
    assert owners == {0, 1}  # both had something to encode
    assert contents(tmp_path / "cache") == contents(built[1])


KILL = """
import os, signal, sys
from pathlib import Path
import torch
from t2i_align.data import cache, prepare, reference_cache
from t2i_align.recipe import load_recipe
from t2i_align.train.cache_build import build
from rich.console import Console
import functools, io
torch.set_num_threads(1)
replace, left = os.replace, 0

def counted(*names):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written, its name is not
    replace(*names)

os.replace = counted
prepare.TensorStore = functools.partial(cache.TensorStore, flush_bytes=20)
reference_cache.ReferenceStore.__init__.__kwdefaults__["flush_seconds"] = 0.0
for path, number in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        left = int(number)
        build(load_recipe(path), Console(file=io.StringIO()))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "ended", flush=True)
"""


def test_a_build_killed_at_any_point_and_resumed_equals_the_whole(
    built: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    """SIGKILL between writing a file and naming it: first and later shards of media and text, the
    manifest, the facts and first and later parts of the reference's errors.
    """
    points = [1, 3, 5, 8, 12, 15]
    arguments: list[str] = []
    caches = [tmp_path / f"cache{point}" for point in points]
    for point, cache in zip(points, caches, strict=True):
        arguments += [str(recipe_file(tmp_path, model, cache)), str(point)]
    done = subprocess.run(
        [sys.executable, "-c", KILL, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(points), done.stderr
    whole, left = contents(built[1]), []
    spaces = [{name.partition("-")[0] for name in contents(cache)} for cache in caches]
    assert spaces[0] == set() and spaces[-1] == {"media", "text", "reference"}
    for cache, path in zip(caches, arguments[::2], strict=True):
        left.append(sum(map(len, contents(cache).values())))
        ok("build", path)
        assert contents(cache) == whole
        assert not list((cache / "v1").glob("*/*.corrupt"))
    assert left == sorted(left) and left[0] == 0 and len(set(left)) >= 4  # truly different points


def test_inspect_says_what_is_in_it_and_whose(built: tuple[Path, Path], model: Path) -> None:
    cache = built[1]
    found = {space["kind"]: space for space in json.loads(ok("inspect", cache, "--json"))}
    assert {kind: space["entries"] for kind, space in found.items()} == {
        "media": 12,
        "text": 5,
        "reference": 24,
    }
    for space in found.values():
        files = [p for p in (cache / "v1" / space["name"]).iterdir()]
        assert space["num_bytes"] == sum(p.stat().st_size for p in files)
        assert space["models"] == [str(model)] and len(space["runs"]) >= 1
    assert all(space["name"][:12] in ok("inspect", cache) for space in found.values())
    missing = call("inspect", cache / "nowhere")
    assert missing.exit_code == 3 and "has no folder v1" in missing.output


def copy_of(cache: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(cache, folder / "copy"))


@pytest.mark.parametrize("kind", ["media", "text", "reference"])
def test_verify_names_the_broken_shard_and_what_is_set_aside_is_rebuilt(
    kind: str, built: tuple[Path, Path], tmp_path: Path
) -> None:
    path, cache = built[0], copy_of(built[1], tmp_path)
    assert "0 broken" in ok("verify", cache)
    shard = next((cache / "v1").glob(f"{kind}-*/*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    found = call("verify", cache)
    assert found.exit_code == 3 and f"{shard}: its contents are not what was" in found.output
    assert "1 broken" in found.output and shard.exists()
    assert call("verify", cache, "--set-aside").exit_code == 3
    assert not shard.exists() and "0 broken" in ok("verify", cache)
    ok("build", path, f"cache.dir={cache}")
    assert contents(cache) == contents(built[1])


def test_shards_of_earlier_versions_are_read_and_said_to_have_no_hash(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    space = tmp_path / "v1" / "media-0"
    space.mkdir(parents=True)
    old = space / "shard-0.safetensors"
    save_file({"a/x": torch.ones(3)}, old, metadata={"a": json.dumps({"size": 1})})
    store = TensorStore(space)
    assert torch.equal(store.get("a")["x"], torch.ones(3)) and store.meta("a") == {"size": 1}
    assert problem_of(old) == NO_HASH
    assert "0 as written, 1 readable, written before hashes were, 0 broken" in ok(
        "verify", tmp_path
    )
    store.put("b", {"x": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(3)})
    store.flush()
    (new,) = set(space.glob("shard-*.safetensors")) - {old}
    assert problem_of(new) == ""


def test_prune_lists_first_and_deletes_what_no_recipe_needs(
    built: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    path, cache = built[0], copy_of(built[1], tmp_path)
    ok("build", path, f"cache.dir={cache}", "cache.dtype=float16")
    before = contents(cache)
    assert len(before) == 6
    text = ok("prune", cache, "--keep", path)
    assert text.count("-") >= 3 and "3 would be deleted" in text and "--yes" in text
    assert contents(cache) == before
    assert "3 deleted" in ok("prune", cache, "--keep", path, "--yes")
    assert contents(cache) == contents(built[1])
    assert "0 would be deleted, and 0 files" in ok("prune", cache, "--keep", path)
    assert "3 would be deleted" in ok("prune", cache)  # nothing is kept that no recipe asks for
    ok("prune", cache, "--yes")
    assert contents(cache) == {}
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    ok("build", path, f"cache.dir={cache}")
    assert contents(cache) == contents(built[1])


def records_of(cache: Path) -> dict[str, set[str]]:
    """Names of manifests' files and of notes."""
    return {
        kind: {p.name for p in (cache / "v1" / kind).iterdir()} for kind in ("manifests", "uses")
    }


def test_prune_takes_manifests_and_notes_of_what_goes_and_no_others(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """A second precision has stores, a manifest and notes of its own, which go with it; a space
    that is removed by hand leaves a manifest and notes that the next prune finds.
    """
    path, cache = built[0], copy_of(built[1], tmp_path)
    own = records_of(cache)
    assert len(own["manifests"]) == 2 and own["uses"]
    ok("build", path, f"cache.dir={cache}", "cache.dtype=float16", f"output_dir={tmp_path / 'h'}")
    both = records_of(cache)
    assert len(both["manifests"]) == 4 and len(both["uses"]) == len(own["uses"]) + 2
    text = ok("prune", cache, "--keep", path)
    assert "3 would be deleted, and 4 files of manifests and notes" in text
    assert records_of(cache) == both
    assert "3 deleted, and 4 files" in ok("prune", cache, "--keep", path, "--yes")
    assert records_of(cache) == own
    assert "0 media, 0 prompts, 0 reference" in ok("build", path, f"cache.dir={cache}")
    (media,) = (cache / "v1").glob("media-*")
    shutil.rmtree(media)
    ok("prune", cache, "--keep", path, "--yes")  # the manifest goes; text is still there
    assert records_of(cache)["manifests"] == set() and records_of(cache)["uses"] == own["uses"]
    ok("build", path, f"cache.dir={cache}")
    assert contents(cache) == contents(built[1]) and records_of(cache) == own


def test_a_manifest_that_names_no_spaces_stays_as_long_as_any_space(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """As earlier versions wrote it: read as it is, removed with the last space."""
    path, cache = built[0], copy_of(built[1], tmp_path)
    (report,) = (cache / "v1" / "manifests").glob("*.json")
    facts = json.loads(report.read_text())
    assert {name.partition("-")[0] for name in facts.pop("spaces")} == {"media", "text"}
    report.write_text(json.dumps(facts))
    assert "0 media, 0 prompts, 0 reference" in ok("build", path, f"cache.dir={cache}")
    assert "spaces" not in json.loads(report.read_text())  # it was not made anew
    torn = [report.with_name(f".{name}.arrow.0.tmp") for name in ("young", "old")]
    for stray in torn:  # of a killed write, or of one that goes on
        stray.touch()
    os.utime(torn[1], (0, 0))
    assert "0 deleted, and 1 files" in ok("prune", cache, "--keep", path, "--yes")
    assert torn[0].is_file() and not torn[1].exists()
    torn[0].unlink()
    ok("prune", cache, "--yes")
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_errors_of_a_process_reach_the_user(model: Path, tmp_path: Path) -> None:
    path = recipe_file(tmp_path, model, tmp_path / "cache")
    flat = {"id": "1", "prompt": "p", "chosen": [[[[1.0]]]], "rejected": [[[[2.0]]]]}
    runs.write_jsonl(tmp_path / "pairs.jsonl", [flat])
    found = call("build", path)
    assert found.exit_code == 3 and "the model wants (2, 1, 1, 1)" in found.output
    assert isinstance(found.exception, SystemExit)

    def broken(recipe: Any, index: int, num: int) -> dict[str, int]:
        raise ModelError(f"process {index} of {num}", "mend it")

    recipe = load_recipe(path)
    assert guarded(broken, recipe, 1, 2) == (ModelError, "process 1 of 2", "mend it")
