"""Built datasets on the Hub: pushed by the command, as it is typed, to a Hub on this machine, and loaded from there."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_from_disk
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from otdrg.cli import main
from otdrg.studies import prepare_studies
from otdrg.studies.publish import push_studies
from PIL import Image

PHANTOMS = {"train": 3, "validation": 1, "test": 2, "image_size": 32}
COMMAND = ["prepare", "phantom", "--train", "3", "--validation", "1", "--test", "2", "--image-size", "32"]
#: What distinguishes R2Gen's two collections, and their licences.
COLLECTIONS = {
    "CC BY-NC-ND 4.0": {"id": "CXR7_IM-0001", "image_path": ["CXR7_IM-0001/0.png"]},
    "PhysioNet": {"id": "50414267", "image_path": ["p10/0.png"], "subject_id": 10000032, "study_id": 50414267},
}


@pytest.fixture
def run(hub_server, tmp_path):
    """Runs Python in a process of its own whose Hub is the test's."""

    def run(*arguments, home="home", **variables):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=hub_server.environment(tmp_path / home, **variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def otdrg(hub_server, monkeypatch, capsys):
    """Runs the command in this process, whose Hub is the test's."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    disable_progress_bars()

    def otdrg(*arguments, token=hub_server.token):
        monkeypatch.setenv("HF_TOKEN", token)
        status = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=shown.out, stderr=shown.err)

    yield otdrg
    enable_progress_bars()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A dataset as `COMMAND` builds it; what pushes it leaves it alone."""
    folder = tmp_path_factory.mktemp("built") / "phantoms"
    prepare_studies("phantom", folder, **PHANTOMS)
    return folder


@pytest.fixture
def restricted(tmp_path):
    """Writes a collection of one study under a licence; returns the command that prepares it."""

    def write(licence):
        study = {**COLLECTIONS[licence], "report": "The lungs are clear."}
        (image,) = study["image_path"]
        (tmp_path / "images" / image).parent.mkdir(parents=True)
        Image.fromarray(np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "images" / image)
        annotation = tmp_path / "annotation.json"
        annotation.write_text(json.dumps({"train": [study], "val": [], "test": []}), encoding="utf-8")
        return ["prepare", "r2gen", "--annotation", annotation, "--images", tmp_path / "images"]

    return write


def contents(folder):
    """What of a built dataset belongs on the Hub."""
    paths = [folder / "README.md", *(folder / "data").glob("*.parquet")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}


def with_pixels(rows):
    return [{**row, "images": [np.asarray(image).tolist() for image in row["images"]]} for row in rows]


def test_push_dataset_is_private_and_loads(run, hub_server, tmp_path):
    folder = tmp_path / "phantoms"
    options = ["--studies-per-shard", 2, "--output", folder, "--push-to-hub", "org/phantoms"]
    pushed = run("-m", "otdrg.cli", *COMMAND, *options)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"pushed: {hub_server.url}/datasets/org/phantoms\n")
    repo = hub_server.repos["datasets", "org/phantoms"]
    assert repo.private
    # Nothing else: not the Arrow files, nor what names files of this machine.
    assert {"skipped.jsonl", "summary.json", "dataset_dict.json"} <= {path.name for path in folder.iterdir()}
    assert repo.files == contents(folder)
    assert sum(path.startswith("data/train-") for path in repo.files) == 2
    assert not any(str(tmp_path).encode() in content for content in repo.files.values())

    load = "import sys; from datasets import load_dataset; load_dataset('org/phantoms').save_to_disk(sys.argv[1])"
    loading = run("-c", load, tmp_path / "loaded", home="empty")
    assert loading.returncode == 0, loading.stderr
    loaded, expected = load_from_disk(tmp_path / "loaded"), load_from_disk(folder)
    assert list(loaded) == list(expected) == ["train", "validation", "test"]
    for split, rows in expected.items():
        assert loaded[split].features == rows.features
        assert with_pixels(loaded[split]) == with_pixels(rows)


def test_push_complete_build_is_not_built_again(otdrg, hub_server, built):
    before, heads = state(built), []
    for _ in range(2):
        pushed = otdrg(*COMMAND, "--output", built, "--resume", "--push-to-hub", "org/phantoms")
        assert pushed.returncode == 0, pushed.stderr
        heads.append(hub_server.repos["datasets", "org/phantoms"].at("main").id)
    assert state(built) == before
    assert heads[0] == heads[1]
    assert hub_server.repos["datasets", "org/phantoms"].files == contents(built)


def test_push_public_repository_is_public(otdrg, hub_server, built):
    pushed = otdrg(*COMMAND, "--output", built, "--resume", "--push-to-hub", "org/phantoms", "--public")
    assert pushed.returncode == 0, pushed.stderr
    assert not hub_server.repos["datasets", "org/phantoms"].private


