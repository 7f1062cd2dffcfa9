// Python bindings of the native kernels: functions over numpy arrays, the interpreter lock released, no I/O.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "head_sweep.h"

namespace py = pybind11;

namespace megakd {
namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("head_sweep: ") + what);
}

template <class T>
struct Tag {
  using type = T;
};

template <class T>
T* checked(const py::array& array, std::initializer_list<py::ssize_t> shape, const char* name) {
  require((array.flags() & py::array::c_style) && array.itemsize() == sizeof(T) &&
              std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim()),
          name);
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// The kernel for two runtime facts as compile-time ones: calls fn with a pointer of the array's element type.
template <class Fn>
void with_elements(const py::array& logits, py::ssize_t rows, py::ssize_t stride, const char* name, const Fn& fn) {
  if (logits.itemsize() == sizeof(BFloat16)) {
    fn(checked<BFloat16>(logits, {rows, stride}, name));
  } else {
    fn(checked<float>(logits, {rows, stride}, name));
  }
}

template <class Divergence, class Student, class Teacher>
void run_pair(const HeadArguments& a, Student* student, const Teacher* teacher) {
  py::gil_scoped_release unlocked;
  if (a.student_temperature == 1.0f) {
    sweep_pair<Divergence, false>(a, student, teacher);
  } else {
    sweep_pair<Divergence, true>(a, student, teacher);
  }
}

void head_sweep(const std::string& sweep, const py::array& student, std::optional<py::array> teacher, int64_t num_valid,
                const py::array& labels, const py::array& lm_weight, std::optional<py::array> kd_weight,
                const std::string& divergence, float student_temperature, float teacher_temperature, float kd_scale,
                const py::array& statistics, int threads) {
  require(student.ndim() == 2, "student: expected [rows, columns]");
  require(teacher.has_value() == kd_weight.has_value(), "teacher and kd_weight go together");
  const int64_t rows = student.shape(0), stride = student.shape(1);
  require(0 <= num_valid && num_valid <= stride, "num_valid: expected at most the columns of student");
  HeadArguments a{};
  a.rows = rows;
  a.row_stride = stride;
  a.num_valid = num_valid;
  a.labels = checked<int64_t>(labels, {rows}, "labels: expected int64 [rows]");
  a.lm_weight = checked<float>(lm_weight, {rows}, "lm_weight: expected float32 [rows]");
  a.student_temperature = student_temperature;
  a.teacher_temperature = teacher_temperature;
  a.kd_scale = kd_scale;
  a.threads = threads;
  if (sweep == "statistics") a.sweep = Sweep::kStatistics;
  else if (sweep == "gradient") a.sweep = Sweep::kGradient;
  else if (sweep == "both") a.sweep = Sweep::kBoth;
  else require(false, "sweep: expected statistics, gradient or both");

  const auto bind_statistics = [&](int columns) {
    a.statistics = checked<float>(statistics, {columns, rows}, "statistics: expected float32 [columns, rows]");
  };
  with_elements(student, rows, stride, "student: expected bf16 or float32 [rows, columns]", [&](auto* s) {
    if (!teacher) {
      bind_statistics(kLabel + 1);
      py::gil_scoped_release unlocked;
      return sweep_student(a, s);
    }
    a.kd_weight = checked<float>(*kd_weight, {rows}, "kd_weight: expected float32 [rows]");
    with_elements(*teacher, rows, stride, "teacher: expected bf16 or float32, shaped like student", [&](const auto* t) {
      const auto with = [&](auto tag) {
        using Divergence = typename decltype(tag)::type;
        bind_statistics(kOwnSums + Divergence::kSums);
        run_pair<Divergence>(a, s, t);
      };
      if (divergence == "forward_kl") with(Tag<ForwardKL>{});
      else if (divergence == "reverse_kl") with(Tag<ReverseKL>{});
      else require(false, "divergence: not implemented natively");
    });
  });
}

}  // namespace
}  // namespace megakd

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "Native kernels of megakd.";
  m.def("head_sweep", &megakd::head_sweep, py::arg("sweep"), py::arg("student"), py::arg("teacher"), py::arg("num_valid"),
        py::arg("labels"), py::arg("lm_weight"), py::arg("kd_weight"), py::arg("divergence"),
        py::arg("student_temperature"), py::arg("teacher_temperature"), py::arg("kd_scale"), py::arg("statistics"),
        py::arg("threads"),
        "One sweep over a chunk of logits: statistics, the gradient over the student's logits, or both.");
}
