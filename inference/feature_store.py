"""Features of encoded views on disk, mapped into memory, which a run that is killed leaves whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

#: Views in a shard: what a run that is killed has to encode again.
SHARD_VIEWS = 256


class FeatureStore:
    """View features (image_tokens, D), of any type, by a digest of what they were made of.

    A shard is a safetensors file of `features` (views, image_tokens, D) and `digests` (views, 16) that is written under
    another name and renamed when it is whole. Shards are only ever added, so that several processes can share a folder.

    Args:
        folder: of the shards; it is made where there is none.

    Raises:
        ValueError: a shard is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._shards: dict[Path, torch.Tensor | None] = {}
        self.refresh()

    def __getstate__(self) -> dict:
        # A process that loads data maps the shards itself: pickled, their features would be copied.
        return {**self.__dict__, "_shards": dict.fromkeys(self._shards)}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __getitem__(self, digest: bytes) -> torch.Tensor:
        """(image_tokens, D), mapped from disk: a view of the file, to be read and not to be written."""
        path, row = self._places[digest]
        if self._shards[path] is None:
            self._shards[path] = _read(path, "features")
        return self._shards[path][row]

    def refresh(self) -> None:
        """Take in shards that were written since, by other processes too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._shards:
                digests = _read(path, "digests").numpy()
                self._shards[path] = None
                for row, digest in enumerate(digests):
                    self._places.setdefault(digest.tobytes(), (path, row))

    def add(self, digests: Sequence[bytes], features: Sequence[torch.Tensor]) -> None:
        """Write a shard of N views, digests of 16 bytes and features (image_tokens, D).

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        name = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
        shard = save(
            {
                "features": torch.stack(list(features)),
                "digests": torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(-1, 16),
            }
        )
        path = self.folder / f"{name}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(shard)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _read(path: Path, name: str) -> torch.Tensor:
    # On CPU the tensor is a view of the file, which the operating system reads as it is needed.
    try:
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete this file, and its views will be encoded again"
        ) from error


__all__ = ["SHARD_VIEWS", "FeatureStore"]
