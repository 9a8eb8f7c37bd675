"""The page: a study goes in, its report streams out, with findings that can be changed and a heatmap of each."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ...findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from ...metrics.faithfulness import KINDS
from ...pipeline_otdrg import ReportGenerationPipeline
from .findings_table import findings_table, table_rows, table_states
from .pictures import heatmap, preview, printable
from .uploads import Example, View, phantom_examples, read_uploads
from .visitors import KEPT_AFTER_LEAVING, Visitor, Visitors, Written
from .writing import stream_report

_LOG = logging.getLogger(__name__)

#: Longest indication in characters, checked here too: a page is not the only thing that sends requests.
MAX_INDICATION = 500
#: Longest problem that is shown, in characters.
_PROBLEM = 500

WARNING = """\
**Research prototype. Not for clinical use.** Reports, findings and heatmaps are a machine's and often wrong. They must
not be used for diagnosis, treatment or any other decision about a patient. Do not upload images that identify one.
"""

_CUT_OFF = "<p>The report was cut off at its most tokens, and not at its end.</p>"

_DOWNLOAD = """(text) => {{
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{type}'}}));
  link.download = '{name}';
  link.click();
  URL.revokeObjectURL(link.href);
}}"""

# No event is an address that programs may call: this is a page.
_HERE = {"api_visibility": "private"}
#: Whatever is no report: it does not wait with them, and no full queue refuses it.
_QUICK = {**_HERE, "queue": False}


def build_demo(pipe: ReportGenerationPipeline, name: str, max_new_tokens: int | None = None) -> gr.Blocks:
    """The page for one model; [`serving.serve`] shows it.

    Args:
        pipe: the model's pipeline.
        name: of the model, for the heading.
        max_new_tokens: most tokens of a report; the model's own number without it.
    """
    page = _Page(pipe, max_new_tokens)
    with gr.Blocks(title="OTDRG", analytics_enabled=False) as demo:
        page.lay_out(name)
        demo.unload(page.leave)
    return demo


class _Page:
    """Components of the page and what happens between them."""

    def __init__(self, pipe: ReportGenerationPipeline, max_new_tokens: int | None):
        self.pipe = pipe
        self.max_new_tokens = max_new_tokens
        self.steerable, self.has_plan = pipe.model.config.dle, pipe.model.config.fiot
        self.visitors = Visitors()
        # A full view takes up to 1 GB while it is read: one at a time, whoever uploads it. Of one thread each, because
        # what a thread allocated is the next one's only in the same thread, and matplotlib is made for one.
        self.reading = asyncio.Lock()
        self.reader, self.painter = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def lay_out(self, name: str) -> None:
        gr.Markdown(f"# Radiology report generation\nModel: {escape(printable(name))}")
        gr.Markdown(WARNING, elem_id="warning")
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
            info="Why the study was made. Leave it empty for a model that was not trained with indications.",
            placeholder="Enter writes the report",
            max_lines=1,
            max_length=MAX_INDICATION,
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
            label="Report",
            info="Decoded greedily, to be seen word by word; otdrg generate takes the model's beams. One report is "
            "written at a time: “queue: 2/5” is your place and how many wait.",
            lines=5,
            max_lines=20,
            interactive=False,
            buttons=["copy"],
            elem_id="report",
        )
        with gr.Row():
            self.save_text = gr.Button("Download text", size="sm", interactive=False)
            self.save_record = gr.Button("Download JSON", size="sm", interactive=False)
        self.contradictions = gr.HTML(elem_id="contradictions")
        self.table = findings_table(self.steerable)
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
            self.report,
            self.contradictions,
            self.table,
            self.finding,
            self.heatmap,
            self.record_text,
            self.problem,
        ]
        buttons = [self.write, self.again, self.save_text, self.save_record]
        form = [self.files, self.preview, self.indication, *results, *buttons]
        writing = [
            # One trigger at a time: a second Enter writes nothing more.
            gr.on(
                triggers,
                write,
                [self.indication, *inputs],
                [*results, *buttons],
                trigger_mode="once",
                concurrency_id="model",
                concurrency_limit=1,
                show_progress_on=self.report,
                **_HERE,
            )
            for triggers, write, inputs in (
                ([self.write.click, self.indication.submit], self.write_report, []),
                ([self.again.click], self.write_again, [self.table, self.finding]),
            )
        ]
        for event in writing:
            # After an error too, and once a report that was ended has let go of the model.
            event.then(self.enable, None, buttons, **_QUICK)
        # A change of the study ends the report of the one before.
        self.files.upload(self.add_views, self.files, form, cancels=writing, **_QUICK)
        self.clear.click(self.start_anew, None, form, cancels=writing, **_QUICK)
        for button, example in self.examples:
            button.click(self._example(example), None, form, cancels=writing, **_QUICK)
        self.finding.input(self.show_heatmap, self.finding, [self.heatmap, self.problem], **_QUICK)
        for button, text, name, kind in (
            (self.save_text, self.report, "report.txt", "text/plain"),
            (self.save_record, self.record_text, "report.json", "application/json"),
        ):
            button.click(None, text, js=_DOWNLOAD.format(name=name, type=kind), **_HERE)

    # -- the study ----------------------------------------------------------------------------------------------------

    async def add_views(self, paths: list[str] | None, request: gr.Request) -> dict:
        """Read what was uploaded into the study; a problem leaves the study and its last whole report as they were."""
        visitor = self.visitors.get(request.session_hash)
        visitor.take_turn()
        async with self.reading:
            before, most = visitor.views, self.pipe.processor.max_image_pixels
            try:
                views = await _in(self.reader, read_uploads, paths or [], before, most, self._resize)
            except (ValueError, ImportError) as error:
                # One that was being written has been ended.
                left = self._no_results() if visitor.written is None else self._text(visitor.written.record)
                return {**left, self.files: None, self.problem: _problem(error)}
            if visitor.views is not before:  # cleared, or an example was taken, while the files were read
                return {self.files: None}
            return {**self._forget_results(visitor), **self._study(visitor, views)}

    def _resize(self, view: Image.Image) -> Image.Image:
        """A view as the model's image processor resizes it, so that the report is that of the full view."""
        pixels = self.pipe.processor.image_processor(view, do_rescale=False, do_normalize=False, return_tensors="np")
        return Image.fromarray(np.moveaxis(pixels["pixel_values"][0], 0, -1).astype(np.uint8))

    def _example(self, example: Example) -> Callable[[gr.Request], dict]:
        def show(request: gr.Request) -> dict:
            """Put a phantom into the form."""
            return {**self._begin(request, example.views), self.indication: ""}

        return show

    def start_anew(self, request: gr.Request) -> dict:
        """Empty the form."""
        return {**self._begin(request, []), self.indication: ""}

    def _begin(self, request: gr.Request, views: list[View]) -> dict:
        visitor = self.visitors.get(request.session_hash)
        visitor.take_turn()
        return {**self._forget_results(visitor), **self._study(visitor, list(views))}

    def _study(self, visitor: Visitor, views: list[View]) -> dict:
        visitor.views = views
        return {self.files: None, self.preview: preview(views)}

    def _forget_results(self, visitor: Visitor) -> dict:
        visitor.written = None
        return self._no_results()

    def _no_results(self) -> dict:
        empty = {self.report: "", self.contradictions: "", self.heatmap: "", self.record_text: "", self.problem: ""}
        return {**empty, self.table: [], **self._allow(False)}

    async def leave(self, request: gr.Request) -> None:
        """Forget a visitor who closed the page, and what Gradio keeps of what it showed, if they do not come back."""
        session, sessions = request.session_hash, request.request.app.state_holder.session_data

        def forget() -> None:
            if self.visitors.forget(session):
                sessions.pop(session, None)

        self.visitors.leave(session)
        asyncio.get_running_loop().call_later(KEPT_AFTER_LEAVING + 1, forget)

    # -- the report ---------------------------------------------------------------------------------------------------

    def write_report(self, indication: str | None, request: gr.Request) -> Iterator[dict]:
        """Write the report of the study, from the states that the model predicts."""
        yield from self._write(self.visitors.get(request.session_hash), indication)

    def write_again(self, indication: str | None, rows: Any, finding: str, request: gr.Request) -> Iterator[dict]:
        """Write it from the states in the table, and keep to the heatmap of a finding."""
        try:
            states = table_states(rows)
        except ValueError as error:
            yield {self.problem: _problem(error)}
            return
        yield from self._write(self.visitors.get(request.session_hash), indication, states, finding)

    def _write(
        self,
        visitor: Visitor,
        indication: str | None,
        states: dict[str, str] | None = None,
        finding: str | None = None,
    ) -> Iterator[dict]:
        views, indication = visitor.views, (indication or "").strip()
        if not views:
            yield {self.problem: _problem("no view: upload one or two views of a study, or take a phantom")}
            return
        if len(indication) > MAX_INDICATION:
            yield {
                self.problem: _problem(
                    f"the indication has {len(indication):,} characters: expected at most {MAX_INDICATION}"
                )
            }
            return
        turn = visitor.take_turn()
        yield {self.problem: "", self.contradictions: "", self.record_text: "", **self._disable()}
        try:
            inputs = [view.model_input for view in views]
            for written in stream_report(self.pipe, inputs, indication or None, states, self.max_new_tokens):
                if turn != visitor.turn:
                    return
                if isinstance(written, str):
                    yield {self.report: written}
                else:
                    visitor.written = Written(views, written)
                    yield {**self._text(written), self.table: table_rows(written, self.steerable)}
                    if self.has_plan:
                        finding = finding or _most_telling(written["findings"])
                        drawn = self.painter.submit(heatmap, views, written, finding)
                        yield {self.finding: finding, self.heatmap: drawn.result()}
        except (ValueError, OSError, ImportError) as error:
            yield {**self._forget_results(visitor), self.problem: _problem(error)}
        except Exception as error:  # the next visitor's report is another matter
            _LOG.exception("a report could not be written")
            told = f"the report could not be written ({type(error).__name__}): the server's log says why"
            yield {**self._forget_results(visitor), self.problem: _problem(told)}

    def _text(self, record: dict[str, Any]) -> dict:
        """The report and what is told of it, without the table, which may have been edited since."""
        return {
            self.report: record["generated_text"] or "(the model wrote nothing)",
            self.contradictions: ("" if record["complete"] else _CUT_OFF) + _contradictions(record),
            self.record_text: json.dumps(record, ensure_ascii=False, indent=2, default=lambda array: array.tolist()),
        }

    async def show_heatmap(self, finding: str, request: gr.Request) -> dict:
        """Draw the chosen finding's."""
        written = self.visitors.get(request.session_hash).written
        if written is None or not self.has_plan:
            return {self.problem: _problem("no heatmap yet: write a report first")}
        try:
            return {self.heatmap: await _in(self.painter, heatmap, *written, finding), self.problem: ""}
        except ImportError as error:
            return {self.problem: _problem(error)}

    def _disable(self) -> dict:
        return {self.write: gr.update(value="Writing …", interactive=False), **self._allow(False)}

    def enable(self, request: gr.Request) -> dict:
        """The buttons, those behind a report only where there is one."""
        written = self.visitors.get(request.session_hash).written
        return {self.write: gr.update(value="Write report", interactive=True), **self._allow(written is not None)}

    def _allow(self, behind_a_report: bool) -> dict:
        buttons = (self.again, self.save_text, self.save_record)
        return dict.fromkeys(buttons, gr.update(interactive=behind_a_report))


