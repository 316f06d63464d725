"""The stream floor: the time of a plain read of some bytes, by a kernel that nvcc compiles.

The kernel belongs to the benchmark and not to the library, so it is not part of the extension: it
is compiled from ``stream_floor.cu`` into a shared library of its own.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("stream_floor.cu")
# Resident blocks of 256 threads per SM: all that fit, so one wave covers the GPU.
BLOCKS_PER_SM = 8


def find_nvcc() -> str:
    """Return the path of nvcc.

    Raises:
        RuntimeError: it is not on PATH, in CUDA_HOME or in /usr/local/cuda.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if candidate and Path(candidate).exists():
            return candidate
    raise RuntimeError(
        f"the stream floor needs nvcc, which is neither on PATH nor in {home}/bin; "
        "set CUDA_HOME to a CUDA toolkit"
    )


def compile_library(folder: str, arch: str) -> Path:
    """Compile the kernel for ``arch`` (such as ``sm_90``) and return the library's path.

    Raises:
        RuntimeError: nvcc is missing or fails; the message contains its output.
    """
    library = Path(folder) / f"stream_floor_{arch}.so"
    command = [find_nvcc(), "-O3", "-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
    done = subprocess.run(
        [*command, "-o", str(library), str(SOURCE)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {SOURCE}:\n{done.stderr}")
    return library


class StreamFloor:
    """Reads tensors at the speed of memory; build one per process."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        with tempfile.TemporaryDirectory() as folder:  # the mapping outlives the file
            self._library = ctypes.CDLL(str(compile_library(folder, f"sm_{major}{minor}")))
        self._library.stream_read.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._blocks = BLOCKS_PER_SM * properties.multi_processor_count
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(self, buffer: Tensor) -> None:
        """Read all bytes of a contiguous CUDA tensor on the current stream.

        Raises:
            ValueError: the address or the length is not a multiple of 16 bytes.
            RuntimeError: the launch failed.
        """
        num_bytes = buffer.numel() * buffer.element_size()
        if buffer.data_ptr() % 16 or num_bytes % 16 or not buffer.is_contiguous():
            raise ValueError(f"buffer must be 16-byte vectors, got {num_bytes} bytes")
        error = self._library.stream_read(
            buffer.data_ptr(),
            num_bytes,
            self._sink.data_ptr(),
            self._blocks,
            torch.cuda.current_stream().cuda_stream,
        )
        if error:
            raise RuntimeError(f"stream_read failed with cudaError {error}")
