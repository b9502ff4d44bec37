"""transformers' models import torchvision, of which a CPU environment with vLLM may have the build for CUDA."""

from weights_bridge.vllm.cpu_compat import cuda_builds

cuda_builds.tolerate()
