"""Handler of a Hugging Face Inference Endpoint, which runs it in the folder of the model.

    {"inputs": "<base64>"}
    {"inputs": ["<base64>", "<base64>"], "parameters": {"indication": "cough", "max_new_tokens": 100}}
    {"inputs": {"images": ["data:image/png;base64,..."], "indication": "cough"}}

The images are the views of one study. Nothing is fetched: URLs and paths are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import pipeline

#: Most views of a study, and longest indication in characters.
MAX_IMAGES, MAX_INDICATION = 4, 500
#: Numbers that a request may set, with their largest value: whole ones, and others.
WHOLE = {
    "max_new_tokens": 512,
    "min_new_tokens": 512,
    "num_beams": 8,
    "candidates": 64,
    "top_k": 1000,
    "no_repeat_ngram_size": 100,
}
NUMBERS = {**WHOLE, "temperature": 2, "top_p": 1, "guidance_scale": 10, "repetition_penalty": 10, "length_penalty": 10}
#: Their smallest values, if not 0; logits are divided by the temperature and the penalty.
LEAST = {"max_new_tokens": 1, "num_beams": 1, "temperature": 0.01, "repetition_penalty": 0.01}
#: Other parameters.
OTHERS = {"indication": str, "findings": dict, "do_sample": bool}


class EndpointHandler:
    """Writes the report of a study.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = ""):
        dtype = torch.bfloat16 if torch.accelerator.is_available() else "auto"
        self.pipe = pipeline("image-to-text", model=path, dtype=dtype, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Write the report of the study in a request.

        Args:
            data: `inputs`, one view or a list of views (a base64 text, a data URL, bytes or a PIL image), or a
                dictionary of `images` and `indication`; and `parameters` of the pipeline, see `NUMBERS` and `OTHERS`.

        Returns:
            A list of one dictionary: `generated_text`, `complete` and `findings`.

        Raises:
            ValueError: wrong input; one line, which the endpoint returns with status 400.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError("no inputs: expected {'inputs': an image in base64 or a list of them}")
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters is a {type(parameters).__name__}: expected an object of names and values")
        parameters = dict(parameters)
        if isinstance(inputs, dict):
            unknown = inputs.keys() - {"images", "image", "indication"}
            if unknown:
                raise ValueError(f"inputs has {sorted(map(str, unknown))[0]!r}: expected images and indication")
            if inputs.get("indication") is not None:
                parameters["indication"] = inputs["indication"]
            inputs = inputs.get("images", inputs.get("image"))
        views = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if not 1 <= len(views) <= MAX_IMAGES:
            raise ValueError(f"{len(views)} images: expected 1 to {MAX_IMAGES}, the views of one study")
        study = {"images": [_view(view, f"image {number}") for number, view in enumerate(views, 1)]}
        return self.pipe(study, **_checked(parameters))


def _view(view: Any, name: str) -> Any:
    """A view as the pipeline reads it: a text becomes a data URL, so that it is not read as a path or URL."""
    if isinstance(view, str):
        if not view:
            raise ValueError(f"{name} is empty: expected base64")
        if view[:5].lower() == "data:":
            return view
        if "://" in view[:20]:
            raise ValueError(f"{name} is a URL: expected base64 or a data URL, nothing is fetched")
        return f"data:image/*;base64,{view}"
    if isinstance(view, (bytes, bytearray)) or type(view).__module__.partition(".")[0] == "PIL":
        return view
    raise ValueError(f"{name} is a {type(view).__name__}: expected base64 or a data URL")


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are given, each of its type and within its limit."""
    parameters = {name: value for name, value in parameters.items() if value is not None}
    for name, value in parameters.items():
        if name not in NUMBERS and name not in OTHERS:
            raise ValueError(f"unknown parameter {name!r}: expected one of {', '.join([*OTHERS, *NUMBERS])}")
        if name in OTHERS and not isinstance(value, OTHERS[name]):
            raise ValueError(f"{name} is a {type(value).__name__}: expected {OTHERS[name].__name__}")
        if name in NUMBERS:
            kinds, least = int if name in WHOLE else (int, float), LEAST.get(name, 0)
            if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= NUMBERS[name]:
                kind = "whole number" if name in WHOLE else "number"
                raise ValueError(f"{name}={value!r}: expected a {kind} from {least} to {NUMBERS[name]}")
    if len(parameters.get("indication", "")) > MAX_INDICATION:
        number = len(parameters["indication"])
        raise ValueError(f"the indication has {number:,} characters: expected at most {MAX_INDICATION}")
    return parameters
