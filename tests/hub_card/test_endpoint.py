"""What the handler of an Inference Endpoint refuses; test_push.py runs it as an endpoint does."""

from pathlib import Path

import otdrg
import pytest
from otdrg.hub_card.endpoint.handler import MAX_IMAGES, _checked, _view

ROOT = Path(otdrg.__file__).parent
ENDPOINT = ROOT / "hub_card" / "endpoint"


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
        ({"max_new_tokens": 513}, "max_new_tokens=513: expected a whole number from 1 to 512"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number from 1 to 512"),
        ({"num_beams": 0}, "num_beams=0: expected a whole number from 1 to 8"),
        ({"temperature": 1e-40}, "temperature=1e-40: expected a number from 0.01 to 2"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ({"num_beams": True}, "num_beams=True: expected a whole number"),
        ({"temperature": float("nan")}, "temperature=nan: expected a number from 0.01 to 2"),
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
