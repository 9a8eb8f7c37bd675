"""`otdrg generate` as it is typed, on a model folder, a run and what is neither."""

import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from otdrg import FINDINGS, ReportGenerationPipeline
from otdrg.cli import main
from otdrg.consensus_otdrg import ConsensusDecoder, ConsensusSettings
from otdrg.inference import listing
from otdrg.inference.loading import decoding, load_published
from otdrg.labelers.report_table import read_reports
from otdrg.metrics.faithfulness import self_check
from otdrg.pipeline_otdrg import ReportGenerationPipeline as Pipeline
from otdrg.runtime.interruptions import Terminated
from PIL import Image

FEW = ["--num-beams", "1", "--max-new-tokens", "6"]


@pytest.fixture
def generate(run_folder, capsys):
    """Runs the command; its exit status, and what it prints to the two streams."""

    def generate(*arguments, model=run_folder, few=FEW):
        status = main(["generate", *map(str, (model, *arguments)), *few])
        return status, *capsys.readouterr()

    return generate


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def one_line(error, *parts):
    assert error.startswith("otdrg generate: error: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


# --- one study -------------------------------------------------------------------------------------------------------


def test_generate_text_has_report_and_findings(generate, paths):
    status, shown, error = generate("--study", paths[0], paths[1])
    assert status == 0 and error == ""
    assert shown.splitlines()[0] in f"{paths[0]} + {paths[1]}"
    for name in ("Enlarged Cardiomediastinum", "Pleural Effusion", "No Finding"):
        assert name in " ".join(shown.split())


def test_generate_json_equals_the_pipeline(generate, model, processor, paths, tmp_path):
    heatmaps = tmp_path / "deep" / "heatmaps"
    arguments = ["--study", paths[0], "--study", paths[1], paths[2], "--indication", "cough"]
    arguments += ["--findings", "Edema=positive", "--findings", "pleural EFFUSION=uncertain"]
    status, shown, error = generate(*arguments, "--json", "--heatmap", heatmaps)
    assert status == 0 and error == ""
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    for record, study in zip(rows_of(shown), (paths[:1], paths[1:]), strict=True):
        given = {"edema": "positive", "pleural_effusion": "unclear"}
        expected = pipe([study], findings=given, indication="cough", num_beams=1, max_new_tokens=6)[0][0]
        assert record["id"] == " + ".join(study) and record["images"] == study
        assert (record["indication"], record["steered"]) == ("cough", given)
        assert record["report"] == expected["generated_text"]
        for name in FINDINGS:
            assert record["findings"][name]["state"] == expected["findings"][name]["state"]
        states = [
            ("unmentioned", "positive", "negative", "unclear").index(record["findings"][name]["state"])
            for name in FINDINGS
        ]
        assert record["contradictions"] == self_check([record["report"]], [states])[0]
        with Image.open(record["heatmap"]) as picture:
            assert picture.format == "PNG"
    assert len(list(heatmaps.iterdir())) == 2


def test_generate_without_dle_has_no_contradictions(generate, build_model, paths, tmp_path):
    model, processor = build_model(dle=False, fiot=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    status, shown, _ = generate("--study", paths[0], "--json", model=tmp_path)
    assert status == 0 and "contradictions" not in rows_of(shown)[0]
    status, _, error = generate("--study", paths[0], "--findings", "edema=positive", model=tmp_path)
    assert status == 1
    one_line(error, "OTDRGConfig.dle=False: this model does not use finding states")
    lines = [{"images": paths[0]}, {"images": paths[1], "findings": {"edema": "positive"}}]
    (tmp_path / "list").write_text("\n".join(map(json.dumps, lines)))
    status, shown, error = generate("--studies", tmp_path / "list", "--json", model=tmp_path)
    assert status == 1 and shown == ""
    one_line(error, "OTDRGConfig.dle=False: this model does not use finding states")
    status, _, error = generate("--study", paths[0], "--guidance-scale", "2", model=tmp_path)
    assert status == 1
    one_line(error, "--guidance-scale is 2: expected 1, this model does not use finding states (dle=False)")
    status, _, error = generate("--study", paths[0], "--heatmap", tmp_path / "maps", model=tmp_path)
    assert status == 1
    one_line(error, "OTDRGConfig.fiot=False: this model has no transport plan")


def test_generate_heatmap_that_cannot_be_drawn_is_refused_before_generation(
    generate, build_model, paths, tmp_path, monkeypatch
):
    for part in build_model(fiot=False):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    calls, whole = [], Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda *args, **more: calls.append(1) or whole(*args, **more))
    status, _, error = generate("--study", paths[0], "--heatmap", tmp_path / "file" / "maps")
    assert status == 1
    one_line(error, f"--heatmap {tmp_path / 'file' / 'maps'}: {tmp_path / 'file'} is not a writable folder")
    status, _, error = generate("--study", paths[0], "--heatmap", tmp_path / "maps", model=tmp_path)
    assert status == 1 and calls == []
    one_line(error, "OTDRGConfig.fiot=False: this model has no transport plan")
    # A study that fails alone is not written again.
    status, _, error = generate("--study", paths[0], "--indication", "cough " * 400)
    assert status == 1 and calls == [1]
    one_line(error, "expected at most 512 together, the positions of the LLM")


def test_generate_guidance_scale_is_that_of_the_pipeline(generate, model, processor, paths):
    arguments = ("--study", paths[0], "--findings", "edema=positive", "--guidance-scale", "9", "--json")
    status, shown, error = generate(*arguments)
    assert status == 0 and error == ""
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    options = {"findings": {"edema": "positive"}, "num_beams": 1, "max_new_tokens": 6}
    guided = pipe(paths[0], **options, guidance_scale=9.0)[0]["generated_text"]
    assert rows_of(shown)[0]["report"] == guided != pipe(paths[0], **options)[0]["generated_text"]


def test_generate_guidance_scale_1_switches_off_the_models_own(generate, run_folder, paths, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "guided")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "guidance_scale": 9.0}))
    studies = ["--study", paths[0], "--findings", "edema=positive", "--json"]
    written = []
    for more, model in (([], folder), (["--guidance-scale", 1], folder), ([], run_folder)):
        status, shown, error = generate(*studies, *more, model=model)
        assert status == 0 and error == ""
        written.append(rows_of(shown)[0]["report"])
    assert written[0] != written[1] == written[2]
    plain = decoding(load_published(str(folder))[0], guidance_scale=1.0)
    assert plain["guidance_scale"] == 1, "the settings that evaluate records"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--findings", "edema"], "--findings edema: expected FINDING=STATE"),
        (["--findings", "oedema=positive"], "--findings oedema=positive: unknown finding 'oedema'"),
        (["--findings", "edema=maybe"], "--findings edema=maybe: unknown finding state 'maybe'"),
        (["--batch-size", "0"], "--batch-size is 0: expected 1 or more"),
        (["--guidance-scale", "0.5"], "--guidance-scale is 0.5: expected a number of at least 1"),
        (["--resume"], "--resume needs --output: expected both"),
        (["--split", "test"], "--split needs --studies with a folder of otdrg prepare"),
        (["--output", "."], "--output .: this is a folder"),
        (["--output", "reports.json"], "--output reports.json: another kind of file, expected the name of a .jsonl"),
        (["--output", f"{__file__}/reports.jsonl"], "test_generate.py is not a writable folder"),
        (["--heatmap", __file__], "this is a file, expected a folder"),
        (["--indication", "fi\udce8vre"], "indication 'fi\\udce8vre': cannot be encoded"),
        (["--indication", "see <image>"], "indication holds '<image>'"),
    ],
)
def test_generate_wrong_arguments_are_one_line(generate, paths, arguments, message):
    status, shown, error = generate("--study", paths[0], *arguments)
    assert status == 1 and shown == ""
    one_line(error, message)


