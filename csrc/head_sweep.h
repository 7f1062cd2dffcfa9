// One sweep over the rows of a chunk of logits: softmax statistics of student and teacher, and the gradient of the weighted
// LM and distillation loss written over the student's logits. Two calls with a merge between them where the vocabulary is
// split; both at once, a row at a time while it is in cache, where it is whole.
//
// Columns of the statistics, each `rows` floats: student_max, student_sum, label; with a teacher also student_kd_sum,
// teacher_max, teacher_sum, teacher_self, agree, and the divergence's own sums. Their meaning: losses/vocab_parallel.py.
#pragma once

#include <cstring>

#include "divergences.h"
#include "parallel_for.h"
#include "vec.h"

namespace megakd {

enum class Sweep { kStatistics, kGradient, kBoth };

enum Column { kStudentMax, kStudentSum, kLabel, kStudentKDSum, kTeacherMax, kTeacherSum, kTeacherSelf, kAgree, kOwnSums };

struct HeadArguments {
  int64_t rows, row_stride, num_valid;
  const int64_t* labels;   // [rows] column of the label in this slice, or outside [0, num_valid)
  const float* lm_weight;  // [rows]
  const float* kd_weight;  // [rows], null without a teacher
  float student_temperature, teacher_temperature;
  float kd_scale;          // on the divergence
  float* statistics;       // [columns, rows]: out, or in for the gradient alone
  Sweep sweep;
  int threads;

  float& at(int column, int64_t row) const { return statistics[column * rows + row]; }
};

// Sums over this many entries are closed before they join the row's, so that rounding does not grow with the vocabulary.
constexpr int64_t kBlock = 64 * kLanes;
constexpr int64_t kRun = 4;  // rows that a thread takes at a time

inline float pivot(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Subtracted before scaled: exact where logits are huge.
inline Vec relative(Vec logits, float pivot, float scale) { return (logits - pivot) * scale; }

template <class Element>
float row_max(const Element* logits, int64_t n) {
  Vec best[4];
  for (Vec& b : best) b = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; j++) best[j] = max(load(logits + i + j * kLanes), best[j]);
  }
  for (; i < n; i += kLanes) best[0] = max(load(logits + i, n - i), best[0]);
  return reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// Adds up over a row what `entries(i, count, sums)` adds to its sums for the `count` entries from i on.
template <int kSums, class Body>
inline void sum_row(int64_t n, float totals[], const Body& entries) {
  Vec closed[kSums] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    Vec sums[kSums] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) entries(i, kLanes, sums);
    if (i < end) entries(i, end - i, sums);
    for (int k = 0; k < kSums; k++) closed[k] += sums[k];
  }
  for (int k = 0; k < kSums; k++) totals[k] = reduce_add(closed[k]);
}

// Overwrites a row of logits with slope(i, count), less the LM weight at the label, and padding with 0.
template <class Element, class Body>
inline void rewrite_row(const HeadArguments& a, int64_t row, Element* logits, const Body& slope) {
  const int64_t n = a.num_valid, label = a.labels[row];
  const bool owned = label >= 0 && label < n;
  const Vec at_label = owned ? slope(label, 1) - a.lm_weight[row] : Vec{};  // before the logit is gone
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(logits + i, slope(i, kLanes));
  if (i < n) store(logits + i, slope(i, n - i), n - i);
  if (owned && a.lm_weight[row] != 0.0f) store(logits + label, at_label, 1);
  std::memset(static_cast<void*>(logits + n), 0, (a.row_stride - n) * sizeof(Element));
}

template <class Student>
void student_statistics(const HeadArguments& a, int64_t row, const Student* student) {
  const float maximum = row_max(student, a.num_valid), subtract = pivot(maximum);
  const int64_t label = a.labels[row];
  a.at(kStudentMax, row) = maximum;
  a.at(kLabel, row) = label >= 0 && label < a.num_valid ? load(student + label, 1)[0] : 0.0f;
  sum_row<1>(a.num_valid, &a.at(kStudentSum, row), [&](int64_t i, int64_t count, Vec sums[]) {
    sums[0] += exp2(relative(load(student + i, count), subtract, kLog2E));
  });
}

template <class Student>
void student_gradient(const HeadArguments& a, int64_t row, Student* student) {
  const float subtract = pivot(a.at(kStudentMax, row)), factor = a.lm_weight[row] / a.at(kStudentSum, row);
  rewrite_row(a, row, student, [&](int64_t i, int64_t count) {
    return exp2(relative(load(student + i, count), subtract, kLog2E)) * factor;
  });
}

