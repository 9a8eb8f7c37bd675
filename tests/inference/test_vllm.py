"""Reports by vLLM: of a server that plays it, and, where it is installed, of vLLM itself."""

import base64
import io
import json
import os
import signal
import threading
import time

import pytest
import torch
import vllm_server as played
from datasets import Dataset
from otdrg.cli import main
from otdrg.consensus_otdrg import ConsensusDecoder, ConsensusSettings
from otdrg.inference.generation import generate_reports
from otdrg.inference.vllm import BATCHES_AHEAD, VLLM, save_language_model, served_name
from otdrg.runtime.interruptions import EngineError
from otdrg.runtime.vllm_server import PROGRAM, vllm_server
from otdrg.studies import prepare_studies
from PIL import Image
from transformers import GenerationConfig

GREEDY = {"num_beams": 1, "max_new_tokens": 8}
FEW = ["--num-beams", "1", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def tiny(build_model):
    return build_model()


@pytest.fixture(scope="module")
def studies(view):
    images = [[Image.fromarray(view(seed)) for seed in range(place, place + 1 + place % 2)] for place in range(5)]
    return Dataset.from_dict({"id": [f"s{place}" for place in range(5)], "images": images})


@pytest.fixture(scope="module")
def expected(tiny, studies):
    return generate_reports(*tiny, studies, batch_size=2, generation=GREEDY)


def writer(llm):
    """Writes as the LLM does, from the embeddings that the server got."""
    lock = threading.Lock()  # there is one random state

    def write(request):
        with lock:
            return sampled(request)

    def sampled(request):
        reports = []
        never = [int(token) for token in request["logit_bias"]]
        for encoded in request["prompt_embeds"]:
            embeddings = torch.load(io.BytesIO(base64.b64decode(encoded)), weights_only=True)
            for number in range(request["n"]):
                torch.manual_seed((request["seed"] or 0) + number)
                sampling = {"temperature": request["temperature"], "top_p": request["top_p"], "do_sample": True}
                config = GenerationConfig(
                    max_new_tokens=request["max_tokens"],
                    eos_token_id=request["stop_token_ids"],
                    pad_token_id=0,
                    suppress_tokens=never,
                    **(sampling if request["temperature"] else {}),
                )
                mask = torch.ones(1, len(embeddings), dtype=torch.long)
                reports.append(
                    llm.generate(inputs_embeds=embeddings[None], attention_mask=mask, generation_config=config)[0]
                )
        return [tokens.tolist() for tokens in reports]

    return write


@pytest.fixture
def serve(tiny):
    """A server of the tiny model's LLM."""
    model = tiny[0]

    def serve(model_name=None, **options):
        return played.Server(model_name or served_name(model), writer(model.language_model), **options)

    return serve


def write_all(tiny, studies, engine, **more):
    with engine:
        return generate_reports(*tiny, studies, batch_size=2, generation=GREEDY, engine=engine, **more)


# --- what a server writes --------------------------------------------------------------------------------------------


def test_vllm_greedy_reports_equal_those_of_the_model(tiny, studies, expected, serve):
    with serve() as server:
        found = write_all(tiny, studies, VLLM(*tiny, server.url))
        request = server.requests[0]
    assert found.reports == expected.reports and len(set(found.reports)) > 1
    assert (found.finding_states == expected.finding_states).all()
    assert (request["n"], request["temperature"], request["max_tokens"]) == (1, 0, 8)
    assert request["stop_token_ids"] == [tiny[0].generation_config.eos_token_id] and request["ignore_eos"]
    # Afterwards the model writes itself.
    assert generate_reports(*tiny, studies, batch_size=2, generation=GREEDY).reports == expected.reports


def test_vllm_suppressed_words_are_not_written(build_model, studies, serve):
    model, processor = build_model()
    words = [[token] for token in (5, 9, 300)] + [[7, 8]]
    generation = {**GREEDY, "bad_words_ids": words}
    with serve() as server, VLLM(model, processor, server.url) as engine:
        generate_reports(model, processor, studies, generation=generation, engine=engine)
    request = server.requests[0]
    assert set(request["logit_bias"]) == set(map(str, (5, 9, 300, *model.config.placeholder_token_ids)))
    assert set(request["logit_bias"].values()) == {-100}
    assert request["bad_words"] == [processor.tokenizer.decode([7, 8])]


def test_vllm_candidates_are_samples_with_own_seeds(tiny, studies, serve):
    settings = ConsensusSettings(candidates=8, agreement_weight=0.0, seed=3)
    with serve() as server:
        found = []
        for _ in range(2):
            engine = VLLM(*tiny, server.url)
            decoder = engine.decoder(ConsensusDecoder(settings))
            found.append(write_all(tiny, studies, engine, consensus=decoder))
    assert found[0].reports == found[1].reports == found[0].sampled
    asked = [(row["seed"], row["n"], row["temperature"], row["top_p"]) for row in server.requests]
    seeds = [(3 * 4 + number) * 4096 for number in range(4)]
    assert sorted(set(asked)) == [(seed, 2, 0.9, 0.95) for seed in seeds]
    # The plan that the reports depend on, for the settings of a journal.
    assert {group.guidance_scale for group in decoder.settings.plan} == {1.0}


def test_vllm_map_keeps_order_and_bounds_what_is_open(tiny, view):
    images = [[Image.fromarray(view(0))]] * 60
    studies = Dataset.from_dict({"id": list(map(str, range(60))), "images": images})

    def write(request):
        time.sleep(0.02)
        return played.constant(request)

    with played.Server(served_name(tiny[0]), write) as server, VLLM(*tiny, server.url) as engine:
        found = generate_reports(*tiny, studies, batch_size=1, generation=GREEDY, engine=engine)
    assert len(server.requests) == len(found.reports) == 60 and len(set(found.reports)) == 1
    assert 1 < server.most_open <= BATCHES_AHEAD + 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", "answered 500: EngineCore encountered an issue. See stack trace"),
        ("refusal", "answered 400: You must set `--enable-prompt-embeds`"),
        ("silence", "did not answer within 3 seconds"),
        ("hang_up", "cannot be reached (Remote end closed connection without response)"),
        ("other", "does not answer as vLLM"),
    ],
)
def test_vllm_fault_is_one_line_and_finished_reports_are_kept(tiny, studies, tmp_path, monkeypatch, fault, message):
    # One request at a time, so that the server answers the first batch.
    monkeypatch.setattr("otdrg.inference.vllm.BATCHES_AHEAD", 0)
    journal, name = tmp_path / "reports.jsonl", served_name(tiny[0])
    with played.Server(name, fault=fault, after=1) as server, pytest.raises(EngineError) as error:
        longest = 3 if fault == "silence" else 60
        write_all(tiny, studies, VLLM(*tiny, server.url, longest_answer=longest), journal=journal)
    assert str(error.value).startswith(f"{server.url} {message}") and "\n" not in str(error.value)
    assert [row["id"] for row in map(json.loads, journal.read_text().splitlines())] == ["s0", "s1"]
    with played.Server(name) as server:
        found = write_all(tiny, studies, VLLM(*tiny, server.url), journal=journal)
    assert len(set(found.reports)) == 1 and len(server.requests) == 2


