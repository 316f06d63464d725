"""Builds ``libflash_llm.so`` (host core, the operators and, where there is nvcc, the CUDA kernels),
which C++ programs load without Python, and the Python module ``flash_llm._C``, which links to it.

Environment:
    FLASH_LLM_BUILD_CUDA: ``auto`` (default: with CUDA when nvcc and a CUDA build of torch agree on
        the major version), ``1`` (with CUDA or fail) or ``0`` (CPU only). No GPU is needed.
    FLASH_LLM_CUDA_ARCHS: architectures to compile for, ``8.0;9.0a;10.0+PTX;12.0`` by default (code
        for 8.0 runs on 8.6 and 8.9 too, GPUs newer than all of them run the PTX for 10.0), and
        ``8.0+PTX;9.0a`` with an nvcc before 12.8, which has no newer ones.
    MAX_JOBS: number of parallel compilers, the number of CPUs by default.

``python setup.py check_kernels`` reads the built library and fails if a kernel spills on any of its
architectures, or if its tensor core instructions on Hopper wait for each other.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Command, find_packages, setup

ROOT = Path(__file__).resolve().parent
TORCH_PIN = "2.11.0"
BUILD_TOOLS = f'torch=={TORCH_PIN} numpy "setuptools>=77" wheel ninja'

if int(setuptools.__version__.split(".")[0]) < 77:
    # Without build isolation pip does not check `requires` in pyproject.toml, and older versions
    # misread that file.
    raise SystemExit(
        f"flash_llm: building needs setuptools 77 or newer, found {setuptools.__version__}. Run:\n"
        f"    {sys.executable} -m pip install {BUILD_TOOLS}"
    )

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"flash_llm: building needs torch in this environment, and importing it failed: {error}\n"
        "Without --no-build-isolation pip builds in an environment without torch. Run:\n"
        f"    {sys.executable} -m pip install {BUILD_TOOLS}\n"
        f'    {sys.executable} -m pip install --no-build-isolation -e "."'
    ) from error

CORE_SOURCES = [
    "csrc/base/cpu_isa.cpp",
    "csrc/cpu/reference.cpp",
    "csrc/cpu/row_bitmap_avx2.cpp",
    "csrc/cpu/row_bitmap_avx512.cpp",
    "csrc/cpu/row_bitmap_avx512_quantized.cpp",
    "csrc/cpu/row_bitmap_neon.cpp",
    "csrc/cpu/row_bitmap_portable.cpp",
    "csrc/cpu/row_bitmap_spmm.cpp",
    "csrc/cpu/spmm.cpp",
    "csrc/cpu/tiled_csl_spmm.cpp",
    "csrc/format/bitmap.cpp",
    "csrc/format/gather.cpp",
    "csrc/format/packed_format.cpp",
    "csrc/format/packed_header.cpp",
    "csrc/format/prune.cpp",
    "csrc/format/quantized_bitmap.cpp",
    "csrc/format/row_bitmap.cpp",
    "csrc/format/tiled_csl.cpp",
    "csrc/format/value_type.cpp",
    "csrc/plan/bitmap_mma_sync.cpp",
    "csrc/plan/bitmap_rows_sm90.cpp",
    "csrc/plan/bitmap_sm90a.cpp",
    "csrc/plan/cpu.cpp",
    "csrc/plan/device.cpp",
    "csrc/plan/gather.cpp",
    "csrc/plan/kernel_family.cpp",
    "csrc/plan/problem.cpp",
    "csrc/plan/quantized_bitmap.cpp",
    "csrc/plan/quantized_bitmap_sm90a.cpp",
    "csrc/plan/spmm_plan.cpp",
    "csrc/plan/tiled_csl_sm80.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/bitmap/bitmap_pack.cu",
    "csrc/cuda/bitmap/bitmap_sm80.cu",
    "csrc/cuda/bitmap/bitmap_sm90.cu",
    "csrc/cuda/bitmap/bitmap_sm90a.cu",
    "csrc/cuda/bitmap/rows_sm90.cu",
    "csrc/cuda/bitmap/tensor_map.cpp",
    "csrc/cuda/gather/gather_pack.cu",
    "csrc/cuda/gather/gather_sm80.cu",
    "csrc/cuda/gather/gather_sm90.cu",
    "csrc/cuda/launch.cpp",
    "csrc/cuda/prune.cu",
    "csrc/cuda/quantized_bitmap/quantized_bitmap_pack.cu",
    "csrc/cuda/quantized_bitmap/quantized_bitmap_sm80.cu",
    "csrc/cuda/quantized_bitmap/quantized_bitmap_sm90.cu",
    "csrc/cuda/quantized_bitmap/quantized_bitmap_sm90a.cu",
    "csrc/cuda/quantized_bitmap/quantized_bitmap_unpack.cu",
    "csrc/cuda/quantized_bitmap/dense_fp8x.cu",
    "csrc/cuda/tiled_csl/lscd.cu",
    "csrc/cuda/tiled_csl/tiled_csl_pack.cu",
]
OPERATOR_SOURCES = [
    "csrc/torch/autograd.cpp",
    "csrc/torch/checks.cpp",
    "csrc/torch/ops_cpu.cpp",
    "csrc/torch/ops_cuda.cpp",
    "csrc/torch/packed_parts.cpp",
    "csrc/torch/parallel_for.cpp",
    "csrc/torch/schemas.cpp",
]
MODULE_SOURCES = ["csrc/torch/introspect.cpp", "csrc/torch/python_calls.cpp"]
LIBRARY = "libflash_llm"

DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX;12.0"
CUDA_ARCHS_BEFORE_12_8 = "8.0+PTX;9.0a"
MIN_CUDA_ARCH = (8, 0)
# Headers that torch's CUDA headers include; a toolkit with nvcc alone lacks them.
CUDA_HEADERS = ["cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"]


def say(text):
    """Prints a message of this build; pip shows it with -v."""
    print(f"flash_llm: {text}", file=sys.stderr)


def find_nvcc():
    """Returns (CUDA home, nvcc version such as "13.0"), or (None, None)."""
    home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home:  # torch compiles with this nvcc, so no other is tried
        candidates = [f"{home}/bin/nvcc"]
    for nvcc in candidates:
        if nvcc and Path(nvcc).exists():
            said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
            if match := re.search(r"release (\d+\.\d+)", said):
                return Path(nvcc).parent.parent, match.group(1)
    return None, None


def why_not_cuda(mode, home, nvcc_version):
    """Returns the reason why there is no CUDA part, or "" if there is one."""
    torch_cuda = torch.version.cuda
    if mode == "0":
        return "built with FLASH_LLM_BUILD_CUDA=0"
    if nvcc_version is None:
        wanted = f"CUDA {torch_cuda.split('.')[0]}.x" if torch_cuda else "a CUDA toolkit"
        return f"nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda; need {wanted}"
    found = f"nvcc {nvcc_version} was found, but"
    if torch_cuda is None:
        return f"{found} torch {torch.__version__} is a build without CUDA"
    if nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"{found} torch {torch.__version__} was built with CUDA {torch_cuda}"
    missing = [name for name in CUDA_HEADERS if not (home / "include" / name).exists()]
    if missing:
        return f"{found} {home}/include lacks {' '.join(missing)}"
    return ""


def version(text):
    """Returns the numbers of a version such as "13.0"."""
    return tuple(map(int, text.split(".")))


def cuda_archs(nvcc_version):
    """Returns the checked architecture list in the spelling of TORCH_CUDA_ARCH_LIST."""
    knows_blackwell = version(nvcc_version) >= (12, 8)
    default = DEFAULT_CUDA_ARCHS if knows_blackwell else CUDA_ARCHS_BEFORE_12_8
    archs = os.environ.get("FLASH_LLM_CUDA_ARCHS", default).strip().strip(";")
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if not match or (int(match[1]), int(match[2])) < MIN_CUDA_ARCH:
            raise SystemExit(
                "flash_llm: FLASH_LLM_CUDA_ARCHS must be a list such as "
                f'"{DEFAULT_CUDA_ARCHS}" with nothing older than 8.0, got {archs!r}'
            )
    return archs


def string_macro(name, text):
    """Returns a -D flag for a C string; characters special to ninja or the shell become '."""
    plain = re.sub(r"[^A-Za-z0-9 .,:;=+_/()*-]", "'", text)
    return f'-D{name}="{plain}"'


