"""Which text a report is scored against: the field's two reference protocols.

`full` takes references as they are. `r2gengpt` cuts them to so many tokens of a tokenizer, as R2GenGPT (Wang et al.,
Meta-Radiology 2023) does in evaluation, too: 60 on IU X-Ray, 100 on MIMIC-CXR. Its scores do not compare with those of
`full`, nor with its own under another tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PROTOCOLS = ("full", "r2gengpt")

#: Tokens of a reference in R2GenGPT's evaluation, by the cleaning that belongs to the data.
R2GENGPT_TOKENS = {"r2gen_iu": 60, "r2gen_mimic": 100}


def add_protocol_arguments(parser) -> None:
    """The arguments, of a parser or a group of one, that [`reference_tokens`] reads."""
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="full", help="r2gengpt truncates the true reports (default: full)"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="for r2gengpt: Hub id or folder")
    parser.add_argument(
        "--reference-tokens", type=int, metavar="N", help="for r2gengpt (default: 60 for r2gen_iu, 100 for r2gen_mimic)"
    )


def reference_tokens(options: argparse.Namespace, cleaning: str) -> int | None:
    """To how many tokens true reports are cut, by the arguments that were typed; None under protocol `full`.

    Raises:
        ValueError: an argument too many or too few.
    """
    if options.protocol == "full":
        for name in ("tokenizer", "reference_tokens"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} goes with --protocol r2gengpt: leave it out")
        return None
    if options.tokenizer is None:
        raise ValueError("--protocol r2gengpt truncates by a tokenizer: expected --tokenizer, a Hub id or a folder")
    tokens = R2GENGPT_TOKENS.get(cleaning) if options.reference_tokens is None else options.reference_tokens
    if tokens is None:
        raise ValueError("--protocol r2gengpt: expected --reference-tokens, 60 for IU X-Ray or 100 for MIMIC-CXR")
    return tokens


def truncate_to_tokens(texts: Sequence[str], tokenizer: str, tokens: int) -> list[str]:
    """Each text up to the end of its `tokens`-th token; shorter ones as they are.

    Args:
        texts: cleaned reports.
        tokenizer: Hub id or folder of one of `AutoTokenizer`'s, a fast one: it has to say where a token ends.
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
            f"tokenizer {tokenizer}: {type(loaded).__name__} does not say where tokens end, expected a fast one"
        )
    ends = loaded(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        text if len(places) <= tokens else text[: places[tokens - 1][1]]
        for text, places in zip(texts, ends, strict=True)
    ]


__all__ = ["PROTOCOLS", "R2GENGPT_TOKENS", "add_protocol_arguments", "reference_tokens", "truncate_to_tokens"]