@pytest.mark.parametrize("longest", [None, 512, 200])
def test_generate_study_too_long_for_the_server_is_left_out(
    run_folder, model, processor, paths, tmp_path, capsys, longest
):
    listed = [{"id": str(number), "images": path} for number, path in enumerate(paths)]
    # Without `longest`, beyond the positions of the model.
    listed[1]["indication"] = "cough " * (100 if longest == 200 else 300)
    (tmp_path / "list").write_text("\n".join(map(json.dumps, listed)))
    command = ["generate", str(run_folder), "--studies", str(tmp_path / "list"), "--json", "--batch-size", "3", *FEW]
    with played.Server(served_name(model), longest=longest) as server:
        assert main([*command, "--engine", "vllm", "--engine-url", server.url]) == 1
    shown, error = capsys.readouterr()
    assert [json.loads(line)["id"] for line in shown.splitlines()] == ["0", "2"]
    lines = error.splitlines()
    assert len(lines) == 2 and lines[0].startswith("left out: 1: a prompt of ")
    assert f"expected at most {longest or 512} together" in lines[0] and "1 of 3 studies were left out" in lines[1]


def test_vllm_server_that_is_down_or_of_another_model_is_one_line(tiny, studies, serve):
    with serve("llama") as server, pytest.raises(EngineError, match=r"serves llama: expected otdrg-[0-9a-f]{16}"):
        write_all(tiny, studies, VLLM(*tiny, server.url))
    with pytest.raises(EngineError, match=rf"{server.url} cannot be reached \(.*refused"):
        write_all(tiny, studies, VLLM(*tiny, server.url))


