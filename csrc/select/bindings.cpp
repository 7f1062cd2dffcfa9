// Python bindings of the selection by radix, and of the gathering of kept tokens.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

#include "select/radix_select.h"

namespace py = pybind11;

namespace megakd {
namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("selection: ") + what);
}

// The memory of a one-axis array without gaps, of this type and, unless it is -1, this length.
template <class T>
T* checked(const py::array& array, int64_t size, const char* what) {
  require(py::isinstance<py::array_t<T>>(array) && array.ndim() == 1 && (array.flags() & py::array::c_style) &&
              (size < 0 || array.size() == size),
          what);
  return static_cast<T*>(const_cast<void*>(array.data()));
}

using PerSample = std::variant<int64_t, py::array>;  // one number for all samples, or an int32 for each

class ScoreSweep {
 public:
  ScoreSweep(std::vector<py::array> log_probs, const std::vector<double>& weights, PerSample divisor, PerSample tokens,
             py::array excluded, uint64_t tie_key, std::pair<uint64_t, double> gumbel, bool drop_negative,
             std::optional<std::pair<uint32_t, uint64_t>> below, std::vector<py::array> ranks)
      : held_{std::move(log_probs), std::move(ranks), std::move(divisor), std::move(tokens), std::move(excluded)} {
    require(!held_.log_probs.empty() && held_.log_probs.size() == weights.size(), "one weight for each model");
    require(held_.ranks.empty() || held_.ranks.size() == weights.size(), "one table of ranks for each model, or none");
    size_ = held_.log_probs[0].size();
    for (const py::array& array : held_.log_probs)
      source_.log_probs.push_back(checked<float>(array, size_, "log_probs: expected float32 [num_samples]"));
    for (const double weight : weights) source_.weights.push_back(static_cast<float>(weight));
    for (const py::array& table : held_.ranks)
      source_.ranks.push_back(checked<double>(table, (1 << kRankBits) + 1, "ranks: expected float64 [2^20 + 1]"));
    if (const auto* array = std::get_if<py::array>(&held_.divisor))
      source_.divisor = checked<int32_t>(*array, size_, "divisor: expected int32 [num_samples]");
    else
      source_.divisor_of_all = static_cast<float>(std::get<int64_t>(held_.divisor));
    if (const auto* array = std::get_if<py::array>(&held_.tokens))
      source_.tokens = checked<int32_t>(*array, size_, "tokens: expected int32 [num_samples]");
    else
      source_.tokens_of_all = std::get<int64_t>(held_.tokens);
    source_.excluded = checked<int64_t>(held_.excluded, -1, "excluded: expected int64 [n]");
    source_.num_excluded = held_.excluded.size();
    source_.tie_key = tie_key;
    source_.gumbel_key = gumbel.first;
    source_.gumbel_temperature = gumbel.second;
    source_.drop_negative = drop_negative;
    source_.has_below = below.has_value();
    if (below) source_.below = {below->first, below->second};
  }

  py::dict survey(int64_t begin, int64_t end, bool by_tokens, const py::array& counts, int threads) const {
    check(begin, end);
    auto* out = checked<uint64_t>(counts, kDigits, "counts: expected uint64 [65536]");
    Survey found;
    {
      py::gil_scoped_release unlocked;
      found = by_tokens ? survey_of<uint64_t>(source_, begin, end, true, threads, out)
                        : survey_of<uint32_t>(source_, begin, end, false, threads, out);
    }
    py::dict result;
    result["candidates"] = found.candidates;
    result["tokens"] = found.tokens;
    result["excluded"] = found.excluded;
    result["empty"] = found.empty;
    result["negative"] = found.negative;
    result["num_bad"] = found.num_bad;
    result["first_bad"] = found.first_bad;
    result["divisors"] = std::make_pair(found.divisors.least, found.divisors.most);
    result["token_counts"] = std::make_pair(found.token_counts.least, found.token_counts.most);
    result["moments"] = found.moments;
    return result;
  }

  void count(int64_t begin, int64_t end, int digit, std::pair<uint32_t, uint64_t> prefix, bool by_tokens,
             const py::array& counts, int threads) const {
    check(begin, end);
    require(0 <= digit && digit <= 5, "digit: expected 0 to 5");
    auto* out = checked<uint64_t>(counts, kDigits, "counts: expected uint64 [65536]");
    const Key key{prefix.first, prefix.second};
    py::gil_scoped_release unlocked;
    if (by_tokens) histogram_of<uint64_t>(source_, begin, end, digit, key, true, threads, out);
    else histogram_of<uint32_t>(source_, begin, end, digit, key, false, threads, out);
  }

  int64_t collect(int64_t begin, int64_t end, std::pair<uint32_t, uint32_t> images_between, const py::array& images,
                  const py::array& hashes, const py::array& tokens) const {
    check(begin, end);
    const int64_t room = images.size();
    auto* to_images = checked<uint32_t>(images, room, "images: expected uint32 [n]");
    auto* to_hashes = checked<uint64_t>(hashes, room, "hashes: expected uint64 [n]");
    auto* to_tokens = checked<int32_t>(tokens, room, "tokens: expected int32 [n]");
    const auto [first, last] = images_between;
    py::gil_scoped_release unlocked;
    return megakd::collect(source_, begin, end, first, last, room, to_images, to_hashes, to_tokens);
  }

