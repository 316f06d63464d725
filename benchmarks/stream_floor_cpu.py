"""The stream floor of a CPU: the time of a plain read of some bytes, by code that g++ compiles.

The code belongs to the benchmark and not to the library, so it is compiled into a shared library of
its own, for the CPU that runs it.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("stream_floor_cpu.cpp")


class CpuStreamFloor:
    """Reads tensors with the number of threads that torch has.

    Raises:
        RuntimeError: there is no g++.
    """

    def __init__(self) -> None:
        if shutil.which("g++") is None:
            raise RuntimeError("the stream floor of a CPU needs g++ on PATH")
        self._folder = tempfile.TemporaryDirectory()  # kept while the library is loaded
        library = Path(self._folder.name) / "stream_floor_cpu.so"
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared"]
        subprocess.run(["g++", *flags, "-fPIC", str(SOURCE), "-o", str(library)], check=True)
        self._read = ctypes.CDLL(str(library)).stream_read
        self._read.restype = ctypes.c_uint64

    def read(self, tensor: Tensor) -> int:
        """Read a contiguous CPU tensor once; up to 255 bytes at its end are left out."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("the stream floor reads contiguous CPU tensors")
        pointer, words = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes // 8)
        return int(self._read(pointer, words, torch.get_num_threads()))
