"""Engines on CPUs beside packages that were built for CUDA: `cuda_builds` says what is wrong with those.

This folder is put on PYTHONPATH, so that its `sitecustomize` prepares every process that the engine starts.
"""

from __future__ import annotations

import os
from pathlib import Path

from weights_bridge.vllm.cpu_compat import cuda_builds


def activate() -> None:
    """Prepares this process and those that it starts; call before torchvision or transformers' models are imported."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    cuda_builds.tolerate()
