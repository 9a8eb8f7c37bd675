"""The handler of an Inference Endpoint, run as the endpoint does: without the package, in the folder of the model."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import otdrg
import pytest
from otdrg import ReportGenerationPipeline
from otdrg.hub_card.endpoint.handler import MAX_IMAGES, _checked, _view
from PIL import Image

ROOT = Path(otdrg.__file__).parent
ENDPOINT = ROOT / "hub_card" / "endpoint"
FEW = {"max_new_tokens": 8, "num_beams": 1}

RUN = """
hide("otdrg")
import base64, importlib.util, io, json
from PIL import Image

folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
found = []
for line in sys.stdin:
    data = json.loads(line)
    if data.get("as_image"):
        data = {"inputs": Image.open(io.BytesIO(base64.b64decode(data["as_image"]))), "parameters": data["parameters"]}
    try:
        found.append(handler(data))
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def coded(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_handler_gives_the_pipelines_records_without_the_package(build_model, view, hide, tmp_path):
    model, processor = build_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "handler.py").write_bytes((ENDPOINT / "handler.py").read_bytes())
    first, second = coded(view(0)), coded(view(1))
    steered = {"findings": {"edema": "positive"}, **FEW}
    requests = [
        {"inputs": first, "parameters": FEW},
        {"inputs": f"data:image/png;base64,{first}", "parameters": FEW},
        {"as_image": first, "parameters": FEW},
        {"inputs": [first, second], "parameters": {"indication": "Cough.", **FEW}},
        {"inputs": {"images": [first, second], "indication": "Cough."}, "parameters": FEW},
        {"inputs": first, "parameters": steered},
        {"inputs": base64.b64encode(b"The lungs are clear.").decode()},
        {"inputs": "radiograph.png"},
        {"inputs": first, "parameters": {"findings": {"edema": "present"}}},
    ]
    lines = "".join(f"{json.dumps(request)}\n" for request in requests)
    done = subprocess.run(
        [sys.executable, "-c", hide + RUN, str(tmp_path)], input=lines, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    pipe = ReportGenerationPipeline(model=model, processor=processor)
    one = pipe(view(0), **FEW)
    two = pipe({"images": [view(0), view(1)], "indication": "Cough."}, **FEW)
    for got, expected in zip(found, [one, one, one, two, two, pipe(view(0), **steered)], strict=False):
        assert [record["generated_text"] for record in got] == [record["generated_text"] for record in expected]
        states = {name: finding["state"] for name, finding in expected[0]["findings"].items()}
        assert {name: finding["state"] for name, finding in got[0]["findings"].items()} == states
    assert re.match("data URL: not an image, expected PNG", found[6])
    assert re.match("data URL: the data URL is not base64", found[7])
    assert "present" in found[8]


def test_handler_wrong_view_or_parameter_is_one_line():
    for view, message in (
        ("https://example.org/view.png", "image 1 is a URL: expected base64 or a data URL, nothing is fetched"),
        ("file:///etc/passwd", "image 1 is a URL"),
        ("", "image 1 is empty"),
        (None, "image 1 is a NoneType: expected base64"),
        (7, "image 1 is a int"),
    ):
        with pytest.raises(ValueError, match=message):
            _view(view, "image 1")
    for parameters, message in (
        ({"return_heatmaps": True}, "unknown parameter 'return_heatmaps': expected one of indication, findings"),
        ({"max_new_tokens": 513}, "max_new_tokens=513: expected a whole number from 0 to 512"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ({"num_beams": True}, "num_beams=True: expected a whole number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number from 0 to 2"),
        ({"findings": ["edema"]}, "findings is a list: expected dict"),
        ({"indication": "x" * 501}, "the indication has 501 characters: expected at most 500"),
    ):
        with pytest.raises(ValueError, match=message):
            _checked(parameters)
    assert _checked({"num_beams": 2, "seed": None}) == {"num_beams": 2}
    assert MAX_IMAGES == 4


def test_endpoint_requirements_match_the_package():
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the package is installed without its pyproject.toml")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (ENDPOINT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert f'"{line}"' in project
