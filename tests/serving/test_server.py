"""The server of `otdrg serve`, asked by OpenAI's own client: equal reports, limits, the queue, and refusals."""

import asyncio
import base64
import importlib
import io
import json
import logging
import socket
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import otdrg
import pytest
import torch
from otdrg import ReportGenerationPipeline
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

import openai
import uvicorn
from otdrg.inference.loading import consensus_decoder
from otdrg.runtime.hosts import Hosts
from otdrg.serving.app import build_app
from otdrg.serving.gate import Limits
from otdrg.serving.writer import ReportWriter

TOKENS = 24
SIZE = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
NAME = "org/otdrg"
GREEDY = {"num_beams": 1, "max_new_tokens": TOKENS, "candidates": 1}
LIMITS = Limits(requests=4, images=2, image_bytes=2**20, body_bytes=3 * 2**20, held_bytes=4 * 2**20, seconds=2)


@pytest.fixture(scope="module")
def pipe(build_model):
    """Wide weights and a head of its own, so that an untrained LLM's text depends on the study."""
    text = {**SIZE, **HEADS, "initializer_range": 0.3, "tie_word_embeddings": False}
    model, processor = build_model(seed=2, text_config=text)
    return ReportGenerationPipeline(model=model, processor=processor)


@contextmanager
def running(pipe, arguments=GREEDY, limits=LIMITS, **options):
    """A server in this process, with its address and writer."""
    writer = ReportWriter(pipe, arguments, batch_size=4)
    app = build_app(writer, NAME, Hosts("127.0.0.1"), limits, **options)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        server.address, server.writer = f"http://127.0.0.1:{listening.getsockname()[1]}", writer
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(30)
            writer.close()


@pytest.fixture(scope="module")
def server(pipe):
    with running(pipe) as server:
        yield server


def client_of(server, **options):
    options = {"api_key": "none", "max_retries": 0, **options}
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{server.address}/v1", http_client=http, timeout=60, **options)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def held(pipe):
    """Holds the model until the event is set; its `reached` is set when the model runs."""
    go = threading.Event()
    go.reached = threading.Event()

    def hold(*_):
        go.reached.set()
        go.wait(30)

    hook = pipe.model.language_model.register_forward_pre_hook(hold)
    yield go
    go.set()
    hook.remove()


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def part(content, kind="image/png"):
    data = content if isinstance(content, bytes) else png(content)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def study(*views, text=None):
    texts = [] if text is None else [{"type": "text", "text": text}]
    return {"model": NAME, "messages": [{"role": "user", "content": [*map(part, views), *texts]}]}


def streamed(client, **request):
    """The text of a stream, its chunks and the last one that has a choice."""
    chunks = list(client.chat.completions.create(stream=True, **request))
    choices = [chunk for chunk in chunks if chunk.choices]
    return "".join(chunk.choices[0].delta.content or "" for chunk in choices), chunks, choices[-1]


