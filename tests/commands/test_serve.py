"""`otdrg serve` on the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from otdrg.cli import main
from otdrg.commands.serve import _name


def refused(arguments, capsys):
    assert main(["serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_serve_wrong_options_are_one_line(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be used (Address already in use)" in refused(["m", "--port", str(port)], capsys)
    for option, value, message in (
        ("--queue", "0", "--queue is 0: expected 1 or more"),
        ("--max-images", "0", "--max-images is 0: expected 1 or more"),
        ("--dtype", "int8", "--dtype is 'int8': expected one of float32"),
        ("--quantization", "2bit", "--quantization is '2bit': expected one of 4bit, 8bit"),
        ("--candidates", "0", "--candidates 0 needs --bank: expected both"),
        ("--allow-origin", "*", "--allow-origin is '*': expected a page's origin"),
    ):
        assert message in refused(["m", option, value], capsys)
    assert f"{tmp_path}: no config.json" in refused([str(tmp_path), "--port", str(free_port())], capsys)


def test_serve_model_has_the_name_of_its_run_or_folder(monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: path.is_absolute())
    for model, name in (("/runs/tiny", "tiny"), ("/runs/tiny/model", "tiny"), ("/model", "model"), ("a/b@main", "a/b")):
        assert _name(model) == name


@pytest.mark.parametrize("library", ["fastapi", "uvicorn"])
def test_serve_missing_library_is_one_line(library, capsys, monkeypatch):
    from otdrg.commands import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == library else True)
    assert f"the server needs {library}: pip install 'otdrg[serve]'" in refused(["runs/quickstart"], capsys)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_answers_until_it_is_interrupted(how, model, processor, tmp_path):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    model.save_pretrained(tmp_path / "run" / "model")
    processor.save_pretrained(tmp_path / "run" / "model")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "otdrg.cli", "serve", str(tmp_path / "run"), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OTDRG_API_KEY": "sk-otdrg"},
        # A job in the background is started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/v1 serves run\n", process.stderr.read()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer sk-otdrg"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert [found["id"] for found in json.load(answer)["data"]] == ["run"]
        process.send_signal(how)
        _, error = process.communicate(timeout=40)
    finally:
        process.kill()
    assert (process.returncode, error) == (0, "")
