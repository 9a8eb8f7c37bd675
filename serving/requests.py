"""Requests in the form of OpenAI's chat completions: checked, with their views read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..image_processing_otdrg import is_data_url, read_view
from ..inference.views import MAX_INDICATION, model_input
from ..processing_otdrg import OTDRGProcessor
from .errors import RefusedError
from .gate import Limits

#: Smallest temperature other than 0: logits are divided by it.
_LEAST_TEMPERATURE = 0.01
#: Fields that have no effect on a report.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "reasoning_effort", "verbosity"),
)
#: Fields that are refused unless they ask for nothing.
_NOTHING: dict[str, tuple] = {
    "n": (1,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ImageURL(_Model):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class _ImagePart(_Model):
    type: Literal["image_url"]
    image_url: _ImageURL


class _TextPart(_Model):
    type: Literal["text"]
    text: str


class _Message(_Model):
    role: str
    content: list[Annotated[_ImagePart | _TextPart, Field(discriminator="type")]]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Request(_Model):
    """Fields of a chat completion, and `findings`, which is our own."""

    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    findings: dict[str, str] | None = None

    @field_validator("temperature")
    @classmethod
    def _is_finite_in_sampling(cls, temperature: float | None) -> float | None:
        if temperature and temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"{temperature:g} is not possible: expected 0 or at least {_LEAST_TEMPERATURE}")
        return temperature


@dataclass
class Asked:
    """A study whose report is asked for.

    Args:
        views: pictures resized by the model's image processor.
        indication: text of the message.
        findings: states that condition the report, by finding.
        max_new_tokens: largest number of tokens that the client accepts.
        sampling: `temperature` and `top_p` of `generate`; empty for the server's own way of decoding.
        seed: of sampling.
        stream: whether to send the report while it grows.
        include_usage: whether a stream ends with the number of tokens.
        prompt_tokens: number of tokens of the prompt.
    """

    views: list[Image.Image]
    indication: str | None = None
    findings: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int | None = None
    sampling: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    prompt_tokens: int = 0


def read_request(body: bytes, name: str, processor: OTDRGProcessor, limits: Limits) -> Asked:
    """Check a request and read its views.

    Args:
        body: the JSON of the request.
        name: name of the served model.
        processor: of the model.
        limits: of images.

    Raises:
        RefusedError: the request is not as expected, or a view cannot be read.
    """
    request = _parsed(body)
    if request.model != name:
        raise RefusedError(
            HTTPStatus.NOT_FOUND, f"model {request.model!r}: unknown, expected {name!r}", "model", "model_not_found"
        )
    urls, texts = _parts(request.messages)
    if not urls:
        raise _wrong("no image: expected the views of a study as parts of type 'image_url'", "messages")
    if len(urls) > limits.images:
        raise _wrong(f"{len(urls)} images: expected at most {limits.images}, the views of one study", "messages")
    indication = "\n".join(texts).strip()
    if len(indication) > MAX_INDICATION:
        raise _wrong(
            f"a text of {len(indication):,} characters: expected the indication of the study, at most {MAX_INDICATION}",
            "messages",
        )
    try:
        prompt = processor.encode_text([len(urls)], indication=indication or None)
    except ValueError as error:  # it contains a placeholder of the prompt
        raise _wrong(str(error), "messages") from error
    return Asked(
        views=[_view(url, f"image {number}", processor, limits) for number, url in enumerate(urls, 1)],
        indication=indication or None,
        findings=request.findings or {},
        max_new_tokens=min(filter(None, (request.max_tokens, request.max_completion_tokens)), default=None),
        sampling={"temperature": request.temperature, "top_p": request.top_p or 1.0} if request.temperature else {},
        seed=request.seed,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        prompt_tokens=prompt["input_ids"].shape[1],
    )


def _wrong(message: str, param: str | None = None) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, message, param)


def _parsed(body: bytes) -> _Request:
    try:
        text = body.decode()
        fields = json.loads(text)
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError as error:  # such as half of a pair of surrogates
        raise _wrong("the request has characters that are not Unicode: expected JSON in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _wrong("the request is not JSON: expected a chat completion") from error
    if not isinstance(fields, dict):
        raise _wrong(f"the request is a JSON {type(fields).__name__}: expected an object")
    for name in _WITHOUT_EFFECT:
        fields.pop(name, None)
    for name, nothing in _NOTHING.items():
        value: Any = fields.pop(name, None)
        if value is not None and value not in nothing:
            raise _wrong(f"{name}: not supported, expected {json.dumps(nothing[0])} or nothing", name)
    try:
        return _Request.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _wrong(f"{place}: {first['msg']}", str(first["loc"][0])) from error


def _parts(messages: list[_Message]) -> tuple[list[str], list[str]]:
    """The URLs of images and the texts of the only message."""
    if len(messages) != 1 or messages[0].role != "user":
        roles = ", ".join(message.role for message in messages) or "none"
        raise _wrong(
            f"messages of {roles}: expected one of the user, with the views of a study; this model follows no "
            "instructions and holds no conversation",
            "messages",
        )
    parts = messages[0].content
    urls = [part.image_url.url for part in parts if isinstance(part, _ImagePart)]
    return urls, [part.text for part in parts if isinstance(part, _TextPart)]


def _view(url: str, name: str, processor: OTDRGProcessor, limits: Limits) -> Image.Image:
    """Read a view, and keep a picture of the model's size."""
    if not is_data_url(url):
        raise _wrong(f"{name}: not a data URL, expected data:image/png;base64,...; nothing is fetched", "messages")
    if len(url) * 3 // 4 > limits.image_bytes:
        raise _wrong(f"{name}: more than {limits.image_bytes:,} bytes, expected a smaller image", "messages")
    try:
        return model_input(processor, read_view(url, processor.max_image_pixels, name))
    except (ValueError, ImportError) as error:
        raise _wrong(str(error), "messages") from error


__all__ = ["Asked", "read_request"]
