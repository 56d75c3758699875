"""Builds the op libraries: CPU kernels always, CUDA kernels where there are CUDA and a .cu source.

`setup.py build_runner` builds the program that runs exported models without Python, `check_cuda`
compiles the CUDA kernels without a GPU.

Everything else about the package is in pyproject.toml.
"""

import os
import re
import shlex
import shutil
import subprocess
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar

import torch
from setuptools import Command, Extension, find_packages, setup
from setuptools.errors import CompileError, ExecError, OptionError
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
    library_paths,
)

ROOT = Path(__file__).parent
RUNNER = (ROOT / "csrc" / "runner").resolve()
# One binary for torch 2.11 and later: only the stable ABI of that version is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
STANDARD = "-std=c++20"
# An exported model names the version of the op library that it needs; a library says its own.
(VERSION,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
# No -march: the sources choose instruction sets at run time. -g0: Python's own flags may ask for
# debug information, which makes the library ten times larger.
CXX_FLAGS = ["-O3", "-g0", STANDARD, "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# The stable ABI gives out streams only where USE_CUDA is defined. -lineinfo costs nothing at run
# time and lets a profiler point at lines.
NVCC_FLAGS = ["-O3", STANDARD, "-lineinfo", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]


def csrc(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"csrc/{pattern}"))


def system_headers(device: str) -> list[str]:
    """Flags that keep warnings to our own sources: torch's headers count as system headers."""
    return [flag for path in include_paths(device) for flag in ("-isystem", path)]


# With ninja every build looks at every header by itself; this serves builds without it.
DEPENDS = [*csrc("*.h"), "setup.py", "pyproject.toml"]

# Neither library is a Python module: both are loaded with torch.ops.load_library, so that they
# also load in a process without Python.
extensions = [
    CppExtension(
        "retro_ops._C",
        csrc("*.cpp"),
        depends=DEPENDS,
        extra_compile_args={
            "cxx": [
                *CXX_FLAGS,
                STABLE_ABI,
                f'-DRETRO_OPS_VERSION="{VERSION}"',
                *system_headers("cpu"),
            ]
        },
        py_limited_api=True,
    )
]
cuda_sources = csrc("*.cu") if torch.version.cuda else []
if cuda_sources and not CUDA_HOME:
    warnings.warn("retro_ops: no nvcc, set CUDA_HOME; building without CUDA kernels", stacklevel=1)
elif cuda_sources:
    extensions.append(
        CUDAExtension(
            "retro_ops._C_cuda",
            cuda_sources,
            depends=DEPENDS,
            extra_compile_args={"cxx": [], "nvcc": [*NVCC_FLAGS, STABLE_ABI]},
            py_limited_api=True,
        )
    )


class BuildLibraries(BuildExtension):
    """Keeps objects in `build/`, so that in-place, editable and wheel builds compile what changed.

    pip would have setuptools build in a new temporary folder each time. Objects of different torch
    versions are kept apart, since a compiler's dependency list leaves system headers out; objects
    of the two libraries too, since an op's .cpp and .cu share their stem.
    """

    def build_extension(self, ext: Extension) -> None:
        self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}" / ext.name)
        super().build_extension(ext)


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers; nvcc may be a link or a script far from them."""
    homes = [CUDA_HOME, "/usr/local/cuda", str(Path(torch.__file__).parents[1] / "nvidia/cu13")]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_runtime_api.h").is_file():
            return Path(home) / "include"
    return None


class BuildRunner(Command):
    """Compiles `csrc/runner/` for the torch that is installed, which must be there when it runs.

    With `--main` a file of your own takes the place of its `main.cpp`: another program that runs
    packages. Where torch and the compiler have CUDA, they record CUDA graphs.
    """

    description = "build the program that runs exported models without Python"
    user_options = [  # noqa: RUF012  (setuptools')
        ("output=", "o", "the program to write"),
        ("main=", "m", "the file with its main(), instead of csrc/runner/main.cpp"),
    ]

    def initialize_options(self) -> None:
        self.main = str(RUNNER / "main.cpp")
        self.output = str(ROOT / "build" / "retro_runner")

    def finalize_options(self) -> None:
        self.main, self.output = str(Path(self.main).resolve()), str(Path(self.output).resolve())
        if not Path(self.main).is_file():
            raise OptionError(f"--main must be a C++ source with main(), there is no {self.main}")

    def run(self) -> None:
        libraries, cuda = ["torch", "torch_cpu", "c10"], []
        if torch.version.cuda:
            libraries += ["torch_cuda", "c10_cuda"]
            # torch's libraries find those of CUDA when they are loaded.
            cuda = ["-Wl,--allow-shlib-undefined"]
            headers = cuda_headers()
            if headers is None:
                message = "retro_ops: no CUDA headers, set CUDA_HOME; the runner records no graphs"
                warnings.warn(message, stacklevel=1)
            else:
                cuda += ["-DRETRO_RUNNER_CUDA", "-isystem", str(headers)]
        folders = library_paths("cpu")
        Path(self.output).parent.mkdir(parents=True, exist_ok=True)
        sources = [path for path in RUNNER.glob("*.cpp") if path.name != "main.cpp"]
        ours = Path(self.main) == RUNNER / "main.cpp"
        strict = ["-Wall", "-Wextra", "-Werror"] if ours else []
        command = [
            *shlex.split(os.environ.get("CXX", "c++")),
            *("-O2", "-g0", STANDARD, *strict, *system_headers("cpu")),
            *cuda,
            *(f"-I{RUNNER}", self.main, *map(str, sorted(sources))),
            *("-o", self.output),
            *(f"-L{folder}" for folder in folders),
            *(f"-Wl,-rpath,{folder}" for folder in folders),
            # The programs of a package look for symbols in what is loaded already.
            "-Wl,--no-as-needed",
            *(f"-l{library}" for library in libraries),
            "-ldl",
        ]
        subprocess.run(command, cwd=ROOT, check=True)


class CheckCuda(Command):
    """Compiles the CUDA sources for the oldest GPUs that they are for and for the H100.

    It takes nvcc, and any torch; no GPU. Names the kernels for which ptxas spills registers.
    """

    description = "compile the CUDA sources on a machine without a GPU"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        # torch's CUDA_HOME is None in a build without CUDA, whatever the environment says.
        homes = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
        nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ["PATH"]]))
        if nvcc is None:
            raise ExecError("check_cuda compiles with nvcc, and there is none in PATH or CUDA_HOME")
        command = [nvcc, *NVCC_FLAGS, STABLE_ABI, *system_headers("cpu"), "-Werror=all-warnings"]
        command += ["-Xptxas=-v", "-gencode=arch=compute_80,code=sm_80"]
        command += ["-gencode=arch=compute_90,code=sm_90", "-c", "-o", os.devnull]

        def compile_one(source: str) -> tuple[str, bool, str]:
            done = subprocess.run(
                [*command, source],
                cwd=ROOT,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return source, done.returncode == 0, done.stdout

        spills = r"entry function '(\S+)' for '(\S+)'\n.*\n.* ([1-9]\d*) bytes spill stores"
        failed = []
        with ThreadPool(os.cpu_count()) as pool:
            for source, compiles, output in pool.imap_unordered(compile_one, csrc("*.cu")):
                if not compiles:
                    failed.append(source)
                print(source, "compiles" if compiles else f"fails:\n{output}")
                for kernel, gpu, count in re.findall(spills, output):
                    print(f"  {kernel} for {gpu} spills {count} bytes")
        if failed:
            raise CompileError(f"these do not compile: {', '.join(failed)}")


packages = find_packages(include=["retro_ops", "retro_ops.*"])
package_dir = {}
# Rooms at the top of the checkout that are installed inside the package.
for room in ("models", "benchmarks"):
    if (ROOT / room).is_dir():
        package_dir[f"retro_ops.{room}"] = room
        packages += [f"retro_ops.{room}"]
        packages += [f"retro_ops.{room}.{name}" for name in find_packages(str(ROOT / room))]

setup(
    packages=packages,
    package_dir=package_dir,
    include_package_data=False,
    package_data={
        "retro_ops": ["py.typed"],
        "retro_ops.models": [f"recall/**/*.{kind}" for kind in ("json", "md", "safetensors")],
    },
    ext_modules=extensions,
    cmdclass={
        "build_ext": BuildLibraries,
        "build_runner": BuildRunner,
        "check_cuda": CheckCuda,
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
