// The divergences' formulas for sixteen vocabulary entries at a time; the sweep in dense_sweep.h is generic over them.
// Those that need the probabilities for their value are in mixtures.h. Derivations are in docs/numerics.md.
//
// A divergence is a struct with
//   kFirstPass   number of sums over the row that `accumulate` adds to; the result is multiplied by kFirstPassUnit;
//   kSecondPass  number of sums over the row that `accumulate_second_pass` adds to, once the first are merged over the
//                whole row; with kSecondPassElsewhere Python makes them (adaptive_kl.py);
//   kLinear      true if `slope` is of first degree in p and q, so that these may contain the row's weight;
//   kLabelApart  true if the label's entry stays out of all sums and has a slope of its own, `label_slope`;
//   slope        derivative by the student's logit over its temperature.
#pragma once

#include <cmath>

#include "simd/vec.h"

namespace megakd {

// Entries of a row before its sums are known. s2 and t2 are the logits of student and teacher relative to the maximum of
// their slice, after temperature, in units of log2; exp_s is 2^s2 and exp_t is 2^t2, exactly 0 where there is no mass.
// s and t are the logits after temperature in nats, with no maximum subtracted.
struct Entries {
  Vec s2, t2, exp_s, exp_t, s, t;
};

// Entries of a row once its sums are merged. s2 and t2 are relative to the maximum of the whole row, s and t as above. p
// and q are the probabilities of teacher and student, times the weight of the row's divergence if that is linear.
struct Probabilities {
  Vec s2, t2, p, q, s, t;
};

// The pivot that is subtracted from a row's logits, and the inverse of their temperature.
struct Scale {
  float pivot, inverse_temperature;

  // Subtracts before it scales, which is exact where logits are huge.
  Vec in_log2(Vec logits) const { return (logits - pivot) * (inverse_temperature * kLog2E); }
};

// Merged sums of a row: `student` of exp_s, `teacher` of exp_t, and `own`, the divergence's columns in nats, those of the
// first pass before those of the second.
struct RowSums {
  float student, teacher;
  Scale student_scale, teacher_scale;
  const float* own;
};

// Parameters of a divergence; each divergence says what they mean.
struct Parameters {
  float a, b;
};

// mass * ratio, exactly 0 where there is no mass, whatever the ratio.
inline Vec product(Vec mass, Vec ratio) { return mass == 0.0f ? Vec{} : mass * ratio; }

// sum += mass * ratio, leaving the sum alone where there is no mass, whatever the ratio.
inline void add_product(Vec& sum, Vec mass, Vec ratio) { sum = mass == 0.0f ? sum : sum + mass * ratio; }

// Defaults that most divergences share.
struct Plain {
  static constexpr int kFirstPass = 1, kSecondPass = 0;
  static constexpr float kFirstPassUnit = kLn2;
  static constexpr bool kSecondPassElsewhere = false, kLinear = true, kLabelApart = false;
};

// KL(p || q).
struct ForwardKL : Plain {
  static void accumulate(const Entries& e, Vec sums[]) { add_product(sums[0], e.exp_t, e.t2 - e.s2); }

  ForwardKL(const RowSums&, const Parameters&) {}
  Vec slope(const Probabilities& e) const { return e.q - e.p; }
};

// KL(q || p).
struct ReverseKL : Plain {
  static void accumulate(const Entries& e, Vec sums[]) { add_product(sums[0], e.exp_s, e.s2 - e.t2); }

  ReverseKL(const RowSums& row, const Parameters&) : mean(row.own[0] / row.student) {}
  Vec slope(const Probabilities& e) const { return product(e.q, (e.s2 - e.t2) * kLn2 - mean); }
  float mean;
};

// (1 - w) KL(p || q) + w KL(q || p), w the first parameter.
struct SymmetricKL : Plain {
  static constexpr int kFirstPass = 2;  // forward, reverse

  static void accumulate(const Entries& e, Vec sums[]) {
    add_product(sums[0], e.exp_t, e.t2 - e.s2);
    add_product(sums[1], e.exp_s, e.s2 - e.t2);
  }

