"""T2I-CompBench's parser on spaCy itself, where it is installed: a pipeline trained here.

The released model is not used: a tagger and a dependency parser of spaCy's own architecture learn a
few prompts of the benchmark's forms by heart, are saved as a folder and loaded back.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from t2i_align.errors import ModelError
from t2i_align.evaluate.benchmarks.compbench_parsers import PatternParser, SpacyParser
from t2i_align.evaluate.metrics.compbench_marks import questions

spacy: Any = pytest.importorskip("spacy", reason="spaCy is not installed: pip install spacy")

# words with part of speech, dependency and head
TAUGHT = {
    "a red hen and a green mug": "DET:det:2 ADJ:amod:2 NOUN:ROOT:2 CCONJ:cc:2 DET:det:6 ADJ:amod:6 "
    "NOUN:conj:2",
    "a hen on the left of a mug": "DET:det:1 NOUN:ROOT:1 ADP:prep:1 DET:det:4 NOUN:pobj:2 "
    "ADP:prep:4 DET:det:7 NOUN:pobj:5",
    "a big box near a small cat": "DET:det:2 ADJ:amod:2 NOUN:ROOT:2 ADP:prep:2 DET:det:6 "
    "ADJ:amod:6 NOUN:pobj:3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    example = importlib.import_module("spacy.training").Example
    spacy.util.fix_random_seed(0)
    pipeline = spacy.blank("en")
    pipeline.add_pipe("morphologizer")
    pipeline.add_pipe("parser", config={"min_action_freq": 1})
    examples = []
    for text, notes in TAUGHT.items():
        pos, deps, heads = zip(*(note.split(":") for note in notes.split()), strict=True)
        facts = {"words": text.split(), "pos": list(pos), "deps": list(deps)}
        facts["heads"] = [int(h) for h in heads]
        examples.append(example.from_dict(pipeline.make_doc(text), facts))
    optimizer = pipeline.initialize(lambda: examples)
    for _ in range(80):
        pipeline.update(examples, sgd=optimizer)
    target = tmp_path_factory.mktemp("spacy") / "taught"
    pipeline.to_disk(target)
    return target


def test_spacys_own_words_and_phrases_make_the_questions(folder: Path) -> None:
    parser, pattern = SpacyParser(str(folder)), PatternParser()
    for text, notes in TAUGHT.items():
        found = parser(text)
        assert [t.kind for t in found.tokens] == [n.split(":")[0] for n in notes.split()]
        assert [text[t.start :].startswith(t.text) for t in found.tokens] == [True] * len(
            found.tokens
        )
        assert questions(found.chunks) == questions(pattern(text).chunks)
    assert questions(parser("a red hen and a green mug").chunks) == ["a red hen?", "a green mug?"]
    assert questions(parser("a hen on the left of a mug").chunks) == ["a hen?", "a mug?"]


def test_the_hash_is_of_the_weights(folder: Path, tmp_path: Path) -> None:
    import shutil

    named = SpacyParser(str(folder)).identity()
    assert named["parser"].startswith(f"spacy taught ({spacy.__version__}, ")
    again = tmp_path / "taught"
    shutil.copytree(folder, again)
    assert SpacyParser(str(again)).identity() == named
    pipeline = spacy.load(again)
    weights = pipeline.get_pipe("parser").model
    for node in weights.walk():
        for name in node.param_names:
            if node.has_param(name):
                node.set_param(name, node.get_param(name) + 1e-3)
    pipeline.to_disk(again)
    other = SpacyParser(str(again)).identity()
    assert other["parser"] == named["parser"]
    assert other["parser_sha256"] != named["parser_sha256"]


def test_what_is_not_installed_or_does_not_parse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)needs spaCy and its model nowhere_sm.*pattern"):
        SpacyParser("nowhere_sm")("a hen")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ModelError, match="no parser, only a tokenizer"):
        SpacyParser(str(tmp_path / "blank"))("a hen")
