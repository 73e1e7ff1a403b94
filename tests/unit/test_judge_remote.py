"""``remote`` against endpoints that are functions: what it asks, reads, repeats and reports."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from remote_judges import CPU, mocked, remote, said

from t2i_align.contract import Media, MediaError
from t2i_align.errors import ModelError, UserError
from t2i_align.evaluate.score_source import Entry
from t2i_align.evaluate.scoring import Member, judged
from t2i_align.judges.facts import JudgeFacts
from t2i_align.judges.remote import Remote
from t2i_align.judges.remote_options import RemoteOptions
from t2i_align.judges.wire import Part, from_url, to_url

KEY = "sk-secret-1234"
MEDIA, TEXT = [Media("image", torch.zeros(3, 8, 8))], ["a photo of a car"]


def test_the_request_is_what_vllm_and_sglang_take() -> None:
    seen: list[dict[str, Any]] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        assert str(request.url) == "http://127.0.0.1:9/v1/chat/completions"
        seen.append(json.loads(request.content))
        return said("4", **{"4": -0.001})

    judge, _ = mocked(handler, read="likert", slot="Score: ")
    assert judge.score(MEDIA, TEXT).values.tolist() == [4]
    (body,) = seen
    (question, begun) = body.pop("messages")
    assert begun == {"role": "assistant", "content": "Score: "}
    image, text = question["content"]
    assert text["text"].startswith('Does this figure show "a photo of a car"')
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (8, 8) and data.startswith(b"\x89PNG")
    assert body == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_answers_beyond_the_likely_tokens_are_bounded() -> None:
    """p = (.6, .1) listed, .05 the least of them, .25 left: each unlisted one holds .05 at most."""
    p = {"4": 0.6, "5": 0.1, "I": 0.05}
    logs = {t: math.log(v) for t, v in p.items()}
    judge, _ = mocked(lambda _: said("4", **logs), read="likert", max_missing=0.18)
    assert judge.score(MEDIA, TEXT).values[0].item() == pytest.approx((4 * 0.6 + 5 * 0.1) / 0.7)
    judge, _ = mocked(lambda _: said("4", **logs), read="likert")
    assert judge.score(MEDIA, TEXT).reasons == (
        "1, 2, 3 could hold 0.18 of the scale beyond the 3 likely tokens; max_missing is 0.01",
    )  # 3 * .05 / (3 * .05 + .7) = .176


def test_tokens_that_mean_the_same_are_added_up() -> None:
    """P(yes) = (.3 + .1) / (.3 + .1 + .2) = 2/3; the rest is neither."""
    p = {" Yes": 0.3, "yes": 0.1, "NO": 0.2, "Maybe": 0.4}
    logs = {t: float(torch.tensor(v).log()) for t, v in p.items()}
    judge, _ = mocked(lambda _: said("Maybe", **logs))
    assert judge.score(MEDIA, TEXT).values[0].item() == pytest.approx(2 / 3, abs=1e-6)
    judge, _ = mocked(lambda _: said("Maybe", **logs), normalise="vocabulary")
    assert judge.score(MEDIA, TEXT).values[0].item() == pytest.approx(0.4, abs=1e-6)
    judge, _ = mocked(lambda _: said("I", I=-0.1, It=-3.0))
    assert judge.score(MEDIA, TEXT).reasons == (
        "none of No, Yes is among the likely answers ('I', 'It', ...)",
    )


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("Yes, it does.", {}, 1.0),
        ("**no**", {}, 0.0),
        ("Certainly", {}, "the answer 'Certainly' is none of No, Yes"),
        ("", {}, "the answer '' is none of No, Yes"),
        ("4", {"read": "likert"}, 4.0),
        ("7", {"read": "likert"}, "the answer '7' is none of 1, 2, 3, 4, 5"),
        ("Good.\nScore: 3.5", {"read": "text"}, 3.5),
        ("Good.", {"read": "text"}, "no grade in the answer 'Good.'"),
        ("yes", {"logprobs": "required"}, "the endpoint offered no logprobs"),
    ],
)
def test_answers_without_logprobs(text: str, given: dict[str, Any], expected: float | str) -> None:
    judge, _ = mocked(lambda _: said(text), **given)
    found = judge.score(MEDIA, TEXT)
    assert (found.reasons[0] or found.values[0].item()) == expected


def test_an_endpoint_that_refuses_logprobs_is_asked_without() -> None:
    seen: list[bool] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append("logprobs" in json.loads(request.content))
        if seen[-1]:
            error = {"error": {"message": "logprobs is not supported with this model"}}
            return httpx2.Response(400, json=error)
        return said("yes")

    judge, waits = mocked(handler, concurrency=1)
    assert judge.score(MEDIA * 2, TEXT * 2).values.tolist() == [1, 1]
    assert seen == [True, False, False] and waits == []
    judge, _ = mocked(handler, logprobs="required")
    assert judge.score(MEDIA, TEXT).reasons == (
        "HTTP 400: logprobs is not supported with this model",
    )


def test_busy_servers_are_asked_again_after_doubling_waits() -> None:
    replies = iter(
        [
            httpx2.Response(429, headers={"Retry-After": "7"}),
            httpx2.Response(503),
            httpx2.ReadTimeout("slow"),
            httpx2.ConnectError("refused"),
            said("yes"),
        ]
    )

    def handler(request: httpx2.Request) -> httpx2.Response:
        reply = next(replies)
        if isinstance(reply, Exception):
            raise reply
        return reply

    judge, waits = mocked(handler, backoff=0.5)
    assert judge.score(MEDIA, TEXT).values.tolist() == [1]
    assert waits == [7, 1, 2, 4]


@pytest.mark.parametrize(
    ("reply", "reason", "tries"),
    [
        (httpx2.Response(500, text="oops"), "HTTP 500: oops after 3 tries", 3),
        (httpx2.Response(429, headers={"Retry-After": "86400"}), "HTTP 429: after 3 tries", 3),
        (httpx2.ReadTimeout(""), "no reply in 60 s (ReadTimeout) after 3 tries", 3),
        (httpx2.ConnectError("refused"), "no connection: refused after 3 tries", 3),
        (httpx2.Response(404, json={"error": {"message": "no such model"}}),
         "HTTP 404: no such model", 1),
        (httpx2.Response(307, headers={"Location": "http://evil.example/"}), "HTTP 307:", 1),
        (httpx2.Response(200, text="<html>"), "the reply is not JSON: ", 1),
        (httpx2.Response(200, text="[" * 100_000), "the reply is not JSON: ", 1),
        (httpx2.Response(200, text="x" * (2**20 + 1)), "a reply of more than 1048576 bytes", 1),
        (httpx2.Response(200, json={"choices": []}), "no ChatReply came back: choices: ", 1),
        (httpx2.Response(200, json={"choices": [{"text": "yes"}]}),
         "no ChatReply came back: choices.0.message: Field required", 1),
    ],
)  # fmt: skip
def test_failures_are_nan_with_a_reason(
    reply: httpx2.Response | Exception, reason: str, tries: int
) -> None:
    count: list[int] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":  # whether the server is there at all
            return httpx2.Response(200, json={"data": []})
        count.append(1)
        if isinstance(reply, Exception):
            raise reply
        return reply

    judge, waits = mocked(handler, retries=2)
    found = judge.score(MEDIA, TEXT)
    assert bool(found.values.isnan().all()) and str(found.reasons[0]).startswith(reason)
    assert len(count) == tries and len(waits) == tries - 1 and all(w <= 60 for w in waits)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"values": [0.5], "reasons": []}, "1 values came back for 1 pictures"),
        ({"values": [0.5, 1], "reasons": [None, None]}, "2 values came back for 1 pictures"),
        ({"values": [None], "reasons": [None]}, "no value, and no reason given"),
        ({"values": ["x"], "reasons": [None]}, "no ScoreReply came back: values.0: "),
        ({"values": [float("inf")], "reasons": [None]}, "the judge answered inf"),
    ],
)
def test_replies_of_numbers_are_checked(reply: Any, reason: str) -> None:
    text = json.dumps(reply)
    judge, _ = mocked(lambda _: httpx2.Response(200, text=text), protocol="score")
    found = judge.score(MEDIA, TEXT)
    assert bool(found.values.isnan().all()) and str(found.reasons[0]).startswith(reason)


def test_one_failure_leaves_the_others_alone() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        text = json.loads(request.content)["messages"][0]["content"][1]["text"]
        return httpx2.Response(400, text="no") if "bowl" in text else said("yes")

    judge, _ = mocked(handler)
    media = [*MEDIA * 3, Media("image", b"broken")]
    found = judge.score(media, ["a car", "a bowl", "a bed", "a car"])
    assert found.values.isnan().tolist() == [False, True, False, True]
    assert found.reasons[1] == "HTTP 400: no" and "not an image" in str(found.reasons[3])


def test_no_more_requests_than_agreed_are_under_way() -> None:
    now, most = [0], [0]

    async def handler(request: httpx2.Request) -> httpx2.Response:
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return said("yes")

    judge = remote(model="m", concurrency=3)
    judge.endpoint.transport = httpx2.MockTransport(handler)
    assert judge.score(MEDIA * 12, TEXT * 12).values.tolist() == [1] * 12
    assert most == [3]


def test_a_key_goes_into_the_header_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ModelError, match="environment variable MY_KEY, which is not set"):
        remote(api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", KEY)
    heard: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        heard.append(request.headers["Authorization"])
        assert KEY not in str(request.url) and KEY.encode() not in request.content
        return httpx2.Response(401, text=f"wrong key {KEY}")

    judge, _ = mocked(handler, api_key_env="MY_KEY")
    with caplog.at_level("DEBUG"):
        found = judge.score(MEDIA, TEXT)
    assert heard == [f"Bearer {KEY}"] and found.reasons == ("HTTP 401: wrong key ***",)
    assert KEY not in caplog.text and KEY not in repr(judge.options)


def test_addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2I_ALIGN_REMOTE_URL", raising=False)
    with pytest.raises(ModelError, match=r"no address was given\n  fix: set T2I_ALIGN_REMOTE_URL="):
        Remote(Path(), RemoteOptions(), CPU, torch.float32)
    with pytest.raises(ModelError, match="a remote judge needs an address, got 'localhost:8000'"):
        remote("localhost:8000")
    with pytest.raises(ModelError, match=r"host.example carries more than host and path") as error:
        remote("https://me:secret@host.example/v1")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("T2I_ALIGN_REMOTE_URL", "http://127.0.0.1:8000/v1")
    judge = Remote(Path(), RemoteOptions(), CPU, torch.float32)
    assert judge.endpoint.url == "http://127.0.0.1:8000/v1"
    with pytest.raises(ValidationError, match=r"holds \{prompt\} exactly once"):
        RemoteOptions(template="Is it good?")


def test_the_first_model_listed_is_asked() -> None:
    seen: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": "org/model"}, {"id": "other"}]})
        seen.append(json.loads(request.content)["model"])
        return said("yes")

    judge, _ = mocked(handler, model=None)
    judge.score(MEDIA, TEXT)
    assert seen == ["org/model"]
    judge, _ = mocked(lambda _: httpx2.Response(200, json={"data": []}), model=None)
    with pytest.raises(ModelError, match=r"no model is listed at http://127.0.0.1:9/v1/models: "):
        judge.score(MEDIA, TEXT)


def test_pictures_on_the_wire_lose_nothing() -> None:
    pixels = torch.randint(0, 256, (3, 5, 7)).byte().permute(1, 2, 0).numpy()
    back = Image.open(io.BytesIO(from_url(to_url(Image.fromarray(pixels)))))
    assert (torch.from_numpy(pixels) == torch.tensor(list(back.tobytes())).view(5, 7, 3)).all()
    for url in ("data:text/plain;base64,aGk=", "data:image/png,aGk=", "https://host.example/a.png"):
        with pytest.raises(MediaError, match="an image is a data URL"):
            from_url(url)
    with pytest.raises(ValidationError, match="holds image_url and nothing else"):
        Part.model_validate({"type": "image_url", "text": "x"})


def test_one_prompt_a_picture() -> None:
    with pytest.raises(ValueError, match="1 media and 2 prompts; give one prompt each"):
        remote().score(MEDIA, TEXT * 2)


@pytest.mark.parametrize(
    ("reply", "gone"),
    [
        (httpx2.ConnectError("refused"), True),
        (httpx2.Response(503), True),
        (httpx2.Response(401), True),
        (httpx2.Response(500), False),
        (httpx2.Response(400, text="this picture"), False),
        (httpx2.Response(200, text="<html>"), False),
    ],
)
def test_only_a_server_that_is_not_there_is_unreachable(
    reply: httpx2.Response | Exception, gone: bool
) -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        if isinstance(reply, Exception):
            raise reply
        if request.method == "GET" and reply.status_code == 500:
            return httpx2.Response(200, json={"data": []})
        return reply

    judge, _ = mocked(handler, retries=0)
    assert judge.score(MEDIA * 2, TEXT * 2).unreachable is gone
    broken = Media("image", b"no picture")
    assert judge.score([broken, *MEDIA], TEXT * 2).unreachable is gone
    assert judge.score([broken], TEXT).unreachable is False
    assert judge.score([], []).unreachable is False


def test_a_run_stops_where_its_judge_cannot_be_reached() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    judge, _ = mocked(handler, retries=0)
    member = Member(JudgeFacts("remote", 1, None, {}), judge, None)
    entries = [Entry("a.png", MEDIA[0], TEXT[0])]
    with pytest.raises(UserError, match=r"'remote' cannot be reached: no connection(?s:.*)again"):
        judged([member], entries)


def test_numbers_belong_to_an_address_and_a_model() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        assert str(request.url).endswith("/v1/models")
        return httpx2.Response(200, json={"data": [{"id": "first", "version": 3}]})

    judge, _ = mocked(handler, model=None)
    found = {"url": "http://127.0.0.1:9/v1", "model": "first", "id": "first"}
    assert judge.depends_on == found | {"version": 3}
    assert mocked(handler, model="other")[0].depends_on == {"url": found["url"], "model": "other"}
    assert mocked(handler, model=None, protocol="score")[0].depends_on["version"] == 3


def test_a_picture_the_server_fails_on_is_one_nan() -> None:
    """The server is there: it lists its models, and answers for the other picture."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, json={"data": [{"id": "m"}]})
        poison = b"poison" in request.content
        return httpx2.Response(500) if poison else said("Yes", Yes=-0.1, No=-2.0)

    judge, _ = mocked(handler, retries=0)
    found = judge.score(MEDIA * 2, ["a car", "poison"]).kept("remote")
    assert found.reasons[0] is None and str(found.reasons[1]).startswith("HTTP 500")
