// Python bindings of the sweeps over chunks of logits: checks of their arguments, then the sweep without the interpreter
// lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "losses/dense_sweep.h"
#include "losses/sparse_sweep.h"

namespace py = pybind11;

namespace megakd {
namespace {

using Shape = std::initializer_list<py::ssize_t>;

void require(bool fits, const std::string& what) {
  if (!fits) throw std::invalid_argument("sweep: " + what);
}

// The array's memory. Throws unless the array has this shape, elements of this type and no gaps. numpy has no bf16, which
// travels as uint16.
template <class T>
T* checked(const py::array& array, Shape shape, const char* expected) {
  using Stored = std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t, T>;
  const bool is_type = py::isinstance<py::array_t<Stored>>(array);
  require(is_type && (array.flags() & py::array::c_style) &&
              std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim()),
          expected);
  return static_cast<T*>(const_cast<void*>(array.data()));
}

struct Logits {
  void* data;
  bool is_bf16;
};

Logits checked_logits(const py::array& array, Shape shape, const char* expected) {
  if (py::isinstance<py::array_t<uint16_t>>(array)) return {checked<BFloat16>(array, shape, expected), true};
  return {checked<float>(array, shape, expected), false};
}

Sweep sweep_of(const std::string& name, std::initializer_list<std::pair<const char*, Sweep>> allowed) {
  std::string names;
  for (const auto& [known, sweep] : allowed) {
    if (name == known) return sweep;
    names += names.empty() ? known : std::string(" or ") + known;
  }
  throw std::invalid_argument("sweep: it is " + name + ", expected " + names);
}

ChunkArguments chunk_arguments(const py::array& student, int64_t num_valid, const py::array& labels,
                               const py::array& lm_weight, const std::optional<py::array>& z_weight, int threads) {
  require(student.ndim() == 2, "student: expected [rows, columns]");
  const int64_t rows = student.shape(0), stride = student.shape(1);
  require(0 <= num_valid && num_valid <= stride, "num_valid: expected at most the columns of student");
  ChunkArguments a{};
  a.rows = rows;
  a.row_stride = stride;
  a.num_valid = num_valid;
  a.labels = checked<int64_t>(labels, {rows}, "labels: expected int64 [rows]");
  a.lm_weight = checked<float>(lm_weight, {rows}, "lm_weight: expected float32 [rows]");
  if (z_weight) a.z_weight = checked<float>(*z_weight, {rows}, "z_weight: expected float32 [rows]");
  a.threads = threads;
  return a;
}

Logits student_logits(const ChunkArguments& a, const py::array& student) {
  return checked_logits(student, {a.rows, a.row_stride}, "student: expected bf16 or float32 [rows, columns]");
}

void set_statistics(ChunkArguments& a, const py::array& statistics, int64_t columns) {
  a.statistics = checked<float>(statistics, {columns, a.rows}, "statistics: expected float32 [columns, rows]");
}

template <class Arguments>
Arguments with(const ChunkArguments& chunk) {
  Arguments a{};
  static_cast<ChunkArguments&>(a) = chunk;
  return a;
}

void sweep_lm(const std::string& sweep, const py::array& student, int64_t num_valid, const py::array& labels,
              const py::array& lm_weight, const std::optional<py::array>& z_weight, const py::array& statistics,
              int threads) {
  auto a = chunk_arguments(student, num_valid, labels, lm_weight, z_weight, threads);
  a.sweep = sweep_of(
      sweep, {{"statistics", Sweep::kStatistics}, {"gradient", Sweep::kGradient}, {"both", Sweep::kBoth}});
  set_statistics(a, statistics, kLMColumns);
  const Logits s = student_logits(a, student);
  py::gil_scoped_release unlocked;
  if (s.is_bf16) lm_sweep(a, static_cast<BFloat16*>(s.data));
  else lm_sweep(a, static_cast<float*>(s.data));
}

const DenseKernel& dense_kernel_of(const std::string& divergence) {
  for (const DenseKernel* kernels : {kDivergenceKernels, kMixtureKernels}) {
    for (const DenseKernel* kernel = kernels; kernel->name != nullptr; kernel++) {
      if (divergence == kernel->name) return *kernel;
    }
  }
  throw std::invalid_argument("sweep: divergence " + divergence + " has no native kernel");
}

void sweep_dense(const std::string& sweep, const py::array& student, int64_t num_valid, const py::array& labels,
                const py::array& lm_weight, const std::optional<py::array>& z_weight, const py::array& statistics,
                int threads, const py::array& teacher, const py::array& kd_weight, const std::string& divergence,
                std::pair<float, float> parameters, float student_temperature, float teacher_temperature,
                float kd_scale) {
  auto a = with<DenseArguments>(chunk_arguments(student, num_valid, labels, lm_weight, z_weight, threads));
  a.sweep = sweep_of(sweep, {{"statistics", Sweep::kStatistics},
                             {"second_pass", Sweep::kSecondPass},
                             {"gradient", Sweep::kGradient},
                             {"both", Sweep::kBoth}});
  const DenseKernel& kernel = dense_kernel_of(divergence);
  require(!kernel.second_pass_elsewhere || a.sweep == Sweep::kStatistics || a.sweep == Sweep::kGradient,
          "it is " + sweep + ", but the second sums of " + divergence + " are not made here");
  set_statistics(a, statistics, kOwn + kernel.first_pass + (a.sweep == Sweep::kStatistics ? 0 : kernel.second_pass));
  a.kd_weight = checked<float>(kd_weight, {a.rows}, "kd_weight: expected float32 [rows]");
  a.student_temperature = student_temperature;
  a.teacher_temperature = teacher_temperature;
  a.kd_scale = kd_scale;
  a.parameters = {parameters.first, parameters.second};
  const Logits s = student_logits(a, student);
  const Logits t = checked_logits(teacher, {a.rows, a.row_stride}, "teacher: expected bf16 or float32, as student");
  py::gil_scoped_release unlocked;
  kernel.run[s.is_bf16][t.is_bf16](a, s.data, t.data);
}

void sweep_sparse(const std::string& sweep, const py::array& student, int64_t num_valid, const py::array& labels,
                  const py::array& lm_weight, const std::optional<py::array>& z_weight, const py::array& statistics,
                  int threads, const py::array& columns, float student_temperature, bool spread,
                  const std::optional<py::array>& factor, const std::optional<py::array>& shift,
                  const std::optional<py::array>& listed) {
  auto a = with<SparseArguments>(chunk_arguments(student, num_valid, labels, lm_weight, z_weight, threads));
  a.sweep = sweep_of(sweep, {{"statistics", Sweep::kStatistics}, {"gradient", Sweep::kGradient}});
  require(columns.ndim() == 2, "columns: expected [rows, listed]");
  a.num_listed = columns.shape(1);
  a.columns = checked<int64_t>(columns, {a.rows, a.num_listed}, "columns: expected int64 [rows, listed]");
  a.student_temperature = student_temperature;
  a.spread = spread;
  set_statistics(a, statistics, a.first_line() + a.num_listed);
  if (a.sweep == Sweep::kGradient) {
    require(factor && shift && listed, "the gradient needs factor, shift and listed");
    a.factor = checked<float>(*factor, {a.rows}, "factor: expected float32 [rows]");
    a.shift = checked<float>(*shift, {a.rows}, "shift: expected float32 [rows]");
    a.listed = checked<float>(*listed, {a.num_listed, a.rows}, "listed: expected float32 [listed, rows]");
  }
  const Logits s = student_logits(a, student);
  py::gil_scoped_release unlocked;
  if (s.is_bf16) sparse_sweep(a, static_cast<BFloat16*>(s.data));
  else sparse_sweep(a, static_cast<float*>(s.data));
}

}  // namespace