def make_extensions():
    """Decides what to build, prints it, and returns (library, Python module, with CUDA?)."""
    mode = os.environ.get("FLASH_LLM_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(
            f'flash_llm: FLASH_LLM_BUILD_CUDA must be "auto", "0" or "1", got {mode!r}'
        )
    home, nvcc_version = find_nvcc()
    reason = why_not_cuda(mode, home, nvcc_version)
    if mode == "1" and reason:
        raise SystemExit(
            f"flash_llm: FLASH_LLM_BUILD_CUDA=1, but {reason}.\n"
            f"Needed: nvcc and headers of the CUDA major version of torch {torch.__version__}, "
            f"which is CUDA {torch.version.cuda}, with CUDA_HOME pointing at that toolkit. Then:\n"
            f"    FLASH_LLM_BUILD_CUDA=1 {sys.executable} -m pip install --no-build-isolation -e ."
        )
    with_cuda = not reason

    # -fopenmp: at::parallel_for is header code and runs serially without it. torch brings the same
    # libgomp.so.1, so both share one thread pool. -g0 overrides Python's own -g, which is slow.
    cxx = ["-O3", "-std=c++17", "-fopenmp", "-g0", "-Wall", "-Wextra", "-Werror=switch"]
    nvcc = ["-O3", "-std=c++17", "-lineinfo", "--ptxas-options=-v", "-Xcompiler=-Werror=switch"]
    link = ["-fopenmp"]
    sources = CORE_SOURCES + OPERATOR_SOURCES
    if with_cuda:
        archs = cuda_archs(nvcc_version)
        if version(nvcc_version) >= (13, 0):
            # A ninth of the bytes, for a tenth more time.
            nvcc.append("--compress-mode=size")
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        sources += CUDA_SOURCES
        cxx += [
            "-DFLASH_LLM_WITH_CUDA",
            string_macro("FLASH_LLM_NVCC_VERSION", nvcc_version),
        ]
        say(f"building with CUDA {nvcc_version} for {archs}")
    else:
        archs = DEFAULT_CUDA_ARCHS  # for explain_plan
        cxx.append(string_macro("FLASH_LLM_NO_CUDA_REASON", reason))
        say(f"building for the CPU only: {reason}")

    cxx.append(string_macro("FLASH_LLM_CUDA_ARCHS", archs))
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h"))
    operators = make(
        f"flash_llm.{LIBRARY}",
        sources,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=[*link, f"-Wl,-soname,{LIBRARY}.so"],
        depends=headers,
    )
    operators.libraries.remove("torch_python")  # it would need Python in the process
    module = cpp_extension.CppExtension(
        "flash_llm._C",
        MODULE_SOURCES,
        extra_compile_args={"cxx": cxx},
        extra_link_args=[f"-l:{LIBRARY}.so", "-Wl,-rpath,$ORIGIN"],
        depends=headers,
    )
    # Torch's headers cause -Wextra warnings, which are not reported for system headers.
    system_flags = [flag for path in operators.include_dirs for flag in ("-isystem", path)]
    for extension in (operators, module):
        extension.include_dirs = [str(ROOT / "csrc")]
    cxx += system_flags
    nvcc += system_flags
    return operators, module, with_cuda


