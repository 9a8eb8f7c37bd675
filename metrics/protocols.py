"""Reference protocols: the text that a report is scored against.

`full` takes references as they are. `r2gengpt` cuts them to a number of tokens, 60 on IU X-Ray and 100 on MIMIC-CXR, as
the evaluation of R2GenGPT (Wang et al., Meta-Radiology 2023) does. Its scores cannot be compared with those of `full`,
nor with those of another tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

PROTOCOLS = ("full", "r2gengpt")

#: Tokens of a reference in R2GenGPT's evaluation, by the cleaning that belongs to the data.
R2GENGPT_TOKENS = {"r2gen_iu": 60, "r2gen_mimic": 100}


def check_one_section(sectioned: bool) -> None:
    """Refuse `r2gengpt` for true reports of several sections, of which it would cut the last; raises `ValueError`."""
    if sectioned:
        raise ValueError("protocol r2gengpt would cut the impression off true reports with sections: expected full")


def truncate_to_tokens(texts: Sequence[str], tokenizer: str, tokens: int) -> list[str]:
    """Cut each text after its `tokens`-th token.

    Args:
        texts: cleaned reports.
        tokenizer: Hub id or folder of a fast tokenizer, which gives the positions of tokens.
        tokens: how many are kept.

    Raises:
        ValueError: `tokens` below 1, no such tokenizer, or a slow one.
    """
    if tokens < 1:
        raise ValueError(f"reference tokens: {tokens}, expected at least 1")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"tokenizer {tokenizer}: {why}; expected a Hub id or a folder with a tokenizer") from None
    if not loaded.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer}: {type(loaded).__name__} gives no positions of tokens, expected a fast one"
        )
    ends = loaded(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        text if len(places) <= tokens else text[: places[tokens - 1][1]]
        for text, places in zip(texts, ends, strict=True)
    ]


__all__ = ["PROTOCOLS", "R2GENGPT_TOKENS", "check_one_section", "truncate_to_tokens"]
