"""The llm labeler on servers with OpenAI's API: one of the standard library, and `transformers serve`."""

import json
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from otdrg.cli import main
from otdrg.findings_otdrg import FINDINGS
from otdrg.labelers import UnreadReportsWarning, llm_endpoint, load_labeler, read_states
from otdrg.labelers.llm_prompt import load_prompt

pytest.importorskip("openai")

# Of one sentence each.
REPORTS = [f"Heart of size {size}, {'no ' if place % 2 else ''}effusion." for place, size in enumerate("abcdefgh")]


def well(report, attempt):
    """A valid answer."""
    return json.dumps({"Cardiomegaly": "present", "Pleural Effusion": "absent" if "no " in report else "present"})


class ChatServer:
    """A server that answers with `behaviour(report, attempt)`.

    The behaviour returns the text of the LLM, or `(status, body)`, or None to close the connection. `requests` holds
    the bodies, `asked` counts them by report, `busiest` is the highest number of requests at a time.
    """

    def __init__(self):
        self.behaviour = well
        self.requests, self.asked, self.keys = [], Counter(), set()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        report = body["messages"][-1]["content"].removeprefix("Sentence: ")
        with self.lock:
            attempt = self.asked[report]
            self.asked[report] += 1
            self.requests.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            given = (404, {"detail": "Not Found"}) if handler.path != "/v1/chat/completions" else None
            given = given or (self.behaviour(body, attempt) if self.raw else self.behaviour(report, attempt))
        finally:
            with self.lock:
                self.busy -= 1
        if given is None:
            handler.close_connection = True
            return
        if isinstance(given, str):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": given}}
            given = (200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        status, content = given
        kind = "text/html" if isinstance(content, str) else "application/json"
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        handler.wfile.write(content)

    #: Whether the behaviour receives the body of the request instead of the report.
    raw = False


@pytest.fixture
def server():
    server = ChatServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def load(server, tmp_path, monkeypatch):
    """Loads the labeler for the server, with a cache of the test's own."""
    monkeypatch.delenv(llm_endpoint.KEY, raising=False)

    def load(**options):
        fixed = {"model": "m", "endpoint": server.url, "cache": tmp_path / "states.jsonl"}
        return load_labeler("llm", **{**fixed, **options})

    return load


def of(states, finding):
    return states[:, FINDINGS.index(finding)].tolist()


def test_endpoint_reports_are_asked_at_the_same_time_and_once(server, load):
    def slow(report, attempt):
        time.sleep(0.05)
        return well(report, attempt)

    server.behaviour = slow
    states = load(concurrency=4).label([*REPORTS, REPORTS[0]])
    assert of(states, "cardiomegaly") == [1] * 9 and of(states, "pleural_effusion") == [1, 2] * 4 + [1]
    assert set(server.asked.values()) == {1} and len(server.asked) == len(REPORTS)
    assert 2 <= server.busiest <= 4
    body = server.requests[0]
    assert body["model"] == "m" and body["temperature"] == 0 and body["messages"][:-1] == load_prompt().chat("")[:-1]
    assert body["response_format"]["json_schema"]["schema"] == load_prompt().schema()
    # From the cache; another model has answers of its own.
    assert (load().label(REPORTS) == states[:-1]).all()
    assert set(server.asked.values()) == {1}
    load(model="other").label(REPORTS)
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize("accepted", ["json_object", None])
@pytest.mark.parametrize("status", [400, 422])
def test_endpoint_without_json_schema_is_asked_otherwise(server, load, accepted, status):
    def partial(body, attempt):
        wanted = body.get("response_format", {}).get("type")
        if wanted != accepted:
            return status, {"error": {"message": f"response_format {wanted} is not supported"}}
        return well("", attempt)

    server.behaviour, server.raw = partial, True
    assert of(load().label(REPORTS), "cardiomegaly") == [1] * len(REPORTS)
    assert sorted(server.asked.values()) == [1] * 7 + [2 if accepted else 3]


def test_endpoint_refusing_for_now_is_asked_again(server, load):
    faults = [(429, {"error": {"message": "slow down"}}), (503, "<html>busy</html>"), None]

    def moody(report, attempt):
        return faults[REPORTS.index(report) % 3] if attempt == 0 else well(report, attempt)

    server.behaviour = moody
    assert of(load().label(REPORTS), "cardiomegaly") == [1] * len(REPORTS)
    assert set(server.asked.values()) == {2}


def test_endpoint_nonsense_is_asked_again_and_counted(server, load):
    nonsense = {0: ["late", well], 1: ['{"Edema": 1}'], 2: ['{"Edema": "maybe"}'], 3: ["{}"]}

    def behave(report, attempt):
        answers = nonsense[REPORTS.index(report)]
        answer = answers[min(attempt, len(answers) - 1)]
        return answer(report, attempt) if callable(answer) else answer

    server.behaviour = behave
    with pytest.warns(UnreadReportsWarning, match=r"2 of 4 reports \(positions 1, 2\) hold a sentence that got"):
        states = load(retries=1).label(REPORTS[:4])
    assert of(states, "no_finding") == [0, 0, 0, 1] and not states[1:3].any()
    assert [server.asked[report] for report in REPORTS[:4]] == [2, 2, 2, 1]
    assert sorted(body["temperature"] for body in server.requests) == [0] * 4 + [0.7] * 3


def test_endpoint_other_findings_rule_out_no_finding(server, load):
    answers = [
        '{"Hernia": "present"}',
        '{"Hernia": "absent"}',
        '{"Hernia": "uncertain"}',
        '{"Support Devices": "present"}',
    ]
    server.behaviour = lambda report, attempt: answers[REPORTS.index(report)]
    assert of(load().label(REPORTS[:4]), "no_finding") == [0, 1, 0, 1]


def test_endpoint_refused_report_is_skipped(server, load):
    long = f"{'No effusion, ' * 50}clear."

    def behave(report, attempt):
        return (400, {"error": {"message": "too many tokens"}}) if len(report) > 500 else well(report, attempt)

    server.behaviour = behave
    with pytest.warns(UnreadReportsWarning, match=r"1 of 2 reports \(positions 0\) hold a sentence that got"):
        assert of(load().label([long, REPORTS[0]]), "cardiomegaly") == [0, 1]
    assert server.asked[long.lower().capitalize()] == 1


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def no_model(report, attempt):
    return 404, {"error": {"message": "The model `m` does not exist.", "code": 404}}


def wrong_key(report, attempt):
    return 401, {"error": {"message": "Incorrect API key provided: sk-secret."}}


def busy(report, attempt):
    return 429, {"error": {"message": "quota reached"}}


def page(report, attempt):
    return 200, "<html>Welcome</html>"


def other_json(report, attempt):
    return 200, {"status": "ok"}


def sleepy(report, attempt):
    time.sleep(0.3)
    return well(report, attempt)


@pytest.mark.parametrize(
    ("behaviour", "path", "message"),
    [
        (well, "", r"HTTP 404 \(Not Found\), expected a URL that ends in /v1, and the name of a model"),
        (no_model, "/v1", r"HTTP 404 \(The model `m` does not exist\.\), expected a URL"),
        (wrong_key, "/v1", r"HTTP 401 \(.*provided: \*\*\*\.\), expected a key in the environment variable OPENAI"),
        (busy, "/v1", r"HTTP 429 \(quota reached\), use a smaller concurrency, or continue later"),
        (page, "/v1", "the answer is not that of an OpenAI-compatible server"),
        (other_json, "/v1", "the answer is not that of an OpenAI-compatible server"),
        (sleepy, "/v1", r"no answer within 0\.1 seconds"),
        (None, "/v1", "cannot be reached"),
    ],
)
def test_endpoint_wrong_is_one_line(server, load, tmp_path, behaviour, path, message, monkeypatch, capsys):
    monkeypatch.setenv(llm_endpoint.KEY, "sk-secret")
    monkeypatch.setattr(llm_endpoint, "_FIRST_HTTP_RETRIES", 1)
    server.behaviour = behaviour
    endpoint = server.url.removesuffix("/v1") + path
    if behaviour is None:
        endpoint = f"http://127.0.0.1:{closed_port()}/v1"
    timeout = 0.1 if behaviour is sleepy else 10
    with pytest.raises(ConnectionError, match=message) as caught:
        load(endpoint=endpoint, timeout=timeout).label(REPORTS)
    line = str(caught.value)
    assert line.startswith(endpoint) and "\n" not in line and "sk-secret" not in line
    assert "; 0 of 8 sentences are answered and kept in " in line
    assert set(server.asked) <= {REPORTS[0]}
    assert server.keys <= {"Bearer sk-secret"}


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://localhost/v1", "http:///v1", "http://user:secret@localhost/v1", "8000"]
)
def test_endpoint_wrong_url_is_named(load, url):
    with pytest.raises(ValueError, match="endpoint: expected a URL such as http://localhost:8000/v1") as caught:
        load(endpoint=url)
    assert "secret" not in str(caught.value)