def test_vllm_interrupted_does_not_wait_for_the_server(tiny, studies, serve):
    with serve(fault="silence", after=1) as server, VLLM(*tiny, server.url) as engine:
        begin = time.monotonic()

        items = (studies.select([place]) for place in range(4))
        decoder = engine.decoder(ConsensusDecoder(ConsensusSettings(candidates=1, agreement_weight=0.0)))
        found = engine.map(lambda batch: decoder.sample(*tiny, *_study(tiny, batch), GREEDY), items)
        next(found)
        found.close()
        assert time.monotonic() - begin < 20


def _study(tiny, batch):
    """The prompts of studies, and what the model reads in their views."""
    inputs = tiny[1](images=list(batch["images"]))
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return prompt, tiny[0].read_study(inputs["pixel_values"], inputs["view_mask"])


def test_save_language_model_follows_the_umask(build_model, tmp_path):
    save_language_model(*build_model(), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


# --- a server of one's own -------------------------------------------------------------------------------------------


def is_gone(program):
    """Whether the program's process ended, and was waited for."""
    process = int((program.parent / f"{program.name}.pid").read_text())
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes a program the one that OTDRG_VLLM names."""

    def make(*arguments):
        path = played.write_program(tmp_path / "vllm", *arguments)
        monkeypatch.setenv(PROGRAM, str(path))
        return path

    return make


def test_vllm_server_ends_with_the_body_also_after_an_error(program, tmp_path):
    path = program()
    arguments = ["--served-model-name", "otdrg"]
    with pytest.raises(KeyError), vllm_server(arguments, tmp_path / "log") as server:
        while not (tmp_path / "vllm.pid").exists() or not (tmp_path / "vllm.pid").read_text():
            time.sleep(0.02)
        assert server.failure() is None and not is_gone(path)
        raise KeyError
    assert is_gone(path)


def test_generate_starts_vllm_with_the_model_and_ends_it(
    run_folder, model, processor, program, paths, tmp_path, capsys
):
    path = program()
    (tmp_path / "list").write_text("\n".join(paths))
    output = tmp_path / "reports.jsonl"
    command = ["generate", str(run_folder), "--studies", str(tmp_path / "list"), "--output", str(output), *FEW]
    assert main([*command, "--engine", "vllm"]) == 0
    assert is_gone(path)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == paths and all(row["complete"] for row in rows)
    assert {row["report"] for row in rows} == {processor.tokenizer.decode([5, 6])}
    arguments = json.loads((tmp_path / "vllm.arguments").read_text())
    assert arguments[0] == "serve" and not os.path.exists(arguments[1])
    assert {"--enable-prompt-embeds", "--enforce-eager", "float32", served_name(model)} <= set(arguments)
    # Nothing is left to do: no server is started. Reports of another engine are not continued.
    program("start")
    assert main([*command, "--engine", "vllm", "--resume"]) == 0
    capsys.readouterr()
    assert main([*command, "--resume"]) == 1
    assert "engine='vllm', now None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("start",), "vllm serve ended with status 1: ValueError: the LLM has an unknown architecture"),
        (("die", 1), "vllm serve ended with status 3: RuntimeError: Engine core is dead."),
    ],
)
def test_generate_vllm_that_fails_is_one_line(run_folder, program, paths, tmp_path, capsys, arguments, message):
    path = program(*arguments)
    (tmp_path / "list").write_text("\n".join(paths))
    output = tmp_path / "reports.jsonl"
    command = ["generate", str(run_folder), "--studies", str(tmp_path / "list"), "--output", str(output), *FEW]
    assert main([*command, "--engine", "vllm"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"otdrg generate: error: {message}"
    assert is_gone(path)
    assert (output.read_text().count("\n") if output.exists() else 0) == (arguments[0] == "die")
    program()
    assert main([*command, "--engine", "vllm", "--resume"]) == 0
    assert output.read_text().count("\n") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generate_interrupted_ends_vllm(run_folder, program, paths, tmp_path, start_process, number):
    path = program("silence", 1)
    (tmp_path / "list").write_text("\n".join(paths))
    output = tmp_path / "reports.jsonl"
    command = ["generate", run_folder, "--studies", tmp_path / "list", "--output", output, *FEW]
    process = start_process(["-m", "otdrg", *command, "--engine", "vllm"])
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.splitlines()[-1].endswith(f"1 of 3 studies were written to {output}; --resume continues")
    assert is_gone(path)


def test_evaluate_reports_of_vllm_are_scored_and_named(run_folder, model, program, tmp_path, capsys):
    path = program()
    options = {"train": 4, "validation": 3, "test": 0, "image_size": 64, "views": ["frontal"], "seed": 5}
    prepare_studies("phantom", tmp_path / "built", **options)
    command = ["evaluate", str(run_folder), str(tmp_path / "built"), "--output", str(tmp_path / "out")]
    command += ["--engine", "vllm", "--candidates", "4", "--max-new-tokens", "8", "--bootstrap", "0"]
    assert main([*command, "--metrics", "bleu_1"]) == 0, capsys.readouterr().err
    assert is_gone(path)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["generation"]["engine"] == "vllm" and "by vLLM" in (tmp_path / "out" / "evaluation.md").read_text()
    assert {group["guidance_scale"] for group in result["generation"]["consensus"]["plan"]} == {1.0}
    # The control without consensus decoding is greedy, though the model would search with beams.
    assert result["generation"]["num_beams"] == 1
    assert "model, without consensus decoding" in result["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm", "--num-beams", "3"], "--num-beams is 3: expected 1, --engine vllm has no beam search"),
        (
            ["--engine", "vllm", "--guidance-scale", "2"],
            "--guidance-scale is 2: expected 1, --engine vllm has no",
        ),
        (["--engine", "vllm", "--quantization", "4bit"], "--quantization and --engine vllm were both given"),
        (["--engine-url", "http://127.0.0.1:1"], "--engine-url needs --engine vllm"),
        (["--engine", "vllm", "--engine-url", "127.0.0.1:1"], "expected an address such as http://127.0.0.1:8000"),
        (["--engine", "vllm"], f"{PROGRAM}=/nowhere/vllm is not a program"),
    ],
)
def test_generate_what_vllm_cannot_do_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv(PROGRAM, "/nowhere/vllm")
    assert main(["generate", "no_model", "--study", "no_view.png", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "with 3 beams, which vLLM has not: expected --num-beams 1"),
        ({"guidance_scale": 2.0}, "guidance_scale=2 in this model's generation_config.json"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 in this model's generation_config.json"),
    ],
)
def test_vllm_settings_of_the_model_that_it_has_not_are_refused(build_model, settings, message):
    from otdrg.inference.loading import decoding

    model, processor = build_model()
    model.generation_config.update(**{"num_beams": 1, **settings})
    engine = VLLM(model, processor, "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=message):
        engine.decoding(decoding(model), None)
    if "num_beams" in settings:
        assert engine.decoding(decoding(model), ConsensusDecoder(ConsensusSettings(), label=len))["num_beams"] == 1


# --- vLLM itself -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(PROGRAM), reason=f"{PROGRAM} does not name the program of vLLM")
def test_vllm_itself_writes_what_transformers_writes(build_model, studies):
    # vLLM has no attention heads of fewer than 32 numbers.
    text = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = build_model(text_config={**text, "max_position_embeddings": 512})
    greedy = {**GREEDY, "bad_words_ids": [[5], [300]]}
    expected = generate_reports(*tiny, studies, batch_size=2, generation=greedy)
    with VLLM(*tiny) as engine:
        found = generate_reports(*tiny, studies, batch_size=2, generation=greedy, engine=engine)
        decoder = engine.decoder(ConsensusDecoder(ConsensusSettings(candidates=8, agreement_weight=0.0)))
        samples = [
            next(engine.map(lambda batch: decoder.sample(*tiny, *_study(tiny, batch), GREEDY), [studies]))
            for _ in range(2)
        ]
    assert found.reports == expected.reports and len(set(found.reports)) > 1
    assert samples[0] == samples[1] and all(len(set(texts)) > 1 for texts in samples[0])
