"""Features of encoded views in memory-mapped files that stay intact if a process is killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

#: Views in a shard, which is the most that a killed run has to encode again.
SHARD_VIEWS = 256


class FeatureStore:
    """View features (tokens, D) of any type, by the digest of the view.

    A shard is a safetensors file of `features` (views, tokens, D) and `digests` (views, 16) that is written under
    another name and renamed when it is complete. Shards are only added, so that several processes can share a folder.

    Args:
        folder: of the shards; created if need be.

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
        # Processes that load data map the shards themselves: pickling would copy the features.
        return {**self.__dict__, "_shards": dict.fromkeys(self._shards)}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __getitem__(self, digest: bytes) -> torch.Tensor:
        """(tokens, D), a read-only view of the mapped file."""
        path, row = self._places[digest]
        if self._shards[path] is None:
            self._shards[path] = _read(path, "features")
        return self._shards[path][row]

    def refresh(self) -> None:
        """Find shards that were written since, also by other processes."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._shards:
                digests = _read(path, "digests").numpy()
                self._shards[path] = None
                for row, digest in enumerate(digests):
                    self._places.setdefault(digest.tobytes(), (path, row))

    def add(self, digests: Sequence[bytes], features: Sequence[torch.Tensor]) -> None:
        """Write a shard of N views, digests of 16 bytes and features (tokens, D).

        Raises:
            OSError: it cannot be written, for instance because the disk is full.
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
    # On a CPU the tensor is a view of the file, which the operating system reads when it is needed.
    try:
        with safe_open(path, "pt") as shard:
            return shard.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete this file, and its views will be encoded again"
        ) from error


__all__ = ["SHARD_VIEWS", "FeatureStore"]
