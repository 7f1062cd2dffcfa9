// Python binding of the sentence cuts.
#include "data/sentence_cuts.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace megakd {
namespace {

template <class Element>
bool fits(const py::array& array) {
  return py::isinstance<py::array_t<Element>>(array) && array.ndim() == 1 && (array.flags() & py::array::c_style);
}

// Runs the cuts if the tokens are of this type.
template <class Id>
bool cut_if(const py::array& tokens, const py::array& classes, int64_t window, py::array& starts,
            SentenceCuts& result) {
  if (!fits<Id>(tokens)) return false;
  const auto* ids = static_cast<const Id*>(tokens.data());
  const auto* table = static_cast<const uint8_t*>(classes.data());
  auto* out = static_cast<int64_t*>(starts.mutable_data());
  const int64_t num_tokens = tokens.size(), num_classes = classes.size(), capacity = starts.size();
  py::gil_scoped_release unlocked;
  result = cut_sentences(ids, num_tokens, table, num_classes, window, out, capacity);
  return true;
}

int64_t sentence_cuts(const py::array& tokens, const py::array& classes, int64_t window, py::array starts) {
  if (!fits<uint8_t>(classes)) throw std::invalid_argument("sentence_cuts: classes: expected uint8 [num_ids]");
  if (!fits<int64_t>(starts) || starts.size() < 1 || *static_cast<const int64_t*>(starts.data()) < 0)
    throw std::invalid_argument("sentence_cuts: starts: expected int64 [n], the first of them a token position");
  if (window < 2) throw std::invalid_argument("sentence_cuts: window: expected at least 2");
  SentenceCuts result;
  if (!cut_if<uint8_t>(tokens, classes, window, starts, result) &&
      !cut_if<int8_t>(tokens, classes, window, starts, result) &&
      !cut_if<uint16_t>(tokens, classes, window, starts, result) &&
      !cut_if<int16_t>(tokens, classes, window, starts, result) &&
      !cut_if<int32_t>(tokens, classes, window, starts, result) &&
      !cut_if<int64_t>(tokens, classes, window, starts, result))
    throw std::invalid_argument("sentence_cuts: tokens: expected integer ids [num_tokens]");
  if (result.bad_position >= 0)
    throw py::index_error("token position " + std::to_string(result.bad_position) + ": an id beyond the table of " +
                          std::to_string(classes.size()) + " classes");
  return result.count;
}

}  // namespace

void bind_sentence_cuts(py::module_& m) {
  m.def("sentence_cuts", &sentence_cuts, py::arg("tokens"), py::arg("classes"), py::arg("window"), py::arg("starts"),
        "The ends of the samples of sentence packing.");
}

}  // namespace megakd
