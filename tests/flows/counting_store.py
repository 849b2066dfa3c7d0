"""A store of files that counts what is asked of it."""

from __future__ import annotations

from collections import Counter

from sd3core.data.store import FileStore


class CountingStore(FileStore):
    """Keeps what is asked of it, by method, and how many bytes came."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()
        self.whole: list[str] = []
        self.bytes = 0

    def get(self, path: str) -> bytes:
        self.whole.append(path)
        return self._counted("get", super().get(path))

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        return self._counted("get_range", super().get_range(path, offset, length))

    def size(self, path: str) -> int:
        self.asked["size"] += 1
        return super().size(path)

    def list(self, prefix: str = ""):
        assert not prefix.startswith(("datasets", "towers")), prefix
        self.asked["list"] += 1
        return super().list(prefix)

    def folders(self, prefix: str = "") -> list[str]:
        self.asked["folders"] += 1
        return super().folders(prefix)

    def _counted(self, method: str, data: bytes) -> bytes:
        self.asked[method] += 1
        self.bytes += len(data)
        return data
