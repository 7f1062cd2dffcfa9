// The extension module megakd._csrc: functions over numpy arrays, the interpreter lock released, no I/O.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace megakd {

void bind_sweeps(py::module_& m);         // losses/bindings.cpp
void bind_sentence_cuts(py::module_& m);  // data/sentence_cuts.cpp
void bind_byte_pairs(py::module_& m);     // data/byte_pairs.cpp
void bind_row_codec(py::module_& m);      // rows/bindings.cpp

}  // namespace megakd

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "Native kernels of megakd.";
  megakd::bind_sweeps(m);
  megakd::bind_sentence_cuts(m);
  megakd::bind_byte_pairs(m);
  megakd::bind_row_codec(m);
}
