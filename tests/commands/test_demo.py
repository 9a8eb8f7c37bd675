"""`otdrg demo` on the command line."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from otdrg.cli import main


def test_demo_help_imports_neither_torch_nor_gradio():
    code = (
        "import sys\n"
        "from otdrg.cli import main\n"
        "try:\n"
        "    main(['demo', '--help'])\n"
        "except SystemExit:\n"
        "    print([name for name in ('torch', 'transformers', 'gradio') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "ssh -N -L 7860:127.0.0.1:7860" in done.stdout


def refused(arguments, capsys):
    assert main(["demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_demo_wrong_port_or_address_is_one_line(capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be used (Address already in use)" in refused(["m", "--port", str(port)], capsys)
    port = str(free_port())
    for name, message in (
        ("8.8.8.8", "is not an address of this machine"),
        ("no host", "is not an IPv4 address"),
        ("::1", "is not an IPv4"),
    ):
        error = refused(["m", "--server-name", name, "--port", port], capsys)
        assert f"--server-name {name!r} {message}" in error
    assert "--port is 70000: expected 1 to 65535" in refused(["m", "--port", "70000"], capsys)
    assert "--max-new-tokens is 0: expected 1 or more" in refused(["m", "--max-new-tokens", "0"], capsys)


@pytest.mark.parametrize("library", ["gradio", "matplotlib"])
def test_demo_missing_library_is_one_line(library, capsys, monkeypatch):
    from otdrg.commands import demo as demo_command

    monkeypatch.setattr(demo_command, "find_spec", lambda name: None if name == library else True)
    assert f"the demo needs {library}: pip install 'otdrg[demo]'" in refused(["runs/quickstart"], capsys)


def test_demo_folder_without_model_is_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "before")
    assert f"{tmp_path}: no config.json" in refused([str(tmp_path), "--port", str(free_port())], capsys)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_demo_serves_until_it_is_interrupted(how, model, processor, tmp_path):
    pytest.importorskip("gradio")
    model.save_pretrained(tmp_path / "run" / "model")
    processor.save_pretrained(tmp_path / "run" / "model")
    port, temporary = free_port(), tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "otdrg.cli", "demo", str(tmp_path / "run"), "--port", str(port)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        # A job in the background is started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n", process.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert "Not for clinical use" in answer.read().decode()
        assert list(temporary.glob("otdrg-demo-*"))
        process.send_signal(how)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in error
    assert not list(temporary.glob("otdrg-demo-*"))
