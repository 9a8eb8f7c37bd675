"""Studies as they are typed and listed."""

import json

import pytest
from otdrg.inference.listing import ListedStudy, listed_studies, read_lines, typed_findings, typed_studies


def listed(*lines, indication=None, findings=None):
    return listed_studies(lines, "list.txt", indication, findings or {})


def test_listed_studies_tabs_separate_views():
    one, two = listed("a view.png\tlateral.png\n", "", "other.png\r\n", indication="cough")
    assert one == ListedStudy("a view.png + lateral.png", ("a view.png", "lateral.png"), "cough")
    assert two == ListedStudy("other.png", ("other.png",), "cough")


def test_listed_studies_object_fields_have_precedence():
    one, two = listed(
        json.dumps(
            {"id": "s1", "images": ["a.png", "b.png"], "indication": "fall", "findings": {"Edema": "Uncertain"}}
        ),
        '{"images": "c.png", "id": null}',
        indication="cough",
        findings={"edema": "positive", "fracture": "negative"},
    )
    assert one == ListedStudy("s1", ("a.png", "b.png"), "fall", {"edema": "unclear", "fracture": "negative"})
    assert two == ListedStudy("c.png", ("c.png",), "cough", {"edema": "positive", "fracture": "negative"})


def test_typed_findings_any_spelling_is_known():
    typed = typed_findings(["Pleural Effusion=Positive", "LUNG_OPACITY=uncertain"])
    assert typed == {"pleural_effusion": "positive", "lung_opacity": "unclear"}
    with pytest.raises(ValueError, match="--findings edema=negative: edema is given twice"):
        typed_findings(["Edema=positive", "edema=negative"])


def test_typed_studies_duplicate_is_refused():
    with pytest.raises(ValueError, match=r"--study a.png \+ b.png is given twice"):
        typed_studies([["a.png", "b.png"], ["c.png"], ["a.png", "b.png"]], None, {})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png", "", "a.png"], "list.txt, line 3: 'a.png' is in line 1 too"),
        (['{"images": '], r"list.txt, line 1: no JSON \("),
        (['{"image": "a.png"}'], "unknown key 'image', expected some of id, images, indication, findings"),
        (['{"id": "a"}'], "images: expected the path of a view, or a list of paths"),
        (['{"images": []}'], "images: expected the path"),
        (['{"images": ["a.png", 3]}'], "images: expected the path"),
        (['{"images": "a.png", "id": 3}'], "id is 3, expected a string"),
        (['{"images": "a.png", "findings": "No edema."}'], "findings is 'No edema.', expected an object such as"),
        (['{"images": "a.png", "findings": {"oedema": "positive"}}'], "line 1: unknown finding 'oedema'"),
        (["", " "], "list.txt lists no study"),
        (["a.png", "l\udce9on.png"], r"list.txt, line 2: images 'l\\udce9on.png': cannot be encoded as UTF-8"),
        (['{"images": "a.png", "id": "l\\udce9on"}'], r"line 1: id 'l\\udce9on': cannot be encoded as UTF-8"),
    ],
)
def test_listed_studies_wrong_line_is_named(lines, message):
    with pytest.raises(ValueError, match=message) as error:
        listed(*lines)
    assert "\n" not in str(error.value)


def test_listed_studies_spaces_between_views_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"line 1: the views are separated by spaces, expected tabs"):
        listed("a.png b.png")


def test_read_lines_wrong_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--studies nowhere: cannot be read \(No such file or directory\), expected"):
        read_lines("nowhere")
    (tmp_path / "list").write_bytes(b"a.png\n\xff\xfe")
    with pytest.raises(ValueError, match="list, line 2: not UTF-8 text"):
        read_lines(str(tmp_path / "list"))


def test_listed_study_url_with_password_is_named_without_it():
    (study,) = typed_studies([["https://user:secret@host.example/a.png?size=1"]], None, {})
    assert study.id == "https://host.example/a.png?size=1"
    assert study.images == ("https://user:secret@host.example/a.png?size=1",)
    assert study.asked()["images"] == ["https://host.example/a.png?size=1"]
