r"""A judge behind an address: vLLM, SGLang, a provider, or ``t2i-align judges serve``.

``protocol: chat`` asks an OpenAI-compatible endpoint a question a picture and reads the answer as
the local judges do (Eq. (1) and (2) of scale.py):

    read: yes_no    P(yes), as vqa_score.py      read: likert    expected grade, as vlm_likert.py
    read: text      the last grade found in a written answer

The first two use the endpoint's ``top_logprobs``: a token counts for an answer if the two are equal
without spaces at the ends and upper case. An answer that is not among the listed tokens (mostly 20)
counts as impossible, as long as it cannot hold more than ``max_missing`` of the scale; its
probability is at most the smallest listed one, and what the listed ones leave of 1. Where an
endpoint offers no logprobs, the token it says decides: coarse, with ties (``logprobs: required``
makes that a failure instead). A begun answer (``slot``) needs a server that knows
``continue_final_message``, as vLLM and SGLang do.

``protocol: score`` asks POST /v1/score of ``judges serve`` and passes on any judge's own numbers.

Whatever goes wrong with a sample is NaN with the reason. ``concurrency`` requests are under way at
once; pictures are encoded when their turn comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from t2i_align.contract import Media, MediaError
from t2i_align.judges.base import Scores
from t2i_align.judges.endpoint import Endpoint, key_from
from t2i_align.judges.endpoint_error import EndpointError, Unreachable
from t2i_align.judges.remote_chat import Found, Questions, checked
from t2i_align.judges.remote_options import RemoteOptions, checked_url
from t2i_align.judges.remote_server import first_model, is_gone, listed, run
from t2i_align.judges.vlm_common import paired, picture, scores_of
from t2i_align.judges.wire import ChatReply, Choice, ScoreReply, to_base64, to_url
from t2i_align.options import Options

if TYPE_CHECKING:
    import httpx2

Item = tuple[Media, str]


class Remote:
    """Scores from an endpoint; see the module."""

    Options: ClassVar[type[Options]] = RemoteOptions

    def __init__(
        self, folder: Path, options: RemoteOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Check address and key; nothing is sent yet.

        Raises:
            ModelError: no address, no key where one is named, or grades beyond digits.
        """
        self.options, self.model = options, options.model
        self.endpoint = Endpoint(
            checked_url(options.url),
            key_from(options.api_key_env),
            options.timeout,
            options.retries,
            options.backoff,
            options.max_response_bytes,
        )
        self.wants_logprobs = options.logprobs != "never" and options.read != "text"
        self.questions = Questions(options)

    @property
    def depends_on(self) -> dict[str, Any]:
        """Address and model, with the version and the hash that `judges serve` tells of it.

        The endpoint is asked where no model is named, or where it serves a judge's own numbers.

        Raises:
            ModelError: it does not answer, or lists no model.
        """
        about: dict[str, Any] = {}
        if self.options.protocol == "score" or self.model is None:
            about = run(listed(self.endpoint))
            self.model = self.model or str(about["id"])
        served = {k: about[k] for k in ("id", "version", "weights_sha256") if k in about}
        return {"url": self.endpoint.url, "model": self.model} | served

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture.

        Args:
            media: B images.
            prompts: B prompts.

        Raises:
            ModelError: the endpoint lists no model and none was named.
        """
        items = paired(media, prompts)
        work = self._score(items) if self.options.protocol == "score" else self._chat(items)
        found = run(work)
        gone = is_gone(self.endpoint, [f for f in found if isinstance(f, Unreachable)])
        return replace(scores_of(found), unreachable=gone)

    async def _each(
        self, items: Sequence[Any], work: Callable[[httpx2.AsyncClient, Any], Awaitable[Any]]
    ) -> list[Any]:
        """Work on all items over one client, so many at once."""
        gate = asyncio.Semaphore(self.options.concurrency)
        async with self.endpoint.open() as client:
            if self.options.protocol == "chat" and self.model is None:
                self.model = str((await first_model(self.endpoint, client))["id"])

            async def one(item: Any) -> Any:
                async with gate:
                    return await work(client, item)

            return await asyncio.gather(*map(one, items))

    async def _chat(self, items: Sequence[Item]) -> list[Found]:
        async def work(client: httpx2.AsyncClient, item: Item) -> Found:
            try:
                image = await asyncio.to_thread(picture, item[0], self.options.max_pixels)
                url = await asyncio.to_thread(to_url, image)
                return self.questions.read(await self._answer(client, url, item[1]))
            except MediaError as error:
                return str(error)
            except EndpointError as error:
                return error.reason

        return await self._each(items, work)

    async def _answer(self, client: httpx2.AsyncClient, url: str, prompt: str) -> Choice:
        """The endpoint's answer, asked again without logprobs where it refuses those."""
        asked = self.wants_logprobs
        try:
            reply = await self._complete(client, url, prompt, asked)
        except EndpointError as error:
            refused = error.status in (400, 422) and "logprob" in str(error).lower()
            if not (asked and refused and self.options.logprobs == "when_offered"):
                raise
            self.wants_logprobs = False
            reply = await self._complete(client, url, prompt, False)
        return checked(ChatReply, reply).choices[0]

    async def _complete(
        self, client: httpx2.AsyncClient, url: str, prompt: str, logprobs: bool
    ) -> Any:
        body = self.questions.request(str(self.model), url, prompt, logprobs=logprobs)
        return await self.endpoint.ask(client, "chat/completions", body)

    async def _score(self, items: Sequence[Item]) -> list[Found]:
        size = self.options.batch_size
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        found = await self._each(parts, self._score_part)
        return [value for part in found for value in part]

    async def _score_part(self, client: httpx2.AsyncClient, items: Sequence[Item]) -> list[Found]:
        found: list[Found] = [""] * len(items)
        sent: dict[int, tuple[str, str | None]] = {}
        for i, (medium, _) in enumerate(items):
            try:
                sent[i] = await asyncio.to_thread(self._pictures, medium)
            except MediaError as error:
                found[i] = str(error)
        if not sent:
            return found
        body: dict[str, Any] = {
            "prompts": [items[i][1] for i in sent],
            "images": [image for image, _ in sent.values()],
        }
        if any(other is not None for _, other in sent.values()):
            body["references"] = [other for _, other in sent.values()]
        for i, value in zip(sent, await self._numbers(client, body, len(sent)), strict=True):
            found[i] = value
        return found

    def _pictures(self, medium: Media) -> tuple[str, str | None]:
        """A picture and its reference, if it has one, as base64."""
        other = medium.meta.get("reference")
        image = to_base64(picture(medium, self.options.max_pixels))
        if not isinstance(other, Media):
            return image, None
        return image, to_base64(picture(other, self.options.max_pixels))

    async def _numbers(
        self, client: httpx2.AsyncClient, body: dict[str, Any], num: int
    ) -> list[Found]:
        try:
            reply = checked(ScoreReply, await self.endpoint.ask(client, "score", body))
        except EndpointError as error:
            return [error.reason] * num
        if not num == len(reply.values) == len(reply.reasons):
            return [f"{len(reply.values)} values came back for {num} pictures"] * num
        pairs = zip(reply.values, reply.reasons, strict=True)
        return [why or "no value, and no reason given" if v is None else v for v, why in pairs]
