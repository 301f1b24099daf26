"""Builds the native libraries by calling CMake; how they are built is written in CMakeLists.txt alone.

Environment:
    NORMKERN_CUDA=0|1      CUDA kernels off or on; default: on where torch is a CUDA build and nvcc is found
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0+PTX"; default: the GPUs of this machine, else one of each generation
    MAX_JOBS               parallel compilers; default: one per core
    NORMKERN_TORCH_DIR     the torch directory to build against, where it is not found by itself
    NORMKERN_CMAKE_ARGS    more arguments for CMake
    DEBUG=1                a debug build
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_CMAKE = (3, 22)


def failure(sentence):
    return SystemExit(f"normkern: {sentence}")


def has_cmake():
    if not shutil.which("cmake"):
        return False
    version = re.search(r"(\d+)\.(\d+)", subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout)
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_CMAKE


def has_compiler():
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name)


def find_torch():
    """The torch that the package will run with, found without importing it.

    torch is not among the build requirements: an isolated build would download another one, gigabytes of it. The
    stable ABI needs only headers and one library, and inside pip's isolated build sysconfig still names the
    directories of the environment that is installed into.
    """
    paths = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]
    if environment := os.environ.get("VIRTUAL_ENV"):
        paths.append(f"{environment}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
    candidates = [Path(path, "torch") for path in paths]
    if spec := importlib.util.find_spec("torch"):
        candidates.insert(0, Path(spec.submodule_search_locations[0]))
    if chosen := os.environ.get("NORMKERN_TORCH_DIR"):
        candidates = [Path(chosen)]
    for directory in candidates:
        if (directory / "version.py").exists() and (directory / "include").is_dir():
            return directory
    raise failure(
        "PyTorch was not found for the build; first `pip install torch`, then `pip install --no-build-isolation .` "
        "with setuptools, pybind11 and cmake installed, or set NORMKERN_TORCH_DIR to its directory (.../torch)"
    )


def cuda_option():
    value = os.environ.get("NORMKERN_CUDA", "")
    options = {"": "AUTO", "0": "OFF", "1": "ON"}
    if value not in options:
        raise failure(f"NORMKERN_CUDA must be 0 or 1; got {value!r}")
    return options[value]


def configure(arguments):
    """Runs CMake; where it stops with a sentence of ours, that sentence is the last thing said."""
    process = subprocess.Popen(["cmake", *arguments], stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        sys.stderr.write(line)
        said.append(line)
    if process.wait() == 0:
        return
    sentence = re.search(r"CMake Error[^\n]*\n\s+normkern: (.*?)\n(?:\n|Call Stack)", "".join(said), re.DOTALL)
    raise failure(
        " ".join(sentence[1].split()) if sentence else "CMake could not configure the build; its messages are above"
    )


class CMakeBuild(build_ext):
    def run(self):
        destination = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "normkern"
        directory = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        cuda = cuda_option()
        if not has_compiler():
            if cuda == "ON":
                raise failure("NORMKERN_CUDA=1 needs a C++ compiler and none was found; install g++ or set CXX")
            self.remove_old(destination)
            self.warn(
                "normkern: no C++ compiler was found, so the package is installed without its kernels and runs on "
                "plain PyTorch; install g++ or set CXX, then install again"
            )
            return
        self.compile(directory, cuda)
        self.remove_old(destination)
        install = ["cmake", "--install", str(directory), "--component", "python", "--prefix", str(destination)]
        subprocess.run(install, check=True)

    def compile(self, directory, cuda):
        if not has_cmake():
            oldest = ".".join(map(str, OLDEST_CMAKE))
            raise failure(
                f"CMake {oldest} or later was not found; `pip install cmake`, or leave out --no-build-isolation"
            )
        if not importlib.util.find_spec("pybind11"):
            raise failure("pybind11 was not found; `pip install pybind11`, or leave out --no-build-isolation")
        import pybind11

        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug or os.environ.get('DEBUG') == '1' else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNORMKERN_TORCH_DIR={find_torch()}",
            f"-DNORMKERN_CUDA={cuda}",
            "-DNORMKERN_TESTS=OFF",
            # An isolated build puts these in a directory that is gone by the next one, so never let CMake remember.
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if ninja := shutil.which("ninja"):
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        arguments += shlex.split(os.environ.get("NORMKERN_CMAKE_ARGS", ""))
        configure(["-S", str(ROOT), "-B", str(directory), *arguments])
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if subprocess.run(["cmake", "--build", str(directory), "--parallel", jobs]).returncode:
            raise failure("the build failed; the compiler's messages are above")

    def remove_old(self, destination):
        """A library of an earlier build, say with CUDA, would be loaded beside the new ones."""
        for library in destination.glob("*.so"):
            library.unlink()

    def get_outputs(self):
        destination = Path(self.build_lib, "normkern")
        return [str(library) for library in destination.glob("*.so")]

    def get_output_mapping(self):
        return {}

    def copy_extensions_to_source(self):
        """Nothing: an in-place build has installed straight into the source tree."""


class FreshBuild(build):
    def run(self):
        # Left alone, a module that was deleted from the sources would live on in the next wheel.
        shutil.rmtree(Path(self.build_lib, "normkern"), ignore_errors=True)
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("normkern._host", sources=[])],  # its presence makes the wheel a platform's
        cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
        # pip asks for this through egg_info, and fetches it into an isolated build; nothing else should fetch.
        setup_requires=["cmake>=3.22"] if "egg_info" in sys.argv and not has_cmake() else [],
    )
