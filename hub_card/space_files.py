"""What a Space is made of: the page, and the package, which is on no index that a Space could install it from."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_PAGE = Path(__file__).with_name("space")
#: The folders of the package with what the page runs on.
_ROOMS = ("evaluation", "hub_card", "inference", "labelers", "metrics", "runtime", "studies", "training")
_KINDS = (".py", ".yaml", ".json", ".css")
#: Scripts beside the package's modules.
_SCRIPTS = ("train_hf.py", "quickstart.py")
#: The model that stands in the templates.
_STAND_IN = "org/otdrg"


def space_files(model_id: str) -> dict[str, bytes | Path]:
    """The files of a Space that shows a model.

    Args:
        model_id: the model's id on the Hub, such as "org/otdrg".

    Returns:
        For each path in the Space its content, or the file that has it: app.py, requirements.txt, README.md and, in
        the folder otdrg, the package's code and the data that it reads, without tests and documentation.

    Raises:
        ValueError: it is no id.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise ValueError(f"model id {model_id!r}: expected one of the Hub, such as {_STAND_IN}")
    files: dict[str, bytes | Path] = {"requirements.txt": _PAGE / "requirements.txt"}
    for name in ("app.py", "README.md"):
        files[name] = (_PAGE / name).read_text(encoding="utf-8").replace(_STAND_IN, model_id).encode()
    for path in (*_PACKAGE.glob("*.py"), *(path for room in _ROOMS for path in (_PACKAGE / room).rglob("*"))):
        if path.suffix in _KINDS and path.name not in _SCRIPTS:
            files[f"otdrg/{path.relative_to(_PACKAGE).as_posix()}"] = path
    return files


__all__ = ["space_files"]
