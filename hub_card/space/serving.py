"""Serve the page: address, limits and privacy settings."""

from __future__ import annotations

import os

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ...runtime.hosts import Hosts
from .guard import Guard
from .interface import MAX_VISITORS
from .uploads import MAX_FILE_SIZE, UploadFolder

#: Reports that may wait for the model; further ones are refused as busy. Other events do not wait.
_QUEUE = 32

_CSS = """
.views { display: flex; flex-wrap: wrap; gap: 0.75rem; }
.views figure { flex: 1 1 8rem; max-width: 16rem; }
figure { margin: 0; }
figure img { width: 100%; max-width: 50rem; border-radius: var(--radius-md); }
figcaption { font-size: var(--text-sm); overflow-wrap: anywhere; }
#problem p { margin: 0; padding: 0.6rem; overflow-wrap: anywhere; border: 2px solid var(--error-border-color); }
#findings { overflow-x: auto; }
#findings :is(th, td) { padding: 0.2rem; overflow-wrap: normal; word-break: normal; }
@media (max-width: 640px) { #findings table { font-size: 0.75rem; } }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
"""


def serve(demo: gr.Blocks, server_name: str | None = None, port: int | None = None, block: bool = True) -> str:
    """Show a page of [`build_demo`] and return its address; nothing is shared, recorded or fetched from elsewhere.

    Without `server_name` and `port`, Gradio's environment variables apply, as on a Space. `block` waits for the end of
    the server.

    Raises:
        OSError: the port is taken.
    """
    hosts = Hosts(server_name or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    guard = Middleware(Guard, hosts=hosts, uploads=UploadFolder(get_upload_folder()))
    # Without `api_open`, no request can bypass the queue.
    demo.queue(max_size=_QUEUE, default_concurrency_limit=1, api_open=False)
    _, address, _ = demo.launch(
        server_name=server_name,
        server_port=port,
        prevent_thread_lock=not block,
        quiet=True,
        share=False,
        run_history=False,  # would keep studies and reports in the browser
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=MAX_VISITORS,
        app_kwargs={"middleware": [guard]},
        css=_CSS,
    )
    return address
