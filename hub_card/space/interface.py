"""The page: upload a study, stream its report, change finding states, show the heatmap of a finding."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ...bank_otdrg import ReportBank
from ...findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS
from ...inference.views import MAX_INDICATION, model_input
from ...pipeline_otdrg import ReportGenerationPipeline
from ...sections_otdrg import lay_out_sections
from .pictures import heatmap, preview, printable
from .results import contradiction_list, findings_table, runners_up_table
from .uploads import View, phantom_examples, read_uploads
from .writing import stream_report
from .zero_gpu import on_gpu

_LOG = logging.getLogger(__name__)

#: Numbers of candidates to choose from; more than one is consensus decoding.
CANDIDATES = (1, 8, 32)
#: Sessions whose studies are kept; beyond that, the least recently used is forgotten.
MAX_VISITORS = 64
#: Seconds for which a study is kept after its page was closed, because phones drop connections for a moment.
KEPT_AFTER_LEAVING = 120
#: Longest error message in characters.
_PROBLEM = 500

WARNING = """\
### ⚠ Research prototype. Not for clinical use.
Reports, findings and heatmaps are computed by a model and often wrong. Do not use them for diagnosis, treatment or any
other decision about a patient. Do not upload images that identify a patient.
"""

#: A download made in the browser, so that no report becomes a file on the server.
_DOWNLOAD = """(text) => {{
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{type}'}}));
  link.download = '{name}';
  link.click();
  URL.revokeObjectURL(link.href);
}}"""

# No event is an API for programs.
_PRIVATE = {"api_visibility": "private"}
#: For all events that do not run the model: they do not wait in its queue, and a full queue does not refuse them.
_QUICK = {**_PRIVATE, "queue": False}


class Written(NamedTuple):
    """A report and its views; the form may show other views in the meantime."""

    views: list[View]
    record: dict[str, Any]
    heatmap: str


@dataclass
class Visitor:
    """The study and the last complete report of one open page, in memory only."""

    views: list[View] = field(default_factory=list)
    written: Written | None = None
    #: Error message of the last event. `gr.Error` shows none for events outside the queue.
    problem: str = ""
    candidates: int = CANDIDATES[0]
    #: Number of events: Gradio lets a cancelled report continue for a moment.
    turn: int = 0

    def begin(self) -> int:
        """Begin an event, which ends the previous one."""
        self.turn, self.problem = self.turn + 1, ""
        return self.turn

    def replace_study(self, views: list[View]) -> None:
        """Begin another study."""
        self.begin()
        self.views, self.written = views, None


def build_demo(
    pipe: ReportGenerationPipeline, name: str, max_new_tokens: int | None = None, bank: ReportBank | None = None
) -> gr.Blocks:
    """Build the page of one model, which [`serving.serve`] shows; `name` is its heading, `bank` its report bank."""
    page = _Page(pipe, max_new_tokens, bank)
    with gr.Blocks(title="OTDRG", analytics_enabled=False) as demo:
        gr.Markdown(f"# Radiology report generation\nModel: {escape(printable(name))}")
        gr.Markdown(WARNING, container=True, elem_id="warning")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                page.lay_out_study()
            with gr.Column(scale=3, min_width=320):
                page.lay_out_report()
        page.connect()
        demo.unload(page.leave)
    return demo


class _Page:
    """The components of the page and their events."""

    def __init__(self, pipe: ReportGenerationPipeline, max_new_tokens: int | None, bank: ReportBank | None):
        self.pipe, self.bank = pipe, bank

        def stream(views, indication, states, candidates) -> Iterator[str | dict[str, Any]]:
            """Stream a report; the model and the bank are no arguments, because ZeroGPU would pickle them."""
            yield from stream_report(pipe, views, indication, states, max_new_tokens, candidates, bank)

        self.stream = on_gpu(stream)
        self.steerable, self.has_plan = pipe.model.config.dle, pipe.model.has_heatmaps
        self.examples = phantom_examples(max(pipe.model.config.image_size, 256))
        # Reading a view takes up to 1 GB, and matplotlib is not thread-safe: one thread for each, for all visitors.
        self.reader, self.painter = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def lay_out_study(self) -> None:
        self.visitor = gr.State(Visitor())
        self.files = gr.File(
            label="One or two views of a study (PNG, JPEG, DICOM)", file_count="multiple", height=180, elem_id="files"
        )
        self.preview = gr.HTML(visible=False, elem_id="preview")
        self.indication = gr.Textbox(
            label="Indication (optional)",
            info="Why the study was made. Leave it empty for a model that was trained without indications.",
            placeholder="Press Enter to write the report",
            max_lines=1,
            max_length=MAX_INDICATION,
            elem_id="indication",
        )
        with gr.Row():
            self.write = gr.Button("Write report", variant="primary", elem_id="write")
            self.clear = gr.Button("Clear", elem_id="clear")
        self.problem = gr.HTML(visible=False, elem_id="problem")
        self.candidates = gr.Radio(
            CANDIDATES,
            value=CANDIDATES[0],
            label="Candidates",
            info="1: decoded greedily, shown word by word. More: the one that agrees most with "
            f"{'the others' if self.bank is None else 'the report bank'} and the states is chosen.",
            elem_id="candidates",
        )
        self.samples = gr.Dataset(
            label="Examples: phantoms, drawn by a program",
            components=["textbox"],
            samples=[[title] for title in self.examples],
            type="index",
        )

    def lay_out_report(self) -> None:
        self.report = gr.Textbox(
            label="Report",
            info="Decoded greedily, to be shown word by word; otdrg generate uses beam search. One report is written "
            "at a time: “queue: 2/5” is your position and the number of waiting reports.",
            lines=4,
            max_lines=20,
            interactive=False,
            buttons=["copy"],
            elem_id="report",
        )
        with gr.Row():
            self.save_text = gr.Button("Download text", size="sm", interactive=False)
            self.save_record = gr.Button("Download JSON", size="sm", interactive=False)
        self.contradictions = gr.Markdown(visible=False, elem_id="contradictions")
        self.runners_up = gr.Markdown(visible=False, elem_id="runners-up")
        self.table = gr.Markdown(visible=False, elem_id="findings")
        with gr.Accordion("Change the states and write again", open=False, visible=self.steerable):
            with gr.Row():
                self.states = [
                    # Not `gr.Dropdown`: its lists stay open when the keyboard moves on.
                    gr.Radio(
                        # No Finding is not a finding: it is positive or unmentioned.
                        FINDING_STATES[:2] if finding == "no_finding" else FINDING_STATES,
                        value=None,
                        label=FINDING_DISPLAY_NAMES[finding],
                        interactive=True,
                        min_width=280,
                        elem_id=f"state-{finding}",
                    )
                    for finding in FINDINGS
                ]
            self.again = gr.Button("Write again from these states", interactive=False, elem_id="again")
        self.finding = gr.Dropdown(
            [(FINDING_DISPLAY_NAMES[finding], finding) for finding in FINDINGS],
            value=FINDINGS[-1],
            label="Heatmap of",
            info="Where the transport plan places the finding, as a multiple of a uniform plan."
            if self.has_plan
            else "This model has no transport plan (fiot=False), and therefore no heatmaps.",
            interactive=self.has_plan,
            elem_id="finding",
        )
        self.heatmap = gr.HTML(visible=False, elem_id="heatmap")
        self.record_text = gr.Textbox(visible="hidden", elem_id="record")

    def connect(self) -> None:
        buttons = [self.write, self.again, self.save_text, self.save_record]
        texts = [self.report, self.contradictions, self.problem, self.record_text]
        shown = [
            self.preview,
            *texts,
            self.runners_up,
            self.table,
            self.heatmap,
            *buttons[1:],
            *self.states,
        ]
        writing = [
            # One at a time: pressing again while a report is written has no effect.
            gr.on(
                triggers,
                write,
                [self.indication, *inputs, self.visitor],
                [*texts, *buttons, *self.states, self.finding],
                trigger_mode="once",
                concurrency_id="model",
                concurrency_limit=1,
                show_progress_on=self.report,
                **_PRIVATE,
            )
            for triggers, write, inputs in (
                ([self.write.click, self.indication.submit], self.write_report, []),
                ([self.again.click], self.write_again, [self.finding, *self.states]),
            )
        ]
        changes = [
            # A change of the study ends the report of the previous one. No other event empties the file list, because
            # that would lose an upload that ends at the same moment.
            self.files.upload(
                self.add_views,
                [self.files, self.visitor],
                self.files,
                cancels=writing,
                trigger_mode="multiple",
                **_QUICK,
            ),
            self.clear.click(self.start_anew, self.visitor, self.indication, cancels=writing, **_QUICK),
            self.samples.click(
                self.take_example, [self.samples, self.visitor], self.indication, cancels=writing, **_QUICK
            ),
        ]
        for event in changes:
            event.then(self.show, self.visitor, shown, trigger_mode="multiple", **_QUICK)
        for event in writing:
            # Also after an error, and when a cancelled report has stopped: a button pressed before has no effect.
            event.then(self.finish, self.visitor, [*shown, self.write], **_QUICK)
        self.candidates.input(self.choose_candidates, [self.candidates, self.visitor], None, **_QUICK)
        self.finding.input(self.show_heatmap, [self.finding, self.visitor], [self.heatmap, self.problem], **_QUICK)
        for button, text, name, kind in (
            (self.save_text, self.report, "report.txt", "text/plain"),
            (self.save_record, self.record_text, "report.json", "application/json"),
        ):
            button.click(None, text, js=_DOWNLOAD.format(name=name, type=kind), **_PRIVATE)

    # -- the study ----------------------------------------------------------------------------------------------------

    async def add_views(self, paths: list[str] | None, visitor: Visitor) -> None:
        """Read the uploaded views into the study, and empty the file list.

        An error leaves the study and its report unchanged.
        """
        visitor.begin()

        def read() -> None:
            before, most = visitor.views, self.pipe.processor.max_image_pixels
            # During an upload, the list still has the files of the one before, which are read and deleted by now.
            unread = [path for path in paths or [] if Path(path).exists()]
            views = read_uploads(unread, before, most, partial(model_input, self.pipe.processor))
            if visitor.views is before:  # neither cleared nor replaced by an example meanwhile
                visitor.views, visitor.written = views, None

        try:
            await _in(self.reader, read)
        except (ValueError, ImportError) as error:
            visitor.problem = _one_line(error)

    def take_example(self, index: int, visitor: Visitor) -> str:
        """Use a phantom as the study; returns the indication, which is empty."""
        visitor.replace_study([*list(self.examples.values())[index]])
        return ""

    def start_anew(self, visitor: Visitor) -> str:
        """Forget the study and its report; returns the indication, which is empty."""
        visitor.replace_study([])
        return ""

    async def leave(self, request: gr.Request) -> None:
        """Forget the session of a closed page, unless it is used again within `KEPT_AFTER_LEAVING` seconds."""
        session, holder = request.session_hash, request.request.app.state_holder

        def forget() -> None:
            kept = timedelta(seconds=KEPT_AFTER_LEAVING)
            if datetime.now() - holder.time_last_used.get(session, datetime.min) >= kept:
                holder.session_data.pop(session, None)

        asyncio.get_running_loop().call_later(KEPT_AFTER_LEAVING + 1, forget)

    # -- the report ---------------------------------------------------------------------------------------------------

    def choose_candidates(self, number: int, visitor: Visitor) -> None:
        """Choose the next reports among so many candidates; a number that the page does not offer is ignored."""
        if number in CANDIDATES:
            visitor.candidates = number

    def write_report(self, indication: str | None, visitor: Visitor) -> Iterator[dict]:
        """Write the report of the study from the states that the model predicts."""
        yield from self._write(visitor, indication)

    def write_again(self, indication: str | None, finding: str, *inputs: Any) -> Iterator[dict]:
        """Write the report from the chosen states, and keep the heatmap of `finding`."""
        *states, visitor = inputs
        if None in states:
            yield self._fail(visitor, "there are no states yet: write a report first")
            return
        yield from self._write(visitor, indication, dict(zip(FINDINGS, states, strict=True)), finding)

    def _write(
        self,
        visitor: Visitor,
        indication: str | None,
        states: dict[str, str] | None = None,
        finding: str | None = None,
    ) -> Iterator[dict]:
        views, indication = visitor.views, (indication or "").strip()
        if not views:
            yield self._fail(visitor, "no view: upload one or two views of a study, or choose an example")
            return
        if len(indication) > MAX_INDICATION:
            number = f"{len(indication):,}"
            yield self._fail(visitor, f"the indication has {number} characters: expected at most {MAX_INDICATION}")
            return
        turn = visitor.begin()
        yield {
            self.write: gr.update(value="Writing …", interactive=False),
            self.contradictions: _visible(""),
            self.problem: _visible(""),
            self.record_text: "",
            **self._allow(False),
        }
        try:
            inputs = [view.model_input for view in views]
            for written in self.stream(inputs, indication or None, states, visitor.candidates):
                if turn != visitor.turn:
                    return
                if isinstance(written, str):
                    yield {self.report: self._laid_out(written)}
                    continue
                shown = finding or _main_finding(written["findings"])
                drawn = self.painter.submit(heatmap, views, written, shown).result() if self.has_plan else ""
                visitor.written = Written(views, written, drawn)
                chosen = [written["findings"][name]["state"] for name in FINDINGS]
                yield {self.finding: shown, **dict(zip(self.states, chosen, strict=True))}
        except Exception as error:  # any: the page stays usable
            visitor.written = None
            if isinstance(error, gr.Error):  # raised by ZeroGPU, such as for a visitor without quota
                error = error.message
            elif not isinstance(error, (ValueError, OSError, ImportError)):
                _LOG.exception("a report could not be written")
                error = f"the report could not be written ({type(error).__name__}): see the log of the server"
            yield self._fail(visitor, error)

    def _laid_out(self, report: str) -> str:
        """A report as the page shows it, with its sections apart if the model writes them."""
        return lay_out_sections(report) if self.pipe.model.config.report_sections else report

    def _fail(self, visitor: Visitor, error: Exception | str) -> dict:
        visitor.problem = _one_line(error)
        return {self.problem: _alert(visitor.problem)}

    async def show_heatmap(self, finding: str, visitor: Visitor) -> dict:
        """Draw the heatmap of a finding."""
        written = visitor.written
        if written is None or not self.has_plan:
            return self._fail(visitor, "no heatmap yet: write a report first")
        try:
            drawn = await _in(self.painter, heatmap, written.views, written.record, finding)
        except ImportError as error:
            return self._fail(visitor, error)
        visitor.written, visitor.problem = written._replace(heatmap=drawn), ""
        return {self.heatmap: _visible(drawn), self.problem: _visible("")}

    def show(self, visitor: Visitor) -> dict:
        """Show the study and its last complete report; states that were chosen since are kept."""
        updates = {
            self.preview: _visible(preview(visitor.views)),
            self.problem: _alert(visitor.problem),
        }
        if visitor.written is None:
            updates |= self._allow(False)
            hidden = dict.fromkeys((self.contradictions, self.runners_up, self.table, self.heatmap), _visible(""))
            return {**updates, **hidden, self.report: "", self.record_text: "", **dict.fromkeys(self.states)}
        record = visitor.written.record
        return {
            **updates,
            self.report: self._laid_out(record["generated_text"]) or "(the model wrote nothing)",
            self.contradictions: _visible(contradiction_list(record)),
            self.runners_up: _visible(runners_up_table(record)),
            self.table: _visible(findings_table(record, self.steerable)),
            self.heatmap: _visible(visitor.written.heatmap),
            self.record_text: json.dumps(record, ensure_ascii=False, indent=2, default=lambda array: array.tolist()),
        }

    def finish(self, visitor: Visitor) -> dict:
        """Show the last complete report, and enable the buttons."""
        enabled = self._allow(visitor.written is not None)
        return {**self.show(visitor), **enabled, self.write: gr.update(value="Write report", interactive=True)}

    def _allow(self, has_report: bool) -> dict:
        buttons = (self.again, self.save_text, self.save_record)
        return dict.fromkeys(buttons, gr.update(interactive=has_report))


async def _in(executor: ThreadPoolExecutor, work: Callable, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)


def _visible(text: str) -> dict:
    """An update that hides an empty component."""
    return gr.update(value=text, visible=bool(text))


def _main_finding(findings: dict[str, dict]) -> str:
    """The likeliest positive or unclear finding; No Finding if there is none."""
    there = [name for name in FINDINGS[:-1] if findings[name]["state"] in ("positive", "unclear")]
    return max(there, key=lambda name: findings[name]["probability"], default=FINDINGS[-1])


def _one_line(error: Exception | str) -> str:
    return printable(" ".join(str(error).split()), _PROBLEM)


def _alert(problem: str) -> dict:
    return _visible(f'<p role="alert">⚠ {escape(problem)}</p>' if problem else "")
