"""The files of a Space: the page, and the package, because a Space cannot install it from a package index."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_PAGE = Path(__file__).with_name("space")
#: Folders of the package that the page needs.
_ROOMS = ("evaluation", "hub_card", "inference", "labelers", "metrics", "runtime", "studies", "training")
_KINDS = (".py", ".yaml", ".json")
#: The script in the package's folder.
_SCRIPT = "train_hf.py"
#: Model id in app.py and README.md, to be replaced.
_PLACEHOLDER = "org/otdrg"


def space_files(model_id: str) -> dict[str, bytes | Path]:
    """Collect the files of a Space that shows a model.

    Returns:
        For each path in the Space its content, or the file that holds it: app.py, requirements.txt, README.md and, in
        the folder otdrg, the package without tests and documentation.

    Raises:
        ValueError: `model_id` is not an id such as "org/otdrg".
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise ValueError(f"model id {model_id!r}: expected an id on the Hub, such as {_PLACEHOLDER}")
    files: dict[str, bytes | Path] = {"requirements.txt": _PAGE / "requirements.txt"}
    for name in ("app.py", "README.md"):
        files[name] = (_PAGE / name).read_text(encoding="utf-8").replace(_PLACEHOLDER, model_id).encode()
    for path in (*_PACKAGE.glob("*.py"), *(path for room in _ROOMS for path in (_PACKAGE / room).rglob("*"))):
        if path.suffix in _KINDS and path.name != _SCRIPT:
            files[f"otdrg/{path.relative_to(_PACKAGE).as_posix()}"] = path
    return files
