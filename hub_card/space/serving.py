"""How the page is served: to whom, how many at once, and what is not kept."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from .uploads import MAX_FILE_SIZE

#: Visitors that wait for the model; whoever comes on top of them is told that it is busy.
_QUEUE = 16
#: Visitors whose studies are kept in memory; the one away longest is forgotten first.
_SESSIONS = 32


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
    demo.queue(max_size=_QUEUE, default_concurrency_limit=1)
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
        state_session_capacity=_SESSIONS,
        css_paths=[Path(__file__).with_name("page.css")],
    )
    return address


__all__ = ["serve"]
