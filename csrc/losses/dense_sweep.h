// The sweep over a chunk's logits of student and teacher, generic over the divergence between them.
#pragma once

#include "losses/divergences.h"
#include "losses/lm_sweep.h"

namespace megakd {

enum DenseColumn { kStudentMax = kLMColumns, kStudentSum, kTeacherMax, kTeacherSum, kTeacherSelf, kAgree, kOwn };

struct DenseArguments : ChunkArguments {
  const float* kd_weight;  // [rows]
  float student_temperature, teacher_temperature;
  float kd_scale;  // on the divergence
  Parameters parameters;
};

// Columns behind the sums of a divergence that treats the label apart: the label's logits, and the maxima of the whole
// rows, label included.
enum ApartColumn { kStudentLabel, kTeacherLabel, kStudentTop, kTeacherTop, kApartColumns };

template <class Divergence>
constexpr int kFirstPassColumns = Divergence::kFirstPass + (Divergence::kLabelApart ? kApartColumns : 0);

// The maximum of a row without the entry `apart`.
template <class Element>
float max_without(const Element* logits, int64_t n, int64_t apart) {
  const float before = row_max(logits, apart), behind = row_max(logits + apart + 1, n - apart - 1);
  return before > behind ? before : behind;
}

// The entries from i on, with -inf in the place of `apart` if it is among them.
inline Vec without(Vec logits, int64_t i, int64_t apart) {
  const IntVec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes == int32_t(apart - i) ? broadcast(-kInfinity) : logits;
}

inline float larger(float a, float b) { return b > a ? b : a; }  // returns a where b is NaN

// kTempered: the student's softmax in the divergence has another temperature than the one in the LM loss.
template <class Divergence, bool kTempered, class Student, class Teacher>
void dense_statistics(const DenseArguments& a, int64_t row, const Student* student, const Teacher* teacher) {
  constexpr bool kTwoSoftmaxes = kTempered || Divergence::kLabelApart;
  const int64_t n = a.num_valid, label = a.labels[row];
  const bool apart = Divergence::kLabelApart && a.owns_label(row);
  const float student_label = label_logit(a, row, student);
  const float teacher_label = label_logit(a, row, teacher);
  float student_max, teacher_max, student_top, teacher_top;
  if (!apart) {
    student_top = student_max = row_max(student, n), teacher_top = teacher_max = row_max(teacher, n);
  } else {
    student_max = max_without(student, n, label), student_top = larger(student_max, student_label);
    teacher_max = max_without(teacher, n, label), teacher_top = larger(teacher_max, teacher_label);
  }
  const float lm_pivot = pivot(student_top);
  const Scale student_scale{pivot(student_max), 1.0f / a.student_temperature};
  const Scale teacher_scale{pivot(teacher_max), 1.0f / a.teacher_temperature};
  Vec top = broadcast(-kInfinity);  // the maximum of s2 + t2, which is 0 only where one id is the maximum of both rows
  float totals[4 + Divergence::kFirstPass];
  sum_row<4 + Divergence::kFirstPass>(n, totals, [&](int64_t i, int64_t count, Vec sums[]) {
    const Vec whole = load(student + i, count);
    Vec s = whole, t = load(teacher + i, count);
    if (Divergence::kLabelApart && apart) s = without(s, i, label), t = without(t, i, label);
    const Vec s2 = student_scale.in_log2(s), t2 = teacher_scale.in_log2(t);
    const Entries entries{
        s2, t2, exp2(s2), exp2(t2), s * student_scale.inverse_temperature, t * teacher_scale.inverse_temperature};
    top = max(s2 + t2, top);
    sums[0] += kTwoSoftmaxes ? lm_exp(whole, lm_pivot) : entries.exp_s;
    sums[1] += entries.exp_s;
    sums[2] += entries.exp_t;
    add_product(sums[3], entries.exp_t, t2);
    Divergence::accumulate(entries, sums + 4);
  });
  bool agree = reduce_max(top) == 0.0f;
  if (apart) {
    agree = (agree && student_max == student_top && teacher_max == teacher_top) ||
            (student_label == student_top && teacher_label == teacher_top);
  }
  a.at(kLMMax, row) = student_top;
  a.at(kLMSum, row) = totals[0];
  a.at(kLabel, row) = student_label;
  a.at(kStudentMax, row) = student_max;
  a.at(kStudentSum, row) = totals[1];
  a.at(kTeacherMax, row) = teacher_max;
  a.at(kTeacherSum, row) = totals[2];
  a.at(kTeacherSelf, row) = totals[3] * kLn2;
  a.at(kAgree, row) = agree;
  for (int k = 0; k < Divergence::kFirstPass; k++) a.at(kOwn + k, row) = totals[4 + k] * Divergence::kFirstPassUnit;
  if (!Divergence::kLabelApart) return;
  const int behind = kOwn + Divergence::kFirstPass;
  a.at(behind + kStudentLabel, row) = student_label;
  a.at(behind + kTeacherLabel, row) = teacher_label;
  a.at(behind + kStudentTop, row) = student_top;
  a.at(behind + kTeacherTop, row) = teacher_top;
}

// The merged sums of a row and the divergence made from them: input of the second pass and of the gradient.
template <class Divergence>
struct Merged {
  static constexpr int kColumns = kFirstPassColumns<Divergence> + Divergence::kSecondPass;