  std::pair<int64_t, int64_t> keep(int64_t begin, int64_t end, std::pair<uint32_t, uint64_t> at_least,
                                   const py::array& ids) const {
    check(begin, end);
    auto* out = checked<int64_t>(ids, -1, "ids: expected int64 [n]");
    require(ids.size() >= end - begin, "ids: expected room for the whole range");
    py::gil_scoped_release unlocked;
    const Kept kept = megakd::keep(source_, begin, end, {at_least.first, at_least.second}, out);
    return {kept.samples, kept.tokens};
  }

  void count_ranks(int64_t begin, int64_t end, int64_t model, const py::array& counts) const {
    check(begin, end);
    require(0 <= model && model < static_cast<int64_t>(source_.log_probs.size()), "model: no such one");
    auto* out = checked<uint64_t>(counts, 1 << kRankBits, "counts: expected uint64 [2^20]");
    py::gil_scoped_release unlocked;
    rank_histogram_of(source_, begin, end, model, out);
  }

  void scores(int64_t begin, int64_t end, const py::array& scores) const {
    check(begin, end);
    auto* out = checked<float>(scores, end - begin, "scores: expected float32 [end - begin]");
    py::gil_scoped_release unlocked;
    Block block(source_);
    for (int64_t at = begin; at < end; at += kBlock) {
      block.fill_scores(at, std::min(at + kBlock, end), false);
      std::copy(block.score, block.score + block.count, out + (at - begin));
    }
  }

 private:
  void check(int64_t begin, int64_t end) const {
    require(0 <= begin && begin <= end && end <= size_, "begin and end: expected a range of the samples");
  }

  struct {  // what source_ points into
    std::vector<py::array> log_probs, ranks;
    PerSample divisor, tokens;
    py::array excluded;
  } held_;
  ScoreSource source_;
  int64_t size_ = 0;
};

// Copies ranges of bytes one behind the other.
void gather_bytes(const py::array& source, const py::array& starts, const py::array& sizes, const py::array& out) {
  const auto* from = checked<uint8_t>(source, -1, "source: expected uint8 [bytes]");
  const int64_t count = starts.size(), available = source.size();
  const auto* start = checked<int64_t>(starts, count, "starts: expected int64 [n]");
  const auto* size = checked<int64_t>(sizes, count, "sizes: expected int64 [n]");
  auto* to = checked<uint8_t>(out, -1, "out: expected uint8 [bytes]");
  int64_t room = out.size();
  for (int64_t i = 0; i < count; i++) {
    require(start[i] >= 0 && size[i] >= 0 && start[i] <= available - size[i], "a range beyond the source");
    require((room -= size[i]) >= 0, "out: too short");
  }
  py::gil_scoped_release unlocked;
  for (int64_t i = 0; i < count; i++) {
    std::memcpy(to, from + start[i], size[i]);
    to += size[i];
  }
}

}  // namespace

void bind_selection(py::module_& m) {
  py::class_<ScoreSweep>(m, "ScoreSweep", "Sweeps over the scores of one dataset's samples (radix_select.h).")
      .def(py::init<std::vector<py::array>, const std::vector<double>&, PerSample, PerSample, py::array, uint64_t,
                    std::pair<uint64_t, double>, bool, std::optional<std::pair<uint32_t, uint64_t>>,
                    std::vector<py::array>>(),
           py::arg("log_probs"), py::arg("weights"), py::kw_only(), py::arg("divisor"), py::arg("tokens"),
           py::arg("excluded"), py::arg("tie_key"), py::arg("gumbel"), py::arg("drop_negative"), py::arg("below"),
           py::arg("ranks"))
      .def("survey", &ScoreSweep::survey, py::arg("begin"), py::arg("end"), py::arg("by_tokens"), py::arg("counts"),
           py::arg("threads"))
      .def("count", &ScoreSweep::count, py::arg("begin"), py::arg("end"), py::arg("digit"), py::arg("prefix"),
           py::arg("by_tokens"), py::arg("counts"), py::arg("threads"))
      .def("collect", &ScoreSweep::collect, py::arg("begin"), py::arg("end"), py::arg("images_between"),
           py::arg("images"), py::arg("hashes"), py::arg("tokens"))
      .def("keep", &ScoreSweep::keep, py::arg("begin"), py::arg("end"), py::arg("at_least"), py::arg("ids"))
      .def("count_ranks", &ScoreSweep::count_ranks, py::arg("begin"), py::arg("end"), py::arg("model"),
           py::arg("counts"))
      .def("scores", &ScoreSweep::scores, py::arg("begin"), py::arg("end"), py::arg("scores"));
  m.def("gather_bytes", &gather_bytes, py::arg("source"), py::arg("starts"), py::arg("sizes"), py::arg("out"),
        "Copies ranges of bytes one behind the other.");
}

}  // namespace megakd
