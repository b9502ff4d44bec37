"""A tensor over an array: the same bits at the same place, for as long as the tensor lives."""

import gc
import warnings
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from weights_bridge.torch_view import as_tensor  # noqa: E402

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def random_bits(dtype, shape=(5, 7, 3)) -> np.ndarray:
    """Every kind of number, subnormal ones and NaNs among them."""
    size = np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8).view(dtype)


def bits_of(tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_over_a_jax_array_has_its_bits_and_its_address(dtype):
    array = jax.device_put(random_bits(dtype))
    tensor = as_tensor(array)
    assert bits_of(tensor) == np.asarray(array).tobytes()
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tuple(tensor.shape) == array.shape and str(tensor.dtype) == f"torch.{np.dtype(dtype).name}"


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_over_a_numpy_array_has_its_bits_and_its_address_and_warns_of_nothing(dtype, writable):
    array = random_bits(dtype)
    array.flags.writeable = writable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = as_tensor(array)
    assert bits_of(tensor) == array.tobytes()
    assert tensor.data_ptr() == array.ctypes.data
    assert tuple(tensor.shape) == array.shape and str(tensor.dtype) == f"torch.{np.dtype(dtype).name}"


def test_a_tensor_keeps_the_memory_of_its_array_alive():
    array = jnp.full((512, 512), 3.0) + 0
    alive, tensor = weakref.ref(array), as_tensor(array)
    del array
    gc.collect()
    assert alive() is None
    others = [jax.block_until_ready(jnp.zeros((512, 512)) + number) for number in range(20)]
    assert tensor.data_ptr() not in {other.unsafe_buffer_pointer() for other in others}
    assert torch.equal(tensor.cpu(), torch.full((512, 512), 3.0))


def test_a_tensor_does_not_change_when_its_array_is_donated():
    add_one = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = jnp.full((64, 64), 3.0) + 0
    tensor = as_tensor(array)
    later = jax.block_until_ready(add_one(array))
    assert float(later[0, 0]) == 4.0 and torch.equal(tensor.cpu(), torch.full((64, 64), 3.0))


def test_a_tensor_keeps_the_memory_of_a_numpy_array_alive():
    array = np.full((512, 512), 3.0, ml_dtypes.bfloat16)
    tensor = as_tensor(array)
    del array
    gc.collect()
    others = [np.zeros((512, 512), ml_dtypes.bfloat16) for _ in range(20)]
    assert tensor.data_ptr() not in {other.ctypes.data for other in others}
    assert torch.equal(tensor.cpu(), torch.full((512, 512), 3.0, dtype=torch.bfloat16))
