"""JAX parameters as vLLM's `WeightSource`, for learners that have vLLM beside them: it opens vLLM's own trainers.

    source = JaxWeightSource(lambda: state.params, read_layout(folder), dtype="bfloat16")
    trainer = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
    trainer.send_weights()

Needs vLLM and torch in the learner's process; the transports of this package do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups

from weights_bridge.entries import Entry
from weights_bridge.stream import TensorStream
from weights_bridge.torch_view import as_tensor


class JaxWeightSource(WeightSource):
    """Each pass streams the parameters as they are then, a layer's tensors together, a tied model's head included.

    Tensors are views of JAX's memory on GPUs, of the host's elsewhere, and valid until the next one is asked for.
    Parameters over several processes: each of them iterates.
    """

    def __init__(self, params: Callable[[], Mapping[str, Any]], entries: Sequence[Entry], *, dtype: Any = None):
        """
        Args:
          params: gives the parameter tree of today; called at each pass.
          entries: the model's table.
          dtype: of the engines; None is each leaf's own.

        Raises:
          CheckpointError: parameters and table do not fit together.
        """
        self._params, self._dtype = params, dtype
        self._entries = list(entries)
        names = [spec.name for spec in self._stream().specs]
        place = {name: number for number, name in enumerate(sum(layerwise_groups(names), []))}
        # vLLM's order, which it checks: what belongs to no layer, and came after the first, goes last.
        self._entries.sort(key=lambda entry: place[entry.hf_name])

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of what a pass yields, in its order."""
        return [ParamMeta(spec.name, getattr(torch, spec.dtype.name), spec.shape) for spec in self._stream().specs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        stream = self._stream()
        on_gpu = jax.default_backend() == "gpu"
        return ((name, as_tensor(array)) for name, array in (stream.on_device() if on_gpu else stream))

    def _stream(self) -> TensorStream:
        return TensorStream(self._params(), self._entries, dtype=self._dtype, for_engines=True)