def test_generate_wrong_model_or_image_is_one_line(generate, paths, tmp_path, monkeypatch):
    status, _, error = generate("--study", paths[0], model=tmp_path)
    assert status == 1
    one_line(error, f"{tmp_path}: no config.json")
    note = tmp_path / "note.png"
    note.write_text("not an image")
    monkeypatch.setattr("otdrg.inference.loading.load_published", None)
    # Printed before the model is loaded.
    status, shown, error = generate("--study", paths[0], "--study", note)
    assert status == 1 and shown == ""
    one_line(error, f"{note}: not an image")


# --- many studies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_list_equals_single_studies(generate, paths, tmp_path, monkeypatch, batch_size):
    lines = [
        "\t".join(paths[:2]),
        json.dumps({"id": "steered", "images": paths[1:], "findings": {"edema": "positive"}, "indication": "fall"}),
        paths[2],
    ]
    listed = "\n".join(lines)
    (tmp_path / "list").write_text(listed)
    status, shown, error = generate("--studies", tmp_path / "list", "--json", "--batch-size", batch_size)
    assert status == 0 and error == ""
    found = rows_of(shown)
    assert [row["id"] for row in found] == [" + ".join(paths[:2]), "steered", paths[2]]
    assert found[1]["steered"] == {"edema": "positive"} and "steered" not in found[2]
    alone = [
        ["--study", *paths[:2]],
        ["--study", *paths[1:], "--findings", "edema=positive", "--indication", "fall"],
        ["--study", paths[2]],
    ]
    for row, arguments in zip(found, alone, strict=True):
        (expected,) = rows_of(generate(*arguments, "--json")[1])
        assert row["report"] == expected["report"]
        assert [it["state"] for it in row["findings"].values()] == [it["state"] for it in expected["findings"].values()]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    assert [row["report"] for row in rows_of(generate("--studies", "-", "--json")[1])] == [
        row["report"] for row in found
    ]


