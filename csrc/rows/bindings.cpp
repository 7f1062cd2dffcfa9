// Python bindings of the logits store's codec.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "rows/row_decoder.h"
#include "rows/row_encoder.h"

namespace py = pybind11;

namespace megakd {
namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("rows: ") + what);
}

template <class T>
T* checked(const py::array& array, std::initializer_list<int64_t> shape, const char* what) {
  require(py::isinstance<py::array_t<T>>(array) && (array.flags() & py::array::c_style) &&
              std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim()),
          what);
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// The memory of the frequency ranks. Throws unless they are a permutation: files must be able to name every id.
const int32_t* checked_ranks(const py::array& ranks) {
  const auto* data = checked<int32_t>(ranks, {ranks.size()}, "ranks: expected int32 [vocab_size]");
  std::vector<bool> seen(ranks.size());
  for (int64_t i = 0; i < ranks.size(); i++) {
    require(0 <= data[i] && data[i] < ranks.size() && !seen[data[i]], "ranks: expected a permutation");
    seen[data[i]] = true;
  }
  return data;
}

RowFormat row_format(int64_t vocab_size, const std::string& value, const std::string& mass, uint32_t draws) {
  require(vocab_size >= 1, "ranks: expected at least one id");
  RowFormat format{vocab_size, Value::kLevel, Mass::kOne, draws};
  if (mass == "stored") format.mass = Mass::kStored;
  else if (mass == "free") format.mass = Mass::kFree;
  else require(mass == "one", "mass: expected one, stored or free");
  if (value == "8") format.value = Value::kLevel;
  else if (value == "16") format.value = Value::kFineLevel;
  else if (value == "32") format.value = Value::kFloat;
  else if (value == "count") format.value = Value::kCount;
  else require(false, "value: expected 8, 16, 32 or count");
  require(format.value != Value::kCount || draws >= 1, "draws: expected at least 1");
  return format;
}

class Encoder {
 public:
  Encoder(const py::array& ranks, const std::string& value, const std::string& mass, uint32_t draws,
          int64_t rows_for_codes)
      : counts_(value == "count"),
        encoder_(row_format(ranks.size(), value, mass, draws), checked_ranks(ranks), rows_for_codes) {}

  void add(const std::optional<py::array>& ids, const std::optional<py::array>& values,
           const std::optional<py::array>& entropies) {
    if (!ids) return encoder_.add_without_targets();
    require(values && entropies, "add: expected ids, values and entropies, or none of them");
    require(ids->ndim() == 2, "ids: expected int64 [rows, width]");
    const int64_t rows = ids->shape(0), width = ids->shape(1);
    const auto* id = checked<int64_t>(*ids, {rows, width}, "ids: expected int64 [rows, width]");
    const auto* entropy = checked<float>(*entropies, {rows}, "entropies: expected float32 [rows]");
    const float* log_prob = nullptr;
    const int32_t* draw = nullptr;
    if (counts_) draw = checked<int32_t>(*values, {rows, width}, "values: expected int32 [rows, width]");
    else log_prob = checked<float>(*values, {rows, width}, "values: expected float32 [rows, width]");
    std::string wrong;
    {
      py::gil_scoped_release unlocked;
      wrong = encoder_.add(rows, width, id, log_prob, draw, entropy);
    }
    if (!wrong.empty()) throw std::invalid_argument(wrong);
  }

  py::tuple finish() {
    {
      py::gil_scoped_release unlocked;
      encoder_.finish();
    }
    const auto array = [](const auto& values) { return py::array(int64_t(values.size()), values.data()); };
    return py::make_tuple(array(encoder_.payload()), array(encoder_.offsets()), array(encoder_.lengths()));
  }

 private:
  bool counts_;
  RowEncoder encoder_;
};

class Decoder {
 public:
  Decoder(py::array ids_of_ranks, const std::string& value, const std::string& mass, uint32_t draws,
          const py::array& lengths)
      : ids_(std::move(ids_of_ranks)),
        decoder_(row_format(ids_.size(), value, mass, draws),
                 checked<int32_t>(ids_, {ids_.size()}, "ids_of_ranks: expected int32 [vocab_size]"),
                 checked<uint8_t>(lengths, {kCodeLengths}, "lengths: expected uint8 [kCodeLengths]")) {}

  int64_t decode(const py::array& record, const py::array& ids, const py::array& log_probs,
                 const py::array& entropies) const {
    const int64_t size = record.size();
    const auto* bytes = checked<uint8_t>(record, {size}, "record: expected uint8 [bytes]");
    require(size >= kReadAhead, "record: expected the bytes to read ahead behind it");
    require(ids.ndim() == 2, "ids: expected int64 [rows, width]");
    const int64_t rows = ids.shape(0), width = ids.shape(1);
    const RowsOut out{rows, width, checked<int64_t>(ids, {rows, width}, "ids: expected int64 [rows, width]"),
                      checked<float>(log_probs, {rows, width}, "log_probs: expected float32 [rows, width]"),
                      checked<float>(entropies, {rows}, "entropies: expected float32 [rows]")};
    py::gil_scoped_release unlocked;
    return decoder_.decode(bytes, bytes + size - kReadAhead, out);
  }

 private:
  py::array ids_;
  RowDecoder decoder_;
};

}  // namespace

void bind_row_codec(py::module_& m) {
  m.attr("ROW_CODE_LENGTHS") = kCodeLengths;
  m.attr("ROW_READ_AHEAD") = kReadAhead;
  py::class_<Encoder>(m, "RowEncoder", "Rows of a logits store to bytes (row_encoder.h).")
      .def(py::init<const py::array&, const std::string&, const std::string&, uint32_t, int64_t>(),
           py::arg("frequency_ranks"),
           py::kw_only(), py::arg("value"), py::arg("mass"), py::arg("draws"), py::arg("rows_for_codes"))
      .def("add", &Encoder::add, py::arg("ids"), py::arg("values"), py::arg("entropies"))
      .def("finish", &Encoder::finish);
  py::class_<Decoder>(m, "RowDecoder", "Bytes of a logits store to rows (row_decoder.h).")
      .def(py::init<py::array, const std::string&, const std::string&, uint32_t, const py::array&>(), py::arg("ids_of_ranks"),
           py::kw_only(), py::arg("value"), py::arg("mass"), py::arg("draws"), py::arg("lengths"))
      .def("decode", &Decoder::decode, py::arg("record"), py::arg("ids"), py::arg("log_probs"), py::arg("entropies"));
}

}  // namespace megakd
