"""The page: a study goes in, its report streams out, with findings that can be changed and a heatmap of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from ...pipeline_otdrg import ReportGenerationPipeline
from .findings_table import findings_table, table_rows, table_states
from .pictures import heatmap, preview
from .uploads import MAX_FILE_SIZE, MAX_VIEWS, Example, View, phantom_examples, read_uploads
from .writing import stream_report

#: Visitors that wait for the model at once; whoever comes later is told that it is busy.
QUEUE_SIZE = 16
#: Visitors whose studies are kept in memory; the one away longest is forgotten first.
_SESSIONS = 32
#: How often, in seconds, files of uploads that never arrived whole are looked for, and how old they may get.
_LEFTOVERS = (60, 300)

WARNING = """\
**Research prototype. Not for clinical use.** Reports, findings and heatmaps are a machine's and often wrong. They must
not be used for diagnosis, treatment or any other decision about a patient. Do not upload images that identify one.
"""

_DOWNLOAD = """(text) => {{
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{type}'}}));
  link.download = '{name}';
  link.click();
  URL.revokeObjectURL(link.href);
}}"""

# No event is an address that programs may call: this is a page.
_HERE = {"api_visibility": "private"}


def build_demo(pipe: ReportGenerationPipeline, name: str, max_new_tokens: int | None = None) -> gr.Blocks:
    """The page for one model; [`serve`] shows it.

    Args:
        pipe: the model's pipeline.
        name: of the model, for the heading.
        max_new_tokens: most tokens of a report; the model's own number without it.
    """
    page = _Page(pipe, max_new_tokens)
    with gr.Blocks(title="OTDRG", analytics_enabled=False, delete_cache=_LEFTOVERS) as demo:
        page.lay_out(name)
    return demo


def serve(demo: gr.Blocks, server_name: str | None = "127.0.0.1", port: int | None = None, block: bool = True) -> str:
    """Show the page, until Ctrl-C if `block`, and return its address.

    Nothing is shared, recorded or fetched from elsewhere, and one report is written at a time.

    Args:
        demo: of [`build_demo`].
        server_name: the address to listen on; None is what Gradio takes from its environment, as on a Space.
        port: the port; without it, the first free one from 7860.
        block: whether to wait here.

    Raises:
        OSError: the port is taken.
    """
    demo.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
    _, address, _ = demo.launch(
        server_name=server_name,
        server_port=port,
        prevent_thread_lock=not block,
        quiet=True,
        share=False,
        run_history=False,  # in the browser, with the images
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


class _Page:
    """Components of the page and what happens between them."""

    def __init__(self, pipe: ReportGenerationPipeline, max_new_tokens: int | None):
        self.pipe = pipe
        self.max_new_tokens = max_new_tokens
        self.steerable, self.has_plan = pipe.model.config.dle, pipe.model.config.fiot

    def lay_out(self, name: str) -> None:
        gr.Markdown(f"# Radiology report generation\nModel: {escape(name)}")
        gr.Markdown(WARNING, elem_id="warning")
        self.study, self.record = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_study()
            with gr.Column(scale=3, min_width=320):
                self._lay_out_report()
        self._connect()

    def _lay_out_study(self) -> None:
        self.files = gr.File(
            label="One or two views of a study (PNG, JPEG, DICOM)",
            file_count="multiple",
            height=180,
            elem_id="files",
        )
        self.preview = gr.HTML(elem_id="preview")
        self.indication = gr.Textbox(
            label="Indication (optional)",
            placeholder="Why the study was made. Enter writes the report.",
            max_lines=1,
            max_length=500,
            elem_id="indication",
        )
        with gr.Row():
            self.write = gr.Button("Write report", variant="primary", elem_id="write")
            self.clear = gr.Button("Clear", elem_id="clear")
        self.problem = gr.HTML(elem_id="problem")
        gr.Markdown("Or try a phantom: drawn by a program, of no patient.")
        self.examples = [
            (gr.Button(example.title, size="sm"), example)
            for example in phantom_examples(max(self.pipe.model.config.image_size, 256))
        ]

    def _lay_out_report(self) -> None:
        self.report = gr.Textbox(
            label="Report", lines=5, max_lines=20, interactive=False, buttons=["copy"], elem_id="report"
        )
        with gr.Row():
            self.save_text = gr.Button("Download text", size="sm", interactive=False)
            self.save_record = gr.Button("Download JSON", size="sm", interactive=False)
        self.contradictions = gr.HTML(elem_id="contradictions")
        self.table = findings_table()
        self.again = gr.Button(
            "Write again from these states", interactive=False, visible=self.steerable, elem_id="again"
        )
        self.finding = gr.Dropdown(
            [(FINDING_DISPLAY_NAMES[finding], finding) for finding in FINDINGS],
            value=FINDINGS[-1],
            label="Heatmap of",
            info="Where the transport plan puts the finding, as a multiple of a uniform plan."
            if self.has_plan
            else "This model has no transport plan (it was trained without FIOT), and so no heatmaps.",
            interactive=self.has_plan,
            elem_id="finding",
        )
        self.heatmap = gr.HTML(elem_id="heatmap")
        self.record_text = gr.Textbox(visible="hidden", elem_id="record")

    def _connect(self) -> None:
        results = [
            self.record,
            self.report,
            self.contradictions,
            self.table,
            self.finding,
            self.heatmap,
            self.record_text,
            self.problem,
        ]
        buttons = [self.write, self.again, self.save_text, self.save_record]
        study = [self.files, self.study, self.preview]
        self.files.upload(
            self.add_views, [self.files, self.study], [*study, *results, *buttons], show_progress="minimal", **_HERE
        )
        for button, example in self.examples:
            button.click(
                lambda example=example: self.show_example(example),
                outputs=[*study, self.indication, *results, *buttons],
                **_HERE,
            )
        self.clear.click(self.start_anew, outputs=[*study, self.indication, *results, *buttons], **_HERE)
        for triggers, write, inputs in (
            ([self.write.click, self.indication.submit], self.write_report, [self.study, self.indication]),
            ([self.again.click], self.write_again, [self.study, self.indication, self.table]),
        ):
            # In three events, so that the buttons come back after an error too.
            gr.on(triggers, self.disable, outputs=buttons, queue=False, trigger_mode="once", **_HERE).then(
                write,
                inputs,
                results,
                concurrency_id="model",
                concurrency_limit=1,
                show_progress_on=self.report,
                **_HERE,
            ).then(self.enable, self.record, buttons, queue=False, **_HERE)
        self.finding.input(
            self.show_heatmap, [self.study, self.record, self.finding], [self.heatmap, self.problem], **_HERE
        )
        for button, text, name, kind in (
            (self.save_text, self.report, "report.txt", "text/plain"),
            (self.save_record, self.record_text, "report.json", "application/json"),
        ):
            button.click(None, text, js=_DOWNLOAD.format(name=name, type=kind), **_HERE)

    # -- the study ----------------------------------------------------------------------------------------------------

    def add_views(self, paths: list[str] | None, before: list[View]) -> dict:
        """Read what was uploaded into the study; a problem leaves the study as it was."""
        try:
            views = read_uploads(paths or [], before, self.pipe.processor.max_image_pixels)
        except (ValueError, ImportError) as error:
            return {self.files: None, self.problem: _problem(error)}
        return {**self._no_results(), **self._study(views)}

    def show_example(self, example: Example) -> dict:
        """Put a phantom into the form."""
        return {**self._no_results(), **self._study(example.views), self.indication: example.indication}

    def start_anew(self) -> dict:
        """Empty the form."""
        return {**self._no_results(), **self._study([]), self.indication: ""}

    def _study(self, views: list[View]) -> dict:
        names, images = zip(*views, strict=True) if views else ((), ())
        return {self.files: None, self.study: views, self.preview: preview(names, images)}

    def _no_results(self) -> dict:
        empty = {self.report: "", self.contradictions: "", self.heatmap: "", self.record_text: "", self.problem: ""}
        return {**empty, self.record: None, self.table: [], **self.enable(None)}

    # -- the report ---------------------------------------------------------------------------------------------------

    def write_report(self, study: list[View], indication: str) -> Iterator[dict]:
        """Write the report of the study, from the states that the model predicts."""
        yield from self._write(study, indication, None)

    def write_again(self, study: list[View], indication: str, rows: Any) -> Iterator[dict]:
        """Write it from the states in the table."""
        try:
            states = table_states(rows)
        except ValueError as error:
            yield {self.problem: _problem(error)}
            return
        yield from self._write(study, indication, states)

    def _write(self, study: list[View], indication: str, states: dict[str, str] | None) -> Iterator[dict]:
        if not study:
            yield {self.problem: _problem("no view: upload one or two views of a study, or take a phantom")}
            return
        views = [view.image for view in study]
        try:
            for written in stream_report(self.pipe, views, indication.strip() or None, states, self.max_new_tokens):
                if isinstance(written, str):
                    yield {self.report: written, self.contradictions: "", self.problem: ""}
                else:
                    yield self._results(written)
                    if self.has_plan:
                        finding = _most_telling(written["findings"])
                        yield {self.finding: finding, self.heatmap: heatmap(views, written, finding)}
        except (ValueError, OSError, ImportError) as error:
            yield {self.problem: _problem(error)}

    def _results(self, record: dict[str, Any]) -> dict:
        return {
            self.record: record,
            self.report: record["generated_text"] or "(the model wrote nothing)",
            self.contradictions: _contradictions(record),
            self.table: table_rows(record, self.steerable),
            self.record_text: json.dumps(record, ensure_ascii=False, indent=2, default=lambda array: array.tolist()),
            self.problem: "",
        }

    def show_heatmap(self, study: list[View], record: dict | None, finding: str) -> dict:
        """Draw the chosen finding's."""
        if record is None:
            return {self.problem: _problem("no heatmap yet: write a report first")}
        return {self.heatmap: heatmap([view.image for view in study], record, finding), self.problem: ""}

    def disable(self) -> dict:
        """No button starts anything while a report is written."""
        buttons = (self.again, self.save_text, self.save_record)
        return {self.write: gr.update(value="Writing …", interactive=False)} | dict.fromkeys(
            buttons, gr.update(interactive=False)
        )

    def enable(self, record: dict | None) -> dict:
        """The buttons, those behind a report only where there is one."""
        buttons = (self.again, self.save_text, self.save_record)
        return {self.write: gr.update(value="Write report", interactive=True)} | dict.fromkeys(
            buttons, gr.update(interactive=record is not None)
        )


def _most_telling(findings: dict[str, dict]) -> str:
    """The likeliest finding that is there or may be; No Finding where there is none."""
    there = [name for name in FINDINGS[:-1] if findings[name]["state"] in ("positive", "unclear")]
    return max(there, key=lambda name: findings[name]["probability"], default=FINDINGS[-1])


def _contradictions(record: dict[str, Any]) -> str:
    if "contradictions" not in record:
        return ""
    contradicted = [each for each in record["contradictions"] if each["kind"] == "contradicted"]
    if not contradicted:
        return "<p>The report contradicts no state below, as the labeler <code>rules</code> reads it.</p>"
    lines = "".join(
        f"<li>{FINDING_DISPLAY_NAMES[each['finding']]}: told {each['told']}, the report says {each['said']}</li>"
        for each in contradicted
    )
    return f"<p>The report contradicts what the model was told:</p><ul>{lines}</ul>"


def _problem(error: Exception | str) -> str:
    return f'<p role="alert">{escape(" ".join(str(error).split()))}</p>'


__all__ = ["MAX_VIEWS", "QUEUE_SIZE", "WARNING", "build_demo", "serve"]
