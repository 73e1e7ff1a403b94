"""``judges serve`` over real HTTP: the local numbers for ``remote``, and what is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from remote_judges import COUNT, CPU, remote, served

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import UserError
from t2i_align.judges import gate, serve
from t2i_align.judges.base import load
from t2i_align.judges.statistics import ImageStatistic, StatisticOptions
from t2i_align.judges.vlm_likert import LikertOptions, VLMLikert
from t2i_align.judges.vlm_pairwise import PairwiseOptions, VLMPairwise
from t2i_align.judges.vqa_score import VQAScore, VQAScoreOptions
from t2i_align.judges.wire import to_url
from t2i_align.scenes import golden

VLM, KEY = find_root() / "reward_models" / "scenes_vlm", "sk-secret-1234"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def shown() -> tuple[list[Media], list[str]]:
    """Renders asked about their own and another prompt, and one broken file."""
    pairs = [
        (i, own, asked) for i, (own, other) in enumerate(golden.CASES) for asked in (own, other)
    ]
    media = [golden.drawn(own, i) for i, own, _ in pairs]
    return [*media, Media("image", b"broken")], [
        *(asked for *_, asked in pairs),
        "a photo of a car",
    ]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(load("scenes_vlm"), "scenes_vlm", max_bytes=2**20) as url:
        yield url


def post(url: str, **given: Any) -> httpx2.Response:
    with httpx2.Client(trust_env=False, timeout=60) as client:
        return client.post(url, **given)


def ask(url: str, content: Any, **given: Any) -> httpx2.Response:
    body = {"model": "scenes_vlm", "messages": [{"role": "user", "content": content}]}
    return post(f"{url}/chat/completions", json=body | given)


# --- remote against served


@pytest.mark.parametrize("normalise", ("yes_no", "vocabulary"))
def test_a_served_model_gives_the_local_numbers(
    normalise: Any, address: str, shown: tuple[list[Media], list[str]]
) -> None:
    local = VQAScore(VLM, VQAScoreOptions(normalise=normalise), CPU, torch.float32)
    here = local.score(*shown)
    there = remote(address, normalise=normalise, concurrency=3).score(*shown)
    assert (here.values[:-1] - there.values[:-1]).abs().max() <= 1e-4
    assert here.values[:-1].std() > 0.1
    assert there.reasons == here.reasons and there.num_failed == 1


@pytest.mark.parametrize("slot", ("", "The answer is"))
def test_served_grades_are_the_local_ones(slot: str, address: str) -> None:
    media = [golden.drawn("a photo of three birds", 2), golden.drawn("a photo of a purple tie", 3)]
    texts = ["birds", "ties"]
    local = VLMLikert(VLM, LikertOptions(**COUNT, slot=slot), CPU, torch.float32)
    here = local.score(media, texts).values
    there = remote(address, read="likert", slot=slot, top_logprobs=200, **COUNT)
    there = there.score(media, texts)
    assert there.num_failed == 0 and (here - there.values).abs().max() <= 1e-4
    assert here[0] - here[1] > 0.1


def test_answers_that_could_hide_are_not_counted_as_impossible(address: str) -> None:
    """Pushed off what it was taught, the bundled model spreads its answers."""
    media = [golden.drawn("a photo of three birds", 2)]
    spread = remote(address, read="likert", slot="The answer is", **COUNT).score(media, ["birds"])
    assert "of the scale beyond the 20 likely tokens" in str(spread.reasons[0])


def test_without_logprobs_the_said_token_decides(
    address: str, shown: tuple[list[Media], list[str]]
) -> None:
    sharp = remote(address).score(*shown).values[:-1]
    coarse = remote(address, logprobs="never").score(*shown).values[:-1]
    assert torch.equal(coarse, (sharp > 0.5).float())


def test_any_judge_is_served_as_numbers(address: str, shown: tuple[list[Media], list[str]]) -> None:
    here = load("scenes_vlm").score(*shown)
    there = remote(address, protocol="score", batch_size=5).score(*shown)
    assert there.reasons == here.reasons
    assert (here.values[:-1] - there.values[:-1]).abs().max() <= 1e-5
    statistic = ImageStatistic(
        Path(), StatisticOptions(statistic="colorfulness"), CPU, torch.float32
    )
    tiny = Media("image", torch.rand(3, 2, 9))
    with served(statistic, "colorfulness") as url:
        exact = statistic.score([*shown[0][:3], tiny], [""] * 4).values
        assert torch.equal(
            remote(url, protocol="score").score([*shown[0][:3], tiny], [""] * 4).values, exact
        )
        # the same number as an answer in words, for any client of chat completions
        written = remote(url, read="text", pattern=r"([\d.]+)", low=0, high=1000)
        found = written.score(shown[0][:3], ["a"] * 3).values
        assert (found - exact[:3]).abs().max() <= 1e-4
        assert post(
            f"{url}/chat/completions",
            json={"model": "x", "messages": [{"role": "user", "content": "no picture"}]},
        ).json()["error"]["message"] == ("judge 'colorfulness' scores one picture a request, got 0")


def test_what_a_served_judge_cannot_score_keeps_its_reason() -> None:
    statistic = ImageStatistic(Path(), StatisticOptions(statistic="sharpness"), CPU, torch.float32)
    flat = Media("image", torch.rand(3, 2, 9))
    with served(statistic) as url:
        found = remote(url, protocol="score").score(
            [flat, golden.drawn("a photo of a bed", 0)], ["", ""]
        )
    assert found.reasons == ("sharpness needs 3 x 3 pixels, got 9 x 2", None)
    assert found.values.isnan().tolist() == [True, False]


def test_references_travel_with_the_pictures() -> None:
    options = PairwiseOptions(
        template='Does this figure show "{prompt}"? Please answer yes or no.',
        first=("No",),
        second=("Yes",),
    )
    judge = VLMPairwise(VLM, options, CPU, torch.float32)
    a, b = golden.drawn("a photo of a bed", 0), golden.drawn("a photo of a car", 1)
    media = [Media("image", a.data, {"reference": b}), a, Media("image", b.data, {"reference": a})]
    with served(judge) as url:
        there = remote(url, protocol="score").score(media, ["a photo of a bed"] * 3)
    here = judge.score(media, ["a photo of a bed"] * 3)
    assert there.reasons == here.reasons and there.reasons[1] is not None
    assert (here.values - there.values)[[0, 2]].abs().max() <= 1e-5


def test_remote_works_inside_a_running_event_loop(
    address: str, shown: tuple[list[Media], list[str]]
) -> None:
    async def inside() -> torch.Tensor:
        return remote(address).score(shown[0][:1], shown[1][:1]).values

    assert asyncio.run(inside())[0] == pytest.approx(0.983475, abs=1e-4)  # the golden value


# --- what the server says and refuses


def test_health_and_models_name_the_judge(address: str) -> None:
    with httpx2.Client(trust_env=False) as client:
        health = client.get(address.replace("/v1", "/health")).json()
        (listed,) = client.get(f"{address}/models").json()["data"]
    assert listed["id"] == "scenes_vlm" and health.items() <= listed.items()
    weights = VQAScore(VLM, VQAScoreOptions(), CPU, torch.float32).weights_sha256
    assert health == {
        "status": "ok",
        "chat": "model",
        "judge": "scenes_vlm",
        "version": 3,
        "weights_sha256": weights,
    }


def test_answers_have_the_form_of_chat_completions(address: str) -> None:
    url = to_url(Image.new("RGB", (64, 64)))
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Is there a car in the picture?"},
    ]
    reply = ask(address, content, logprobs=True, top_logprobs=2, max_tokens=5).json()
    choice = reply["choices"][0]
    assert reply["object"] == "chat.completion" and choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "no"}
    first, end = choice["logprobs"]["content"]
    assert (first["token"], end["token"]) == ("no", "</s>")
    assert {t["token"] for t in first["top_logprobs"]} == {"no", "yes"}
    mass = sum(torch.tensor(t["logprob"]).exp() for t in first["top_logprobs"])
    assert (
        mass == pytest.approx(1, abs=0.01)
        and first["logprob"] == first["top_logprobs"][0]["logprob"]
    )
    assert ask(address, content, max_tokens=1).json()["choices"][0]["finish_reason"] == "length"


PICTURE = {"type": "image_url", "image_url": {"url": to_url(Image.new("RGB", (8, 8)))}}


@pytest.mark.parametrize(
    ("content", "given", "status", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}], {}, 400,
         "an image is a data URL (data:image/png;base64,...), got 'http://127.0.0.1:1/a.png'; "
         "URLs are not fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], {}, 400, "data URL"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], {}, 400,
         "not base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}], {}, 400,
         "not an image (starts with b'hello')"),
        ([PICTURE], {"temperature": 0.7}, 400, "temperature must be 0, got 0.7"),
        ([PICTURE], {"stream": True}, 400, "stream: Input should be False"),
        ([PICTURE], {"tools": []}, 400, "tools: Extra inputs are not permitted"),
        ([PICTURE], {"top_logprobs": 1001}, 400, "less than or equal to 1000"),
        ([PICTURE], {"continue_final_message": True}, 400, "goes with a last message of"),
        ([{"type": "text"}], {}, 400, "a part of type text holds text and nothing else"),
        ([PICTURE] * 257, {}, 413, "257 pictures; a request holds 256 at most"),
    ],
)  # fmt: skip
def test_wrong_requests_are_explained(
    content: Any, given: dict[str, Any], status: int, message: str, address: str
) -> None:
    reply = ask(address, content, **given)
    assert reply.status_code == status and message in reply.json()["error"]["message"]
    assert "iVBOR" not in reply.text  # what was sent is not repeated


def test_lists_of_different_length_are_refused(address: str) -> None:
    reply = post(f"{address}/score", json={"prompts": ["a", "b"], "images": ["aGk="]})
    assert reply.status_code == 400
    assert "2 prompts, 1 images and 1 references; give equally many" in reply.text
    bad = post(f"{address}/score", json={"prompts": ["a"], "images": ["@"]})
    assert bad.status_code == 400 and "not base64" in bad.text


def test_pixels_are_counted_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("L", (6000, 6000)).save(stream, "PNG")
    media = gate.pictures([stream.getvalue()] * 3)
    assert len(media) == 3 and media[0].data == stream.getvalue()
    with pytest.raises(gate.BadRequest, match="144 megapixels by the headers; a request holds 128"):
        gate.pictures([stream.getvalue()] * 4)
    assert len(gate.pictures([b"broken"] * 2)) == 2


def test_large_requests_are_refused_declared_or_not(address: str) -> None:
    declared = post(f"{address}/score", content=b"x" * (2**20 + 1), headers=JSON)
    assert declared.status_code == 413 and "the limit is 1048576" in declared.text
    parts = (b"x" * 2**18 for _ in range(6))  # no length given: chunked
    counted = post(f"{address}/score", content=parts, headers=JSON)
    assert counted.status_code == 413
    # endless ones are cut off: the connection is closed, or the refusal read
    endless = (b"x" * 2**20 for _ in range(64))
    try:
        assert post(f"{address}/score", content=endless, headers=JSON).status_code == 413
    except httpx2.TransportError:
        pass


def test_only_json_for_this_host_comes_in(address: str) -> None:
    body = json.dumps({"prompts": ["a"], "images": ["aGk="]})
    url = f"{address}/score"
    plain = post(url, content=body, headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and "send application/json, got text/plain" in plain.text
    other = post(url, content=body, headers=JSON | {"Host": "evil.example"})
    assert other.status_code == 421 and "loopback address only" in other.text
    assert post(url, content=body, headers=JSON | {"Host": "localhost:99"}).status_code == 200
    assert post(url, content="{", headers=JSON).status_code == 400
    pickled = post(url, content=b"\x80\x04.", headers={"Content-Type": "application/octet-stream"})
    assert pickled.status_code == 415


def test_a_key_is_needed_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    media, texts = [golden.drawn("a photo of a bed", 0)], ["a photo of a bed"]
    with served(load("colorfulness"), key=KEY) as url:
        without = remote(url, protocol="score").score(media, texts)
        assert without.reasons[0] == (
            "HTTP 401: the key is missing or wrong (Authorization: Bearer ...)"
        )
        assert (
            remote(url, protocol="score", api_key_env="MY_KEY").score(media, texts).num_failed == 0
        )
        with httpx2.Client(trust_env=False) as client:
            assert client.get(url.replace("/v1", "/health")).status_code == 200


def test_a_judge_that_raises_is_an_answer_not_a_crash() -> None:
    class Broken:
        def score(self, media: Any, prompts: Any) -> Any:
            raise RuntimeError("out of memory\nat line 3")

    media = [golden.drawn("a photo of a bed", 0)]
    with served(Broken()) as url:
        found = remote(url, protocol="score", retries=0).score(media, [""])
    assert found.reasons == ("HTTP 422: the judge failed: out of memory",)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_serving_cleanly(number: int) -> None:
    at = serve.bind("127.0.0.1", 0)
    port = at.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}: .*in use"):
        serve.bind("127.0.0.1", port)
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        url = f"http://127.0.0.1:{port}/health"
        with httpx2.Client(trust_env=False) as client:
            while not seen:
                try:
                    seen.append(client.get(url).status_code)
                except httpx2.TransportError:
                    time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    app = serve.build_app(load("colorfulness"), "colorfulness", 1)
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            serve.run(app, at)
        assert ended.value.code == 0
    else:
        serve.run(app, at)
    thread.join(10)
    assert seen == [200] and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)