def test_endpoint_without_openai_names_the_extra(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"needs openai: pip install 'otdrg\[endpoint\]'"):
        load()


def test_endpoint_dying_server_keeps_the_answers(server, load, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_endpoint, "_HTTP_RETRIES", 1)
    server.behaviour = lambda report, attempt: well(report, attempt) if len(server.asked) <= 3 else None
    labeler = load(concurrency=1)
    with pytest.raises(ConnectionError, match=r"cannot be reached .*; 3 of 8 sentences are answered and kept in "):
        labeler.label(REPORTS)
    assert len((tmp_path / "states.jsonl").read_text().splitlines()) == 3
    server.asked.clear()
    server.behaviour = well
    assert of(labeler.label(REPORTS), "cardiomegaly") == [1] * 8
    assert len(server.asked) == 5 and set(server.asked.values()) == {1}


@pytest.mark.parametrize("signal", ["kill", "terminate"])
def test_endpoint_killed_command_asks_nothing_twice(server, tmp_path, signal):
    def slow(report, attempt):
        time.sleep(0.1)
        return well(report, attempt)

    server.behaviour = slow
    reports, cache, output = tmp_path / "reports.csv", tmp_path / "states.jsonl", tmp_path / "states.csv"
    reports.write_text("id,report\n" + "".join(f'{place},"{text}"\n' for place, text in enumerate(REPORTS)))
    options = {"endpoint": server.url, "model": "m", "concurrency": 2, "cache": cache}
    command = ["label", "--reports", str(reports), "--labeler", "llm", "--output", str(output)]
    command += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    process = subprocess.Popen([sys.executable, "-m", "otdrg.cli", *command], stderr=subprocess.PIPE)
    while len(server.asked) < 5 and process.poll() is None:
        time.sleep(0.01)
    getattr(process, signal)()
    process.communicate(timeout=60)
    kept = len(cache.read_text().splitlines())
    assert 1 <= kept < len(REPORTS) and not output.exists()
    assert main(command) == 0
    assert len(read_states(output)) == len(REPORTS)
    # Only what was being answered is asked again.
    assert sum(server.asked.values()) <= len(REPORTS) + 2
    assert len(cache.read_text().splitlines()) == len(REPORTS)


