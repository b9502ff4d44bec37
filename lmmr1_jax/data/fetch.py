"""Where an image's bytes come from: relative and absolute paths, `file://`, `data:` URIs, and http(s) when allowed."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from lmmr1_jax.data.faults import BROKEN_IMAGE, FORBIDDEN_PATH, MISSING_IMAGE, ImageFault

_SHOWN = 120  # characters of an address in a message: a data: URI is as long as its image


@dataclasses.dataclass(frozen=True)
class FetchPolicy:
    """From where images may come.

    Attributes:
      root: files are read only from below this folder, symbolic links followed first; None reads any file.
      allow_http: whether http(s) addresses are fetched.
      http_seconds: time limit of one fetch.
      http_bytes: size limit of one fetch.
    """

    root: Path | None = None
    allow_http: bool = False
    http_seconds: float = 20.0
    http_bytes: int = 64_000_000


def open_reference(reference: str, base: Path, policy: FetchPolicy) -> IO[bytes]:
    """Opens what an image's address names; the caller closes it.

    Args:
      reference: the address as the prompt has it.
      base: the folder that relative paths start from.
      policy: what is allowed.

    Raises:
      ImageFault: `missing_image`, `broken_image` (a data: URI that cannot be decoded) or `forbidden_path`.
    """
    scheme, colon, rest = reference.partition(":")
    scheme = scheme.lower() if colon and scheme.isalnum() and len(scheme) > 1 else ""
    if scheme == "data":
        return io.BytesIO(_data_uri(rest))
    if scheme in ("http", "https"):
        if not policy.allow_http:
            raise ImageFault(FORBIDDEN_PATH, f"{shown(reference)}: http(s) is not allowed (data.allow_http)")
        return io.BytesIO(_http(reference, policy))
    if scheme == "file":
        path = _file_uri(reference)
    elif scheme and rest.startswith("//"):
        raise ImageFault(FORBIDDEN_PATH, f"{shown(reference)}: no image is read from {scheme}: addresses")
    else:
        path = Path(reference)
    return _open_file(reference, base / path, policy)


def shown(reference: str) -> str:
    """An address short enough for a message."""
    return reference if len(reference) <= _SHOWN else reference[:_SHOWN] + "..."


def _file_uri(reference: str) -> Path:
    parts = urllib.parse.urlsplit(reference)
    if parts.netloc not in ("", "localhost"):
        raise ImageFault(FORBIDDEN_PATH, f"{shown(reference)}: a file on another host")
    # Not `parts.path`: unquoted '?' and '#' are common in file names that were never meant as URIs.
    path = reference[len("file:") :]
    if path.startswith("//"):
        path = path[2 + len(parts.netloc) :]
    quoted, plain = Path(urllib.parse.unquote(path)), Path(path)
    return plain if plain != quoted and _exists(plain) else quoted


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _open_file(reference: str, path: Path, policy: FetchPolicy) -> IO[bytes]:
    try:
        resolved = path.resolve()
        if policy.root is not None and not resolved.is_relative_to(policy.root.resolve()):
            raise ImageFault(FORBIDDEN_PATH, f"{shown(reference)}: outside {policy.root} (data.image_root)")
        if not resolved.is_file():  # a pipe or a device would be read for ever
            raise ImageFault(MISSING_IMAGE, f"{shown(reference)}: no such file")
        return open(resolved, "rb")
    except (OSError, ValueError, RuntimeError) as error:  # unreadable; a NUL in the path; a loop of links
        cause = getattr(error, "strerror", None) or error
        raise ImageFault(MISSING_IMAGE, f"{shown(reference)}: {cause}") from None


def _data_uri(rest: str) -> bytes:
    head, comma, body = rest.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        body = urllib.parse.unquote_to_bytes(body)
        if not head.lower().endswith(";base64"):
            return body
        body = b"".join(body.split()).replace(b"-", b"+").replace(b"_", b"/")
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageFault(BROKEN_IMAGE, f"data:{shown(head)}: the URI cannot be decoded: {error}") from None


def _http(reference: str, policy: FetchPolicy) -> bytes:
    deadline = time.monotonic() + policy.http_seconds
    opener = urllib.request.OpenerDirector()  # http(s) alone: a redirect to ftp: or file: must not be followed
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(reference, headers={"User-Agent": "lmmr1_jax"})
        with opener.open(request, timeout=policy.http_seconds) as response:
            body = bytearray()
            # read1 returns what has arrived, so that a server that drips bytes cannot outlast the deadline.
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > policy.http_bytes:
                    raise ImageFault(MISSING_IMAGE, f"{shown(reference)}: more than {policy.http_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ImageFault(MISSING_IMAGE, f"{shown(reference)}: over {policy.http_seconds:g} seconds")
            return bytes(body)
    except ImageFault:
        raise
    except Exception as error:  # urllib lets through whatever sockets, TLS and http.client raise
        raise ImageFault(MISSING_IMAGE, f"{shown(reference)}: {error}") from None
