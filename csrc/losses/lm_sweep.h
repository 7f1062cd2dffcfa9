// The sweep for the LM loss alone, and the parts that all sweeps share: sums over a row, and a row overwritten with its
// gradient. A sweep makes the statistics of rows, or the gradient in place from merged statistics. Where one process
// holds the whole vocabulary it does both at once, a row at a time while the row is in cache.
//
// The statistics are columns of `rows` floats each; megakd/losses/vocab_parallel.py says what they mean.
#pragma once

#include <cmath>
#include <cstring>

#include "threads/parallel_for.h"
#include "simd/vec.h"

namespace megakd {

enum class Sweep { kStatistics, kSecondPass, kGradient, kBoth };

enum LMColumn { kLMMax, kLMSum, kLabel, kLMColumns };

struct ChunkArguments {
  int64_t rows, row_stride, num_valid;
  const int64_t* labels;   // [rows] column of the label in this slice, or outside [0, num_valid)
  const float* lm_weight;  // [rows]
  const float* z_weight;   // [rows], or null
  float* statistics;       // [columns, rows]: output; input for the gradient alone
  Sweep sweep;
  int threads;

  float& at(int column, int64_t row) const { return statistics[column * rows + row]; }
  bool owns_label(int64_t row) const { return labels[row] >= 0 && labels[row] < num_valid; }
  float z(int64_t row) const { return z_weight == nullptr ? 0.0f : z_weight[row]; }
};

// Entries that are summed apart before the sum joins the row's, so that rounding does not grow with the vocabulary.
constexpr int64_t kBlock = 64 * kLanes;
constexpr int64_t kRun = 4;  // rows that a thread takes at a time

inline float pivot(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Calls body(begin, end) on runs of rows, shared out among the threads.
template <class Body>
void for_rows(const ChunkArguments& a, const Body& body) {
  parallel_for(a.rows, kRun, a.threads, body);
}

// The maximum over a row of entries(i, count), which returns the `count` entries from i on; NaN is ignored.
template <class Body>
inline float max_row(int64_t n, const Body& entries) {
  Vec best[4];
  for (Vec& b : best) b = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; j++) best[j] = max(entries(i + j * kLanes, kLanes), best[j]);
  }
  for (; i < n; i += kLanes) best[0] = max(entries(i, n - i), best[0]);
  return reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

template <class Element>
float row_max(const Element* logits, int64_t n) {
  return max_row(n, [&](int64_t i, int64_t count) { return load(logits + i, count); });
}

// Sums over a row: entries(i, count, sums) adds the `count` entries from i on to its sums.
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

// Overwrites a row of logits with slope(i, count), its label with label_slope() minus the label's weight, and padding
// with 0.
template <class Element, class Body, class LabelBody>
inline void rewrite_row(const ChunkArguments& a, int64_t row, Element* logits, const Body& slope,
                        const LabelBody& label_slope) {
  const int64_t n = a.num_valid;
  const Vec at_label = a.owns_label(row) ? label_slope() - a.lm_weight[row] : Vec{};  // before its logit is overwritten
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(logits + i, slope(i, kLanes));
  if (i < n) store(logits + i, slope(i, n - i), n - i);
  if (a.owns_label(row)) store(logits + a.labels[row], at_label, 1);
  std::memset(static_cast<void*>(logits + n), 0, (a.row_stride - n) * sizeof(Element));
}

template <class Element, class Body>
inline void rewrite_row(const ChunkArguments& a, int64_t row, Element* logits, const Body& slope) {
  rewrite_row(a, row, logits, slope, [&] { return slope(a.labels[row], 1); });
}

inline Vec lm_exp(Vec logits, float pivot) { return exp2((logits - pivot) * kLog2E); }

// Factor of exp(s - lm_max) in the gradient of LM loss and z-loss: but for the label, both are multiples of the softmax.
inline float lm_factor(const ChunkArguments& a, int64_t row) {
  float weight = a.lm_weight[row];
  if (a.z(row) != 0.0f) weight += 2.0f * a.z(row) * (a.at(kLMMax, row) + std::log(a.at(kLMSum, row)));
  return weight == 0.0f ? 0.0f : weight / a.at(kLMSum, row);
}

template <class Student>
float label_logit(const ChunkArguments& a, int64_t row, const Student* student) {
  return a.owns_label(row) ? load(student + a.labels[row], 1)[0] : 0.0f;
}

template <class Student>
void lm_statistics(const ChunkArguments& a, int64_t row, const Student* student) {
  const float maximum = row_max(student, a.num_valid), subtract = pivot(maximum);
  a.at(kLMMax, row) = maximum;
  a.at(kLabel, row) = label_logit(a, row, student);
  sum_row<1>(a.num_valid, &a.at(kLMSum, row), [&](int64_t i, int64_t count, Vec sums[]) {
    sums[0] += lm_exp(load(student + i, count), subtract);
  });
}

template <class Student>
void lm_gradient(const ChunkArguments& a, int64_t row, Student* student) {
  const float subtract = pivot(a.at(kLMMax, row)), factor = lm_factor(a, row);
  if (factor == 0.0f) {  // nothing of the row may reach the gradient, not even NaN
    return rewrite_row(a, row, student, [](int64_t, int64_t) { return Vec{}; });
  }
  rewrite_row(a, row, student, [&](int64_t i, int64_t count) {
    return lm_exp(load(student + i, count), subtract) * factor;
  });
}

template <class Student>
void lm_sweep(const ChunkArguments& a, Student* student) {
  for_rows(a, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Student* const s = student + row * a.row_stride;
      if (a.sweep != Sweep::kGradient) lm_statistics(a, row, s);
      if (a.sweep != Sweep::kStatistics) lm_gradient(a, row, s);
    }
  });
}

}  // namespace megakd
