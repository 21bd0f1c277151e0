"""A disk that can be made too small."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

PAGE = 4096


class Disk:
    """A file system in memory, whose size can be changed. Skips the test where none can be mounted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(folder)], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip("needs to mount a file system (root)")

    def resize(self, pages: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", str(self.folder)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
