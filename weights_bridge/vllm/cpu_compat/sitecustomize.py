"""Python runs this at the start of every process that has this folder on PYTHONPATH: an engine's, and its children's.

vLLM inspects models in a process of its own, which no import in the engine's process reaches.
"""

import importlib.machinery
import importlib.util
import pathlib
import sys

_here = pathlib.Path(__file__).resolve()
_spec = importlib.util.spec_from_file_location("_cuda_builds", _here.with_name("cuda_builds.py"))
_cuda_builds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_cuda_builds)
_cuda_builds.tolerate()

# Only one sitecustomize is run: hand on to the one that this folder hides.
_others = [folder for folder in sys.path if pathlib.Path(folder or ".").resolve() != _here.parent]
_hidden = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
