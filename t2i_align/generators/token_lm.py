r"""Codec-token language models: any transformers ``*ForCausalLM`` over flattened codes.

A sample is ``[text][START][codes ...][END]``; the likelihood is exact:

    log p(codes | text) = sum_u log softmax(logits_{u-1})[code_u]      over the codes and END

Text and START are conditions, never scored (START is constant; scoring it only adds noise to
sequence means). The shift by one happens here, once: ``labels[u]`` is predicted by the logits at
``positions[u]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from t2i_align.contract import (
    DrawSpec,
    Encoded,
    Event,
    Kind,
    Media,
    MediaError,
    MediaKind,
    Rollout,
    Sample,
    SamplingInputs,
    Score,
    Seeds,
    TensorDict,
    View,
)
from t2i_align.errors import ModelError
from t2i_align.generators.adapters import AdaptOptions
from t2i_align.generators.byte_text import NUM_BYTES, byte_ids, pad_rows
from t2i_align.generators.diffusers_folder import DTYPES, local_or_hub
from t2i_align.generators.views import Views, build_views, export_trained, refuse_checkpointing
from t2i_align.options import Options
from t2i_align.process.seeds import generator as rng

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IN_TRAINING_MODE = (
    " (transformers recomputes only in training mode, which the suite never scores in)"
)


def read_config(options: AdaptOptions, noun: str) -> Any:
    """The config of a transformers model.

    Args:
        options: its ``model`` section.
        noun: what it should be, for the error.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    source = local_or_hub(options.name_or_path)
    try:
        return AutoConfig.from_pretrained(
            source, revision=options.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name_or_path: no {noun} at '{options.name_or_path}'",
            "give a folder with config.json and safetensors weights, or a hub id",
        ) from error


def readable(mask: Tensor) -> Tensor:
    """A padding mask ``(B, N)`` as transformers can take it on the meta device too.

    It looks whether any value is False, which meta tensors cannot say, and leaves 4-D masks alone.
    """
    return mask[:, None, None, :].bool() if mask.is_meta else mask


class TokenLMOptions(AdaptOptions):
    """A causal language model over codec tokens."""

    type: Literal["token_lm"] = "token_lm"
    tokenizer: Literal["bytes", "auto"] = Field(
        default="bytes",
        description="bytes: UTF-8 bytes are ids 0 to 255; auto: the folder's own tokenizer",
    )
    start_id: int = Field(default=256, ge=0, description="id of the token before the codes")
    end_id: int = Field(default=257, ge=0, description="id of the token after the codes")
    code_offset: int = Field(
        default=258, ge=0, description="id of code 0; code c is code_offset + c"
    )
    num_codes: int = Field(ge=2, description="codebook size times levels (flattened codes)")
    max_new_tokens: int = Field(default=1024, ge=1, description="longest rollout, in codes")