void bind_sweeps(py::module_& m) {
  m.def("sweep_lm", &sweep_lm, py::arg("sweep"), py::arg("student"), py::arg("num_valid"), py::arg("labels"),
        py::arg("lm_weight"), py::arg("z_weight"), py::arg("statistics"), py::arg("threads"),
        "Sweep over a chunk of logits for the LM loss alone.");
  m.def("sweep_dense", &sweep_dense, py::arg("sweep"), py::arg("student"), py::arg("num_valid"),
        py::arg("labels"), py::arg("lm_weight"), py::arg("z_weight"), py::arg("statistics"), py::arg("threads"),
        py::kw_only(), py::arg("teacher"), py::arg("kd_weight"), py::arg("divergence"), py::arg("parameters"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("kd_scale"),
        "Sweep over a chunk of logits with the logits of a dense teacher.");
  m.def("sweep_sparse", &sweep_sparse, py::arg("sweep"), py::arg("student"), py::arg("num_valid"),
        py::arg("labels"), py::arg("lm_weight"), py::arg("z_weight"), py::arg("statistics"), py::arg("threads"),
        py::kw_only(), py::arg("columns"), py::arg("student_temperature"), py::arg("spread"),
        py::arg("factor") = py::none(), py::arg("shift") = py::none(), py::arg("listed") = py::none(),
        "Sweep over a chunk of logits with the ids that a sparse teacher lists.");
}

}  // namespace megakd
