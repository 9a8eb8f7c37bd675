"""Which requests the demo's server accepts, without a browser: hosts, sizes, the queue, and what is kept."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import httpx
import numpy as np
import pytest
from otdrg import FINDINGS, ReportGenerationPipeline
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from otdrg.hub_card.space import guard, interface, serving, uploads
from otdrg.hub_card.space.pictures import preview
from otdrg.hub_card.space.temporary import upload_folder
from otdrg.hub_card.space.uploads import UploadFolder, View, read_uploads
from otdrg.runtime.hosts import Hosts

TOKENS = 6
QUEUE = 4


@pytest.fixture(scope="module")
def pipe(build_model):
    model, processor = build_model()
    return ReportGenerationPipeline(model=model, processor=processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["GRADIO_TEMP_DIR"]
    else:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(autouse=True)
def _empty(folder):
    """Each test begins without uploads."""
    UploadFolder(folder).delete_unread(age=-1)


@pytest.fixture(scope="module")
def demo(pipe, folder):
    demo = interface.build_demo(pipe, "org/otdrg", max_new_tokens=TOKENS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "_QUEUE", QUEUE)
        demo.address = serving.serve(demo, "127.0.0.1", block=False).rstrip("/")
    yield demo
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def client(demo):
    with httpx.Client(base_url=demo.address, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def post(demo, client):
    """Posts the inputs of an event, by the name of its function; the last input is the session's state."""
    events = {event["api_name"]: event["id"] for event in client.get("/config").json()["dependencies"]}

    def post(name, *inputs, session="visitor", route=None):
        request = {"data": [*inputs, None], "fn_index": events[name], "session_hash": session}
        return client.post(f"/gradio_api/{route or f'run/{name}'}", json=request)

    return post


@pytest.fixture
def ask(post, client):
    """Has a report written, or refused, through the queue, and returns all that came of it."""

    def ask(name, *inputs, session="visitor"):
        post(name, *inputs, session=session, route="queue/join").raise_for_status()
        lines = []
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                lines.append(line)
                if '"process_completed"' in line:
                    return "\n".join(lines)
        raise AssertionError("the answer ended early")

    return ask


@pytest.fixture
def slow(pipe):
    """Holds the model until the event is set."""
    go = threading.Event()
    hook = pipe.model.language_model.register_forward_pre_hook(lambda *_: go.wait(30) and None)
    yield go
    go.set()
    hook.remove()


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def upload(client, data, name="view.png"):
    return client.post("/gradio_api/upload", files={"files": (name, data, "image/png")})


def as_file(path):
    return {"path": path, "orig_name": "view.png", "meta": {"_type": "gradio.FileData"}}


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# -- who asks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["/", "/config", "/gradio_api/queue/status"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "0.0.0.0:7860", "192.168.1.7", "a@127.0.0.1"]
)
def test_request_under_another_host_is_misdirected(client, route, host):
    answer = client.get(route, headers={"Host": host})
    assert answer.status_code == 421
    assert f"this server is not {host!r}" in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:7860", "localhost", "LOCALHOST:80", "[::1]:7860"])
