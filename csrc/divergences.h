// The divergences' formulas for sixteen vocabulary entries at a time; the sweep in head_sweep.h is generic over them.
// What the sums and slopes mean is derived in docs/numerics.md.
#pragma once

#include "vec.h"

namespace megakd {

// Entries of a row before its sums are known. s2 and t2 are the logits of student and teacher relative to the maximum of
// their slice, after temperature, in units of log2; exp_s and exp_t are 2 to their power, exactly 0 where there is no mass.
struct Entries {
  Vec s2, t2, exp_s, exp_t;
};

// The same once the sums of the whole row are merged. p and q are the probabilities times the weight of the row's
// divergence: most slopes are of first degree in them, so the weight comes in for free.
struct Probabilities {
  Vec s2, t2, p, q;
};

// The merged sums of a row, in nats. `own` are the divergence's columns.
struct RowSums {
  float student, teacher;
  const float* own;
};

// mass * ratio, exactly 0 where there is no mass, whatever the ratio.
inline Vec product(Vec mass, Vec ratio) { return mass == 0.0f ? Vec{} : mass * ratio; }

// sum += mass * ratio, leaving the sum alone where there is no mass, whatever the ratio.
inline void add_product(Vec& sum, Vec mass, Vec ratio) { sum = mass == 0.0f ? sum : sum + mass * ratio; }

struct ForwardKL {
  static constexpr int kSums = 1;  // forward

  static void accumulate(const Entries& e, Vec sums[]) { add_product(sums[0], e.exp_t, e.t2 - e.s2); }

  explicit ForwardKL(const RowSums&) {}
  Vec slope(const Probabilities& e) const { return e.q - e.p; }
};

struct ReverseKL {
  static constexpr int kSums = 1;  // reverse

  static void accumulate(const Entries& e, Vec sums[]) { add_product(sums[0], e.exp_s, e.s2 - e.t2); }

  explicit ReverseKL(const RowSums& row) : mean(row.own[0] / row.student) {}
  Vec slope(const Probabilities& e) const { return product(e.q, (e.s2 - e.t2) * kLn2 - mean); }
  float mean;
};

}  // namespace megakd
