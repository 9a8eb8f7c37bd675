"""An LLM on a server with OpenAI's API (vLLM, llama.cpp, `transformers serve`...), for the labeler `llm`."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..runtime.printable import one_line
from .llm_prompt import Prompt

if TYPE_CHECKING:
    import openai

    from .llm import Keep

#: Environment variable of the key, as other clients of this API have it.
KEY = "OPENAI_API_KEY"

#: Retries of a request that is refused for now (429, 5xx) or lost, with back-off: about 40 seconds in all.
_HTTP_RETRIES = 8
#: Of the first request, which shows whether URL, key and model are right: about 2 seconds.
_FIRST_HTTP_RETRIES = 2

_LONGEST_DETAIL = 200
_HINTS = {
    401: f"expected a key in the environment variable {KEY}",
    403: f"expected a key in the environment variable {KEY}",
    404: "expected a URL that ends in /v1, and the name of a model on the server",
    429: "use a smaller concurrency, or continue later",
}


class Endpoint:
    """Asks an LLM on a server, many sentences at a time; the arguments are those of [`LLMLabeler`].

    Answers are limited to the JSON schema if the server supports it. `huggingface_hub.InferenceClient` is not used: it
    does not retry, rewrites the JSON schema for servers other than the Hub's, and refuses any request when
    `HF_HUB_OFFLINE` is set.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        prompt: Prompt,
        concurrency: int,
        timeout: float,
        retries: int,
        max_new_tokens: int,
    ):
        url = urlsplit(str(endpoint))
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError("endpoint: expected a URL such as http://localhost:8000/v1, without a password")
        try:
            import openai  # noqa: F401
        except ModuleNotFoundError:
            raise ImportError("the option endpoint needs openai: pip install 'otdrg[endpoint]'") from None
        self.endpoint, self.model, self.prompt = str(endpoint), model, prompt
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.max_new_tokens = max_new_tokens
        self._key = os.environ.get(KEY)
        schema = {"name": "findings", "schema": prompt.schema()}
        #: Ways to ask for JSON, until the first request shows which of them the server accepts.
        self._formats: list[dict[str, Any]] = [
            {"response_format": {"type": "json_schema", "json_schema": schema}},
            {"response_format": {"type": "json_object"}},
            {},
        ]
        self._reached = False

    def ask(self, sentences: list[str], keep: Keep) -> None:
        """As [`AskedLLM.ask`].

        Raises:
            ConnectionError: the server cannot be reached, or refuses every request; the message says why.
        """
        from anyio.from_thread import start_blocking_portal

        # A thread of its own, because a notebook's has a loop already. An interruption cancels the requests.
        with start_blocking_portal() as portal:
            portal.call(self._ask, sentences, keep)

    async def _ask(self, sentences: list[str], keep: Keep) -> None:
        import openai

        waiting = iter(sentences)

        async def work() -> None:
            for sentence in waiting:
                keep(sentence, await self._answer(client, sentence))

        options = {"base_url": self.endpoint, "api_key": self._key or "none", "timeout": self.timeout}
        async with openai.AsyncOpenAI(**options, max_retries=_HTTP_RETRIES) as client:
            try:
                if not self._reached:
                    sentence = next(waiting)
                    keep(sentence, await self._answer(client.with_options(max_retries=_FIRST_HTTP_RETRIES), sentence))
                await asyncio.gather(*(work() for _ in range(self.concurrency)))
            except openai.APIError as error:
                raise ConnectionError(self._reason(error)) from error

    async def _answer(self, client: openai.AsyncOpenAI, sentence: str) -> list[int] | None:
        """Ids of the 13 states; None if no answer is valid, or the server refuses this sentence."""
        for attempt in range(self.retries + 1):
            text = await self._write(client, sentence, attempt)
            if text is None:
                return None
            if (states := self.prompt.parse(text)) is not None:
                return states
        return None

    async def _write(self, client: openai.AsyncOpenAI, sentence: str, attempt: int) -> str | None:
        """What the LLM writes, with temperature 0 in the first attempt; None if the sentence is refused (too long)."""
        import openai

        for place, answer_format in enumerate(formats := self._formats):
            try:
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=self.prompt.chat(sentence),
                    max_tokens=self.max_new_tokens,
                    temperature=0.7 if attempt else 0.0,
                    seed=attempt,
                    **answer_format,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                if place + 1 < len(formats):
                    continue
                if not self._reached:
                    raise
                return None
            choices = getattr(reply, "choices", None)
            if not choices and not self._reached:
                raise ConnectionError(f"{self.endpoint}: the answer is not that of an OpenAI-compatible server")
            self._formats, self._reached = [answer_format], True
            return (choices[0].message.content if choices else None) or ""
        return None

    def _reason(self, error: openai.APIError) -> str:
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"{self.endpoint}: no answer within {self.timeout:g} seconds"
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            detail = one_line(body.get("message") or body.get("detail") or error.response.text or error.message)
            if self._key:  # some servers repeat a wrong key
                detail = detail.replace(self._key, "***")
            hint = _HINTS.get(error.status_code)
            return (
                f"{self.endpoint}: HTTP {error.status_code} ({detail[:_LONGEST_DETAIL]}){f', {hint}' if hint else ''}"
            )
        return f"{self.endpoint}: cannot be reached ({one_line(error.__cause__ or error)})"