def find_cuobjdump():
    """Returns the path of cuobjdump, from the toolkit or from triton; None if neither has it."""
    if found := shutil.which("cuobjdump"):
        return found
    home, _ = find_nvcc()
    candidates = [home / "bin" / "cuobjdump"] if home else []
    candidates += [
        Path(entry) / "triton/backends/nvidia/bin/cuobjdump" for entry in sys.path if entry
    ]
    return next((str(path) for path in candidates if path.exists()), None)


def kernel_resources(library, cuobjdump):
    """Returns rows (arch, kernel name, registers, stack bytes, shared bytes) of a built library."""
    # cuobjdump fails on a library without device code, which has no rows.
    said = subprocess.run(
        [cuobjdump, "--dump-resource-usage", library], capture_output=True, text=True
    ).stdout
    rows, arch, name = [], "?", None
    for line in said.splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+?):", line):
            name = match[1]
        elif name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            rows.append((arch, name, *map(int, match.groups())))
            name = None
    names = demangled([row[1] for row in rows])
    return [(row[0], name, *row[2:]) for row, name in zip(rows, names, strict=True)]


def demangled(names):
    """Returns the kernels' demangled names; without c++filt the names as they are."""
    if not (cxxfilt := shutil.which("c++filt")):
        return names
    said = subprocess.run([cxxfilt], input="\n".join(names), capture_output=True, text=True).stdout
    short = re.sub(r"^void |flash_llm::|\(anonymous namespace\)::", "", said, flags=re.MULTILINE)
    return [re.sub(r"\([^()<>]*\)$", "", name) for name in short.splitlines()]


