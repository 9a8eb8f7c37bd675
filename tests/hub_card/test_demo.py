"""The demo in headless Chromium, from the first click to the downloads.

One server and one browser are started for all tests. Each wait is for the state that makes the next action safe; the
timeouts only matter when something hangs.
"""

import json
import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from otdrg import FINDING_STATES, FINDINGS
from otdrg.labelers import load_labeler
from otdrg.metrics.faithfulness import KINDS, contradictions
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

NORMAL = "The heart is normal in size. There is no pleural effusion or pneumothorax."
ENLARGED = "The cardiac silhouette is enlarged. There is no pleural effusion."
TOKENS = 40
SECONDS = 60
SIZE = {"width": 1280, "height": 900}
playwright.expect.set_options(timeout=1000 * SECONDS)
expect = playwright.expect


@pytest.fixture(scope="module")
def pipe(build_model, view):
    """A model overfitted to two reports, chosen by the state of cardiomegaly."""
    import torch
    from otdrg import ReportGenerationPipeline

    model, processor = build_model()
    # Each view with both reports, and with the other states that the tests choose.
    others = ({}, {"pleural_effusion": "unmentioned", "no_finding": "positive"})
    hearts = ({"cardiomegaly": "negative"}, {"cardiomegaly": "positive"})
    states = [heart | other for _ in range(4) for other in others for heart in hearts]
    views = [view(number // 4) for number in range(16)]
    inputs = processor(images=views, report=[NORMAL, ENLARGED] * 8, finding_states=states)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(**model.expand_finding_text(**inputs)).report_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ReportGenerationPipeline(model=model.eval(), processor=processor)


class Pace:
    """Slows a model down and counts its steps."""

    def __init__(self, model):
        self.seconds, self.steps = 0.0, 0
        model.language_model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.steps += 1
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def paced(pipe):
    return Pace(pipe.model)


@pytest.fixture
def pace(paced):
    paced.seconds, paced.steps = 0.0, 0
    yield paced
    paced.seconds = 0.0


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    yield folder
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def address(pipe, paced, uploads):
    from otdrg.hub_card.space.interface import build_demo
    from otdrg.hub_card.space.serving import serve

    demo = build_demo(pipe, "org/otdrg", max_new_tokens=TOKENS)
    yield serve(demo, "127.0.0.1", block=False)
    demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def open_page(browser, address):
    """Opens the page as a new visitor; no request may go to another machine."""
    asked = []

    def open_page():
        context = browser.new_context(viewport=SIZE)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        button(page, "Write report").wait_for()
        page.get_by_text("Change the states and write again").click()
        states(page, "edema").first.wait_for()
        return page

    yield open_page
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []


@pytest.fixture
def visit(open_page, pace):
    """The same; the pages are closed after the test, which also ends the reports that they wait for."""
    pages = []

    def visit():
        pages.append(open_page())
        return pages[-1]

    yield visit
    for page in pages:
        page.context.close()


@pytest.fixture(scope="module")
def one_page(open_page):
    page = open_page()
    yield page
    page.context.close()


@pytest.fixture
def page(one_page, pace, uploads):
    """The page, cleared, whatever the test before left on it."""
    from otdrg.hub_card.space.uploads import UploadFolder

    one_page.set_viewport_size(SIZE)
    one_page.get_by_label("Indication").fill("to be cleared")
    choose(one_page, "edema", "positive")
    button(one_page, "Clear").click()
    # The states are cleared by the last event of Clear, also where there were no views.
    expect(chosen(one_page, "edema")).to_have_count(0)
    expect(one_page.get_by_label("Indication")).to_have_value("")
    expect(views(one_page)).to_have_count(0)
    # A report that was being written has ended.
    expect(button(one_page, "Write report")).to_be_enabled()
    UploadFolder(uploads).delete_unread(age=-1)
    return one_page


@pytest.fixture
def png(view, tmp_path):
    def write(seed=0, name="frontal.png"):
        Image.fromarray(view(seed)).save(tmp_path / name)
        return str(tmp_path / name)

    return write


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def upload(page, *paths):
    page.set_input_files("#files input[type=file]", paths)


def views(page):
    return page.locator("#preview img")


def given(page, *paths):
    """Upload, and wait for the views."""
    before = views(page).count()
    upload(page, *paths)
    expect(views(page)).to_have_count(before + len(paths))


def written(page, press="Write report"):
    """Press, wait, and return the report and the record."""
    page.locator("#record textarea").evaluate("record => record.value = ''")
    button(page, press).click()
    return result(page)


def result(page):
    page.wait_for_function("document.querySelector('#record textarea').value.endsWith('}')")
    expect(button(page, "Write report")).to_be_enabled()
    expect(page.locator("#findings tbody tr")).to_have_count(len(FINDINGS))
    return page.locator("#report textarea").input_value(), json.loads(page.locator("#record textarea").input_value())


def problem(page):
    alert = page.locator("#problem").get_by_role("alert")
    alert.wait_for()
    return alert.inner_text().removeprefix("⚠ ")


def states(page, finding):
    """The radio buttons of a finding."""
    return page.locator(f"#state-{finding}").get_by_role("radio")


def chosen(page, finding):
    """The radio button that is checked."""
    return page.locator(f"#state-{finding} input:checked")


def choose(page, finding, state):
    states(page, finding).and_(page.get_by_label(state, exact=True)).check()


def row(page, finding):
    """The cells of a finding in the table."""
    cells = page.locator("#findings tbody tr").filter(has_text=finding).locator("td")
    return cells.all_inner_texts()


def expected(pipe, study, findings=None, indication=None):
    """What the pipeline writes greedily."""
    study = {"images": study, "indication": indication}
    return pipe(study, findings=findings, num_beams=1, max_new_tokens=TOKENS, return_heatmaps=True)[0]


def same(record, wanted):
    assert record["generated_text"] == wanted["generated_text"]
    assert {name: each["state"] for name, each in record["findings"].items()} == {
        name: each["state"] for name, each in wanted["findings"].items()
    }
    for name in FINDINGS:
        assert record["findings"][name]["probability"] == pytest.approx(wanted["findings"][name]["probability"])
        np.testing.assert_allclose(record["heatmaps"][name], wanted["heatmaps"][name], rtol=1e-4)


def disagreements(record):
    """Disagreements as `otdrg evaluate` counts them: kind and what the report says, by finding."""
    states = [[FINDING_STATES.index(record["findings"][name]["state"]) for name in FINDINGS]]
    said = load_labeler("rules").label([record["generated_text"]])
    return {one.finding: (one.kind, one.said) for one in contradictions(states, said, kinds=KINDS)}


def kept(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_page_warning_is_above_the_form(visit):
    page = visit()
    warning = page.get_by_text("Not for clinical use")
    warning.wait_for()
    box = warning.bounding_box()
    assert box["y"] + box["height"] < button(page, "Write report").bounding_box()["y"] < 900
    expect(button(page, "Write again from these states")).to_be_disabled()
    expect(chosen(page, "edema")).to_have_count(0)
    expect(button(page, "Download JSON")).to_be_disabled()


def test_page_candidates_show_the_runners_up(page, png, pipe):
    given(page, png())
    eight = page.locator("#candidates").get_by_label("8", exact=True)
    with page.expect_response(lambda response: "/run/" in response.url or "/queue/" in response.url):
        eight.check()
    try:
        report, record = written(page)
        wanted = pipe(png(), candidates=8, max_new_tokens=TOKENS)[0]
        assert report == record["generated_text"] == wanted["generated_text"]
        assert len(record["candidates"]) >= 2
        assert page.locator("#runners-up tbody tr").count() == len(record["candidates"])
    finally:
        with page.expect_response(lambda response: "/run/" in response.url or "/queue/" in response.url):
            page.locator("#candidates").get_by_label("1", exact=True).check()
    written(page)
    page.locator("#runners-up table").wait_for(state="detached")


def test_page_image_and_dicom_give_the_pipelines_report(page, pipe, png, dicom, uploads, monkeypatch):
    from otdrg.hub_card.space import interface

    read, arrived = interface.read_uploads, []

    def seen(paths, *rest):
        arrived.extend(Path(path) for path in paths if Path(path).is_file())
        return read(paths, *rest)

    monkeypatch.setattr(interface, "read_uploads", seen)
    frontal = png()
    lateral = dicom(np.linspace(0, 4000, 48 * 40).reshape(48, 40).astype(np.uint16), name="lateral.dcm")
    given(page, frontal)
    given(page, lateral)
    expect(page.locator("#preview")).to_contain_text("lateral.dcm, 40 × 48")
    page.get_by_label("Indication").fill("Chest pain.")
    report, record = written(page)
    same(record, expected(pipe, [frontal, lateral], indication="Chest pain."))
    assert report == record["generated_text"]
    assert len(record["heatmaps"]["edema"]) == 2
    assert [path.name for path in arrived] == ["frontal.png", "lateral.dcm"]
    assert all(path.is_relative_to(uploads) for path in arrived)
    assert kept(uploads) == []


def test_page_report_appears_word_by_word(page, pace, png):
    given(page, png())
    pace.seconds = 0.02
    page.evaluate(
        """() => {
          const report = document.querySelector('#report textarea');
          window.seen = [];
          const look = () => { if (report.value !== window.seen.at(-1)) window.seen.push(report.value) };
          window.watch = setInterval(look, 5);
        }"""
    )
    report, _ = written(page)
    seen = [text for text in page.evaluate("clearInterval(window.watch), window.seen") if text]
    assert len(seen) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert seen[-1] == report


def test_page_changed_state_conditions_the_report(page, pipe, png):
    frontal = png()
    given(page, frontal)
    _, record = written(page)
    conditions = {name: each["state"] for name, each in record["findings"].items()}
    for heart, report in (("positive", ENLARGED), ("negative", NORMAL)):
        for finding, state in (
            ("cardiomegaly", heart),
            ("pleural_effusion", "unmentioned"),
            ("no_finding", "positive"),
        ):
            choose(page, finding, state)
        written_again, record = written(page, "Write again from these states")
        conditions |= {"cardiomegaly": heart, "pleural_effusion": "unmentioned", "no_finding": "positive"}
        same(record, expected(pipe, [frontal], findings=conditions))
        assert written_again == report
        expect(chosen(page, "cardiomegaly")).to_have_value(heart)
    values = states(page, "no_finding").evaluate_all("all => all.map(each => each.value)")
    assert values == ["unmentioned", "positive"]


def test_page_every_disagreement_is_listed_and_in_the_table(page, png):
    given(page, png())
    written(page)
    conditions = {"pleural_effusion": "positive", "lung_lesion": "positive", "cardiomegaly": "negative"}
    for finding, state in {**conditions, "pneumothorax": "unmentioned"}.items():
        choose(page, finding, state)
    report, record = written(page, "Write again from these states")
    assert report == NORMAL
    found = disagreements(record)
    assert found["pleural_effusion"] == ("contradicted", "negative")
    assert found["lung_lesion"] == ("omitted", "unmentioned")
    assert found["pneumothorax"] == ("added", "negative")
    assert [(one["finding"], one["kind"]) for one in record["contradictions"]] == [
        (finding, kind) for finding, (kind, _) in found.items()
    ]
    rows = page.locator("#findings tbody tr").all()
    for finding, cells in zip(FINDINGS, (row.locator("td").all_inner_texts() for row in rows), strict=True):
        kind, said = found.get(finding, ("", ""))
        assert cells[1] == record["findings"][finding]["state"]
        assert cells[0].startswith("⚠") == (kind == "contradicted")
        assert cells[3] == (f"{said} ({kind})" if kind else cells[1] if finding != "no_finding" else "")
    listed = page.locator("#contradictions li").all_inner_texts()
    assert listed[0] == "Pleural Effusion, contradicted: state positive, the report says negative"
    assert "Lung Lesion, omitted: state positive, the report does not mention it" in listed
    assert "Pneumothorax, added: state unmentioned, the report says negative" in listed
    assert len(listed) == len(found)
    # The table belongs to the report, whatever is chosen since.
    choose(page, "pleural_effusion", "negative")
    assert row(page, "Pleural Effusion")[1:] == [
        "positive",
        row(page, "Pleural Effusion")[2],
        "negative (contradicted)",
    ]


def test_page_each_finding_has_a_heatmap(page, png):
    given(page, png(), png(1, "lateral.png"))
    written(page)
    picture = page.locator("#heatmap img")
    picture.wait_for()
    first = picture.get_attribute("src")
    page.get_by_label("Heatmap of").click()
    page.get_by_role("option", name="Fracture").click()
    page.get_by_alt_text("Heatmap of Fracture").wait_for()
    expect(picture).not_to_have_attribute("src", first)
    size = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert min(size) > 300
    choose(page, "fracture", "positive")
    written(page, "Write again from these states")
    page.locator("#heatmap").get_by_text("Fracture: positive").wait_for()


def test_page_downloads_hold_report_and_record(page, png, tmp_path):
    given(page, png())
    report, record = written(page)
    for name, file in (("Download text", "report.txt"), ("Download JSON", "report.json")):
        with page.expect_download() as download:
            button(page, name).click()
        assert download.value.suggested_filename == file
        download.value.save_as(tmp_path / file)
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == report
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == record


def bad_uploads(png, dicom, tmp_path):
    """Files that are not views, and the error for each."""
    note, huge, cut = tmp_path / "note.png", tmp_path / "huge.png", tmp_path / "cut.dcm"
    note.write_text("not an image")
    Image.new("L", (9000, 9000)).save(huge)
    cut.write_bytes(Path(dicom(np.full((48, 40), 7, np.uint16))).read_bytes()[:-500])
    return (
        ([str(note)], "note.png: not an image, expected PNG, JPEG, TIFF"),
        ([str(huge)], "huge.png: 9000x9000 pixels, expected at most 64000000 in total"),
        ([str(cut)], "cut.dcm: the DICOM file's pixels cannot be decoded"),
        ([png(1, "a.png"), png(2, "b.png"), png(3, "c.png")], "3 views: expected one or two"),
    )


def test_page_bad_upload_is_one_line_and_the_page_goes_on(page, pipe, png, dicom, tmp_path, uploads):
    button(page, "Write report").click()
    assert problem(page).startswith("no view: upload one or two views")
    expect(button(page, "Write report")).to_be_enabled()
    for paths, message in bad_uploads(png, dicom, tmp_path):
        upload(page, *paths)
        page.locator("#problem").get_by_text(message).wait_for()
        assert "\n" not in problem(page) and str(uploads) not in problem(page)
        expect(views(page)).to_have_count(0)
    frontal = png()
    given(page, frontal)
    expect(page.locator("#problem").get_by_role("alert")).to_have_count(0)
    upload(page, png(1, "a.png"), png(2, "b.png"))
    page.locator("#problem").get_by_text("3 views, 1 of them already in the study").wait_for()
    same(written(page)[1], expected(pipe, [frontal]))
    assert kept(uploads) == []


def test_page_error_in_the_model_leaves_it_usable(page, pipe, png, monkeypatch, caplog):
    given(page, png())

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(pipe.model, "generate", fail)
        button(page, "Write report").click()
        assert problem(page) == "the report could not be written (RuntimeError): see the log of the server"
        expect(button(page, "Write report")).to_be_enabled()
    assert "out of memory" in caplog.text
    report, _ = written(page)
    assert report


def test_page_works_by_keyboard_alone(visit, pipe, png):
    page, frontal = visit(), png()

    def tab_to(locator):
        for _ in range(100):
            page.keyboard.press("Tab")
            if locator.evaluate("element => element === document.activeElement"):
                outline = locator.evaluate("element => getComputedStyle(element).outlineStyle")
                assert outline == "solid"
                return
        raise AssertionError(f"no Tab leads to {locator}")

    # Registered before the keys are pressed, not meanwhile.
    with page.expect_file_chooser() as chooser:
        tab_to(page.locator("#files").get_by_role("button"))
        page.keyboard.press("Enter")
    chooser.value.set_files(frontal)
    expect(views(page)).to_have_count(1)
    tab_to(page.get_by_label("Indication"))
    page.keyboard.type("Cough.")
    page.keyboard.press("Enter")
    _, record = result(page)
    same(record, expected(pipe, [frontal], indication="Cough."))
    # Gradio gives each radio button a name of its own, so arrow keys do not move between them.
    tab_to(states(page, "cardiomegaly").and_(page.get_by_label("negative", exact=True)))
    page.keyboard.press("Space")
    expect(chosen(page, "cardiomegaly")).to_have_value("negative")
    tab_to(button(page, "Write again from these states"))
    page.locator("#record textarea").evaluate("record => record.value = ''")
    page.keyboard.press("Enter")
    _, record = result(page)
    assert record["findings"]["cardiomegaly"]["state"] == "negative"


def test_page_example_is_written_and_clear_forgets_it(page):
    page.get_by_role("button", name="Pleural effusion, frontal and lateral").click()
    expect(views(page)).to_have_count(2)
    # Not every model was trained with indications.
    expect(page.get_by_label("Indication")).to_have_value("")
    page.get_by_label("Indication").fill("Cough.")
    report, record = written(page)
    assert report and len(record["heatmaps"]["edema"]) == 2
    button(page, "Clear").click()
    expect(views(page)).to_have_count(0)
    expect(page.locator("#report textarea")).to_have_value("")
    expect(page.get_by_label("Indication")).to_have_value("")
    expect(page.locator("#findings tr")).to_have_count(0)
    expect(chosen(page, "edema")).to_have_count(0)
    expect(button(page, "Write again from these states")).to_be_disabled()


def test_page_new_study_ends_the_previous_report(page, pipe, pace, png):
    given(page, png())
    pace.seconds = 0.3
    button(page, "Write report").click()
    page.wait_for_function("document.querySelector('#report textarea').value !== ''")
    expect(page.locator("#write")).to_have_text("Writing …")
    button(page, "Clear").click()
    expect(views(page)).to_have_count(0)
    pace.seconds = 0.0
    expect(button(page, "Write report")).to_be_enabled()
    other = png(5, "other.png")
    given(page, other)
    report, record = written(page)
    same(record, expected(pipe, [other]))
    assert report == record["generated_text"]


def test_page_bad_upload_leaves_no_report_half_written(page, pace, png, tmp_path):
    (tmp_path / "note.png").write_text("not an image")

    def ended_by_a_bad_upload():
        pace.seconds = 0.3
        button(page, "Write report").click()
        expect(page.locator("#write")).to_have_text("Writing …")
        expect(page.locator("#record textarea")).to_have_value("")
        upload(page, str(tmp_path / "note.png"))
        assert problem(page).startswith("note.png: not an image")
        pace.seconds = 0.0
        expect(button(page, "Write report")).to_be_enabled()

    given(page, png())
    ended_by_a_bad_upload()
    expect(page.locator("#report textarea")).to_have_value("")
    report, record = written(page)
    choose(page, "fracture", "positive")
    ended_by_a_bad_upload()
    expect(page.locator("#report textarea")).to_have_value(report)
    assert result(page) == (report, record)
    expect(chosen(page, "fracture")).to_have_value("positive")
    expect(button(page, "Download JSON")).to_be_enabled()


def test_page_closed_frees_the_model(visit, pace, png):
    page = visit()
    given(page, png())
    pace.seconds, pace.steps = 0.4, 0
    button(page, "Write report").click()
    page.wait_for_function("document.querySelector('#report textarea').value !== ''")
    page.context.close()
    steps, deadline = -1, time.monotonic() + SECONDS
    while steps != pace.steps and time.monotonic() < deadline:
        steps = pace.steps
        time.sleep(1)
    # A whole report is a token a step.
    assert steps == pace.steps < len(NORMAL.split())


def test_page_second_visitor_waits_for_the_first(visit, pipe, pace, png):
    pages, studies = [visit(), visit()], [png(3, "a.png"), png(4, "b.png")]
    for page, study in zip(pages, studies, strict=True):
        given(page, study)
    at_once, most, lock = 0, 0, threading.Lock()
    generate = pipe.model.generate

    def counted(*args, **kwargs):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return generate(*args, **kwargs)
        finally:
            with lock:
                at_once -= 1

    pipe.model.generate = counted
    pace.seconds = 0.02
    try:
        for page in pages:
            button(page, "Write report").click()
        pages[1].get_by_text("queue").first.wait_for()
        records = [result(page)[1] for page in pages]
    finally:
        del pipe.model.generate
        pace.seconds = 0.0
    assert most == 1
    for record, study in zip(records, studies, strict=True):
        same(record, expected(pipe, [study]))


def test_page_model_without_states_or_plan_says_so(build_model, browser, png, pace):
    from otdrg import ReportGenerationPipeline
    from otdrg.hub_card.space.interface import build_demo
    from otdrg.hub_card.space.serving import serve

    model, processor = build_model(dle=False, fiot=False)
    demo = build_demo(ReportGenerationPipeline(model=model, processor=processor), "plain", max_new_tokens=8)
    try:
        page = browser.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.goto(serve(demo, "127.0.0.1", block=False))
        page.get_by_text("This model has no transport plan").wait_for()
        given(page, png())
        _, record = written(page)
        assert set(record) == {"generated_text", "complete", "findings"}
        expect(page.get_by_text("this model is not conditioned on states")).to_have_count(1)
        expect(page.get_by_text("Change the states")).to_have_count(0)
        expect(button(page, "Write again from these states")).to_have_count(0)
        expect(page.locator("#heatmap img")).to_have_count(0)
        page.close()
    finally:
        demo.close(verbose=False)


def test_page_on_a_phone_fits_the_screen(page, png):
    page.set_viewport_size({"width": 390, "height": 844})
    given(page, png())
    written(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = page.locator("#findings tr, [id^=state-] label").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect())"
    )
    assert len(boxes) == 1 + len(FINDINGS) + 4 * len(FINDINGS[:-1]) + 2
    assert all(box["left"] >= 0 and box["right"] <= 390 for box in boxes)


def test_page_upload_without_room_is_one_line_and_the_page_goes_on(page, png, monkeypatch):
    from otdrg.hub_card.space import uploads

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "MAX_UPLOADS", 10)
        upload(page, png())
        page.get_by_text("try again in a minute").first.wait_for()
        expect(views(page)).to_have_count(0)
    given(page, png(1, "other.png"))


def test_page_upload_during_an_upload_gives_both_views(page, png, monkeypatch):
    from otdrg.hub_card.space import interface

    read, reading, go = interface.read_uploads, threading.Event(), threading.Event()

    def held(*arguments):
        reading.set()
        go.wait(SECONDS)
        return read(*arguments)

    monkeypatch.setattr(interface, "read_uploads", held)
    upload(page, png())
    reading.wait(SECONDS)
    with page.expect_response(lambda response: "/upload?" in response.url):
        upload(page, png(1, "lateral.png"))
    # The page has to take the answer before the first upload is shown: an empty list that arrives between both wins.
    page.wait_for_timeout(500)
    go.set()
    expect(views(page)).to_have_count(2)
    expect(page.locator("#problem").get_by_role("alert")).to_have_count(0)
