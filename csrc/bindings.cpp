// Python bindings of the native kernels: one submodule-free module, functions over numpy arrays, GIL released.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_csrc, m) { m.doc() = "Native kernels of megakd."; }