def find_spills(rows):
    """Prints rows of kernel_resources(); returns a line for each kernel that uses a stack."""
    if not rows:
        return ["the library has no kernel"]
    say("arch      registers  stack  shared  kernel")
    for arch, name, registers, stack, shared in rows:
        say(f"{arch:9s} {registers:9d} {stack:6d} {shared:7d}  {name}")
    return [f"{name} ({arch}) spills {stack} bytes" for arch, name, _, stack, _ in rows if stack]


def find_serialized(library, cuobjdump):
    """Returns a line for each kernel whose every wgmma waits for the one before it.

    ptxas makes them wait if other instructions may read the sums meanwhile, and says so only in a
    message (C7514). A kernel otherwise waits for all of its wgmma once in a while.
    """
    products, waits, name = {}, {}, "?"
    command = [cuobjdump, "-sass", "-arch", "sm_90a", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as disassembler:
        for line in disassembler.stdout:
            if "Function :" in line:
                name = line.rpartition(":")[2].strip()
            elif "GMMA." in line:
                products[name] = products.get(name, 0) + 1
            elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
                waits[name] = waits.get(name, 0) + 1
    if not products:
        return ["the library has no wgmma for sm_90a"]
    serialized = [name for name, count in products.items() if 2 * waits.get(name, 0) > count]
    return [f"{name} waits for each wgmma" for name in demangled(serialized)]


OPERATORS, MODULE, WITH_CUDA = make_extensions()


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build_ext that keeps objects between builds and checks for spills after linking."""

    def finalize_options(self):
        super().finalize_options()
        # setuptools compares only time stamps and would miss a change of FLASH_LLM_BUILD_CUDA. With
        # this flag it always runs ninja, which also compares command lines.
        self.force = True
        # pip builds an editable install in a temporary folder. With this permanent one the second
        # build, such as that of README's second command, takes seconds.
        kind = "cuda" if WITH_CUDA else "cpu"
        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}-{kind}"
        self.build_temp = str(ROOT / "build" / tag)

    def get_ext_filename(self, name):
        filename = super().get_ext_filename(name)
        # The library does not depend on the Python version, so its name has no Python tag.
        library = name.rpartition(".")[2] == LIBRARY
        return str(Path(filename).with_name(f"{LIBRARY}.so")) if library else filename

    def build_extensions(self):
        library = self.get_ext_fullpath(OPERATORS.name)
        MODULE.library_dirs.append(str(Path(library).parent))
        super().build_extensions()
        # Only a warning: the code of another nvcc than CI's may spill and is still correct.
        if WITH_CUDA and (cuobjdump := find_cuobjdump()):
            for spill in find_spills(kernel_resources(library, cuobjdump)):
                say(f"WARNING: {spill}")

    def build_extension(self, extension):
        # One folder per extension: ninja forgets targets that its file in a folder no longer names.
        whole = self.build_temp
        self.build_temp = str(Path(whole) / extension.name)
        super().build_extension(extension)
        self.build_temp = whole


class CheckKernels(Command):
    """``setup.py check_kernels``: the check of the code in the library built in place."""

    description = "fail if a kernel spills registers, or if its products wait for each other"
    user_options = []

    def initialize_options(self):
        """Takes no options."""

    def finalize_options(self):
        """Takes no options."""

    def run(self):
        """Runs the check; a CPU-only build, which has no kernels, fails it."""
        cuobjdump = find_cuobjdump()
        if cuobjdump is None:
            raise SystemExit("flash_llm: cuobjdump is neither in the CUDA toolkit nor in triton")
        build = self.get_finalized_command("build_ext")
        build.inplace = True
        library = build.get_ext_fullpath(OPERATORS.name)
        rows = kernel_resources(library, cuobjdump)
        faults = find_spills(rows)
        if any(arch == "sm_90a" for arch, *_ in rows):
            faults += find_serialized(library, cuobjdump)
        if faults:
            raise SystemExit("flash_llm: kernel check failed:\n    " + "\n    ".join(faults))
        say("kernel check: no kernel spills, and no wgmma waits for the one before")


# ninja may be in the virtual environment's bin/, which is on PATH only in an activated environment.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))

setup(
    packages=find_packages(include=["flash_llm", "flash_llm.*"]),
    package_data={"flash_llm": ["py.typed"]},
    ext_modules=[OPERATORS, MODULE],
    cmdclass={"build_ext": BuildExtension, "check_kernels": CheckKernels},
    # The extension works only with this torch, because the C++ interface has no stable ABI.
    install_requires=[
        f"torch=={torch.__version__.split('+')[0]}",
        "numpy",
        "safetensors>=0.4.3",
        "tqdm",
    ],
)
