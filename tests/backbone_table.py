"""The docs' table of backbones, from the cases and layouts: ``python -m tests.backbone_table``.

``--write`` writes it to t2i_align/docs/backbones.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import t2i_align
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FAMILIES, FamilyLayout, declared, layout_of
from tests import cases_declared, cases_flux, cases_image, cases_language, cases_video
from tests.backbones import Case

PLANNING = ("cond_shapes", "integers")  # keys that planning alone reads
PATH = Path(t2i_align.__file__).parent / "docs" / "backbones.md"
VERIFIED = PATH.parents[1] / "generators" / "verified.json"
GROUPS = (cases_image, cases_flux, cases_language, cases_video)


@dataclass(frozen=True)
class Proof:
    """A proof in plain words, and how often it runs for a case (``runs``)."""

    words: str
    runs: int = 1


PROOFS = {
    "images": Proof(
        "two prompts of unequal length: the suite's sampling loop gives the stock pipeline's "
        "pictures to 1e-4 (without guidance, with it, and at a size that is not square)",
        3,
    ),
    "score": Proof(
        "the denoising error is that of the prediction which the pipeline's own loop hands its "
        "scheduler (without guidance and with it)",
        2,
    ),
    "clock": Proof("at every time of that loop training mixes in as much noise as the scheduler"),
    "landing": Proof(
        "the pipeline's scheduler, told the training target at every step, ends at the data, so "
        "the target is of the kind that it takes"
    ),
    "true_target": Proof(
        "a step along the target gets closer to the data, so no sign or clock is reversed"
    ),
    "ragged": Proof("a prompt's error depends neither on its mates in a batch nor on the draws"),
    "adapters": Proof(
        "LoRA switched off is bitwise the base; gradients reach adapters only, and gradient "
        "checkpointing does not change them"
    ),
    "step": Proof(
        "one step moves every adapter and no other weight by a bit, towards the preferred item"
    ),
    "training": Proof(
        "`t2i-align train` starts at a margin of 0, resumes bit for bit, and the exported adapter, "
        "read by the stock loader, gives the policy's pictures"
    ),
    "cond_shapes": Proof("a plan made without text encoders has the shapes that they give"),
    "refusals": Proof("sizes that the network cannot take are refused by name"),
}

EXAMPLE_CASE = "AuraFlowPipeline"
EXAMPLE = """\
output_dir: outputs/auraflow
model:
  type: diffusers
  name_or_path: fal/AuraFlow-v0.3
  resolution: 1024
  lora: {r: 16, lora_alpha: 16}
  layout:
    process: rectified        # (1 - s) x_0 + s eps
    prediction: velocity      # eps - x_0
    time_factor: 0.001        # the network is told t / 1000
    attention: [to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj, add_v_proj, to_add_out]
    cond_shapes:              # for planning without encoders
      encoder_hidden_states: [256, 2048]
objective:
  type: dpo
  beta: 100.0
data:
  type: trl
  path: pairs.jsonl
cache:
  dir: cache
train:
  learning_rate: 1.0e-5
  train_batch_size: 2
  max_train_steps: 1000
  checkpointing_steps: 250
"""

PROSE = """\
# Backbones

Families the trainer knows, and pipelines it was shown by a layout in the recipe. The oracle is
always the stock diffusers pipeline (0.42.1) of the real classes, tiny and random; what a full-size
checkpoint does is not shown by it. Likelihood is `elbo` throughout: the denoising error at a drawn
time. This file is written by `python -m tests.backbone_table --write` and checked by the tests.

## What is proven of each

{proofs}

Those are {runs} runs a case. tests/parity/test_backbones.py and tests/parity/test_declared.py do
them; a proof that is said to fail must fail there.

## Families

{families}

## Clips

`model.num_frames` keeps the VAE's rule (Wan and CogVideoX 4 m + 1, LTX 8 m + 1; CogVideoX 1.5 one
that fills whole tokens), and longer clips are cut to their first frames. Text is masked as each
pipeline does it: LTX is handed a mask, Wan zeros after the prompt, CogVideoX attends to its
padding; "ragged" above holds for all. Left out of a clip's error (tests/unit/test_clip_masks.py):

- `short_clips: mask` takes clips of fewer frames: the last one is repeated, and latent frames that
  hold a repeated one are not scored. Default `skip`: they are left out and counted.