  // has_second_pass: true if the columns of the second pass are filled.
  Merged(const DenseArguments& a, int64_t row, bool has_second_pass)
      : own(columns(a, row, has_second_pass)),
        sums{a.at(kStudentSum, row),
             a.at(kTeacherSum, row),
             {pivot(a.at(kStudentMax, row)), 1.0f / a.student_temperature},
             {pivot(a.at(kTeacherMax, row)), 1.0f / a.teacher_temperature},
             own.values},
        divergence(sums, a.parameters) {}
  Merged(const Merged&) = delete;

  // Factors that turn exp_t and exp_s into the probabilities p and q times a weight.
  struct Unit {
    float p, q;
  };
  // A row without any mass (a teacher that is certain of the label, which DKD leaves out) has probability 0 everywhere,
  // not 0 / 0.
  Unit unit(float weight) const { return {share(weight, sums.teacher), share(weight, sums.student)}; }
  static float share(float weight, float sum) { return sum == 0.0f ? 0.0f : weight / sum; }

  Probabilities probabilities(Vec s, Vec t, Unit unit) const {
    const Vec s2 = sums.student_scale.in_log2(s), t2 = sums.teacher_scale.in_log2(t);
    return with_exp(s, t, s2, t2, exp2(s2), unit);
  }
  Probabilities with_exp(Vec s, Vec t, Vec s2, Vec t2, Vec exp_s, Unit unit) const {
    return {s2,
            t2,
            exp2(t2) * unit.p,
            exp_s * unit.q,
            s * sums.student_scale.inverse_temperature,
            t * sums.teacher_scale.inverse_temperature};
  }

