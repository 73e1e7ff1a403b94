"""What ``remote`` asks a chat endpoint, and the number it reads off the answer. Sends nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from t2i_align.judges.endpoint_error import EndpointError
from t2i_align.judges.remote_options import RemoteOptions
from t2i_align.judges.scale import expectation, shown
from t2i_align.judges.wire import Choice, Top

Found = float | str
R = TypeVar("R", bound=BaseModel)


class Questions:
    """Requests and readings under some options.

    Args:
        options: of the judge.

    Raises:
        ModelError: grades that are no digits.
    """

    def __init__(self, options: RemoteOptions) -> None:
        """Name the answers and their values."""
        self.options = options
        self.answers = [options.no, options.yes]
        self.values: tuple[float, ...] = (0.0, 1.0)
        if options.read == "likert":
            self.answers, self.values = list(options.grades().values()), options.values()

    def request(self, model: str, url: str, prompt: str, *, logprobs: bool) -> dict[str, Any]:
        """The body of a chat completion about one picture.

        Args:
            model: name the endpoint knows.
            url: data URL of the picture.
            prompt: put into the template.
            logprobs: whether to ask for them.
        """
        options = self.options
        text = options.template.replace("{prompt}", prompt)
        shows = {"type": "image_url", "image_url": {"url": url}}
        messages: list[Any] = [{"role": "user", "content": [shows, {"type": "text", "text": text}]}]
        body = {"model": model, "messages": messages, "temperature": 0}
        body["max_tokens"] = options.max_new_tokens if options.read == "text" else 1
        if options.slot:
            messages.append({"role": "assistant", "content": options.slot})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body | ({"logprobs": True, "top_logprobs": options.top_logprobs} if logprobs else {})

    def read(self, choice: Choice) -> Found:
        """The number an answer gives, or why it gives none."""
        text = choice.message.content or ""
        if self.options.read == "text":
            return self.options.parse(self.options.slot + text)
        top = [] if self.options.logprobs == "never" else choice.top()
        if top:
            return self._expected(top)
        if self.options.logprobs == "required":
            return "the endpoint offered no logprobs"
        word = re.match(r"\W*(\w+)", text)
        for value, answers in zip(self.values, self.answers, strict=True):
            if word and _plain(word[1]) in map(_plain, answers):
                return value
        return f"the answer {shown(text)} is none of {self._named()}"

    def _expected(self, top: Sequence[Top]) -> Found:
        mass = torch.zeros(1, len(self.values), dtype=torch.float64)
        listed = [(_plain(t.token), math.exp(min(t.logprob, 0.0))) for t in top]
        for k, answers in enumerate(self.answers):
            wanted = set(map(_plain, answers))
            mass[0, k] = sum(p for token, p in listed if token in wanted)
        missing = [a for k, a in enumerate(self.answers) if mass[0, k] == 0]
        if len(missing) == len(self.answers):
            likely = ", ".join(repr(t.token) for t in top[:3])
            return f"none of {self._named()} is among the likely answers ({likely}, ...)"
        if self.options.read == "yes_no" and self.options.normalise == "vocabulary":
            return float(mass[0, 1])
        rest = max(1 - sum(p for _, p in listed), 0.0)
        beyond = min(len(missing) * min(p for _, p in listed), rest)
        share = beyond / (beyond + float(mass.sum()))
        if share > self.options.max_missing:
            return (
                f"{', '.join(a for m in missing for a in m)} could hold {share:.2f} of the scale "
                f"beyond the {len(top)} likely tokens; max_missing is {self.options.max_missing:g}"
            )
        return float(expectation(mass.log(), self.values))

    def _named(self) -> str:
        return ", ".join(answer for answers in self.answers for answer in answers)


def _plain(text: str) -> str:
    return text.strip(" \t\r\n\u2581\u0120").casefold()


def checked(kind: type[R], reply: Any) -> R:
    """A reply of some kind.

    Raises:
        EndpointError: it is of another.
    """
    try:
        return kind.model_validate(reply)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        told = f"no {kind.__name__} came back: {where}: {first['msg']}"
        raise EndpointError(told, 200) from error
