"""The few functions of NCCL and of CUDA's driver that a broadcast needs, by ctypes: no torch, no CuPy."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from weights_bridge.errors import TransportError

UNIQUE_ID_BYTES = 128
_UINT8, _FLOAT32, _SUM = 1, 7, 0  # of nccl.h, the same in all versions 2.x
_NON_BLOCKING = 1  # of cuda.h: a stream that does not wait for the default stream


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * UNIQUE_ID_BYTES)]


class Nccl:
    """NCCL's library. Calls raise TransportError with NCCL's own words.

    A call that rendezvouses with other processes blocks until they come; `abort` from another thread ends it.
    """

    _SIGNATURES = {
        "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
        "ncclCommInitRank": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int],
        "ncclAllReduce": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
                          ctypes.c_void_p, ctypes.c_void_p],
        "ncclBroadcast": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
                          ctypes.c_void_p, ctypes.c_void_p],
        "ncclCommAbort": [ctypes.c_void_p],
    }  # fmt: skip

    def __init__(self):
        """
        Raises:
          TransportError: there is no NCCL here.
        """
        try:
            self._library = ctypes.CDLL(_nccl_path())
        except OSError as error:
            raise TransportError(
                "the nccl transport finds no libnccl.so.2; it comes with jax[cuda13], or in the wheel nvidia-nccl-cu13"
            ) from error
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        for name, arguments in self._SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments

    def unique_id(self) -> bytes:
        """A new group's name, by which its members find each other."""
        identifier = _UniqueId()
        self._call("ncclGetUniqueId", ctypes.byref(identifier))
        return bytes(identifier)

    def join(self, world_size: int, unique_id: bytes, rank: int) -> ctypes.c_void_p:
        """This process's communicator, on its current CUDA device. Returns when all have joined."""
        communicator = ctypes.c_void_p()
        identifier = _UniqueId.from_buffer_copy(unique_id)
        self._call("ncclCommInitRank", ctypes.byref(communicator), world_size, identifier, rank)
        return communicator

    def sum_one(self, address: int, communicator: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        """All-reduce of one float32 in place."""
        self._call("ncclAllReduce", address, address, 1, _FLOAT32, _SUM, communicator, stream)

    def broadcast(self, address: int, nbytes: int, communicator: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        """Rank 0's bytes to all."""
        self._call("ncclBroadcast", address, address, nbytes, _UINT8, 0, communicator, stream)

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """Frees the communicator without asking the others."""
        self._call("ncclCommAbort", communicator)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise TransportError(f"{name}: {self._library.ncclGetErrorString(status).decode()}")


class Cuda:
    """One device by CUDA's driver, in the context that JAX's runtime uses too, and one stream on it."""

    def __init__(self, ordinal: int):
        """
        Args:
          ordinal: of the device among those that this process sees.

        Raises:
          TransportError: there is no driver.
        """
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportError("the nccl transport finds no CUDA driver (libcuda.so.1)") from error
        self._library.cuMemcpyDtoDAsync_v2.argtypes = [
            ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p,
        ]  # fmt: skip
        device, self._context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.use()
        self._call("cuStreamCreate", ctypes.byref(self.stream), _NON_BLOCKING)

    def use(self) -> None:
        """Makes the device this thread's current one, for NCCL too."""
        self._call("cuCtxSetCurrent", self._context)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """From address to address on devices, in the order of the stream."""
        self._call("cuMemcpyDtoDAsync_v2", target, source, nbytes, self.stream)

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._call("cuStreamSynchronize", self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            message = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(message))
            raise TransportError(f"{name}: {(message.value or b'unknown error').decode()}")


def _nccl_path() -> str:
    """The wheel's library, which JAX loads too, else the loader's."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "lib", "libnccl.so.2")
        if path.is_file():
            return str(path)
    return "libnccl.so.2"