def eventually(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_completion_and_stream_equal_the_pipeline(client, pipe, view):
    parts, texts = [], set()
    for views, text in (([view(0)], None), ([view(1), view(2)], "Cough."), ([view(3)], "Chest pain, rule out edema.")):
        expected = pipe({"images": views, "indication": text}, return_contradictions=True, **GREEDY)[0]
        whole = client.chat.completions.create(**study(*views, text=text))
        text, chunks, last = streamed(client, **study(*views, text=text), stream_options={"include_usage": True})
        assert whole.choices[0].message.content == text == expected["generated_text"] != ""
        assert whole.choices[0].finish_reason == last.choices[0].finish_reason
        assert whole.choices[0].finish_reason == ("stop" if expected["complete"] else "length")
        extras = {"findings": expected["findings"], "contradictions": expected["contradictions"]}
        assert whole.otdrg == last.otdrg and same(whole.otdrg, extras)
        counted = len(pipe.processor.tokenizer(expected["generated_text"], add_special_tokens=False)["input_ids"])
        assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == counted + expected["complete"]
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert len({chunk.id for chunk in chunks}) == 1
        parts.append(len(chunks))
        texts.add(expected["generated_text"])
    assert max(parts) > 6 and len(texts) == 3  # a report of one word has four chunks


def same(found, expected):
    """Whether findings agree, probabilities up to rounding."""
    assert found["contradictions"] == expected["contradictions"]
    for name, finding in expected["findings"].items():
        assert found["findings"][name]["state"] == finding["state"]
        assert found["findings"][name]["probability"] == pytest.approx(finding["probability"], abs=1e-5)
    return True


def test_concurrent_requests_share_batches_and_keep_their_texts(client, server, pipe, view, held, monkeypatch):
    sizes, records = [], server.writer._records
    monkeypatch.setattr(server.writer, "_records", lambda jobs: sizes.append(len(jobs)) or records(jobs))
    with ThreadPoolExecutor(4) as users:
        asked = [users.submit(client.chat.completions.create, **study(view(0)))]
        eventually(lambda: sizes)  # the first is written, the others wait
        asked.append(users.submit(lambda: streamed(client, **study(view(1)))[0]))
        asked.append(users.submit(client.chat.completions.create, **study(view(2), view(3))))
        steered = study(view(4)) | {"extra_body": {"findings": {"edema": "positive"}}}
        asked.append(users.submit(client.chat.completions.create, **steered))
        eventually(lambda: len(server.writer._waiting) == 3)
        held.set()
        first, stream, two, edema = [one.result() for one in asked]
    assert sizes == [1, 2, 1]
    texts = [first.choices[0].message.content, stream, two.choices[0].message.content, edema.choices[0].message.content]
    expected = [pipe([[view(0)]], **GREEDY), pipe([[view(1)]], **GREEDY), pipe([[view(2), view(3)]], **GREEDY)]
    expected.append(pipe([[view(4)]], findings={"edema": "positive"}, **GREEDY))
    assert texts == [found[0][0]["generated_text"] for found in expected] and len(set(texts)) == 4
    assert edema.otdrg["findings"]["edema"]["state"] == "positive"


def test_completion_arguments_shorten_and_sample_the_report(client, pipe, view):
    def written(**arguments):
        return client.chat.completions.create(**study(view(5)), **arguments)

    short = written(max_tokens=3, max_completion_tokens=50)
    assert short.choices[0].message.content == pipe(view(5), num_beams=1, max_new_tokens=3)[0]["generated_text"]
    assert short.choices[0].finish_reason == "length"
    longest = pipe(view(5), **GREEDY)[0]["generated_text"]
    assert written(max_completion_tokens=4000).choices[0].message.content == longest
    greedy = written(temperature=0, n=1, user="somebody", presence_penalty=0).choices[0].message.content
    assert greedy == written().choices[0].message.content
    sampled = [written(temperature=1.5, top_p=0.9, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 2
    assert streamed(client, **study(view(5)), temperature=1.5, top_p=0.9, seed=1)[0] == sampled[0]


def test_large_and_dicom_views_are_reported_on_as_by_the_pipeline(client, pipe, dicom):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    large = (np.linspace(0, 4000, 700)[:, None] + np.arange(500)).astype(np.uint16)
    with open(dicom(large), "rb") as file:
        content = file.read()
    expected = pipe(content, **GREEDY)[0]["generated_text"]
    request = study() | {"messages": [{"role": "user", "content": [part(content, "application/dicom")]}]}
    assert client.chat.completions.create(**request).choices[0].message.content == expected


def test_beams_and_candidates_stream_in_one_part(pipe, view):
    beams = {"num_beams": 3, "max_new_tokens": TOKENS, "candidates": 1}
    decoder = consensus_decoder(pipe.model, pipe.processor, 6)
    for arguments in (beams, {"max_new_tokens": TOKENS, "consensus": decoder}):
        expected = pipe([[view(0)]], **arguments)[0][0]["generated_text"]
        with running(pipe, arguments) as server, client_of(server) as client:
            assert client.chat.completions.create(**study(view(0))).choices[0].message.content == expected
            text, chunks, _ = streamed(client, **study(view(0)))
            assert text == expected and len(chunks) == 3
            if "consensus" in arguments:
                with pytest.raises(
                    openai.BadRequestError, match=r"temperature=0.7: expected 0 or nothing, this server"
                ):
                    client.chat.completions.create(**study(view(0)), temperature=0.7)


def test_models_and_health_name_the_model(client, http):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4': unknown, expected 'org/otdrg'"):
        client.models.retrieve("gpt-4")
    assert http.get("/health").json() == {"status": "ok"}


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(http, request, status):
    """The only line of a refusal."""
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = http.post("/v1/chat/completions", content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].count("\n") == 0
    assert len(error["message"]) < 420
    return error["message"]


def message(*parts):
    return {"model": NAME, "messages": [{"role": "user", "content": list(parts)}]}


def huge(width, height):
    """A small PNG whose header states this size."""
    data = bytearray(png(np.zeros((16, 16), np.uint8)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_request_with_bad_image_is_refused_in_one_line(http, view):
    good = part(view(0))
    text = {"type": "text", "text": "Cough."}
    for parts, expected in (
        ([], "no image: expected the views of a study as parts of type 'image_url'"),
        ([text], "no image: expected the views"),
        ([part(huge(20_000, 10_000))], "image 1: the image is too large, expected at most 64000000 pixels"),
        ([good, part(huge(10_000, 8_000))], "image 2: 10000x8000 pixels, expected at most 64000000 in total"),
        ([good, part(b"The lungs are clear.", "image/png")], "image 2: not an image, expected PNG"),
        ([good] * 3, "3 images: expected at most 2, the views of one study"),
        ([part(b"x" * (2**20 + 5))], "image 1: more than 1,048,576 bytes, expected a smaller image"),
        ([part(view(0) * 0)], "image 1: all pixels have one shade"),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}],
            "image 1: the data URL is not base64",
        ),
        ([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}], "image 1: a data URL without base64"),
        ([{"type": "image_url"}], "messages.0.content.0.image_url.image_url: Field required"),
        ([{"type": "input_audio"}], "messages.0.content.0: Input tag 'input_audio' found using 'type' does not match"),
        ([good, {"type": "text", "text": "x" * 501}], "a text of 501 characters: expected the indication of the study"),
        ([good, {"type": "text", "text": "<image>"}], "<image>"),
    ):
        assert expected in refused(http, message(*parts), 400)


@pytest.mark.parametrize("scheme", ["http", "HTTPS", "file", "ftp"])
def test_remote_image_is_refused_and_not_fetched(http, scheme):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        url = f"{scheme}://127.0.0.1:{elsewhere.getsockname()[1]}/frontal.png"
        line = refused(http, message({"type": "image_url", "image_url": {"url": url}}), 400)
        assert "image 1: not a data URL, expected data:image/png;base64,...; nothing is fetched" in line
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert "not a data URL" in refused(http, message({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), 400)


def test_request_of_another_form_is_refused_in_one_line(http, view):
    asked = study(view(0))
    deep = b"[" * 100_000
    for request, status, expected in (
        (b"not JSON", 400, "the request is not JSON: expected a chat completion"),
        (b"", 400, "the request is not JSON"),
        (deep, 400, "the request is not JSON"),
        (b"[]", 400, "the request is a JSON list: expected an object"),
        ({}, 400, "model: Field required"),
        ({**asked, "model": "gpt-4"}, 404, "model 'gpt-4': unknown, expected 'org/otdrg'"),
        ({**asked, "messages": []}, 400, "messages of none: expected one of the user"),
        ({**asked, "messages": [{"role": "system", "content": "Be brief."}, *asked["messages"]]}, 400, "system, user"),
        ({**asked, "temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({**asked, "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        (
            {**asked, "temperature": 1e-40},
            400,
            "temperature: Value error, 1e-40 is not possible: expected 0 or at least",
        ),
        (study(view(0), text="\ud800"), 400, "characters that are not Unicode: expected JSON in UTF-8"),
        ({**asked, "\ud800": 1}, 400, "characters that are not Unicode"),
        (b'{"model": "\xed\xa0\x80"}', 400, "characters that are not Unicode"),
        (study(view(0), text="c a b g " * 60), 400, "expected at most 512 together, the positions of the LLM"),
        ({**asked, "n": 2}, 400, "n: not supported, expected 1 or nothing"),
        ({**asked, "tools": [{"type": "function"}]}, 400, "tools: not supported, expected [] or nothing"),
        ({**asked, "guided_json": {}}, 400, "guided_json: Extra inputs are not permitted"),
        ({**asked, "findings": {"edema": "present"}}, 400, "present"),
        ({**asked, "findings": {"oedem": "positive"}, "stream": True}, 400, "oedem"),
    ):
        assert expected in refused(http, request, status)
    answer = http.get("/v1/embeddings")
    assert answer.status_code == 404 and "no route GET /v1/embeddings" in answer.json()["error"]["message"]
    assert http.get("/docs").status_code == http.get("/openapi.json").status_code == 404
    assert http.get("/v1/chat/completions").status_code == 405


def test_large_and_slow_requests_are_refused_after_they_arrived(http, server, client):
    with pytest.raises(openai.APIStatusError, match="a request of more than 3,145,728 bytes") as caught:
        client.chat.completions.create(**message(part(bytes(4 * 2**20))))
    assert caught.value.status_code == 413
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n".encode())
        assert b"408 Request Timeout" in slow.recv(4096)
    assert http.get("/health").status_code == 200


def test_full_queue_is_refused_and_has_room_again(server, client, view, held):
    ask = client.chat.completions.create
    with ThreadPoolExecutor(4) as users:
        asked = [users.submit(ask, **study(view(0)))]
        eventually(held.reached.is_set)  # is being written, so that the others have to wait
        asked += [users.submit(ask, **study(view(seed))) for seed in range(1, 4)]
        eventually(lambda: len(server.writer._waiting) == 3)
        with pytest.raises(openai.InternalServerError) as full:
            ask(**study(view(9)))
        assert full.value.status_code == 503 and full.value.code == "queue_full"
        assert "4 requests are waiting already: try again later" in str(full.value)
        assert full.value.response.headers["retry-after"] == "1"
        held.set()
        assert all(one.result().choices[0].message.content for one in asked)
    assert ask(**study(view(9))).choices


def test_client_that_leaves_frees_its_place(server, client, view, held):
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**study(view(0)), timeout=0.5)  # is being written
    for _ in range(5):  # more than there are places
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**study(view(0)), stream=True, timeout=0.3)
    eventually(lambda: not server.writer._waiting)
    held.set()
    assert client.chat.completions.create(**study(view(1))).choices[0].message.content


def test_error_in_the_model_is_one_line_without_the_request(client, pipe, view, monkeypatch, caplog):
    secret = "Secret indication"

    def fail(*_, **__):
        raise RuntimeError(secret)

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(pipe.model, "generate", fail)
        with pytest.raises(openai.InternalServerError, match=r"could not be written \(RuntimeError\)") as caught:
            client.chat.completions.create(**study(view(0), text=secret))
    assert "Secret" not in str(caught.value) and "in fail" in caplog.text
    assert "Secret" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("otdrg"))
    assert client.chat.completions.create(**study(view(0))).choices


def test_batch_without_memory_is_freed_before_its_studies_are_written_alone(client, server, pipe, view, held):
    tensors, alive = [], []

    def no_memory(_, arguments, kwargs):
        if len(kwargs["inputs_embeds"]) == 1:
            alive.append([tensor() is not None for tensor in tensors])
            return
        activations = torch.zeros(3)
        tensors.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(f"no room for {len(activations)}")

    with ThreadPoolExecutor(3) as users:
        asked = [users.submit(client.chat.completions.create, **study(view(0)))]
        eventually(held.reached.is_set)  # is being written, so that the others have to wait
        asked += [users.submit(client.chat.completions.create, **study(view(seed))) for seed in (1, 2)]
        eventually(lambda: len(server.writer._waiting) == 2)
        hook = pipe.model.language_model.register_forward_pre_hook(no_memory, with_kwargs=True)
        held.set()
        assert all(one.result().choices[0].message.content for one in asked)
        hook.remove()
    assert len(tensors) == 1 and alive[-1] == [False] and [True] not in alive


def test_error_after_the_stream_began_ends_it_with_an_error(client, pipe, view, monkeypatch):
    monkeypatch.setattr(pipe, "postprocess", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        streamed(client, **study(view(0)))


def test_other_hosts_pages_and_keys_are_refused(pipe, http, view):
    assert http.get("/health", headers={"Host": "evil.example"}).status_code == 421
    assert http.get("/health", headers={"Origin": ""}).status_code == 403
    page = {"Origin": "https://viewer.example"}
    answer = http.post("/v1/chat/completions", json=study(view(0)), headers=page)
    assert answer.status_code == 403 and "expected one of --allow-origin" in answer.json()["error"]["message"]
    with running(pipe, key="sk-otdrg", origins=["https://viewer.example"]) as guarded:
        with pytest.raises(openai.AuthenticationError, match="wrong or no API key"):
            client_of(guarded).chat.completions.create(**study(view(0)))
        asked = {"extra_headers": page, **study(view(0))}
        answer = client_of(guarded, api_key="sk-otdrg").chat.completions.with_raw_response.create(**asked)
        assert answer.headers["access-control-allow-origin"] == "https://viewer.example"
        assert httpx.get(f"{guarded.address}/health", trust_env=False).status_code == 200


def test_serve_load_few_users_are_all_answered_alike(pipe):
    pytest.importorskip("psutil", reason="psutil is not installed")
    benchmarks = Path(otdrg.__file__).parent / "benchmarks"
    if not benchmarks.is_dir():
        pytest.skip("an installed package has no benchmarks")
    with pytest.MonkeyPatch.context() as patch, running(pipe, limits=replace(LIMITS, requests=2)) as server:
        patch.syspath_prepend(str(benchmarks))
        serve_load = importlib.import_module("serve_load")
        patch.setattr(serve_load, "MODEL", NAME)
        patch.setenv("NO_PROXY", "127.0.0.1")
        load = serve_load.Load(f"{server.address}/v1", [serve_load.make_study(index, 64) for index in range(8)])
        asyncio.run(load.run(3, 0))  # more users than places: the client repeats refused requests
    assert not any(load.failed.values()) and not load.differing(), load.table()
    assert sum(map(len, load.seconds.values())) == 6 and load.first