// kTempered: the student's softmax in the divergence is not the one in the LM loss.
template <class Divergence, bool kTempered, class Student, class Teacher>
void pair_statistics(const HeadArguments& a, int64_t row, const Student* student, const Teacher* teacher) {
  const float student_max = row_max(student, a.num_valid), teacher_max = row_max(teacher, a.num_valid);
  const float student_pivot = pivot(student_max), teacher_pivot = pivot(teacher_max);
  const float student_scale = 1.0f / a.student_temperature, teacher_scale = kLog2E / a.teacher_temperature;
  Vec top = broadcast(-kInfinity);  // of s2 + t2, which is 0 only where both are maxima
  float totals[4 + Divergence::kSums];
  sum_row<4 + Divergence::kSums>(a.num_valid, totals, [&](int64_t i, int64_t count, Vec sums[]) {
    const Vec s2 = relative(load(student + i, count), student_pivot, kLog2E);
    const Vec t2 = relative(load(teacher + i, count), teacher_pivot, teacher_scale);
    const Vec exp_s = exp2(s2), exp_t = exp2(t2);
    top = max(s2 + t2, top);
    Entries entries{s2, t2, exp_s, exp_t};
    if (kTempered) entries.s2 = s2 * student_scale, entries.exp_s = exp2(entries.s2);
    sums[0] += exp_s;
    sums[1] += entries.exp_s;
    sums[2] += exp_t;
    add_product(sums[3], exp_t, t2);
    Divergence::accumulate(entries, sums + 4);
  });
  const int64_t label = a.labels[row];
  a.at(kStudentMax, row) = student_max;
  a.at(kStudentSum, row) = totals[0];
  a.at(kLabel, row) = label >= 0 && label < a.num_valid ? load(student + label, 1)[0] : 0.0f;
  a.at(kStudentKDSum, row) = totals[1];
  a.at(kTeacherMax, row) = teacher_max;
  a.at(kTeacherSum, row) = totals[2];
  a.at(kTeacherSelf, row) = totals[3] * kLn2;
  a.at(kAgree, row) = reduce_max(top) == 0.0f;
  for (int k = 0; k < Divergence::kSums; k++) a.at(kOwnSums + k, row) = totals[4 + k] * kLn2;
}

template <class Divergence, bool kTempered, class Student, class Teacher>
void pair_gradient(const HeadArguments& a, int64_t row, Student* student, const Teacher* teacher) {
  const float student_pivot = pivot(a.at(kStudentMax, row)), teacher_pivot = pivot(a.at(kTeacherMax, row));
  const float student_scale = 1.0f / a.student_temperature, teacher_scale = kLog2E / a.teacher_temperature;
  const float lm_factor = a.lm_weight[row] / a.at(kStudentSum, row);
  const float kd_factor = a.kd_weight[row] * a.kd_scale / a.student_temperature;
  float own[Divergence::kSums];
  for (int k = 0; k < Divergence::kSums; k++) own[k] = a.at(kOwnSums + k, row);
  const RowSums sums{a.at(kStudentKDSum, row), a.at(kTeacherSum, row), own};
  const Divergence divergence(sums);
  const float to_q = kd_factor / sums.student, to_p = kd_factor / sums.teacher;
  rewrite_row(a, row, student, [&](int64_t i, int64_t count) {
    const Vec s2 = relative(load(student + i, count), student_pivot, kLog2E);
    const Vec t2 = relative(load(teacher + i, count), teacher_pivot, teacher_scale);
    const Vec exp_s = exp2(s2);
    Probabilities entries{s2, t2, exp2(t2) * to_p, exp_s * to_q};
    if (kTempered) entries.s2 = s2 * student_scale, entries.q = exp2(entries.s2) * to_q;
    return exp_s * lm_factor + divergence.slope(entries);
  });
}

template <class Student>
void sweep_student(const HeadArguments& a, Student* student) {
  parallel_for(a.rows, kRun, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Student* const s = student + row * a.row_stride;
      if (a.sweep != Sweep::kGradient) student_statistics(a, row, s);
      if (a.sweep != Sweep::kStatistics) student_gradient(a, row, s);
    }
  });
}

template <class Divergence, bool kTempered, class Student, class Teacher>
void sweep_pair(const HeadArguments& a, Student* student, const Teacher* teacher) {
  parallel_for(a.rows, kRun, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Student* const s = student + row * a.row_stride;
      const Teacher* const t = teacher + row * a.row_stride;
      if (a.sweep != Sweep::kGradient) pair_statistics<Divergence, kTempered>(a, row, s, t);
      if (a.sweep == Sweep::kStatistics) continue;
      // A row without KD weight: nothing of the teacher may reach the gradient, be it NaN.
      if (a.kd_weight[row] == 0.0f) student_gradient(a, row, s);
      else pair_gradient<Divergence, kTempered>(a, row, s, t);
    }
  });
}

}  // namespace megakd