def test_generate_prepared_dataset_is_read(generate, tmp_path):
    built = tmp_path / "built"
    command = f"prepare phantom --train 2 --validation 3 --test 0 --image-size 64 --output {built}"
    assert main(command.split()) == 0
    status, _, error = generate("--studies", built)
    one_line(error, f"{built} has the splits train, validation: expected --split")
    status, _, error = generate("--studies", built, "--split", "test")
    one_line(error, f"{built} has no split 'test': it has train, validation")
    status, shown, _ = generate("--studies", built, "--split", "validation", "--json", "--batch-size", "2")
    found = rows_of(shown[shown.index("{") :])
    rows = load_dataset("parquet", data_files=str(built / "data" / "validation-*.parquet"), split="train")
    assert status == 0 and [row["id"] for row in found] == rows["id"]
    rows[0]["images"][0].save(tmp_path / "view.png")
    (alone,) = rows_of(generate("--study", tmp_path / "view.png", "--json")[1])
    assert alone["report"] == found[0]["report"] and "images" not in found[0]


def test_generate_unreadable_study_is_skipped_and_named(generate, paths, tmp_path):
    (tmp_path / "list").write_text("\n".join([paths[0], "nowhere.png", paths[2]]))
    status, shown, error = generate("--studies", tmp_path / "list", "--json", "--batch-size", "2")
    assert status == 1
    assert [row["id"] for row in rows_of(shown)] == [paths[0], paths[2]]
    fault, last = error.splitlines()
    assert fault == "left out: nowhere.png: cannot be read (No such file or directory)"
    assert last.startswith("otdrg generate: error: 1 of 3 studies were left out, for the reasons above")


# --- a file that is gone on with -------------------------------------------------------------------------------------


def test_generate_resumed_file_equals_an_uninterrupted_one(generate, paths, tmp_path):
    lines = [json.dumps({"id": name, "images": path}) for name, path in zip("abc", paths, strict=True)]
    (tmp_path / "list").write_text("\n".join(lines))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "deep" / "reports.jsonl"
    status, shown, error = generate("--studies", tmp_path / "list", "--output", whole)
    assert status == 0 and shown == "" and error == f"3 reports written: {whole}\n"
    assert [(row["id"], row["report"]) for row in rows_of(whole.read_text())] == list(read_reports(whole))

    first = tmp_path / "first"
    first.write_text(lines[0])
    assert generate("--studies", first, "--output", output)[0] == 0
    # As a process that was killed leaves it.
    output.write_text(output.read_text() + '{"id": "b", "repo')
    status, _, error = generate("--studies", tmp_path / "list", "--output", output)
    assert status == 1
    one_line(error, f"{output} exists: --resume continues it, --overwrite replaces it")
    status, _, error = generate("--studies", tmp_path / "list", "--output", output, "--resume")
    assert status == 0 and error == f"2 reports written, 1 were there: {output}\n"
    assert output.read_text() == whole.read_text()
    assert generate("--studies", tmp_path / "list", "--output", output, "--resume")[0] == 0
    assert output.read_text() == whole.read_text()
    assert generate("--studies", first, "--output", output, "--overwrite")[0] == 0
    assert output.read_text().count("\n") == 1