  SymmetricKL(const RowSums& row, const Parameters& with) : reverse_weight(with.a), mean(row.own[1] / row.student) {}
  Vec slope(const Probabilities& e) const {
    return (e.q - e.p) * (1.0f - reverse_weight) + product(e.q, (e.s2 - e.t2) * kLn2 - mean) * reverse_weight;
  }
  float reverse_weight, mean;
};

// (1 - w) KL(p || q) + w KL(q || p) with a w for each row, the tail's share of the gap: columns head_gap and tail_gap,
// which adaptive_kl.py fills.
struct AdaptiveKL : SymmetricKL {
  static constexpr int kSecondPass = 2;
  static constexpr bool kSecondPassElsewhere = true;

  AdaptiveKL(const RowSums& row, const Parameters&) : SymmetricKL(row, {tail_share(row.own[2], row.own[3]), 0.0f}) {}
  static float tail_share(float head, float tail) { return head + tail == 0.0f ? 0.5f : tail / (head + tail); }
};

// True for ids that at least one model does not rule out: the others take no part in squared differences of logits.
inline IntVec in_play(Vec s, Vec t) { return (s != -kInfinity) | (t != -kInfinity); }

// mean (s - t)^2.
struct LogitMSE : Plain {
  static constexpr int kFirstPass = 2;  // square, count
  static constexpr float kFirstPassUnit = 1.0f;
  static constexpr bool kLinear = false;

  static void accumulate(const Entries& e, Vec sums[]) {
    const Vec difference = in_play(e.s, e.t) ? e.s - e.t : Vec{};
    sums[0] += difference * difference;
    sums[1] += in_play(e.s, e.t) ? broadcast(1.0f) : Vec{};
  }

  LogitMSE(const RowSums& row, const Parameters&) : factor(2.0f / row.own[1]) {}
  Vec slope(const Probabilities& e) const { return (in_play(e.s, e.t) ? e.s - e.t : Vec{}) * factor; }
  float factor;
};

// mean (s - t - mean (s - t))^2.
struct CentredLogitMSE : Plain {
  static constexpr int kFirstPass = 2, kSecondPass = 1;  // difference, count; square
  static constexpr float kFirstPassUnit = 1.0f;
  static constexpr bool kLinear = false;

  static void accumulate(const Entries& e, Vec sums[]) {
    // An infinite difference stays out of the mean: it makes the sum of squares infinite anyway. NaN stays.
    const Vec difference = in_play(e.s, e.t) ? e.s - e.t : Vec{};
    sums[0] += (difference == kInfinity) | (difference == -kInfinity) ? Vec{} : difference;
    sums[1] += in_play(e.s, e.t) ? broadcast(1.0f) : Vec{};
  }

  CentredLogitMSE(const RowSums& row, const Parameters&) : mean(row.own[0] / row.own[1]), factor(2.0f / row.own[1]) {}
  Vec centred(const Probabilities& e) const { return in_play(e.s, e.t) ? e.s - e.t - mean : Vec{}; }
  void accumulate_second_pass(const Probabilities& e, Vec sums[]) const { sums[0] += centred(e) * centred(e); }
  Vec slope(const Probabilities& e) const { return centred(e) * factor; }
  float mean, factor;
};

// alpha (label part) + beta KL among the other ids (DKD, arXiv 2203.08679). p and q are the distributions among the other
// ids; the parameters are alpha and beta.
struct Decoupled : Plain {
  static constexpr bool kLabelApart = true;

  static void accumulate(const Entries& e, Vec sums[]) { ForwardKL::accumulate(e, sums); }

  // The columns are forward, student_label and teacher_label.
  Decoupled(const RowSums& row, const Parameters& with)
      : label_slope(float(with.a * (of_label(row.own[1], row.student_scale, row.student) -
                                    of_label(row.own[2], row.teacher_scale, row.teacher)))),
        beta(with.b) {}
  Vec slope(const Probabilities& e) const { return (e.q - e.p) * beta - e.q * label_slope; }

  // The label's probability from its logit and the sum over the others.
  static double of_label(float logit, const Scale& scale, float others) {
    return 1.0 / (1.0 + others * std::exp((double(scale.pivot) - logit) * scale.inverse_temperature));
  }
  float label_slope, beta;
};

}  // namespace megakd
