"""Lets CPU engines live with torchvision, torchaudio and torchcodec that were built for CUDA.

PyPI has them for CUDA only. Beside a CPU build of torch their compiled parts cannot load: importing torchvision dies
over operators that this part would have declared, the other two die at once, and transformers' Qwen-VL classes and
vLLM's model registry go down with them. Nothing here calls those operators, so declaring them is enough; sound and
video, which nothing here needs, are hidden. Where the builds match, this does nothing.

Plain Python, importing nothing heavy: it runs at the start of every process of an engine.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import mmap
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType

_CUDA_LIBRARY = "libc10_cuda.so"
_HIDDEN = ("torchaudio", "torchcodec")
_OPERATORS = (
    ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)


class _Torchvision(importlib.abc.MetaPathFinder):
    """Asked first for every module; acts once, when torchvision is imported, and finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator, signature in _OPERATORS:
                # Who only asks where torchvision is gets here too, and may ask again.
                if not hasattr(torch.ops.torchvision, operator):
                    torch.library.define(f"torchvision::{operator}", signature)
        return None


def tolerate() -> None:
    """Call before torchvision or transformers' models are imported; once is enough, more does no harm."""
    torch = _folder("torch")
    if torch is None or (torch / "lib" / _CUDA_LIBRARY).exists():
        return
    if "torchvision" not in sys.modules and _needs_cuda("torchvision"):
        if not any(isinstance(finder, _Torchvision) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Torchvision())
    for package in _HIDDEN:
        if package not in sys.modules and _needs_cuda(package):
            sys.modules[package] = None  # to Python, a module that is not there


def _folder(package: str) -> pathlib.Path | None:
    spec = importlib.machinery.PathFinder.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return pathlib.Path(next(iter(locations))) if locations else None


def _needs_cuda(package: str) -> bool:
    """Whether a compiled part of the package is linked against torch's CUDA half."""
    folder = _folder(package)
    if folder is None:
        return False
    for library in [*folder.glob("*.so"), *folder.glob("lib/*.so")]:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_CUDA_LIBRARY.encode()) >= 0:
                return True
    return False
