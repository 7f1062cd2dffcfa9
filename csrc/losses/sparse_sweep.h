// The sweep over a chunk's logits with a sparse teacher, which lists some ids a row: its divergence needs the logits of
// those ids and the softmax over all others. Where both have the same temperature, one exp an entry serves the softmax
// over the others and the LM loss.
#pragma once

#include <vector>

#include "losses/lm_sweep.h"

namespace megakd {

enum SparseColumn { kRestMax = kLMColumns, kRestSum, kSparseColumns, kTotal = kSparseColumns, kCount, kSpreadColumns };

struct SparseArguments : ChunkArguments {
  int64_t num_listed;
  const int64_t* columns;  // [rows, num_listed] columns in this slice, or outside [0, num_valid); each at most once
  float student_temperature;
  bool spread;  // true to fill total and count
  // For the gradient. At an id that is not listed it is factor exp((s - rest_max) / tau) - shift.
  const float *factor, *shift;  // [rows]
  const float* listed;          // [num_listed, rows]: the gradient at the listed ids

  int first_line() const { return spread ? kSpreadColumns : kSparseColumns; }
};

// The listed ids of one row that this slice holds: their logits, and marks to leave them out of sums over the others.
template <class Student>
class SparseRow {
 public:
  SparseRow(int64_t num_valid, int64_t num_listed)
      : marks_((num_valid + kLanes - 1) / kLanes, 0), slots_(num_listed), logits_(num_listed + kLanes) {}

  void read(const SparseArguments& a, int64_t row, const Student* student) {
    const int64_t* const columns = columns_ = a.columns + row * a.num_listed;
    size_ = 0;
    for (int64_t k = 0; k < a.num_listed; k++) {
      if (columns[k] < 0 || columns[k] >= a.num_valid) continue;
      logits_[size_] = load(student + columns[k], 1)[0];
      slots_[size_++] = k;
    }
    std::fill_n(logits_.begin() + size_, kLanes, -kInfinity);
  }

  void mark() {
    for (int64_t i = 0; i < size_; i++) marks_[column(i) / kLanes] |= uint16_t(1u << (column(i) % kLanes));
  }
  void unmark() {
    for (int64_t i = 0; i < size_; i++) marks_[column(i) / kLanes] = 0;
  }

  // The entries from i on, with -inf in place of marked ones; i is a multiple of the lanes.
  Vec rest(const Student* student, int64_t i, int64_t count) const {
    const Vec logits = load(student + i, count);
    const int32_t marks = marks_[i / kLanes];
    if (__builtin_expect(marks == 0, 1)) return logits;
    const IntVec bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (marks & bits) != 0 ? broadcast(-kInfinity) : logits;
  }

  int64_t size() const { return size_; }
  int64_t slot(int64_t i) const { return slots_[i]; }
  int64_t column(int64_t i) const { return columns_[slots_[i]]; }
  float logit(int64_t i) const { return logits_[i]; }
  Vec logits(int64_t i) const { return load(&logits_[i]); }  // -inf after the last

