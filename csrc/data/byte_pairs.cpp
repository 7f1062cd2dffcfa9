// Search of a text for any of a set of pairs of adjacent bytes: a cheap test before an expensive one
// (megakd/data/tokenizers/routes.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace py = pybind11;

namespace megakd {
namespace {

// pairs: 65536 bytes, not 0 at 256 * first + second of a pair that is looked for; firsts: not 0 at the first byte of one.
bool holds_pair(const uint8_t* text, int64_t size, const uint8_t* firsts, const uint8_t* pairs) {
  const int64_t last = size - 1;  // starts no pair
  const auto here = [&](int64_t i) { return pairs[256 * text[i] + text[i + 1]] != 0; };
  int64_t i = 0;
  for (; i + 8 <= last; i += 8) {
    uint8_t any = 0;
    for (int64_t j = i; j < i + 8; j++) any |= firsts[text[j]];
    if (!any) continue;
    for (int64_t j = i; j < i + 8; j++)
      if (here(j)) return true;
  }
  for (; i < last; i++)
    if (here(i)) return true;
  return false;
}

class BytePairs {
 public:
  explicit BytePairs(const py::array_t<uint8_t, py::array::c_style>& pairs) : pairs_(pairs) {
    if (pairs.ndim() != 1 || pairs.size() != 65536) throw std::invalid_argument("pairs: expected uint8 [65536]");
    for (int i = 0; i < 65536; i++) firsts_[i / 256] |= pairs.data()[i];
  }

  bool in(const py::bytes& text) const {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(text.ptr(), &data, &size) != 0) throw py::error_already_set();
    const auto* bytes = reinterpret_cast<const uint8_t*>(data);
    py::gil_scoped_release unlocked;
    return holds_pair(bytes, size, firsts_, pairs_.data());
  }

 private:
  py::array_t<uint8_t, py::array::c_style> pairs_;
  uint8_t firsts_[256] = {};
};

}  // namespace

void bind_byte_pairs(py::module_& m) {
  py::class_<BytePairs>(m, "BytePairs", "Pairs of adjacent bytes to look for in texts.")
      .def(py::init<const py::array_t<uint8_t, py::array::c_style>&>(), py::arg("pairs"))
      .def("found_in", &BytePairs::in, py::arg("text"));
}

}  // namespace megakd
