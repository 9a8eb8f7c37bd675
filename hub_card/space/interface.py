"""The page: a study goes in, its report streams out, with findings that can be changed and a heatmap of each."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from ...findings_otdrg import FINDING_DISPLAY_NAMES, FINDINGS
from ...metrics.faithfulness import KINDS
from ...pipeline_otdrg import ReportGenerationPipeline
from .findings_table import findings_table, table_rows, table_states
from .pictures import heatmap, preview
from .uploads import Example, View, phantom_examples, read_uploads
from .writing import stream_report

_LOG = logging.getLogger(__name__)

#: How often, in seconds, files of uploads that never arrived whole are looked for, and how old they may get.
_LEFTOVERS = (60, 300)

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


def build_demo(pipe: ReportGenerationPipeline, name: str, max_new_tokens: int | None = None) -> gr.Blocks:
    """The page for one model; [`serving.serve`] shows it.

    Args:
        pipe: the model's pipeline.
        name: of the model, for the heading.
        max_new_tokens: most tokens of a report; the model's own number without it.
    """
    page = _Page(pipe, max_new_tokens)
    with gr.Blocks(title="OTDRG", analytics_enabled=False, delete_cache=_LEFTOVERS) as demo:
        page.lay_out(name)
    return demo


class _Written(NamedTuple):
    """A report and the views that it is of, whatever is in the form by now."""

    views: Sequence[Image.Image]
    record: dict[str, Any]


class _Turns:
    """Of a visitor: what was begun last. Gradio lets a report that is cancelled go on for a moment."""

    def __init__(self):
        self.latest = 0

    def take(self) -> int:
        """Begin something, which ends what was begun before."""
        self.latest += 1
        return self.latest


class _Page:
    """Components of the page and what happens between them."""

    def __init__(self, pipe: ReportGenerationPipeline, max_new_tokens: int | None):
        self.pipe = pipe
        self.max_new_tokens = max_new_tokens
        self.steerable, self.has_plan = pipe.model.config.dle, pipe.model.config.fiot

    def lay_out(self, name: str) -> None:
        gr.Markdown(f"# Radiology report generation\nModel: {escape(name)}")
        gr.Markdown(WARNING, elem_id="warning")
        self.study, self.written, self.turns = gr.State([]), gr.State(None), gr.State(_Turns())
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
            label="Report",
            info="Decoded greedily, to be seen word by word; otdrg generate takes the model's beams.",
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
            self.written,
            self.report,
            self.contradictions,
            self.table,
            self.finding,
            self.heatmap,
            self.record_text,
            self.problem,
        ]
        buttons = [self.write, self.again, self.save_text, self.save_record]
        form = [self.files, self.study, self.preview, self.indication, *results, *buttons]
        writing = [
            # One trigger at a time: a second Enter writes nothing more.
            gr.on(
                triggers,
                write,
                [self.turns, self.study, self.indication, *inputs],
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
            event.then(self.enable, self.written, buttons, queue=False, **_HERE)
        # A change of the study ends the report of the one before.
        study = [self.turns, self.files, self.study, self.written]
        self.files.upload(self.add_views, study, form, cancels=writing, **_HERE)
        self.clear.click(self.start_anew, self.turns, form, cancels=writing, **_HERE)
        for button, example in self.examples:
            button.click(partial(self.show_example, example), self.turns, form, cancels=writing, **_HERE)
        self.finding.input(self.show_heatmap, [self.written, self.finding], [self.heatmap, self.problem], **_HERE)
        for button, text, name, kind in (
            (self.save_text, self.report, "report.txt", "text/plain"),
            (self.save_record, self.record_text, "report.json", "application/json"),
        ):
            button.click(None, text, js=_DOWNLOAD.format(name=name, type=kind), **_HERE)

    # -- the study ----------------------------------------------------------------------------------------------------

    def add_views(self, turns: _Turns, paths: list[str] | None, before: list[View], written: _Written | None) -> dict:
        """Read what was uploaded into the study; a problem leaves the study and its last whole report as they were."""
        turns.take()
        try:
            views = read_uploads(paths or [], before, self.pipe.processor.max_image_pixels)
        except (ValueError, ImportError) as error:
            # One that was being written has been ended.
            left = self._no_results() if written is None else self._text(written.record)
            return {**left, self.files: None, self.problem: _problem(error)}
        return {**self._no_results(), **self._study(views)}

    def show_example(self, example: Example, turns: _Turns) -> dict:
        """Put a phantom into the form."""
        turns.take()
        return {**self._no_results(), **self._study(example.views), self.indication: ""}

    def start_anew(self, turns: _Turns) -> dict:
        """Empty the form."""
        turns.take()
        return {**self._no_results(), **self._study([]), self.indication: ""}

    def _study(self, views: list[View]) -> dict:
        names, images = zip(*views, strict=True) if views else ((), ())
        return {self.files: None, self.study: views, self.preview: preview(names, images)}

    def _no_results(self) -> dict:
        empty = {self.report: "", self.contradictions: "", self.heatmap: "", self.record_text: "", self.problem: ""}
        return {**empty, self.written: None, self.table: [], **self._allow(False)}

    # -- the report ---------------------------------------------------------------------------------------------------

    def write_report(self, turns: _Turns, study: list[View], indication: str) -> Iterator[dict]:
        """Write the report of the study, from the states that the model predicts."""
        yield from self._write(turns, study, indication)

    def write_again(self, turns: _Turns, study: list[View], indication: str, rows: Any, finding: str) -> Iterator[dict]:
        """Write it from the states in the table, and keep to the heatmap of a finding."""
        try:
            states = table_states(rows)
        except ValueError as error:
            yield {self.problem: _problem(error)}
            return
        yield from self._write(turns, study, indication, states, finding)

    def _write(
        self,
        turns: _Turns,
        study: list[View],
        indication: str,
        states: dict[str, str] | None = None,
        finding: str | None = None,
    ) -> Iterator[dict]:
        if not study:
            yield {self.problem: _problem("no view: upload one or two views of a study, or take a phantom")}
            return
        views, turn = [view.image for view in study], turns.take()
        yield {self.problem: "", self.contradictions: "", self.record_text: "", **self._disable()}
        try:
            for written in stream_report(self.pipe, views, indication.strip() or None, states, self.max_new_tokens):
                if turn != turns.latest:
                    return
                if isinstance(written, str):
                    yield {self.report: written}
                else:
                    yield self._results(_Written(views, written))
                    if self.has_plan:
                        finding = finding or _most_telling(written["findings"])
                        yield {self.finding: finding, self.heatmap: heatmap(views, written, finding)}
        except (ValueError, OSError, ImportError) as error:
            yield {**self._no_results(), self.problem: _problem(error)}
        except Exception as error:  # the next visitor's report is another matter
            _LOG.exception("a report could not be written")
            told = f"the report could not be written ({type(error).__name__}): the server's log says why"
            yield {**self._no_results(), self.problem: _problem(told)}

    def _results(self, written: _Written) -> dict:
        table = table_rows(written.record, self.steerable)
        return {**self._text(written.record), self.written: written, self.table: table}

    def _text(self, record: dict[str, Any]) -> dict:
        """The report and what is told of it, without the table, which may have been edited since."""
        return {
            self.report: record["generated_text"] or "(the model wrote nothing)",
            self.contradictions: ("" if record["complete"] else _CUT_OFF) + _contradictions(record),
            self.record_text: json.dumps(record, ensure_ascii=False, indent=2, default=lambda array: array.tolist()),
        }

    def show_heatmap(self, written: _Written | None, finding: str) -> dict:
        """Draw the chosen finding's."""
        if written is None:
            return {self.problem: _problem("no heatmap yet: write a report first")}
        try:
            return {self.heatmap: heatmap(written.views, written.record, finding), self.problem: ""}
        except ImportError as error:
            return {self.problem: _problem(error)}

    def _disable(self) -> dict:
        return {self.write: gr.update(value="Writing …", interactive=False), **self._allow(False)}

    def enable(self, written: _Written | None) -> dict:
        """The buttons, those behind a report only where there is one."""
        return {self.write: gr.update(value="Write report", interactive=True), **self._allow(written is not None)}

    def _allow(self, behind_a_report: bool) -> dict:
        buttons = (self.again, self.save_text, self.save_record)
        return dict.fromkeys(buttons, gr.update(interactive=behind_a_report))


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
    return f'<p role="alert">{escape(" ".join(str(error).split()))}</p>'


__all__ = ["WARNING", "build_demo"]
