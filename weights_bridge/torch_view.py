"""jax.Array and NumPy -> torch.Tensor over the same memory, wherever torch can reach it."""

from __future__ import annotations

import warnings

import jax
import ml_dtypes
import numpy as np
import torch

_SHARED_PLATFORMS = ("cpu", "gpu")


def as_tensor(array: jax.Array | np.ndarray) -> torch.Tensor:
    """A tensor of equal bits, dtype and shape.

    No copy is made of arrays in a CPU's or a GPU's memory: the tensor lies where the array lies, and keeps that memory
    alive when the array is gone. It must only be read: JAX's arrays never change, and NumPy's may be read-only. While
    it lives, a program that is given the array to overwrite (donation) works on a copy. From other devices (TPU) the
    array is copied to the host.

    Args:
      array: on one device, or whole on each of several; or NumPy, bfloat16 by ml_dtypes included.

    Raises:
      ValueError: the array is spread over several devices.
    """
    if isinstance(array, jax.Array):
        count = len(array.sharding.device_set)
        if count > 1:
            if not array.is_fully_replicated:
                raise ValueError(f"an array spread over {count} devices is no tensor; gather it first")
            array = array.addressable_data(0)
        (device,) = array.devices()
        if device.platform in _SHARED_PLATFORMS:
            return torch.from_dlpack(array)
    return _of_numpy(np.asarray(array))


def _of_numpy(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:  # torch knows no such dtype of NumPy
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