def test_request_through_a_forwarded_port_is_answered(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert client.post("/gradio_api/reset", json={"event_id": "x"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:8888"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("route", ["queue/join", "upload", "run/start_anew", "cancel"])
def test_request_of_another_site_is_forbidden(client, headers, route, folder):
    answer = client.post(f"/gradio_api/{route}", json={}, headers=headers)
    assert answer.status_code == 403
    assert "expected this page" in answer.text
    assert files(folder) == []


def test_hosts_on_a_space_are_the_hubs_names(monkeypatch):
    monkeypatch.setenv("SPACE_ID", "org/otdrg-demo")
    monkeypatch.setenv("SPACE_HOST", "org-otdrg-demo.hf.space")
    hosts = Hosts("0.0.0.0")
    assert all(host in hosts for host in ("org-otdrg-demo.hf.space", "org-otdrg-demo--v2.hf.space", "10.0.0.3:7860"))
    assert not any(host in hosts for host in ("evil.example", "hf.space.evil.example", "evilhf.space", "", None))
    headers = {"host": "org-otdrg-demo.hf.space", "origin": "https://org-otdrg-demo.hf.space"}
    assert hosts.same_site(headers)
    assert not hosts.same_site({**headers, "origin": "https://other-space.hf.space"})


def test_hosts_of_all_addresses_are_addresses_and_configured_names(monkeypatch):
    monkeypatch.setenv("OTDRG_ALLOWED_HOSTS", "demo.example.org, Other.example.org")
    hosts = Hosts("0.0.0.0")
    assert all(
        host in hosts for host in ("192.168.1.7:7860", "[fe80::1]:7860", "demo.example.org", "other.example.org:1")
    )
    assert "evil.example" not in hosts and "192.168.1.7" not in Hosts("127.0.0.1") and "10.0.0.1" in Hosts("10.0.0.1")
    # A proxy in front may keep its own name to itself.
    assert hosts.same_site({"host": "127.0.0.1:7860", "origin": "https://demo.example.org"})


@pytest.mark.parametrize(
    "route", ["process_recording", "component_server", "stream/x", "vibe-code/", "run-history/connect"]
)
def test_post_to_what_the_page_lacks_is_not_found(client, route):
    assert client.post(f"/gradio_api/{route}", files={"video": b"x"}).status_code == 404


@pytest.mark.parametrize(
    "route", ["file=/etc/passwd", "file=http://127.0.0.1:1/", "proxy=http://x.hf.space/", "deep_link"]
)
def test_get_of_files_and_addresses_is_not_found(client, route):
    assert client.get(f"/gradio_api/{route}").status_code == 404


# -- how much ---------------------------------------------------------------------------------------------------------


def test_long_indication_through_the_api_is_refused_before_the_model(ask, post, pipe, monkeypatch):
    post("take_example", 0, session="long")

    def never(*args, **kwargs):
        raise AssertionError("the model was asked")

    with monkeypatch.context() as patched:
        patched.setattr(pipe.model, "generate", never)
        answer = ask("write_report", "cough " * 2000, session="long")
        assert "the indication has 11,999 characters: expected at most 500" in answer
        states = ["unmentioned"] * len(FINDINGS)
        assert "expected at most 500" in ask("write_again", "x" * 501, "edema", *states, session="long")
    assert "alert" not in ask("write_report", None, session="long")
    assert "alert" not in ask("write_report", "no pleural effusion " * 25, session="long")


def test_requests_larger_than_any_of_the_page_are_refused(post, client):
    answer = post("write_report", "x" * guard.MAX_JSON, route="queue/join")
    assert answer.status_code == 413 and "expected less" in answer.text

    def chunks():
        yield b'{"data": ["'
        for _ in range(guard.MAX_JSON // 1000 + 1):
            yield b"x" * 1000

    assert client.post("/gradio_api/queue/join", content=chunks()).status_code == 413
    assert client.post("/gradio_api/queue/join", content=b"[" * 100_000).status_code == 400


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (["maybe"] * 14, "Value: maybe is not in the list of choices"),
        (["negative"] * 14, "Value: negative is not in the list of choices"),  # of No Finding
        ([{"edema": "positive"}] * 14, "is not in the list of choices"),
        ([None] * 14, "there are no states yet: write a report first"),
        (["positive"] * 5, "didn't receive enough input values"),
    ],
)
def test_states_through_the_api_are_checked(ask, post, states, message, pipe, monkeypatch):
    post("take_example", 0, session="states")
    with monkeypatch.context() as patched:
        patched.setattr(pipe.model, "generate", None)
        answer = ask("write_again", "", "edema", *states, session="states")
    assert message in answer or '"success":false' in answer


def test_file_at_an_address_is_not_fetched(post):
    answer = post("add_views", [as_file("http://127.0.0.1:1/view.png")])
    assert answer.status_code == 400 and "expected an uploaded file" in answer.text


def test_upload_above_a_limit_is_refused(client, folder, monkeypatch):
    for limit, status, message in (
        ("MAX_REQUEST", 413, "expected at most"),
        ("MAX_UPLOADS", 503, "try again in a minute"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(guard if limit == "MAX_REQUEST" else uploads, limit, 50_000)
            answer = upload(client, bytes(60_000))
            assert (answer.status_code, message in answer.text) == (status, True)
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert upload(client, bytes(68 * 10**6)).status_code == 413
    assert files(folder) == []


def test_uploads_that_wait_to_be_read_count(client, folder, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOADS", 100_000)
    assert [upload(client, bytes(60_000)).status_code for _ in range(2)] == [200, 503]
    UploadFolder(folder).delete_unread(age=-1)
    assert files(folder) == []
    assert upload(client, bytes(60_000)).status_code == 200
    UploadFolder(folder).delete_unread(age=60)
    assert len(files(folder)) == 1
    UploadFolder(folder).delete_unread(age=-1)
    assert list(folder.glob("[0-9a-f]*")) == []


def begin_upload(address):
    """A connection on which half of an upload has been sent."""
    name, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((name, int(port)), timeout=20)
    headers = f"Host: {name}:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000"
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nhalf'
    connection.sendall(f"POST /gradio_api/upload HTTP/1.1\r\n{headers}\r\n\r\n{part}".encode())
    return connection


def test_upload_that_takes_too_long_is_ended(demo, folder, monkeypatch):
    monkeypatch.setattr(guard, "UPLOAD_SECONDS", 0.5)
    with begin_upload(demo.address) as connection:
        assert b"408 Request Timeout" in connection.recv(4096)
    assert files(folder) == []


def test_upload_of_a_client_that_goes_away_leaves_nothing(demo, folder):
    deadline = time.monotonic() + 20
    with begin_upload(demo.address):
        while not files(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert files(folder)
    while files(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert files(folder) == []


def test_upload_same_file_of_two_visitors_is_read_for_both(client, post, view, folder):
    paths = [upload(client, png(view(1))).json()[0] for _ in range(2)]
    assert len(set(paths)) == 2
    for number, path in enumerate(paths):
        assert post("add_views", [as_file(path)], session=f"same-{number}").status_code == 200
        answer = post("show", session=f"same-{number}").text
        assert "view.png, 64 × 64" in answer and "alert" not in answer
    # Gradio's component for files makes an empty one of its own for each.
    assert not [path for path in files(folder) if path.stat().st_size]


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_file_list_is_emptied_by_uploads_only(client):
    """By another event, it could be emptied between the end of an upload and its event, which then has no files."""
    config = client.get("/config").json()
    (files,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == "files")
    assert [event["api_name"] for event in config["dependencies"] if files in event["outputs"]] == ["add_views"]


def test_large_view_is_kept_small_and_reported_on_in_full(client, post, ask, pipe, folder, tmp_path):
    random = np.random.default_rng(0)
    pixels = np.kron(random.integers(0, 200, (22, 30)), np.ones((50, 50))) + random.integers(0, 50, (1100, 1500))
    data = png(pixels.astype(np.uint8))
    (tmp_path / "view.png").write_bytes(data)
    wanted = pipe(str(tmp_path / "view.png"), num_beams=1, max_new_tokens=TOKENS)[0]
    post("add_views", [as_file(upload(client, data).json()[0])], session="large")
    assert "view.png, 1500 × 1100" in post("show", session="large").text
    ask("write_report", "", session="large")
    answer = post("show", session="large").text
    for finding in wanted["findings"].values():
        assert f"{finding['probability']}"[:10] in answer
    assert json.dumps(wanted["generated_text"], ensure_ascii=False).strip('"')[:20] in answer
    (kept,) = read_uploads([str(tmp_path / "view.png")], [], 10**7, lambda image: image.resize((56, 56)))
    assert kept.size == (1500, 1100)
    assert max(kept.image.size) <= 512 and kept.model_input.size == (56, 56)


def test_closed_page_is_forgotten(demo, client, post, ask, monkeypatch):
    monkeypatch.setattr(interface, "KEPT_AFTER_LEAVING", -0.5)
    sessions = demo.app.state_holder.session_data
    with client.stream("GET", "/gradio_api/heartbeat/gone"):
        post("take_example", 0, session="gone")
        ask("write_report", "", session="gone")
        assert "data:image/png" in post("show_heatmap", "edema", session="gone").text
        assert "gone" in sessions
    deadline = time.monotonic() + 20
    while "gone" in sessions and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "gone" not in sessions
    assert "no heatmap yet" in post("show_heatmap", "edema", session="gone").text


def test_closed_page_that_comes_back_is_kept(demo, client, post, monkeypatch):
    monkeypatch.setattr(interface, "KEPT_AFTER_LEAVING", 1)
    with client.stream("GET", "/gradio_api/heartbeat/back"):
        post("take_example", 0, session="back")
    deadline = time.monotonic() + 3.5  # forgotten 2 s after leaving, unless it was used within the last second
    while time.monotonic() < deadline:
        assert "phantom, frontal" in post("show", session="back").text
        time.sleep(0.3)


def test_visitors_beyond_the_capacity_are_forgotten(demo, post, monkeypatch):
    assert demo.app.state_holder.capacity == interface.MAX_VISITORS
    monkeypatch.setattr(demo.app.state_holder, "capacity", 2)
    for session in ("first", "second", "third"):
        post("take_example", 0, session=session)
    assert "phantom, frontal" in post("show", session="third").text
    assert "phantom, frontal" not in post("show", session="first").text


def test_preview_file_name_is_shown_as_text():
    image = Image.new("RGB", (8, 8))
    name = '"><img src=x onerror=alert(1)>\x1b[31m\u202egnp.' + "x" * 300
    page = preview([View(name, image, image, image.size)])
    assert page.count("<img") == 1 and "&lt;img src=x" in page
    assert not any(character in page for character in "\x1b\u202e") and "x" * 100 not in page


# -- the queue --------------------------------------------------------------------------------------------------------


def test_quick_steps_are_answered_while_the_queue_is_full(post, slow, client, view):
    sessions = [f"queue-{number}" for number in range(QUEUE + 1)]
    for session in sessions:
        post("take_example", 0, session=session)
    joined = []
    for session in sessions:  # one is written, the others wait
        joined.append(post("write_report", "", session=session, route="queue/join").status_code)
        time.sleep(0.2)
    assert joined == [200] * len(sessions)
    full = post("write_report", "", session="queue-0", route="queue/join")
    assert (full.status_code, "Queue is full" in full.text) == (503, True)
    path = upload(client, png(view(2))).json()[0]
    for name, *inputs in (
        ("take_example", 1),
        ("start_anew",),
        ("add_views", [as_file(path)]),
        ("show_heatmap", "edema"),
        ("show",),
    ):
        start = time.monotonic()
        assert post(name, *inputs, session="another").status_code == 200
        assert time.monotonic() - start < 10
    # Nobody gets past the queue.
    assert post("write_report", "", session="another").status_code == 404
    slow.set()
    for session in sessions:
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            assert any('"process_completed"' in line and '"success":true' in line for line in events.iter_lines())


def test_demo_load_few_users_are_all_served(demo):
    path = Path(__file__).parents[2] / "benchmarks" / "demo_load.py"
    spec = spec_from_file_location("demo_load", path)
    demo_load = module_from_spec(spec)
    spec.loader.exec_module(demo_load)
    load = demo_load.Load(demo.address)
    asyncio.run(load.run(QUEUE, 1, demo_load.make_view(300)))
    assert not any(load.refused.values()), load.table()
    assert all(len(load.seconds[step]) >= QUEUE for step in demo_load.STEPS)


# -- the folder of a server -------------------------------------------------------------------------------------------

SERVER = """
import sys, time
from otdrg.hub_card.space.temporary import upload_folder
with upload_folder() as folder:
    (folder / "view.png").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folder_of_a_killed_server_is_deleted_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    foreign = tmp_path / "otdrg-demo-of-another-program"
    foreign.mkdir()
    (tmp_path / "otdrg-demo-link").symlink_to(foreign)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        killed, alive = (Path(server.stdout.readline().strip()) for server in servers)
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait(20)
        assert (killed / "view.png").is_file()
        with upload_folder() as folder:
            assert not killed.parent.exists()
            assert (alive / "view.png").is_file() and foreign.is_dir()
            assert list(folder.iterdir()) == [] and folder.parent.stat().st_mode & 0o077 == 0
        assert not folder.parent.exists()
    finally:
        for server in servers:
            server.kill()
            server.wait(20)