def test_generate_file_of_other_settings_is_not_resumed(generate, build_model, paths, tmp_path):
    output, other = tmp_path / "reports.jsonl", tmp_path / "other"
    assert generate("--study", paths[0], "--output", output)[0] == 0
    written = output.read_text()
    model, processor = build_model(seed=1)
    model.save_pretrained(other / "model")
    processor.save_pretrained(other / "model")
    again = ["--output", output, "--resume"]
    for arguments, more, message in (
        (["--study", paths[0]], {"model": other}, "was made with other settings (model): expected the same"),
        (["--study", paths[0]], {"few": ["--num-beams", "1", "--max-new-tokens", "4"]}, "(max_new_tokens=6, now 4)"),
        (["--study", paths[0], "--heatmap", "maps"], {}, "(heatmap=None, now 'maps')"),
        (["--study", paths[0], "--indication", "fall"], {}, "with other images, indication, findings or prior"),
        (["--study", paths[0], "--findings", "edema=negative"], {}, "with other images, indication, findings or prior"),
    ):
        status, _, error = generate(*arguments, *again, **more)
        assert status == 1
        one_line(error, str(output), message)
    settings = output.with_suffix(".settings.json").read_text()
    output.with_suffix(".settings.json").unlink()
    status, _, error = generate("--study", paths[0], *again)
    one_line(error, f"{output} has no reports.settings.json beside it")
    output.with_suffix(".settings.json").write_text(settings)
    output.write_text("no json\n" + written)
    status, _, error = generate("--study", paths[0], *again)
    one_line(error, f"{output}, line 1: no JSON object")


def test_generate_refused_file_of_another_kind_is_not_changed(generate, paths, tmp_path):
    """A file of the user's own, the last line of which does not end."""
    output = tmp_path / "mine.jsonl"
    own = [json.dumps({"id": name, "images": path}) for name, path in zip("ab", paths, strict=False)]
    for lines in (own, own[:1]):
        output.write_text("\n".join(lines))
        before = output.read_bytes()
        status, _, error = generate("--study", paths[2], "--output", output, "--resume")
        assert status == 1 and output.read_bytes() == before
        one_line(error, f"{output} has no mine.settings.json beside it")
        status, _, error = generate("--studies", output, "--output", output, "--overwrite")
        assert status == 1 and output.read_bytes() == before
        one_line(error, f"{output} would be written over, and is --studies: expected another --output")
    # Nor is one of reports by another model, the last line of which was cut off.
    output.unlink()
    assert generate("--study", paths[0], "--output", output)[0] == 0
    output.write_text(output.read_text() + '{"id": "b", "repo')
    before = output.read_bytes()
    status, _, error = generate("--study", paths[0], "--output", output, "--resume", few=["--max-new-tokens", "4"])
    assert status == 1 and output.read_bytes() == before
    # A file whose studies are all written loses the line.
    assert generate("--study", paths[0], "--output", output, "--resume")[0] == 0
    assert [row["id"] for row in rows_of(output.read_text())] == [paths[0]]


