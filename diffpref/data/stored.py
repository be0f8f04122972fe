"""Where an encoded image lies: in the row, in a file below the data folder, or in an archive. Read when it is used.

A data file must not decide which local files are opened: a path leads only to regular files below the folder of the data, after
links and `..` are followed.
"""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from diffpref.data.images import DEFAULT_LIMITS, ImageError


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file named by a row, relative to the first of `roots` that has it."""

    roots: tuple[Path, ...]
    name: str

    def path(self) -> Path:
        """The file, all links followed.

        Raises:
            ImageError: the name is no relative path, leads out of the data folder, or there is no such file.
        """
        problem = path_problem(self.name)
        if problem is not None:
            raise ImageError(problem)
        for root in self.roots:
            try:
                found = (root / self.name).resolve(strict=True)
                below, kind = found.is_relative_to(root.resolve()), found.stat().st_mode
            except (OSError, ValueError, RuntimeError):  # missing, too long a name, a loop of links
                continue
            if not below:
                raise ImageError(f"outside the data folder: {self.name!r} is a link out of it; copy the file into the folder")
            if not stat.S_ISREG(kind):
                raise ImageError(f"not a file: {self.name!r}")
            return found
        raise ImageError(f"no such file: {self.name!r}")

    def read(self) -> bytes:
        """The bytes of the file. Raises ImageError if there is none that may be read."""
        path = self.path()
        try:
            size = path.stat().st_size
            if size > DEFAULT_LIMITS.max_bytes:
                raise ImageError(f"file too large: {size} bytes, at most {DEFAULT_LIMITS.max_bytes}")
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {self.name!r}, {error.strerror}") from error

    def signature(self) -> tuple[int, int] | None:
        """Size and time of change, or None for a file that cannot be used: what tells that a file is still the same."""
        try:
            found = self.path().stat()
        except (ImageError, OSError):
            return None
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """A member of an uncompressed archive, by its place."""

    archive: Path
    member: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the member. Raises ImageError if they are too many or the archive has changed."""
        if self.size > DEFAULT_LIMITS.max_bytes:
            raise ImageError(f"file too large: {self.size} bytes, at most {DEFAULT_LIMITS.max_bytes}")
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"cannot be read: {str(self.archive)!r}, {error.strerror}") from error
        if len(data) != self.size:
            raise ImageError(f"truncated: {self.archive.name!r} ends early")
        return data


def path_problem(name: object) -> str | None:
    """Why `name` cannot be the path of an image, judged without a look at the disk, or None."""
    if name is None:
        return "null"
    if not isinstance(name, str):
        return f"not a path: {type(name).__name__}"
    if not name or "\0" in name:
        return "not a path: empty or with a null character"
    if "://" in name or name.startswith(("data:", "file:")):
        return f"a URL: {name[:80]!r}; download the images and give paths relative to the data file"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("\\"):
        return f"absolute path: {name[:80]!r}; give it relative to the data file"
    depth = 0
    for part in PurePosixPath(name).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return f"outside the data folder: {name[:80]!r}"
    return None


def image_bytes(value: object) -> bytes:
    """The encoded bytes of a stored image: bytes, a place to read from, or what the Image feature of `datasets` gives.

    Raises:
        ImageError: anything else, or a place without a readable image.
    """
    if isinstance(value, FileImage | ArchivedImage):
        return value.read()
    if isinstance(value, dict):
        inner = value.get("bytes")
        if inner is None and value.get("path"):
            raise ImageError("only a path, no bytes: store the encoded image in the row")
        value = inner
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")  # decoded already, so without loss
        return buffer.getvalue()
    if value is None:
        raise ImageError("null")
    if not isinstance(value, bytes):
        raise ImageError(f"not bytes: {type(value).__name__}")
    return value
