"""A client against a real server process that fails in every way it is told to."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from chat_server import MODEL, ChatServer
from PIL import Image

from sd3core.captions import endpoint
from sd3core.captions.api_key import ApiKey, find_api_key
from sd3core.captions.endpoint import ANSWERS, FAILED_IN_A_ROW, EndpointCaptioner
from sd3core.captions.said import Said, caption_seed
from sd3core.errors import DataError, StopStageError
from sd3core.recipe_caption import CaptionSettings

KEY = ApiKey("CAPTION_KEY", "sk-very-secret-0123456789")


@pytest.fixture(scope="module")
def server():
    with ChatServer() as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.02)


def captioner_of(url: str, in_flight: int = 4, key: ApiKey | None = None, **settings) -> EndpointCaptioner:
    plain = {"request_timeout_s": 2.0, "retry_s": 5.0, "prompt": "Say.", "model": MODEL}
    caption = CaptionSettings(captioner="endpoint", endpoint=url, **plain | settings)
    return EndpointCaptioner(caption, in_flight, key)


def grey(shade: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.new("RGB", (width, height), (shade,) * 3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_is_sent_and_what_comes_back(server):
    server.tell()
    captioner = captioner_of(f"{server.url}/", max_new_tokens=17)
    captioner.check()
    assert captioner("k", grey(7)) == Said("a picture of shade 7", tokens=5, revision="fp_1")
    (asked,) = server.asked
    asked.pop("at")
    assert asked == {
        "model": MODEL,
        "max_tokens": 17,
        "temperature": 0.0,
        "shade": 7,
        "size": [40, 30],
        "format": "JPEG",
        "url": "data:image/jpeg;base64,",
        "prompt": "Say.",
        "authorization": None,
    }


def test_a_seed_is_sent_where_words_are_drawn(server):
    server.tell()
    captioner_of(server.url, temperature=0.7, seed=5)("key", grey(7))
    assert (server.asked[0]["seed"], server.asked[0]["temperature"]) == (caption_seed(5, "key"), 0.7)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("empty", Said("", 1, revision="fp_1")),
        ("refusal", Said("I can't help with that.", 1, refused=True, revision="fp_1")),
        ("filtered", Said("A pict", 1, refused=True, revision="fp_1")),
        ("length", Said("A shade of 9. It is as gr", 64, cut_off=True, revision="fp_1")),
        ("parts", Said("a picture in parts", 1, revision="fp_1")),
    ],
)
def test_answers_that_the_rules_are_for_come_as_they_are(server, fault, said):
    server.tell(shades={"9": [fault]})
    assert captioner_of(server.url)("k", grey(9)) == said
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "fault", ["status:429", "status:503", "status:500", "cut", "html", "other", "stall:5", "drip:5", "huge"]
)
def test_what_passes_is_asked_again(server, fault):
    server.tell(shades={"9": [fault, fault]})
    assert captioner_of(server.url, request_timeout_s=1.0)("k", grey(9)).text == "a picture of shade 9"
    assert len(server.asked) == 3


def test_pauses_grow(server, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.2)
    server.tell(every=["status:503"] * 3)
    captioner_of(server.url)("k", grey(9))
    at = [asked["at"] for asked in server.asked]
    first, second, third = (after - before for before, after in pairwise(at))
    assert first >= 0.1 and second >= 0.2 and third >= 0.4  # each of at least half its length, which doubles


def test_a_server_that_asks_for_no_wait_is_not_hammered(server, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.2)
    server.tell(every=["status:429,0", "status:429,nan", "status:503,soon"])
    captioner_of(server.url)("k", grey(9))
    at = [asked["at"] for asked in server.asked]
    assert len(at) == 4 and at[-1] - at[0] >= 0.1 + 0.2 + 0.4


def test_every_request_waits_as_long_as_the_server_asks(server):
    """Retry-After in seconds and as a date; what other threads would send waits, too."""
    in_two = lambda: time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    for after, least in ((lambda: "1", 0.95), (in_two, 0.9)):
        server.tell(every=[f"status:429,{after()}"])
        captioner, began = captioner_of(server.url), time.time()
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(captioner, "a", grey(1))
            while not captioner.not_before:
                time.sleep(0.01)
            second = threads.submit(captioner, "b", grey(2))
            assert first.result().text and second.result().text
        answered, *later = server.asked
        assert answered["shade"] == 1 and len(later) == 2
        assert min(asked["at"] for asked in later) - began >= least


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("status:500", "the server answers 500: told so for shade #"),
        ("html", "the server's answer is none of the OpenAI chat interface$"),
        ("other", "the server's answer is none of the OpenAI chat interface"),
        ("cut", "its answer broke off$"),
        ("stall:2", r"no answer in 0.5 s \(caption.request_timeout_s\)"),
        ("drip:2", r"no answer in 0.5 s \(caption.request_timeout_s\)"),
    ],
)
def test_an_image_that_gets_no_answer_costs_itself_alone(server, fault, reason):
    server.tell(shades={"9": [f"{fault}*"]})
    captioner = captioner_of(server.url, request_timeout_s=0.5)
    with pytest.raises(DataError, match=reason) as said:
        captioner("k", grey(9))
    assert "\n" not in str(said.value) and "\x1b" not in str(said.value)
    assert len(server.asked) == ANSWERS
    assert captioner("k", grey(8)).text == "a picture of shade 8"


def test_what_the_server_will_not_take_is_asked_once_and_images_of_one_reason_are_counted_together(server):
    server.tell(shades={"9": ["status:400*"], "10": ["status:400*"]})
    captioner = captioner_of(server.url)
    for shade in (9, 10):
        with pytest.raises(DataError, match="^the server answers 400: told so for shade #$"):
            captioner("k", grey(shade))
    assert len(server.asked) == 2


def test_a_server_that_answers_no_image_stops_the_stage(server):
    server.tell(every=["status:500*"])
    captioner = captioner_of(server.url)
    for _ in range(FAILED_IN_A_ROW - 1):
        with pytest.raises(DataError):
            captioner("k", grey(9))
    with pytest.raises(
        StopStageError, match=f"no image in {FAILED_IN_A_ROW} got a caption, the last: the server answers 500"
    ):
        captioner("k", grey(9))
    asked = len(server.asked)
    with pytest.raises(StopStageError):
        captioner("k", grey(9))
    assert len(server.asked) == asked, "it is not asked again"


def test_a_page_in_place_of_an_answer_is_shown_where_the_stage_stops(server, monkeypatch):
    monkeypatch.setattr(endpoint, "FAILED_IN_A_ROW", 1)
    server.tell(every=["html*"])
    with pytest.raises(StopStageError, match="none of the OpenAI chat interface: '<html>") as said:
        captioner_of(server.url)("k", grey(9))
    assert "\x1b" not in str(said.value)


def test_a_server_that_is_gone_stops_the_stage_in_one_line_after_retry_s():
    with ChatServer() as own:
        captioner = captioner_of(own.url, retry_s=1.0)
        captioner("k", grey(1))
        own.kill()
        began = time.monotonic()
        with pytest.raises(StopStageError) as said:
            captioner("k", grey(2))
        took = time.monotonic() - began
    assert 0.9 < took < 20
    line = str(said.value)
    assert line.startswith(f"caption.endpoint http://127.0.0.1:{own.port}/v1: cannot be reached (") and "\n" not in line
    assert line.endswith("see to the server; what is captioned stays, and the same command goes on")


def test_a_server_that_hangs_stops_the_stage_and_one_that_hangs_at_an_image_does_not(server):
    server.tell(shades={"9": ["stall:5*"]})
    captioner = captioner_of(server.url, request_timeout_s=1.0, retry_s=0.5)
    with pytest.raises(DataError, match="no answer in 1 s"):  # /models answers: the image is at fault
        captioner("k", grey(9))
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # connections wait in its queue
        captioner = captioner_of(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", request_timeout_s=0.3, retry_s=0.5)
        with pytest.raises(StopStageError, match="no answer in 0.3 s .*no caption for"):
            captioner("k", grey(9))


def test_a_server_that_comes_back_is_waited_for():
    port = free_port()
    captioner = captioner_of(f"http://127.0.0.1:{port}/v1", retry_s=30)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(captioner, "k", grey(3))
        time.sleep(0.5)
        assert not waiting.done()
        with ChatServer(port):
            assert waiting.result(timeout=30).text == "a picture of shade 3"


def test_a_wait_that_would_be_too_long_is_not_begun(server):
    server.tell(every=["status:429,3600"])
    began = time.monotonic()
    with pytest.raises(StopStageError, match="answers 429.*it asks to wait 3600 s more .caption.retry_s 5.; see to"):
        captioner_of(server.url)("k", grey(9))
    assert time.monotonic() - began < 60


def test_requests_in_flight_are_bounded_and_reached(server):
    server.tell(delay_s=0.1)
    captioner = captioner_of(server.url, in_flight=5)
    with ThreadPoolExecutor(20) as threads:
        said = list(threads.map(lambda shade: captioner(f"k{shade}", grey(shade)), range(10, 50)))
    assert [one.text for one in said] == [f"a picture of shade {shade}" for shade in range(10, 50)]
    assert server.seen()["most_at_once"] == 5


def test_a_first_look_says_what_no_image_would_change(server):
    server.tell(key=KEY.value)
    captioner_of(server.url, key=KEY).check()
    with pytest.raises(StopStageError, match=r"refuses the key \(401.*mend caption.api_key_env, which names no key"):
        captioner_of(server.url).check()
    server.tell()
    with pytest.raises(StopStageError, match=f"has no model 'other' .caption.model.; it has {MODEL}"):
        captioner_of(server.url, model="other").check()
    with pytest.raises(
        StopStageError, match=r"does not know this \(404: no such path.*mend caption.model and caption.endpoint"
    ):
        captioner_of(server.url.removesuffix("/v1"))("k", grey(1))
    began = time.monotonic()
    with pytest.raises(StopStageError, match="cannot be reached.*start the server, or mend caption.endpoint"):
        captioner_of(f"http://127.0.0.1:{free_port()}/v1").check()
    assert time.monotonic() - began < 8  # and not CONNECT_S


def test_the_key_is_sent_and_shown_by_nothing(server, monkeypatch):
    monkeypatch.setenv(KEY.variable, f" {KEY.value}\n")
    key = find_api_key(KEY.variable)
    server.tell(key=KEY.value)
    captioner = captioner_of(server.url, key=key, api_key_env=KEY.variable)
    captioner("k", grey(1))
    assert server.asked[0]["authorization"] == f"Bearer {KEY.value}"
    assert KEY.value not in f"{key!r} {key} {captioner.caption!r} {captioner.caption.model_dump_json()}"
    assert pickle.loads(pickle.dumps(key)) == key, "it goes to workers"
    server.tell(key="another")  # and says the one that it was given
    for ask in (captioner.check, lambda: captioner("k", grey(1))):
        with pytest.raises(StopStageError) as said:
            ask()
        assert KEY.value not in str(said.value) and "provided: $CAPTION_KEY" in str(said.value)
    monkeypatch.setenv(KEY.variable, "two words")
    with pytest.raises(DataError, match="CAPTION_KEY holds what no HTTP header can carry") as said:
        find_api_key(KEY.variable)
    assert "two words" not in str(said.value)
    assert find_api_key("NO_SUCH_VARIABLE") is None


def test_the_environments_proxy_is_used_but_for_this_machine(server, monkeypatch):
    """A proxy that answers nothing: what went through it would fail."""
    proxied = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            proxied.append(connection.recv(4096))
            connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        server.tell()
        assert captioner_of(server.url)("k", grey(1)).text
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StopStageError, match="answers 502"):
            captioner_of("http://captions.example/v1", retry_s=0.0)("k", grey(1))
        thread.join(10)
    assert proxied and proxied[0].startswith(b"POST http://captions.example/v1/chat/completions ")


def test_a_proxy_that_is_no_url_is_named_with_its_mend(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:port")
    with pytest.raises(StopStageError, match="the environment's proxy cannot be used .*; mend it"):
        captioner_of("http://captions.example/v1")


def test_an_answer_that_is_nested_without_an_end_costs_its_image_alone():
    captioner, deep = captioner_of("http://127.0.0.1:9/v1"), b"[" * 1_000_000
    with pytest.raises(endpoint._NoUse, match="none of the OpenAI chat interface"):
        captioner._said(200, deep)
    with pytest.raises(endpoint._NoUse, match="the server answers 500"):
        captioner._said(500, deep)
    assert endpoint._model_names(deep) == []