- `given_frames: 1` leaves out the first frame, where both clips were made from one picture.

The error is the mean over the scored latent frames, draws are the same as without. The network sees
the whole clip all the same. In Wan and LTX scored latents hold no padding; CogVideoX's VAE mixes
frames in its norms, so there they hold a little. Objectives that compare whole predictions (dspo,
dpo_safeguard) or train on samples of the policy refuse both keys. Pipelines that start from a
picture or clip are not trained: their extra inputs are no part of a layout.

## Frozen weights in few bits

`model.quantization` under LoRA; linear layers only, the layer is the suite's on CPU and CUDA
(generators/quantize.py says why); tests/unit/test_ways_to_train_quantized.py has all kinds.

| `type` | `backend` | numbers | bits a weight | package |
| --- | --- | --- | --- | --- |
| `nf4` | `auto` | bitsandbytes, blocks of 64 | 4.5; 4.13 with `double_quant` | `[quant]` |
| `int8` | `auto` | the suite's own, a scale a row | 8.03 | none |
| `int8` | `torchao` | torchao's Int8WeightOnlyConfig | 8.04 | `[torchao]` |
| `float8` | `auto`, `torchao` | torchao's Float8WeightOnlyConfig, e4m3 | 8.03 | `[torchao]` |

Bits are of rows of 1024. torchao 0.18's int4 refuses a CPU, and its configurations that round
activations have other numbers than a frozen weight, so neither is offered. Nothing is merged into
rounded weights: `export --format merged` takes the unquantised base.

Planned for one pair of SDXL's 2.57 billion parameters at 1024 px (`sdxl_dpo_lora_24gb`, batch 1):
weights 5.23 GB and a peak of 6.86 GB; nf4 2.02 and 3.65, nf4 with `double_quant` 1.92 and 3.55,
int8 and float8 3.00 and 4.63. Peaks leave out the allocator's slack and the CUDA context.

## At full size

`make test-big`: SDXL's UNet and SD3.5 medium's transformer with random bfloat16 weights take LoRA
steps of DPO on the CPU; text and pictures are encoded first, then the encoders are freed. SD3.5
medium (2,243,171,520 parameters, no T5, which the release makes optional; one pair at 512 px,
nothing recomputed, 2 CPU cores, 2026-11-22): planned peak 10.257 GB, MemTracker 10.246 GB, the
whole process 15.46 GB.

## Declaring a layout

A pipeline without a family is described in the recipe; no Python is needed. What its prompts become
is captured from the pipeline itself, so a layout says only how the denoiser is called:

```yaml
{example}```

`t2i-align schema` lists every key. A run under a declared layout keeps one size, since position ids
are captured with the prompt. A layout that does not fit is refused with what the pipeline does
instead: which arguments it passes, how often it calls its denoiser, the shape it hands it. Only the
proofs above tell whether `prediction`, `sign`, `time_factor` and `process` are right; a wrong one
trains something else without an error.

## Declared pipelines

The first ten text-conditioned pipelines of diffusers by class name that have no family, deprecated
ones and audio included; pipelines that start from a picture, clip or control are not generators
from text. {extra} come after those ten and were added.

{declared}

### Their layouts

