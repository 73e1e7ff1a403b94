"""The other formats: TRL columns, image folders, rankings, labelled items, hub data sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_builders import (
    error_of,
    image_bytes,
    payloads,
    source,
    write_images,
    write_jsonl,
    write_parquet,
)

from t2i_align.contract import Media, MediaError
from t2i_align.data.media import content_hash, resolve

# -- trl ------------------------------------------------------------------------------------------


def test_trl_image_forms_are_one_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    a, b = image_bytes(0), image_bytes(1)
    struct = {"bytes": a, "path": None}, {"bytes": None, "path": "b.jpg"}
    made = [
        {"prompt": "p", "chosen": struct[0], "rejected": struct[1]},
    ]
    parquet = write_parquet(tmp_path / "a.parquet", made)
    raw = write_parquet(tmp_path / "r.parquet", [{"prompt": "p", "chosen": a, "rejected": b}])
    jsonl = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a.jpg", "rejected": "b.jpg"}]
    )
    for path in (parquet, raw, jsonl):
        (record,) = source("trl", path=str(path))
        assert payloads(record) == [a, b]


def test_trl_scores_weight_and_id(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": "n1", "weight": 0.5}
    row |= {"score_chosen": 0.9, "score_rejected": -1}
    (record,) = source("trl", path=str(write_jsonl(tmp_path / "a.jsonl", [row])))
    assert (record.id, record.weight) == ("n1", 0.5)
    assert [i.value for i in record.items] == [0.9, -1.0]


def test_trl_codes(tmp_path: Path) -> None:
    good = {"prompt": "say hi", "chosen": [1, 2, 3], "rejected": [4, 5]}
    rows = [good, good | {"chosen": []}, good | {"chosen": [1.5]}, good | {"chosen": "x"}]
    made = source("trl", path=str(write_jsonl(tmp_path / "a.jsonl", rows)), media="codes")
    (record,) = made
    assert torch.equal(record.items[0].media.data, torch.tensor([1, 2, 3]))
    assert record.items[1].media.kind == "codes" and record.items[1].media.data.dtype == torch.int64
    assert made.stats.num_skipped == 3
    assert "a non-empty list of integers" in made.stats.skipped[0][1]


def test_trl_voxel_forms_are_one_grid(tmp_path: Path) -> None:
    grid = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    np.save(tmp_path / "g.npy", grid)
    data = (tmp_path / "g.npy").read_bytes()
    nested = {"prompt": "p", "chosen": grid.tolist(), "rejected": grid[0].tolist()}
    named = {"prompt": "p", "chosen": "g.npy", "rejected": "g.npy"}
    jsonl = write_jsonl(tmp_path / "a.jsonl", [nested, named])
    parquet = write_parquet(
        tmp_path / "a.parquet", [{"prompt": "p", "chosen": data, "rejected": data}]
    )
    for path in (jsonl, parquet):
        for record in source("trl", path=str(path), media="voxels"):
            for payload in payloads(record):
                assert torch.equal(payload, torch.from_numpy(grid))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match=r"not a readable \.npy array"):
        resolve(Media("voxels", tmp_path / "g.npy"))


def test_missing_files_and_urls_say_so(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "https://x.example/a.png", "rejected": "b"}]
    made = source("trl", path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert list(made) == []
    assert "is a URL; download the media first" in made.stats.skipped[0][1]
    with pytest.raises(MediaError, match=r"missing file .*b\.png"):
        resolve(Media("image", tmp_path / "b.png"))


def test_content_hash_is_of_content() -> None:
    data = image_bytes(0)
    assert content_hash(Media("image", data)) == content_hash(Media("image", bytes(data)))
    codes = torch.tensor([1, 2, 3, 4])
    different = [Media("codes", codes), Media("codes", codes.int()), Media("voxels", codes)]
    different += [Media("codes", codes.view(2, 2)), Media("codes", codes.flip(0))]
    assert len({content_hash(m) for m in different}) == 5
    strided = torch.stack([codes, codes], 1)[:, 0]
    assert content_hash(Media("codes", strided)) == content_hash(different[0])


# -- folder ---------------------------------------------------------------------------------------


def test_folder_of_pairs_and_of_single_images(tmp_path: Path) -> None:
    write_images(tmp_path / "sub", ["a.jpg", "b.jpg"])
    rows = [
        {"prompt": "p", "chosen": "b.jpg", "rejected": "a.jpg"},
        {"file_name": "a.jpg", "text": "t"},
        {"file_name": "a.jpg", "prompt": "p", "label": 0},
        {"file_name": "a.jpg", "prompt": "p", "label": None},
        {"file_name": "a.jpg"},
    ]
    write_jsonl(tmp_path / "sub" / "metadata.jsonl", rows)
    made = source("folder", path=str(tmp_path))
    one, good, bad = made
    assert payloads(one) == [image_bytes(1), image_bytes(0)]
    assert (one.layout, one.id) == ("pair", "sub/metadata.jsonl:0")
    assert (good.layout, good.items[0].label, good.items[0].prompt) == ("binary", 1, "t")
    assert bad.items[0].label == -1
    assert made.stats.no_label == 1
    assert made.stats.skipped == [("metadata.jsonl:4", "prompt is missing")]
    assert made.check(made.options) == [] and made.count() == 5


def test_folder_without_metadata(tmp_path: Path) -> None:
    made = source("folder", path=str(tmp_path))
    text = error_of(made)
    assert text == (
        f"data.path: no metadata.jsonl in {tmp_path}\n"
        '  fix: write one line an image: {"file_name": "a.png", "prompt": "a cat"}'
    )
    assert made.check(made.options) == [text] and made.count() is None
    assert "is not a folder" in error_of(source("folder", path=str(tmp_path / "no")))


def test_folder_with_wrong_keys(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "metadata.jsonl", [{"filename": "a.jpg", "prompt": "p"}])
    assert "no column 'chosen' (nor file_name); it has: filename, prompt" in error_of(
        source("folder", path=str(tmp_path))
    )


def test_folder_fingerprint_sees_a_changed_image(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg"])
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.jpg", "prompt": "p"}])
    before = source("folder", path=str(tmp_path)).fingerprint()
    assert source("folder", path=str(tmp_path)).fingerprint() == before
    (tmp_path / "a.jpg").write_bytes(image_bytes(9, (30, 30)))
    assert source("folder", path=str(tmp_path)).fingerprint() != before


# -- ranked ---------------------------------------------------------------------------------------


def ranked(path: Path, kind: str, **options: Any) -> Any:
    return source("ranked", path=str(path), format=kind, **options)


def test_hpdv2_train_and_test(tmp_path: Path) -> None:
    write_images(tmp_path / "img", ["a.jpg", "b.jpg", "c.jpg"])
    train = tmp_path / "train.json"
    train.write_text(
        json.dumps([{"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]}])
    )
    (record,) = ranked(train, "hpdv2", image_dir=str(tmp_path / "img"))
    assert record.ranks == (1, 0)
    assert payloads(record) == [image_bytes(0), image_bytes(1)]
    test = tmp_path / "test.json"
    images = ["img/a.jpg", "img/b.jpg", "img/c.jpg"]
    row = {"prompt": "p", "image_path": images, "rank": [3, 1, 2], "raw_annotations": [[1]]}
    test.write_text(json.dumps([row]))
    (record,) = ranked(test, "hpdv2")
    assert record.ranks == (2, 0, 1) and record.layout == "ranked"


def test_hpdv3_is_a_pair(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    path = tmp_path / "test.json"
    row = {"prompt": "p", "path1": "b.jpg", "path2": "a.jpg", "confidence": None}
    path.write_text(json.dumps([row]))
    (record,) = ranked(path, "hpdv3")
    assert record.layout == "pair" and payloads(record) == [image_bytes(1), image_bytes(0)]


def test_imagerewarddb_rows_become_groups(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": p, "prompt": f"prompt {p}", "image": image_bytes(k), "rank": r}
        for k, (p, r) in enumerate([("x", 2), ("x", 1), ("x", 2), ("y", 1), ("y", 5)])
    ]
    first, second = ranked(write_parquet(tmp_path / "a.parquet", rows), "imagerewarddb")
    assert (first.id, first.ranks, first.items[0].prompt) == ("x", (1, 0, 1), "prompt x")
    assert payloads(first) == [image_bytes(0), image_bytes(1), image_bytes(2)]
    assert (second.id, second.ranks) == ("y", (0, 1))


def test_imagerewarddb_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt_id": p, "prompt": "p", "image": image_bytes(0), "rank": 1} for p in "xyx"]
    text = error_of(ranked(write_parquet(tmp_path / "a.parquet", rows), "imagerewarddb"))
    assert text == (
        "a.parquet:2: row comes back to prompt_id 'x'\n"
        "  fix: the rows of a prompt must follow each other: sort the file by prompt_id"
    )


def test_imagerewarddb_metadata_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(
        json.dumps(
            [
                {"prompt_id": "i", "prompt": "p", "generations": ["a", "b"], "ranking": [2, 1]},
                {"prompt_id": "j", "prompt": "p", "generations": ["c", "d"], "ranking": [1, 2]},
            ]
        )
    )
    first, second = ranked(path, "imagerewarddb")
    assert (first.id, first.ranks, second.ranks) == ("i", (1, 0), (0, 1))
    assert first.items[0].media.data == tmp_path / "a"


def test_generic_rankings_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    good = {"prompt": "p", "images": ["a", "b"], "ranks": [0, 1], "values": [0.5, None]}
    rows = [
        good,
        good | {"ranks": [0]},
        good | {"images": ["a"], "ranks": [0], "values": None},
        good | {"ranks": [0, None]},
        good | {"values": [1.0]},
    ]
    made = ranked(write_jsonl(tmp_path / "a.jsonl", rows), "generic")
    (record,) = made
    assert record.ranks == (0, 1) and [i.value for i in record.items] == [0.5, None]
    assert [reason for _, reason in made.stats.skipped] == [
        "images and ranks are two lists of one length",
        "a ranking of 1 image(s) says nothing",
        "a rank is missing",
        "1 values for 2 images",
    ]


# -- binary ---------------------------------------------------------------------------------------


def test_binary_labels(tmp_path: Path) -> None:
    labels = [True, False, 1, 0, -1, None, 2]
    rows = [{"prompt": "p", "image": "a.jpg", "label": label, "weight": 2} for label in labels]
    made = source("binary", path=str(write_jsonl(tmp_path / "a.jsonl", rows)))
    records = list(made)
    assert [r.items[0].label for r in records] == [1, -1, 1, -1, -1]
    assert {r.weight for r in records} == {2.0}
    assert made.stats.no_label == 1
    assert made.stats.skipped == [("a.jsonl:6", "label is 2; allowed: true, false, 1, 0, -1")]


# -- hub ------------------------------------------------------------------------------------------


def test_hub_rows_are_streamed_and_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF ``datasets`` streams a local folder exactly as it streams a repository."""
    import datasets

    folder = tmp_path / "repo"
    folder.mkdir()
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Image(),
            "rejected": datasets.Image(),
        }
    )
    rows = {
        "prompt": ["p"],
        "chosen": [{"bytes": image_bytes(0), "path": None}],
        "rejected": [{"bytes": b"broken", "path": None}],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = source("trl", hub_id=str(folder))
    (record,) = made
    assert payloads(record) == [image_bytes(0), b"broken"]
    assert record.id == f"{folder}/train:0"
    assert made.check(made.options) == [] and made.count() is None
    assert "no column 'caption'" in error_of(source("pickapic", hub_id=str(folder)))


def test_an_unknown_hub_id_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert error_of(source("trl", hub_id="who/what", revision="v1")) == (
        "data.hub_id: cannot read 'who/what' (split train, revision v1): no route to host\n"
        "  fix: check name, split, network and `hf auth login`; or download it and use data.path"
    )


def test_hub_fingerprint_is_id_revision_and_split() -> None:
    mark = source("trl", hub_id="who/what", revision="v1").fingerprint()
    assert {k: mark[k] for k in ("hub_id", "revision", "split")} == {
        "hub_id": "who/what",
        "revision": "v1",
        "split": "train",
    }