 private:
  std::vector<uint16_t> marks_;  // one bit an entry
  std::vector<int64_t> slots_;
  std::vector<float> logits_;
  const int64_t* columns_ = nullptr;
  int64_t size_ = 0;
};

// kTempered: the student's softmax in the divergence has another temperature than the one in the LM loss.
template <bool kTempered, class Student>
void sparse_statistics(const SparseArguments& a, int64_t row, const Student* student, SparseRow<Student>& listed) {
  const int64_t n = a.num_valid;
  listed.mark();
  const float rest_max = max_row(n, [&](int64_t i, int64_t count) { return listed.rest(student, i, count); });
  Vec best = broadcast(rest_max);
  for (int64_t i = 0; i < listed.size(); i += kLanes) best = max(listed.logits(i), best);
  const float lm_max = reduce_max(best), lm_pivot = pivot(lm_max), rest_pivot = pivot(rest_max);
  const float scale = kLog2E / a.student_temperature;
  float totals[2] = {};  // sums over the ids that are not listed, relative to rest_max and to lm_max
  sum_row<1 + kTempered>(n, totals, [&](int64_t i, int64_t count, Vec sums[]) {
    const Vec rest = listed.rest(student, i, count);
    sums[0] += exp2((rest - rest_pivot) * scale);
    if (kTempered) sums[1] += lm_exp(rest, lm_pivot);
  });
  listed.unmark();
  Vec listed_sum = {};
  for (int64_t i = 0; i < listed.size(); i += kLanes) listed_sum += lm_exp(listed.logits(i), lm_pivot);
  a.at(kLMMax, row) = lm_max;
  a.at(kLMSum, row) = (kTempered ? totals[1] : totals[0] * std::exp(rest_max - lm_pivot)) + reduce_add(listed_sum);
  a.at(kLabel, row) = label_logit(a, row, student);
  a.at(kRestMax, row) = rest_max;
  a.at(kRestSum, row) = totals[0];
  if (a.spread) {
    sum_row<1>(n, &a.at(kTotal, row), [&](int64_t i, int64_t count, Vec sums[]) {
      sums[0] += (load(student + i, count, lm_pivot) - lm_pivot) * (1.0f / a.student_temperature);
    });
    a.at(kCount, row) = float(n);
  }
  for (int64_t k = 0; k < a.num_listed; k++) a.at(a.first_line() + k, row) = 0.0f;
  for (int64_t i = 0; i < listed.size(); i++) a.at(a.first_line() + listed.slot(i), row) = listed.logit(i);
}

template <bool kTempered, class Student>
void sparse_gradient(const SparseArguments& a, int64_t row, Student* student, SparseRow<Student>& listed) {
  const float lm_pivot = pivot(a.at(kLMMax, row)), on_lm = lm_factor(a, row);
  const float rest_max = a.at(kRestMax, row), rest_pivot = pivot(rest_max);
  const float scale = kLog2E / a.student_temperature, shift = a.shift[row];
  float on_rest = a.factor[row];
  if (!kTempered && on_lm != 0.0f) on_rest += on_lm * std::exp(rest_max - lm_pivot);  // the same exp serves both
  if (on_rest == 0.0f && (!kTempered || on_lm == 0.0f)) {
    rewrite_row(a, row, student, [&](int64_t, int64_t) { return Vec{} - shift; });
  } else {  // the entries of listed ids are overwritten below
    rewrite_row(a, row, student, [&](int64_t i, int64_t count) {
      const Vec logits = load(student + i, count);
      const Vec rest = exp2((logits - rest_pivot) * scale) * on_rest - shift;
      return kTempered ? rest + lm_exp(logits, lm_pivot) * on_lm : rest;
    });
  }
  for (int64_t i = 0; i < listed.size(); i += kLanes) {
    const Vec lm = on_lm == 0.0f ? Vec{} : lm_exp(listed.logits(i), lm_pivot) * on_lm;
    for (int64_t j = i; j < std::min(i + kLanes, listed.size()); j++) {
      float slope = lm[j - i] + a.listed[listed.slot(j) * a.rows + row];
      if (listed.column(j) == a.labels[row]) slope -= a.lm_weight[row];
      store(student + listed.column(j), broadcast(slope), 1);
    }
  }
}

template <bool kTempered, class Student>
void sparse_rows(const SparseArguments& a, Student* student) {
  for_rows(a, [&](int64_t begin, int64_t end) {
    SparseRow<Student> listed(a.num_valid, a.num_listed);
    for (int64_t row = begin; row < end; row++) {
      Student* const s = student + row * a.row_stride;
      listed.read(a, row, s);
      if (a.sweep == Sweep::kStatistics) sparse_statistics<kTempered>(a, row, s, listed);
      else sparse_gradient<kTempered>(a, row, s, listed);
    }
  });
}

template <class Student>
void sparse_sweep(const SparseArguments& a, Student* student) {
  if (a.student_temperature == 1.0f) sparse_rows<false>(a, student);
  else sparse_rows<true>(a, student);
}

}  // namespace megakd
