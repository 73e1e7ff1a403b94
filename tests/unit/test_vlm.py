"""The world's vision-language model: its folder, its training rows, its runs, and the judge."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from t2i_align.contract import Media
from t2i_align.errors import DataError, InterruptedRun, ModelError, StorageError
from t2i_align.judges.vqa_score import TEMPLATE, VQAScore, VQAScoreOptions
from t2i_align.scenes import vlm, vlm_model, vlm_pictures, vlm_report
from t2i_align.scenes.grammar import COLORS, prompts, scene_for
from t2i_align.scenes.questions import FIGURE, FOREIGN, WORDINGS, Question, side, things_in, worded
from t2i_align.scenes.render import CLASSES, Scene, Thing, render
from t2i_align.scenes.vlm_rows import pack_rows

PLAN = vlm.Plan(steps=4, batch=2, questions=3, pictures=12, warm_share=0.5, max_samples=4)
TEXTS = ("a photo of a car", "a photo of a red car and a green bed", "a dragon")


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model, weights enlarged so that its answers differ."""
    model = vlm_model.new_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    out = tmp_path_factory.mktemp("vlm")
    vlm_model.save_folder(model, out)
    return out


@pytest.fixture(scope="module")
def judge(folder: Path) -> VQAScore:
    return VQAScore(folder, VQAScoreOptions(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    items = [m for task in prompts(held_out=False).values() for m in task[:1]]
    return [Image.fromarray(render(scene_for(m, rng), rng)) for m in items[:3]]


@pytest.fixture(scope="module")
def drawn() -> vlm_pictures.Pictures:
    return vlm_pictures.draw_pictures(16, 0, None, lambda n: None)


def media(images: Sequence[Image.Image]) -> list[Media]:
    out = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        out.append(Media("image", stream.getvalue()))
    return out


# --- the folder


def test_stock_auto_classes_load_a_small_folder(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 6e6
    assert not list(folder.rglob("*.py")) and not list(folder.rglob("*.bin"))
    assert {f.stat().st_mode & 0o044 for f in folder.iterdir()} == {0o044}  # anyone may read it
    assert {p.dtype for p in AutoModelForImageTextToText.from_pretrained(folder).parameters()} == {
        torch.float16
    }


def test_words_survive_the_tokenizer_and_only_foreign_ones_are_unknown(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    rng = np.random.default_rng(0)
    claims = sorted(side(held_out=False) | side(held_out=True), key=str)[::97]
    for claim in claims:
        for wording in WORDINGS:
            text = worded(claim, wording, rng)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids, text
            bare = "".join(text.lower().split())
            assert "".join(tokenizer.convert_ids_to_tokens(ids)) == bare
    for word in FOREIGN:
        assert tokenizer(word, add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    answers = ["Yes", "no", *COLORS, *CLASSES, "one", "four"]
    assert all(len(tokenizer(a, add_special_tokens=False).input_ids) == 1 for a in answers)


def test_the_chat_template_places_the_picture_before_the_question(
    folder: Path, pictures: list[Image.Image]
) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "a red car?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(talk, tokenize=False) == (
        "<s><user> <image> a red car? <assistant> yes </s>"
    )
    made = processor.apply_chat_template(
        talk[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    words = processor.tokenizer.convert_ids_to_tokens(made["input_ids"][0].tolist())
    assert words == ["<s>", "<user>", *["<image>"] * 64, "a", "red", "car", "?", "<assistant>"]
    pixels = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1)[None]
    torch.testing.assert_close(made["pixel_values"], vlm.to_pixels(pixels))


# --- training rows


def test_a_packed_row_gives_every_question_what_it_would_have_alone(
    folder: Path, drawn: vlm_pictures.Pictures
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    texts = ["a red car?", FIGURE.format(prompt="a photo of two birds"), "Is there a bed?"]
    asked = [[Question(t, "yes", None, "") for t in row] for row in (texts, texts[:1])]
    trainer = vlm.Trainer(PLAN, drawn, 0)
    trainer.model = model
    rows = pack_rows(asked, trainer.tokenizer, vlm.PREFIX, trainer.assistant)
    pixels = vlm.to_pixels(drawn.images[:2])
    with torch.inference_mode():
        tokens = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        packed = model.lm_head(trainer.hidden(tokens, rows))[rows.is_answer]
        alone = []
        for i, row in enumerate(asked):
            for question in row:
                text = f"<s><user><image>{question.text}<assistant>"
                image = Image.fromarray(drawn.images[i].permute(1, 2, 0).numpy())
                inputs = processor(images=image, text=text, return_tensors="pt")
                alone.append(model(**inputs).logits[0, -1])
    torch.testing.assert_close(packed, torch.stack(alone), atol=2e-5, rtol=1e-4)


def test_labels_are_the_answer_and_the_end_and_nothing_else() -> None:
    tokenizer = vlm_model.tokenizer()
    asked = [
        [Question("a car?", "no", None, ""), Question("What color is the tv?", "red", None, "")]
    ]
    rows = pack_rows(asked, tokenizer, 3, tokenizer.convert_tokens_to_ids("<assistant>"))
    names = tokenizer.convert_ids_to_tokens(rows.labels[0].clamp(min=0).tolist())
    shown = [n if y >= 0 else "." for n, y in zip(names, rows.labels[0].tolist(), strict=True)]
    assert " ".join(shown) == ". . . no </s> . . . . . . red </s>"
    assert rows.ids.shape == rows.labels.shape == (1, 13)
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, *range(3, 11)]
    sees = rows.mask[0, 0].int().sum(1).tolist()  # prefix and own question up to itself
    assert sees == [1, 2, 3, 4, 5, 6, 7, 8, *range(4, 12)]


def test_patch_maps_say_what_covers_each_patch() -> None:
    scene = Scene((Thing("tv", "red", (16, 16), 24), Thing("bed", "blue", (46, 46), 24)))
    grid = vlm_pictures.patch_map(vlm_pictures.masks_of(scene), things_in(scene)).reshape(8, 8, 3)
    nothing = [len(CLASSES), len(COLORS), 0]
    assert grid[2, 1, :2].tolist() == [CLASSES.index("tv"), COLORS.index("red")]
    assert grid[5, 5, :2].tolist() == [CLASSES.index("bed"), COLORS.index("blue")]
    assert grid[7, 0].tolist() == grid[0, 7].tolist() == nothing
    assert grid[..., 2].sum() == 2


def test_broken_pictures_are_described_by_the_exact_judge() -> None:
    rng = np.random.default_rng(1)
    scene = Scene((Thing("tv", "red", (32, 32), 44),))
    image = render(scene, rng)
    assert vlm_pictures.look(image)[0] == things_in(scene)
    outcomes = set()
    for _ in range(25):
        seen, grid = vlm_pictures.look(
            vlm_pictures.break_thing(image, things_in(scene)[0].box, rng)
        )
        assert (grid[:, 0] < len(CLASSES)).any() == bool(seen)
        outcomes.add(tuple((s.cls, s.color) for s in seen))
    assert () in outcomes and len(outcomes) > 1  # some destroyed, some only scratched


# --- model samples


def write_samples(path: Path, captions: Sequence[str]) -> Path:
    rng = np.random.default_rng(0)
    every = {m["prompt"]: m for h in (False, True) for t in prompts(held_out=h).values() for m in t}
    rows = []
    for caption in captions:
        include = every[caption]["include"]
        things = tuple(
            Thing(c["class"], c.get("color", "red"), (16 + 32 * i, 32), 24)
            for i, c in enumerate(include)
        )
        images = [Image.fromarray(render(Scene(t), rng)) for t in (things, ())]
        data = [m.data for m in media(images)]
        row = {"caption": caption, "correct_0": True, "correct_1": False}
        rows.append(row | {"jpg_0": data[0], "jpg_1": data[1]})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_samples_carry_the_exact_verdict_and_stay_on_the_training_side(tmp_path: Path) -> None:
    held = prompts(held_out=True)["two_object"][0]["prompt"]
    path = write_samples(tmp_path / "pairs.parquet", ["a photo of a blue tv", held])
    found = vlm_pictures.read_samples(path, 100, lambda n: None)
    assert found.captions == [("a photo of a blue tv", True), ("a photo of a blue tv", False)]
    assert [[(s.cls, s.color) for s in seen] for seen in found.seen] == [[("tv", "blue")], []]
    rng = np.random.default_rng(0)
    for i, answer in enumerate(("yes", "no")):
        first = vlm.questions_for(found, i, 3, rng, 0.0)[0]
        text = 'Does this figure show "a photo of a blue tv"? Please answer yes or no.'
        assert (first.text, first.answer) == (text, answer)


def test_sample_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"caption": ["x"], "jpg_0": [b""]}), path)
    with pytest.raises(DataError, match=r"no column correct_0, correct_1, jpg_1\n.*scenes pairs"):
        vlm_pictures.read_samples(path, 10, lambda n: None)
    held = prompts(held_out=True)["two_object"][0]["prompt"]
    write_samples(path, [held])
    with pytest.raises(DataError, match="no sample of a training prompt"):
        vlm_pictures.read_samples(path, 10, lambda n: None)


# --- runs


def steps(trainer: vlm.Trainer, numbers: range) -> dict[str, torch.Tensor]:
    for number in numbers:
        trainer.step(number)
    return trainer.model.state_dict()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, drawn: vlm_pictures.Pictures
) -> None:
    whole = steps(vlm.Trainer(PLAN, drawn, 0), range(4))
    first = vlm.Trainer(PLAN, drawn, 0)
    steps(first, range(3))
    first.save(tmp_path, 3)
    second = vlm.Trainer(PLAN, drawn, 0)
    assert second.resume(tmp_path) == 3
    resumed = steps(second, range(3, 4))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    samples = write_samples(tmp_path / "pairs.parquet", ["a photo of a blue tv"])
    with pytest.raises(StorageError, match=r"(?s)another run: .*, samples None\n.* and samples"):
        vlm.Trainer(PLAN, drawn, 0, samples).resume(tmp_path)
    first.samples = [samples.name, samples.stat().st_size]
    first.save(tmp_path, 3)
    assert vlm.Trainer(PLAN, drawn, 0, samples).resume(tmp_path) == 3
    write_samples(samples, ["a photo of a blue tv", "a photo of a red tv"])
    with pytest.raises(StorageError, match=r"another run: .*, samples \['pairs\.parquet', \d+\]"):
        vlm.Trainer(PLAN, drawn, 0, samples).resume(tmp_path)
    other = vlm.Trainer(replace(PLAN, seed=1), drawn, 0)
    with pytest.raises(StorageError, match=r"belongs to another run: \{'steps': 4, 'seed': 0"):
        other.resume(tmp_path)


def test_ctrl_c_says_what_is_saved_and_the_same_command_goes_on(
    tmp_path: Path, drawn: vlm_pictures.Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the third step, the state of the second stands."""
    step = vlm.Trainer.step

    def interrupted(self: vlm.Trainer, number: int) -> dict[str, float]:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    trainer = vlm.Trainer(PLAN, drawn, 0)
    assert vlm.run(trainer, 0, tmp_path, quiet(), 0.0) == 1
    monkeypatch.setattr(vlm, "EXAMINE", 2)
    monkeypatch.setattr(vlm.Trainer, "step", interrupted)
    told = r"stopped; step 2 of 4 is saved\n  fix: the same command goes on"
    with pytest.raises(InterruptedRun, match=told):
        vlm.run(trainer, 1, tmp_path, quiet(), None)
    assert vlm.Trainer(PLAN, drawn, 0).resume(tmp_path) == 2
    with pytest.raises(InterruptedRun, match="step 2 of 4"):
        vlm.run(trainer, 2, tmp_path, quiet(), None)


def test_training_writes_a_folder_that_loads_and_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm, "bundled_vae", lambda: None)
    samples = write_samples(tmp_path / "pairs.parquet", ["a photo of a blue tv"])
    arguments: dict[str, Any] = {"samples": samples, "console": quiet(), "plan": PLAN}
    out = vlm.train_vlm(tmp_path / "out", stop_after=0.0, **arguments)
    assert [p.name for p in out.iterdir()] == ["training.pt"]
    vlm.train_vlm(out, **arguments)
    assert not (out / "training.pt").exists()
    AutoModelForImageTextToText.from_pretrained(out)
    AutoProcessor.from_pretrained(out)


def test_the_tower_learns_what_covers_its_patches(drawn: vlm_pictures.Pictures) -> None:
    plan = replace(PLAN, steps=100, warm_share=1.0, batch=8)
    trainer = vlm.Trainer(plan, drawn, 0)
    losses = [trainer.step(0)["patch"] for _ in range(1)]
    losses += [trainer.step(number)["patch"] for number in range(1, 25)]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    untouched = vlm_model.new_model(0).model.language_model.state_dict()
    trained = trainer.model.model.language_model.state_dict()
    assert all(torch.equal(untouched[k], trained[k]) for k in untouched)


# --- the judge


def test_p_yes_is_the_literal_softmax_of_one_unpadded_item(
    judge: VQAScore, folder: Path, pictures: list[Image.Image]
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores = judge.score(media(pictures), TEXTS)
    assert scores.reasons == (None,) * 3
    whole = VQAScore(
        folder, VQAScoreOptions(normalise="vocabulary"), torch.device("cpu"), torch.float32
    ).score(media(pictures), TEXTS)
    assert len({round(v, 4) for v in scores.values.tolist()}) == 3
    for i, (image, text) in enumerate(zip(pictures, TEXTS, strict=True)):
        asked = (
            f'<s><user><image>Does this figure show "{text}"? Please answer yes or no.<assistant>'
        )
        inputs = processor(images=image, text=asked, return_tensors="pt")
        p = model(**inputs).logits[0, -1].softmax(-1)
        yes, no = (p[processor.tokenizer.convert_tokens_to_ids(w)].item() for w in ("yes", "no"))
        assert scores.values[i].item() == pytest.approx(yes / (yes + no), abs=1e-5)
        assert whole.values[i].item() == pytest.approx(yes, abs=1e-5)


def test_neighbours_and_repetition_do_not_move_a_score(
    judge: VQAScore, pictures: list[Image.Image]
) -> None:
    together = judge.score(media(pictures), TEXTS).values
    alone = [judge.score(media([i]), [t]).values[0] for i, t in zip(pictures, TEXTS, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    assert torch.equal(together, judge.score(media(pictures), TEXTS).values)


def test_what_cannot_be_read_is_nan_with_a_reason(
    judge: VQAScore, pictures: list[Image.Image]
) -> None:
    scores = judge.score([Media("image", b"no image"), *media(pictures[:1])], TEXTS[:2])
    assert scores.num_failed == 1 and scores.values[0].isnan() and scores.reasons[0]
    assert 0 < scores.values[1] < 1


def test_default_template_is_vqascores_own_and_trained_on() -> None:
    assert TEMPLATE == FIGURE == 'Does this figure show "{prompt}"? Please answer yes or no.'
    with pytest.raises(ValidationError, match=r"holds \{prompt\} exactly once, got 'Is it"):
        VQAScoreOptions(template="Is it good?")


def test_unusable_models_and_answers_are_explained(folder: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(
        ModelError, match=r"no image-text-to-text model at .*\n  fix: give a folder"
    ):
        VQAScore(tmp_path, VQAScoreOptions(), cpu, torch.float32)
    with pytest.raises(ModelError, match=r"yes \('Yes',\) and no \('yes',\) start with the same"):
        VQAScore(folder, VQAScoreOptions(no=("yes",)), cpu, torch.float32)


# --- the report


def test_accuracy_is_that_of_the_answers_given() -> None:
    items = vlm_report.examination(20, 0)
    key = {(i.image.tobytes(), i.question.text): i.question.answer == "yes" for i in items}
    figure = {
        (i.image.tobytes(), WORDINGS["figure"](i.claim)): i.question.answer == "yes" for i in items
    }

    def knows(images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        both = key | figure
        pairs = zip(images, texts, strict=True)
        return torch.tensor([float(both[np.array(i).tobytes(), t]) for i, t in pairs])

    found = vlm_report.vqa_accuracy(knows, per_task=20)
    assert found["overall"]["mean"] == found["figure"]["mean"] == found["yes"] == found["no"] == 1
    always = vlm_report.vqa_accuracy(lambda images, texts: torch.ones(len(texts)), per_task=20)
    assert (always["yes"], always["no"]) == (1.0, 0.0)
    assert always["overall"]["mean"] == pytest.approx(np.mean([*key.values()]), abs=0.02)