async def _in(executor: ThreadPoolExecutor, work: Callable, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)


def _most_telling(findings: dict[str, dict]) -> str:
    """The likeliest finding that is there or may be; No Finding where there is none."""
    there = [name for name in FINDINGS[:-1] if findings[name]["state"] in ("positive", "unclear")]
    return max(there, key=lambda name: findings[name]["probability"], default=FINDINGS[-1])


def _contradictions(record: dict[str, Any]) -> str:
    """Every disagreement of the report, what it contradicts first."""
    if "contradictions" not in record:
        return ""
    if not record["contradictions"]:
        return "<p>Of each finding the report says what the model was told.</p>"
    lines = []
    for each in sorted(record["contradictions"], key=lambda each: KINDS.index(each["kind"])):
        name, kind = FINDING_DISPLAY_NAMES[each["finding"]], each["kind"]
        said = "does not mention it" if kind == "omitted" else f"says {each['said']}"
        lines.append(f'<li class="{kind}">{name}, {kind}: told {each["told"]}, the report {said}</li>')
    return f"<p>The report does not say what the model was told:</p><ul>{''.join(lines)}</ul>"


def _problem(error: Exception | str) -> str:
    message = printable(" ".join(str(error).split()), _PROBLEM)
    return f'<p role="alert">{escape(message)}</p>'


__all__ = ["WARNING", "build_demo"]