  struct Columns {
    float values[kColumns + 1];  // an array must not be empty
  };
  static Columns columns(const DenseArguments& a, int64_t row, bool has_second_pass) {
    Columns own{};
    const int filled = has_second_pass ? kColumns : kFirstPassColumns<Divergence>;
    for (int k = 0; k < filled; k++) own.values[k] = a.at(kOwn + k, row);
    return own;
  }
  const Columns own;
  const RowSums sums;
  const Divergence divergence;
};

template <class Divergence, class Student, class Teacher>
void dense_second_pass(const DenseArguments& a, int64_t row, const Student* student, const Teacher* teacher) {
  const Merged<Divergence> merged(a, row, false);
  const auto unit = merged.unit(1.0f);
  float totals[Divergence::kSecondPass];
  sum_row<Divergence::kSecondPass>(a.num_valid, totals, [&](int64_t i, int64_t count, Vec sums[]) {
    const Vec s = load(student + i, count), t = load(teacher + i, count);
    merged.divergence.accumulate_second_pass(merged.probabilities(s, t, unit), sums);
  });
  for (int k = 0; k < Divergence::kSecondPass; k++) a.at(kOwn + kFirstPassColumns<Divergence> + k, row) = totals[k];
}

template <class Divergence, bool kTempered, class Student, class Teacher>
void dense_gradient(const DenseArguments& a, int64_t row, Student* student, const Teacher* teacher) {
  constexpr bool kTwoSoftmaxes = kTempered || Divergence::kLabelApart;
  const Merged<Divergence> merged(a, row, true);
  const float lm_pivot = pivot(a.at(kLMMax, row)), on_lm = lm_factor(a, row);
  const float on_kd = a.kd_weight[row] * a.kd_scale / a.student_temperature;
  const auto unit = merged.unit(Divergence::kLinear ? on_kd : 1.0f);
  const auto lm = [&](Vec s, Vec exp_s) { return (kTwoSoftmaxes ? lm_exp(s, lm_pivot) : exp_s) * on_lm; };
  const auto slope = [&](int64_t i, int64_t count) {
    const Vec s = load(student + i, count), t = load(teacher + i, count);
    const Vec s2 = merged.sums.student_scale.in_log2(s), t2 = merged.sums.teacher_scale.in_log2(t);
    const Vec exp_s = exp2(s2);
    const Vec kd = merged.divergence.slope(merged.with_exp(s, t, s2, t2, exp_s, unit));
    return lm(s, exp_s) + (Divergence::kLinear ? kd : kd * on_kd);
  };
  if constexpr (Divergence::kLabelApart) {
    rewrite_row(a, row, student, slope, [&] {
      return lm(load(student + a.labels[row], 1), Vec{}) + on_kd * merged.divergence.label_slope;
    });
  } else {
    rewrite_row(a, row, student, slope);
  }
}

template <class Divergence, bool kTempered, class Student, class Teacher>
void dense_rows(const DenseArguments& a, Student* student, const Teacher* teacher) {
  constexpr bool kSecondPass = Divergence::kSecondPass > 0 && !Divergence::kSecondPassElsewhere;
  const bool both = a.sweep == Sweep::kBoth;
  for_rows(a, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      Student* const s = student + row * a.row_stride;
      const Teacher* const t = teacher + row * a.row_stride;
      if (both || a.sweep == Sweep::kStatistics) dense_statistics<Divergence, kTempered>(a, row, s, t);
      if constexpr (kSecondPass) {
        if (both || a.sweep == Sweep::kSecondPass) dense_second_pass<Divergence>(a, row, s, t);
      }
      if (!both && a.sweep != Sweep::kGradient) continue;
      // In a row without KD weight nothing of the teacher may reach the gradient, not even NaN.
      if (a.kd_weight[row] == 0.0f) lm_gradient(a, row, s);
      else dense_gradient<Divergence, kTempered>(a, row, s, t);
    }
  });
}

// A divergence as the bindings see it: the number of its columns, and its sweep for every combination of dtypes.
struct DenseKernel {
  using Run = void (*)(const DenseArguments&, void* student, const void* teacher);
  const char* name;
  int first_pass, second_pass;
  bool second_pass_elsewhere;
  Run run[2][2];  // [student is bf16][teacher is bf16]
};

template <class Divergence, class Student, class Teacher>
void run_dense(const DenseArguments& a, void* student, const void* teacher) {
  const auto s = static_cast<Student*>(student);
  const auto t = static_cast<const Teacher*>(teacher);
  if (a.student_temperature == 1.0f) dense_rows<Divergence, false>(a, s, t);
  else dense_rows<Divergence, true>(a, s, t);
}

template <class Divergence>
constexpr DenseKernel dense_kernel(const char* name) {
  return {name,
          kFirstPassColumns<Divergence>,
          Divergence::kSecondPass,
          Divergence::kSecondPassElsewhere,
          {{run_dense<Divergence, float, float>, run_dense<Divergence, float, BFloat16>},
           {run_dense<Divergence, BFloat16, float>, run_dense<Divergence, BFloat16, BFloat16>}}};
}

// Every divergence is in one of these lists, which are compiled apart; an entry without a name ends a list.
extern const DenseKernel kDivergenceKernels[], kMixtureKernels[];

}  // namespace megakd
