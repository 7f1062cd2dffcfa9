// The divergences that are a sum over ids of a function of p and q. Their value needs both, hence a second pass over the
// row. `slope` is w = q dD/dq, up to a multiple of q; the derivative by the logit is w - q sum(w).
#pragma once

#include "losses/divergences.h"

namespace megakd {

// Lower bound of denominators, the smallest normal number: ids without mass in either model must not make 0 / 0.
constexpr float kTiny = std::numeric_limits<float>::min();

// Sums and derivative of a divergence from a function of one entry: Entry(row, parameters), value(e), slope(e).
template <class Entry>
struct Pointwise : Plain {
  static constexpr int kFirstPass = 0, kSecondPass = 2;  // value, slope
  static constexpr bool kLinear = false;

  static void accumulate(const Entries&, Vec[]) {}

  Pointwise(const RowSums& row, const Parameters& with) : entry(row, with), total(row.own[1]) {}
  void accumulate_second_pass(const Probabilities& e, Vec sums[]) const {
    sums[0] += entry.value(e);
    sums[1] += entry.slope(e);
  }
  Vec slope(const Probabilities& e) const { return entry.slope(e) - product(e.q, broadcast(total)); }
  Entry entry;
  float total;
};

// mass log(mass / m), by the ratio, which is precise where mass and m are close.
inline Vec log_ratio_product(Vec mass, Vec inverse_m) { return product(mass, log2(mass * inverse_m) * kLn2); }

// 1 / m for the mixture m = on_p p + (1 - on_p) q.
inline Vec inverse_mixture(const Probabilities& e, float on_p) {
  return 1.0f / max(broadcast(kTiny), e.p * on_p + e.q * (1.0f - on_p));
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta is the first parameter.
struct GeneralisedJSD {
  GeneralisedJSD(const RowSums&, const Parameters& with) : beta(with.a) {}
  Vec value(const Probabilities& e) const {
    return log_ratio_product(e.p, inverse_mixture(e, beta)) * beta + slope(e);
  }
  Vec slope(const Probabilities& e) const {
    return log_ratio_product(e.q, inverse_mixture(e, beta)) * (1.0f - beta);
  }
  float beta;
};

// KL(p || alpha p + (1 - alpha) q); alpha is the first parameter.
struct SkewForwardKL {
  SkewForwardKL(const RowSums&, const Parameters& with) : alpha(with.a) {}
  Vec value(const Probabilities& e) const { return log_ratio_product(e.p, inverse_mixture(e, alpha)); }
  Vec slope(const Probabilities& e) const { return e.p * (e.q * inverse_mixture(e, alpha)) * (alpha - 1.0f); }
  float alpha;
};

// KL(q || alpha q + (1 - alpha) p); alpha is the first parameter.
struct SkewReverseKL {
  SkewReverseKL(const RowSums&, const Parameters& with) : alpha(with.a) {}
  Vec value(const Probabilities& e) const { return log_ratio_product(e.q, inverse_mixture(e, 1.0f - alpha)); }
  Vec slope(const Probabilities& e) const {
    return value(e) - e.q * (e.q * inverse_mixture(e, 1.0f - alpha)) * alpha;
  }
  float alpha;
};

// sum |p - q| / 2.
struct TotalVariation {
  TotalVariation(const RowSums&, const Parameters&) {}
  Vec value(const Probabilities& e) const { return (e.q > e.p ? e.q - e.p : e.p - e.q) * 0.5f; }
  Vec slope(const Probabilities& e) const {
    return e.q * (e.q > e.p ? broadcast(0.5f) : e.q < e.p ? broadcast(-0.5f) : (e.p - e.q) * 0.0f);
  }
};

// ABKD's divergence and its limits, with a and b the exponents of p and q. Computed from log p and log q, so that terms
// of the value that cancel do so exactly. An id that both models rule out adds nothing.
struct AlphaBeta {
  AlphaBeta(const RowSums& row, const Parameters& with)
      : a(with.a), b(with.b), student(std::log2(row.student)), teacher(std::log2(row.teacher)) {}

  Vec value(const Probabilities& e) const {
    const Vec p = e.t2 - teacher, q = e.s2 - student;  // logarithms
    return in_play(p, q) ? value_limit(p, q, value_in_play(p, q)) : Vec{};
  }
  Vec slope(const Probabilities& e) const {
    const Vec p = e.t2 - teacher, q = e.s2 - student;
    return in_play(p, q) ? slope_limit(p, q, slope_in_play(p, q)) : Vec{};
  }

  // Limits of values and slopes that came out as a difference of infinities, which negative exponents of small
  // probabilities make. No value is below 0 and the largest term has a positive sign, so the limit is +inf, or 0 where
  // p = q. The slope has the sign of q - p. NaN logits stay NaN.
  static Vec value_limit(Vec p, Vec q, Vec value) {
    const Vec limit = (p > q ? p - q : q - p) + kInfinity;
    return value > -kInfinity ? value : p == q ? Vec{} : limit;
  }
  static Vec slope_limit(Vec p, Vec q, Vec slope) {
    return slope == slope ? slope : p == q ? Vec{} : (q - p) * kInfinity;
  }

  Vec value_in_play(Vec p, Vec q) const {
    const Vec gap = (p - q) * kLn2;
    if (a == 0.0f && b == 0.0f) return gap * gap * 0.5f;
    if (a == 0.0f) return (product(exp2(q * b), gap * -b) - exp2(q * b) + exp2(p * b)) * (1.0f / (b * b));
    if (b == 0.0f) return (product(exp2(p * a), gap * a) - exp2(p * a) + exp2(q * a)) * (1.0f / (a * a));
    if (a + b == 0.0f) return (exp2((p - q) * a) - gap * a - 1.0f) * (1.0f / (a * a));
    const Vec ends = exp2(p * (a + b)) * a + exp2(q * (a + b)) * b;
    return (ends - exp2(p * a + q * b) * (a + b)) * (1.0f / (a * b * (a + b)));
  }
  Vec slope_in_play(Vec p, Vec q) const {
    const Vec own = a + b == 0.0f ? broadcast(1.0f) : exp2(q * (a + b));  // -inf times 0 would be NaN
    if (a == 0.0f) return product(own, (q - p) * kLn2);
    return (own - (b == 0.0f ? exp2(p * a) : exp2(p * a + q * b))) * (1.0f / a);
  }
  float a, b, student, teacher;
};

}  // namespace megakd
