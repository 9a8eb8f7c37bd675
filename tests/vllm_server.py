"""A server that answers as vLLM does, as far as `otdrg.inference.vllm` asks: in a thread, or run as the program `vllm`.

Only the standard library, so that the program starts in a moment.
"""

import base64
import io
import json
import os
import stat
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def constant(request):
    """The same tokens for every report."""
    return [[5, 6, request["stop_token_ids"][0]]] * (len(request["prompt_embeds"]) * request["n"])


class Server(ThreadingHTTPServer):
    """A server on a free port, in a thread while it is a context.

    Args:
        model: the name under which its LLM is served.
        write: gives the tokens of the reports of a request, one prompt after the other.
        fault: what it does instead: "error", "refusal", "silence", "hang_up", "other" or None.
        after: number of requests it answers before.
        longest: most tokens of a prompt and its report together; longer ones are refused, as vLLM does.
    """

    daemon_threads = True

    def __init__(self, model, write=constant, fault=None, after=0, port=0, longest=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.write, self.fault, self.after = model, write, fault, after
        self.longest = longest
        self.requests, self.open, self.most_open = [], 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that have left are no error."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        served = {"id": self.server.model, "max_model_len": self.server.longest}
        self.answer({"data": [served]} if self.path == "/v1/models" else {})

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            fault = server.fault if len(server.requests) > server.after else None
        try:
            self.respond(request, fault)
        finally:
            with server.lock:
                server.open -= 1

    def respond(self, request, fault):
        if fault == "error":
            self.answer({"error": {"message": "EngineCore encountered an issue.\nSee stack trace"}}, 500)
        elif fault == "refusal":
            self.answer({"error": {"message": "You must set `--enable-prompt-embeds`"}}, 400)
        elif fault == "silence":
            time.sleep(30)
        elif fault == "hang_up":
            self.close_connection = True
        elif fault == "other":
            self.answer({"choices": [{"index": 0, "text": "no token_ids", "finish_reason": "stop"}]})
        elif fault == "die":
            print("RuntimeError: Engine core is dead.", flush=True)
            os._exit(3)
        elif self.server.longest is not None and self.is_too_long(request):
            self.answer({"error": {"message": f"This model's maximum context length is {self.server.longest}"}}, 400)
        else:
            ends = set(request["stop_token_ids"])
            choices = [
                {"index": place, "token_ids": tokens, "finish_reason": "stop" if ends & set(tokens) else "length"}
                for place, tokens in enumerate(self.server.write(request))
            ]
            # Clients must not rely on the order.
            self.answer({"choices": choices[::-1]})

    def is_too_long(self, request):
        import torch  # not for the program, which starts in a moment

        files = [io.BytesIO(base64.b64decode(encoded)) for encoded in request["prompt_embeds"]]
        longest = max(len(torch.load(file, weights_only=True)) for file in files)
        return longest + request["max_tokens"] > self.server.longest

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


def write_program(path, fault="", after=0):
    """Write the program `vllm` of a server with a fault; "start" fails at the start, others are those of [`Server`].

    While it runs, a file of its process id is beside it, and its arguments are in another.
    """
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{path}" "{fault}" {after} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def main():
    path, fault, after, *arguments = sys.argv[1:]
    with open(f"{path}.arguments", "w") as file:
        json.dump(arguments, file)
    with open(f"{path}.pid", "w") as file:
        file.write(str(os.getpid()))
    if fault == "start":
        print(
            "Traceback\nValueError: the LLM has an unknown architecture\nRuntimeError: Engine core failed. See above."
        )
        sys.exit(1)
    value = {name: arguments[arguments.index(name) + 1] for name in ("--served-model-name", "--port")}
    Server(value["--served-model-name"], fault=fault, after=int(after), port=int(value["--port"])).serve_forever(0.05)


if __name__ == "__main__":
    main()
