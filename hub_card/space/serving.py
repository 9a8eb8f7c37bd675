"""How the page is served: to whom, how many at once, and what is not kept."""

from __future__ import annotations

import os
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from .guard import Guard, Hosts
from .uploads import MAX_FILE_SIZE, UploadFolder
from .visitors import MAX_VISITORS

#: Reports that wait for the model; the page says of more that it is busy. Nothing else of the page waits with them.
_QUEUE = 32


def serve(demo: gr.Blocks, server_name: str | None = None, port: int | None = None, block: bool = True) -> str:
    """Show a page of [`build_demo`], one report at a time; nothing is shared, recorded or fetched from elsewhere.

    Args:
        demo: the page.
        server_name: the address to listen on; without it, what Gradio takes from its environment, as on a Space.
        port: the port; likewise.
        block: whether to return only when the server ends.

    Returns:
        The page's address on this machine.

    Raises:
        OSError: the port is taken.
    """
    hosts = Hosts(server_name or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    guard = Middleware(Guard, hosts=hosts, uploads=UploadFolder(get_upload_folder()))
    # Without `api_open` nobody gets past the queue.
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
        css_paths=[Path(__file__).with_name("page.css")],
    )
    return address


__all__ = ["serve"]
