"""Build of the native extension; everything else about the package is in pyproject.toml."""

import os
import platform

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# MEGAKD_MARCH=x86-64-v3 builds for machines other than the one that compiles.
march = os.environ.get("MEGAKD_MARCH")
flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread"]
flags += ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
if march:
    flags.append(f"-march={march}")
elif platform.machine() == "x86_64":
    flags.append("-march=native")

csrc = sorted(os.path.join(folder, name) for folder, _, names in os.walk("csrc") for name in names)
ParallelCompile("MAX_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "megakd._csrc",
            [path for path in csrc if path.endswith(".cpp")],
            include_dirs=["csrc"],
            depends=[path for path in csrc if path.endswith(".h")],
            cxx_std=17,
            extra_compile_args=flags,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