{layouts}
"""


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def family_named(case: Case) -> str:
    """The family of a case: the longest family name that its name starts with."""
    return max((f for f in FAMILIES if case.name.startswith(f)), key=len)


def guidance(layout: FamilyLayout) -> str:
    """How guidance runs."""
    if layout.branches == "embedded":
        return f"told to the network ({layout.embedded_guidance:g} while training)"
    how = {"uncond_first": "one batch", "cond_first": "one batch", "two_calls": "two calls"}
    rule = "" if layout.combine == "standard" else f", {layout.combine}"
    told = "" if layout.embedded_guidance is None else "; or told to the network"
    return how[layout.branches] + rule + told


def prediction(layout: FamilyLayout) -> str:
    """Process and what the network predicts."""
    kind = "by the scheduler's config" if layout.prediction == "scheduler" else layout.prediction
    return f"{layout.process}, {'negative ' if layout.sign == -1 else ''}{kind}"


def loader(pipelines: Sequence[str]) -> str:
    """Who reads the exported adapter."""
    import diffusers

    here = [p for p in pipelines if hasattr(diffusers, p)]  # some classes are of other versions
    peft = [p for p in here if not hasattr(getattr(diffusers, p), "load_lora_weights")]
    if not peft:
        return "`load_lora_weights`"
    return "peft" if peft == here else f"`load_lora_weights`; peft: {', '.join(peft)}"


def passed(cases: Sequence[Case]) -> tuple[str, str]:
    """Proofs passed of all, and what fails with the reason."""
    total = sum(p.runs for p in PROOFS.values()) * len(cases)
    missed = sum(PROOFS[name].runs for case in cases for name in case.fails)
    reasons = [f"{c.name}: {name}, {why}" for c in cases for name, why in c.fails.items()]
    return f"{total - missed} of {total}", "; ".join(reasons) or "nothing"


def families() -> Iterator[Sequence[str]]:
    """A row for every family."""
    cases = [case for group in GROUPS for case in group.CASES]
    for name in FAMILIES:
        mine = [c for c in cases if family_named(c) == name]
        layout = layout_of(name)
        yield (
            f"`{name}`",
            ", ".join(layout.pipelines),
            ", ".join(c.name for c in mine),
            prediction(layout),
            f"{layout.codec}, {layout.packing}",
            guidance(layout),
            loader(layout.pipelines),
            *passed(mine),
        )


def declared_layout(case: Case) -> FamilyLayout:
    """The layout that a case's recipe declares."""
    options = DiffusersOptions.model_validate({"name_or_path": "x", **case.options})
    assert options.layout is not None
    return declared(options.layout)


def declared_rows() -> Iterator[Sequence[str]]:
    """A row for every declared and every refused pipeline."""
    cases = {case.name: case for case in cases_declared.CASES}
    for name in sorted({*cases, *cases_declared.REFUSED}):
        if name in cases_declared.REFUSED:
            why = [cases_declared.NOTES.get(name), cases_declared.REFUSED[name].reason]
            yield (name, "", "", "", "", "refused", ": ".join(x for x in why if x))
            continue
        layout = declared_layout(cases[name])
        count, fails = passed([cases[name]])
        notes = [x for x in (cases_declared.NOTES.get(name), fails) if x not in (None, "nothing")]
        yield (
            name,
            prediction(layout),
            f"{layout.codec}, {layout.packing}",
            guidance(layout),
            loader([name]),
            count,
            "; ".join(str(x) for x in notes),
        )


def declared_keys() -> Iterator[str]:
    """Each layout as a recipe has it, without what planning alone reads."""
    for case in cases_declared.CASES:
        keys = {k: v for k, v in case.options["layout"].items() if k not in PLANNING}
        yield f"- {case.name}: `{{{', '.join(f'{k}: {written(v)}' for k, v in keys.items())}}}`"


def written(value: object) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(written(x) for x in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {written(v)}' for k, v in value.items())}}}"
    return str(value)


def document() -> str:
    """The whole page."""
    ending = ["LoRA loader", "proofs passed"]
    middle = ["process, prediction", "codec, packing", "guidance"]
    extra = sorted(c.name for c in cases_declared.CASES if c.name > "AudioLDM2Pipeline")
    return PROSE.format(
        proofs="\n".join(f"- {name}: {p.words}" for name, p in PROOFS.items()),
        runs=sum(p.runs for p in PROOFS.values()),
        families=table(
            ["family", "pipelines", "cases", *middle, *ending, "what fails"], families()
        ),
        example=EXAMPLE,
        extra=", ".join([*extra, "AudioLDMPipeline"]),
        declared=table(["pipeline", *middle, *ending, "notes"], declared_rows()),
        layouts="\n".join(declared_keys()),
    )


def verified() -> str:
    """What `ls generators` says of each family and declared pipeline, as JSON."""
    found = [
        {
            "name": row[0].strip("`"),
            "pipelines": row[1],
            "media": layout_of(row[0].strip("`")).media,
            "loader": row[6].strip("`"),
            "proofs": row[7],
        }
        for row in families()
    ]
    media = {case.name: declared_layout(case).media for case in cases_declared.CASES}
    layouts = [
        {
            "name": row[0],
            "pipelines": "by model.layout",
            "media": media.get(row[0], ""),
            "loader": row[4].strip("`"),
            "proofs": row[5],
        }
        for row in declared_rows()
    ]
    return json.dumps(found + layouts, indent=1) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PATH.write_text(document())
        VERIFIED.write_text(verified())
    else:
        print(document())