def test_push_again_deletes_earlier_shards(otdrg, hub_server, built, tmp_path):
    many = ["--studies-per-shard", "1", "--output", tmp_path / "many"]
    for options in (many, ["--output", built, "--resume"]):
        pushed = otdrg(*COMMAND, *options, "--push-to-hub", "org/phantoms")
        assert pushed.returncode == 0, pushed.stderr
    # `load_dataset` reads every data/train-*.parquet: a shard that stays is a study twice.
    assert hub_server.repos["datasets", "org/phantoms"].files.keys() == contents(built).keys()


def test_push_name_without_owner_uses_the_user(otdrg, hub_server, built):
    pushed = otdrg(*COMMAND, "--output", built, "--resume", "--push-to-hub", "phantoms")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"pushed: {hub_server.url}/datasets/user/phantoms\n")
    assert hub_server.repos["datasets", "user/phantoms"].files == contents(built)


@pytest.mark.parametrize("licence", COLLECTIONS)
def test_push_restricted_licence_is_not_public(otdrg, hub_server, restricted, tmp_path, licence):
    command = [*restricted(licence), "--output", tmp_path / "built", "--push-to-hub", "org/restricted"]
    refused = otdrg(*command, "--public")
    assert refused.returncode == 1
    assert refused.stderr.startswith("otdrg prepare: error: ") and refused.stderr.count("\n") == 1
    assert licence in refused.stderr and "--public" in refused.stderr
    assert hub_server.requests == []
    assert (tmp_path / "built" / "summary.json").is_file()


@pytest.mark.parametrize("public", [True, False])
def test_push_existing_repository_keeps_its_visibility(otdrg, hub_server, restricted, built, tmp_path, public):
    """The client makes no fuss about a public dataset that was to be a private one, nor about the reverse."""
    repo = hub_server.add_repo("datasets", "org/there", {"README.md": b"# Mine\n"}, private=not public)
    command = restricted("CC BY-NC-ND 4.0") if public else [*COMMAND, "--resume", "--public"]
    refused = otdrg(*command, "--output", tmp_path / "new" if public else built, "--push-to-hub", "org/there")
    assert refused.returncode == 1, "studies were put into a public dataset" if public else refused.stdout
    assert refused.stderr.count("\n") == 1 and f"org/there is {'public' if public else 'private'}" in refused.stderr
    assert repo.files == {"README.md": b"# Mine\n"} and repo.private is not public


#: How pushing fails, and what the message says.
FAILURES = {
    "unreachable": (lambda hub: hub.stop(), {}, "refused"),
    "connection cut": (lambda hub: hub.disturb("POST", "/repos/create", cut=0), {}, "disconnected"),
    "wrong token": (lambda hub: None, {"token": "wrong"}, "401 Unauthorized.*Invalid credentials"),
    "no right": (lambda hub: hub.disturb("POST", "/repos/create", status=403), {}, "403 Forbidden"),
    "out of order": (lambda hub: hub.disturb("POST", "/repos/create", status=500), {}, "500 Internal Server Error"),
    "file refused": (lambda hub: hub.disturb("PUT", "^/storage/", times=9, status=403), {}, "parquet.*403 Forbidden"),
    "commit refused": (lambda hub: hub.disturb("POST", "/commit/", status=500), {}, "500 Internal Server Error"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_push_failure_is_one_line_and_keeps_the_dataset(otdrg, hub_server, built, failure):
    disturb, variables, message = FAILURES[failure]
    disturb(hub_server)
    before = state(built)
    command = [*COMMAND, "--output", built, "--resume", "--push-to-hub", "org/phantoms"]
    failed = otdrg(*command, **variables)
    assert failed.returncode == 1
    assert re.fullmatch(f"otdrg prepare: error: .*{message}.*\n", failed.stderr), failed.stderr
    assert "pushed" not in failed.stdout
    assert state(built) == before


def test_push_storage_error_is_retried(otdrg, hub_server, built):
    hub_server.disturb("PUT", "^/storage/", times=2, status=500, Retry_After="0")
    pushed = otdrg(*COMMAND, "--output", built, "--resume", "--push-to-hub", "org/phantoms")
    assert pushed.returncode == 0, pushed.stderr
    assert [request.status for request in hub_server.requests if request.method == "PUT"].count(500) == 2
    assert hub_server.repos["datasets", "org/phantoms"].files == contents(built)


@pytest.mark.parametrize("summary", [None, "", "[]", "{}"])
def test_push_other_folder_is_refused(tmp_path, summary):
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is not a prepared dataset"):
        push_studies(tmp_path, "org/phantoms")


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        ("", "whose licence is not stated"),
        ("cc-by-nc-nd-4.0", "under cc-by-nc-nd-4.0, which forbids publishing"),
        ("CC BY-NC-ND 4.0 International", "forbids publishing"),
        ("PhysioNet Credentialed Health Data License 1.5.1", "forbids publishing"),
        ("Stanford University Dataset Research Use Agreement", "forbids publishing"),
    ],
)
def test_push_licences_are_recognised_by_words(tmp_path, licence, message):
    (tmp_path / "summary.json").write_text(json.dumps({"licences": ["CC0-1.0", licence]}))
    with pytest.raises(ValueError, match=message):
        push_studies(tmp_path, "org/studies", public=True)
