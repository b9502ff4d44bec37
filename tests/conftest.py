"""What all tests share: compiled programs, and a torchvision that a CPU environment with vLLM can import."""

import os
from pathlib import Path

# Processes of one test run compile the same programs; the next run finds them on disk. Before JAX is imported.
PROGRAMS = Path(__file__).parents[1] / "build" / "compiled_for_tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Programs here are small and run a few times: compiling them costs more than running them, and optimising most of that.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from weights_bridge.vllm.cpu_compat import cuda_builds  # noqa: E402

# transformers' models import torchvision, whose build for CUDA may be what stands beside vLLM on a CPU.
cuda_builds.tolerate()