@pytest.fixture
def serve():
    """Starts `transformers serve` for a folder in this process, and returns its URL."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from transformers.cli.serve import Serve

    servers = []

    def serve(folder):
        port = closed_port()
        servers.append(Serve(force_model=folder, device="cpu", port=port, log_level="error", non_blocking=True))
        return f"http://localhost:{port}/v1"

    yield serve
    for server in servers:
        server.kill_server()


@pytest.mark.parametrize("valid", ["all", "some"])
def test_endpoint_transformers_serve_answers_as_in_process(load, serve, write_llm, tmp_path, valid):
    folder = write_llm(tmp_path / "llm", valid)
    options = {"model": folder, "max_new_tokens": 1, "retries": 0}
    with warnings.catch_warnings(record=True) as here:
        warnings.simplefilter("always", UnreadReportsWarning)
        expected = load_labeler("llm", **options, dtype="float32", cache=tmp_path / "here.jsonl").label(REPORTS)
    with warnings.catch_warnings(record=True) as there:
        warnings.simplefilter("always", UnreadReportsWarning)
        found = load(**options, endpoint=serve(folder)).label(REPORTS)
    assert found.tolist() == expected.tolist()
    skipped = [[str(one.message) for one in caught if one.category is UnreadReportsWarning] for caught in (here, there)]
    assert skipped[0] == skipped[1] and bool(skipped[0]) == (valid == "some")


def test_endpoint_answers_of_another_server_are_not_used(server, load):
    """Two LLMs can have the same name, llama.cpp's for example, on two servers."""
    second = ChatServer()
    for endpoint in (server.url, second.url, second.url):
        load(endpoint=endpoint).label(["The heart is large."])
    second.http.shutdown()
    second.http.server_close()
    assert len(server.requests) == len(second.requests) == 1