class TokenLM:
    """A causal LM as a generator of code sequences ``(T,)``."""

    Options: ClassVar[type[Options]] = TokenLMOptions
    kind: ClassVar[Kind] = "token"
    media_kind: ClassVar[MediaKind] = "codes"
    citation: ClassVar[str] = ""

    def __init__(self, options: TokenLMOptions, device: str | torch.device = "cpu") -> None:
        """Read the config; weights are loaded by :meth:`load_module`."""
        self.options = options
        self.device = torch.device(device)
        self.folder = Path(options.name_or_path).expanduser()
        self.config = read_config(options, "language model")
        needed = max(options.end_id, options.start_id, options.code_offset + options.num_codes - 1)
        if needed >= self.config.vocab_size:
            raise ModelError(
                f"model.num_codes: ids up to {needed} are needed but the model's vocabulary has "
                f"{self.config.vocab_size}",
                "lower code_offset or num_codes, or resize the embeddings",
            )
        self._views: Views | None = None
        self._tokenizer: Any = None

    @property
    def views(self) -> Views:
        """The language model's views."""
        assert self._views is not None, "load_module first"
        return self._views

    @property
    def module(self) -> nn.Module:
        """The language model."""
        return self.views.module

    def load_module(self, seed: int, *, reference: bool, reference_mode: str = "auto") -> None:
        """Load weights (or build on meta), inject adapters, set up the reference."""
        from transformers import AutoModelForCausalLM

        dtype = DTYPES[self.options.dtype]
        if self.device.type == "meta":
            with torch.device("meta"):
                net: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        else:
            net = AutoModelForCausalLM.from_pretrained(
                local_or_hub(self.options.name_or_path),
                revision=self.options.revision,
                dtype=dtype,
                trust_remote_code=False,
            )
            net.to(device=self.device)
        refuse_checkpointing(self.options, "token_lm", IN_TRAINING_MODE)
        self._views = build_views(
            net,
            self.options.lora,
            ATTENTION,
            seed,
            reference=reference,
            reference_mode=reference_mode,
        )

    def media_variants(self) -> Sequence[str]:
        """Codes have no augmentation."""
        return ("",)

    def media_key(self) -> Mapping[str, Any]:
        """Codes are stored as they are."""
        return {"codes": self.options.num_codes, "format": 1}

    def text_key(self) -> Mapping[str, Any]:
        """The tokenizer decides."""
        name = "bytes" if self.options.tokenizer == "bytes" else self.options.name_or_path
        return {"tokenizer": name, "revision": self.options.revision, "format": 1}

    def load_media(self, media: Media, variant: str) -> Encoded:
        """Check the codes of one item."""
        codes = torch.as_tensor(media.data, dtype=torch.int64)
        top = self.options.num_codes
        if codes.dim() != 1 or not len(codes) or int(codes.min()) < 0 or int(codes.max()) >= top:
            raise MediaError(f"codes must be a non-empty 1-D list of integers in [0, {top})")
        return Encoded({"codes": codes}, {"length": len(codes)})

    def encode_media(self, loaded: Sequence[Encoded]) -> list[Encoded]:
        """Codes are already native."""
        return list(loaded)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TensorDict]:
        """Text ids of each prompt, variable length."""
        if self.options.tokenizer == "bytes":
            assert NUM_BYTES <= self.options.code_offset
            return [{"text_ids": byte_ids(p)} for p in prompts]
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                self.options.name_or_path,
                revision=self.options.revision,
                trust_remote_code=False,
            )
        ids = self._tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return [{"text_ids": torch.tensor(i, dtype=torch.int64)} for i in ids]

    def free_encoders(self, *, keep_decoder: bool) -> None:
        """There are none."""

    def assemble(
        self,
        states: Sequence[TensorDict],
        conds: Sequence[TensorDict],
        metas: Sequence[Mapping[str, Any]],
    ) -> Sample:
        """Right-pad codes and text."""
        codes, length = pad_rows([s["codes"] for s in states])
        text, text_length = pad_rows([c["text_ids"] for c in conds])
        cond = {"text_ids": text, "text_length": text_length}
        return Sample({"codes": codes, "length": length}, cond, tuple(metas))

    def draw(self, sample: Sample, spec: DrawSpec, seeds: Seeds, view: View | None = None) -> Event:
        """Lay out ``[text][START][codes][END]``; nothing is random."""
        codes, length = sample.state["codes"], sample.state["length"]
        text, text_length = sample.cond["text_ids"], sample.cond["text_length"]
        num, units = codes.shape[0], codes.shape[1] + 1
        width = int((text_length + length).max()) + 2
        ids = torch.zeros(num, width, dtype=torch.int64, device=codes.device)
        labels = torch.zeros(num, units, dtype=torch.int64, device=codes.device)
        for b in range(num):
            n, m = int(text_length[b]), int(length[b])
            labels[b, :m] = codes[b, :m] + self.options.code_offset
            labels[b, m] = self.options.end_id
            ids[b, :n] = text[b, :n]
            ids[b, n] = self.options.start_id
            ids[b, n + 1 : n + 2 + m] = labels[b, : m + 1]
        column = torch.arange(units, device=codes.device)
        positions = (text_length[:, None] + column).clamp(max=width - 1)
        attention = torch.arange(width, device=codes.device) < (text_length + length + 2)[:, None]
        return Event(
            kind="token",
            cond=sample.cond,
            mask=column <= length[:, None],
            inputs={
                "input_ids": ids,
                "attention_mask": attention.long(),
                "positions": positions,
            },
            labels=labels,
        )

    def use(self, view: View) -> AbstractContextManager[nn.Module]:
        """Select a view's weights."""
        return self.views.use(view)

    def score(
        self,
        event: Event,
        view: View,
        want: frozenset[str] = frozenset(),
        guidance: float = 1.0,
        negative: TensorDict | None = None,
    ) -> Score:
        """Log-probability of every code and END, ``(B, U)``."""
        if guidance != 1.0:
            raise ValueError("token likelihoods are scored without guidance")
        assert event.labels is not None
        inputs = event.inputs
        with self.use(view) as net:
            logits = net(
                input_ids=inputs["input_ids"],
                attention_mask=readable(inputs["attention_mask"]),
                use_cache=False,
            ).logits
        index = inputs["positions"].unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        chosen = logits.gather(1, index).float()
        logp = chosen.log_softmax(-1).gather(-1, event.labels.unsqueeze(-1)).squeeze(-1)
        return Score(
            kind="token",
            logp=logp,
            mask=event.mask,
            dims=torch.ones_like(event.labels),
            reduction="sum",
            pred=chosen if "pred" in want else None,
        )

    def prepare_sampling(
        self,
        prompts: Sequence[str],
        *,
        num_steps: int,
        guidance: float,
        negative_prompt: str | None = None,
    ) -> SamplingInputs:
        """Text ids, padded; ``num_steps`` bounds the number of codes."""
        text, length = pad_rows([c["text_ids"] for c in self.encode_prompts(prompts)])
        cond = {"text_ids": text, "text_length": length}
        steps = min(num_steps, self.options.max_new_tokens)
        return SamplingInputs(cond, None, steps, 1.0, (steps,))

    @torch.no_grad()
    def rollout(self, inputs: SamplingInputs, noise_seeds: Tensor, view: View) -> Rollout:
        """Ancestral sampling by the Gumbel-max rule; row b depends on ``noise_seeds[b]`` only."""
        o = self.options
        allowed = torch.full((self.config.vocab_size,), float("-inf"), device=self.device)
        allowed[o.code_offset : o.code_offset + o.num_codes] = 0
        allowed[o.end_id] = 0
        text, length = inputs.cond["text_ids"], inputs.cond["text_length"]
        rows = []
        with self.use(view) as net:
            for b, seed in enumerate(noise_seeds.tolist()):
                ids = torch.cat([text[b, : int(length[b])], torch.tensor([o.start_id])])
                ids, random = ids.to(self.device), rng(seed)
                codes: list[int] = []
                cache, step = None, ids
                while len(codes) < inputs.num_steps:
                    out = net(input_ids=step[None], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    uniform = torch.rand(len(allowed), generator=random).clamp(1e-20, 1 - 1e-7)
                    gumbel = -(-uniform.log()).log()
                    score = out.logits[0, -1].float() + allowed + gumbel.to(self.device)
                    token = int(score.argmax())
                    if token == o.end_id:
                        break
                    codes.append(token - o.code_offset)
                    step = torch.tensor([token], device=self.device)
                rows.append(torch.tensor(codes, dtype=torch.int64))
        codes_, lengths = pad_rows(rows)
        return Rollout(Sample({"codes": codes_, "length": lengths}, inputs.cond))

    def decode(self, sample: Sample) -> list[Media]:
        """Codes as media; a codec turns them into sound outside this class."""
        pairs = zip(sample.state["codes"], sample.state["length"].tolist(), strict=True)
        return [Media("codes", row[:n].clone()) for row, n in pairs]

    def example(self, batch: int) -> Sample:
        """A sample of typical shape (64 codes, 32 bytes of text), for planning."""
        state = {
            "codes": torch.zeros(batch, 64, dtype=torch.int64),
            "length": torch.full((batch,), 64),
        }
        cond = {
            "text_ids": torch.zeros(batch, 32, dtype=torch.int64),
            "text_length": torch.full((batch,), 32),
        }
        return Sample(state, cond)

    def export(self, folder: str) -> list[str]:
        """LoRA: a peft adapter folder; full: the model folder."""
        return export_trained(
            self.module, self.options, folder, ["model.safetensors", "config.json"]
        )