def test_generate_wrong_model_keeps_the_existing_file(generate, paths, tmp_path):
    output = tmp_path / "reports.jsonl"
    assert generate("--study", paths[0], "--output", output)[0] == 0
    before = output.read_text()
    assert generate("--study", paths[1], "--output", output, "--overwrite", model=tmp_path)[0] == 1
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("stop", "status", "name"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated (SIGTERM)")]
)
def test_generate_interrupted_keeps_reports_and_names_resume(
    generate, paths, tmp_path, monkeypatch, stop, status, name
):
    (tmp_path / "list").write_text("\n".join(paths))
    output, whole, calls = tmp_path / "reports.jsonl", Pipeline.__call__, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise stop
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Pipeline, "__call__", interrupted)
    found, shown, error = generate("--studies", tmp_path / "list", "--output", output)
    assert found == status and shown == ""
    assert error == f"otdrg generate: {name}; 2 of 3 studies were written to {output}; --resume continues\n"
    assert [row["id"] for row in rows_of(output.read_text())] == paths[:2]
    assert generate("--studies", tmp_path / "list", "--output", output, "--resume")[0] == 0
    assert [row["id"] for row in rows_of(output.read_text())] == paths


def test_generate_interrupted_says_only_what_is_true(generate, paths, tmp_path, monkeypatch):
    (tmp_path / "list").write_text("\n".join(paths[:2]))
    output = tmp_path / "reports.jsonl"
    assert generate("--studies", tmp_path / "list", "--output", output)[0] == 0

    def interrupted(self, *arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "__call__", interrupted)
    status, _, error = generate("--study", paths[0])
    assert status == 130 and error == "otdrg generate: interrupted\n"
    # The file has reports of another list.
    status, _, error = generate("--study", paths[2], "--output", output, "--resume")
    assert status == 130
    assert error == f"otdrg generate: interrupted; 0 of 1 studies were written to {output}; --resume continues\n"


def test_generate_list_with_byte_order_mark_reads_its_first_study(generate, paths, tmp_path):
    (tmp_path / "list").write_bytes("\n\n".join(paths[:2]).encode("utf-8-sig"))
    status, shown, error = generate("--studies", tmp_path / "list", "--json")
    assert status == 0 and error == ""
    assert [row["id"] for row in rows_of(shown)] == paths[:2]


def test_generate_damaged_studies_are_skipped(generate, paths, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(paths[0]).read_bytes())
    whole = listing.read_view

    def read_view(view, *arguments):
        if view == str(damaged):
            raise KeyError("Rows")
        return whole(view, *arguments)

    monkeypatch.setattr("otdrg.inference.listing.read_view", read_view)
    listed = [
        {"id": "a", "images": paths[0]},
        {"id": "decoder", "images": str(damaged)},
        {"id": "nul", "images": "x\0y.png"},
        {"id": "long", "images": "x" * 5000},
        {"id": "i" * 3000 + "/\u00e9", "images": paths[1]},
        {"id": "../..", "images": paths[2]},
    ]
    (tmp_path / "list").write_text("\n".join(map(json.dumps, listed)))
    maps = tmp_path / "maps"
    status, shown, error = generate("--studies", tmp_path / "list", "--json", "--batch-size", 3, "--heatmap", maps)
    assert status == 1
    assert [row["id"] for row in rows_of(shown)] == [listed[place]["id"] for place in (0, 4, 5)]
    lines = error.splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["decoder", "nul", "long"]
    assert lines[0] == "left out: decoder: KeyError: 'Rows'"
    assert "3 of 6 studies were left out" in lines[-1]
    # None of the ids led out of the folder.
    assert len(list(maps.iterdir())) == 3


def test_generate_study_failing_in_a_batch_is_skipped_alone(generate, paths, tmp_path, monkeypatch):
    (tmp_path / "list").write_text("\n".join(paths))
    whole = Pipeline.__call__

    def fails(self, inputs, **more):
        if len(inputs) > 1 or inputs[0]["images"][0].size == Image.open(paths[1]).size != Image.open(paths[0]).size:
            raise IndexError("index out of range in self")
        return whole(self, inputs, **more)

    monkeypatch.setattr(Pipeline, "__call__", fails)
    Image.open(paths[1]).resize((70, 61)).save(tmp_path / "other.png")
    (tmp_path / "list").write_text("\n".join([paths[0], str(tmp_path / "other.png"), paths[2]]))
    paths = [paths[0], str(tmp_path / "other.png"), paths[2]]
    status, shown, error = generate("--studies", tmp_path / "list", "--json", "--batch-size", 3)
    assert status == 1 and [row["id"] for row in rows_of(shown)] == [paths[0], paths[2]]
    assert f"left out: {paths[1]}: IndexError: index out of range in self" in error


def test_generate_studies_failing_together_are_left_out_as_alone(generate, paths, tmp_path):
    listed = [{"id": str(number), "images": paths[number % 3]} for number in range(6)]
    for study in listed[2:4]:
        study["indication"] = "cough " * 400
    (tmp_path / "list").write_text("\n".join(map(json.dumps, listed)))
    found = []
    for size in (1, 2):
        status, shown, error = generate("--studies", tmp_path / "list", "--json", "--batch-size", size)
        assert status == 1 and [row["id"] for row in rows_of(shown)] == ["0", "1", "4", "5"]
        found.append(([row["report"] for row in rows_of(shown)], error))
    assert found[0] == found[1]
    lines = found[0][1].splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [["left out", "2"], ["left out", "3"]]
    assert lines[-1].endswith("2 of 6 studies were left out, for the reasons above; the others were written")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", 10**9], "--max-new-tokens is 1000000000: expected less than 512, the positions of"),
        (["--num-beams", 5000], "--num-beams is 5000: expected at most "),
    ],
)
def test_generate_more_tokens_than_the_context_is_one_line(generate, paths, arguments, message):
    status, shown, error = generate("--study", paths[0], *arguments, few=[])
    assert status == 1 and shown == ""
    one_line(error, message)


def test_generate_batch_is_no_larger_than_the_list(generate, paths):
    assert generate("--study", paths[0], "--batch-size", 10**9)[0] == 0


def test_decoding_batch_larger_than_memory_is_refused(model):
    with pytest.raises(ValueError, match=r"--batch-size 100000000 with 3 beams and 500 new tokens needs .* GB"):
        decoding(model, 3, 500, 10**8)
    # Four groups, of which two have prompts for guidance beside their own.
    decoder = ConsensusDecoder(ConsensusSettings(candidates=30))
    with pytest.raises(ValueError, match=r"--batch-size 100000000 with 16 samples at a time and 500 new tokens needs"):
        decoding(model, None, 500, 10**8, decoder=decoder)


def test_generate_out_of_memory_is_one_line(generate, paths, monkeypatch):
    def exhausted(self, *arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(Pipeline, "__call__", exhausted)
    status, _, error = generate("--study", paths[0])
    assert status == 1
    one_line(error, "out of memory (CUDA out of memory): use a smaller batch, fewer beams")


SLOW = """
import sys, time
from otdrg import ReportGenerationPipeline
whole = ReportGenerationPipeline.__call__
def slow(self, *arguments, **more):
    time.sleep(0.5)
    return whole(self, *arguments, **more)
ReportGenerationPipeline.__call__ = slow
from otdrg.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def slow_generate(run_folder, start_process, paths, tmp_path):
    """Starts the command on many studies, slowed down, and waits until a report is written."""
    started = []

    def start(output):
        listed = [{"id": str(number), "images": paths[number % 3]} for number in range(200)]
        (tmp_path / "list").write_text("\n".join(map(json.dumps, listed)))
        command = ["-c", SLOW, "generate", run_folder, "--studies", tmp_path / "list", "--output", output, *FEW]
        process = start_process(command)
        started.append(process)
        deadline = time.monotonic() + 120
        while not (output.exists() and output.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_generate_second_process_is_refused_until_the_first_is_killed(slow_generate, generate, paths, tmp_path):
    output = tmp_path / "out" / "reports.jsonl"
    process = slow_generate(output)
    for more in ([], ["--resume"], ["--overwrite"]):
        status, _, error = generate("--study", paths[0], "--output", output, *more)
        assert status == 1
        one_line(error, f"{output} is being written by process {process.pid} on ")
    process.kill()
    process.wait()
    assert generate("--study", paths[0], "--output", output, "--overwrite")[0] == 0
    assert len(rows_of(output.read_text())) == 1
    assert sorted(os.listdir(output.parent)) == ["reports.jsonl", "reports.settings.json"]


# --- the command itself ----------------------------------------------------------------------------------------------


def test_otdrg_without_command_prints_the_help(capsys):
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out
