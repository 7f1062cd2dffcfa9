// The keys of samples, a block at a time: scores made from the models' log-probabilities, ties told apart by a hash.
//
// A key has 96 bits: the order-preserving image of the float32 score, then a keyed hash of the sample's id. Keys are made
// anew in every sweep, from files that stay on disk.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace megakd {

constexpr int64_t kBlock = 2048;  // keys of a block stay in the first cache
constexpr int kRankBits = 20;
constexpr int kRankLow = 32 - kRankBits;

struct Key {
  uint32_t score;
  uint64_t hash;
};

inline bool less(const Key& a, const Key& b) { return a.score != b.score ? a.score < b.score : a.hash < b.hash; }

// A larger float has a larger image.
inline uint32_t image_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// A bijection (Stafford's variant 13 of MurmurHash3's finaliser): samples of one dataset never share a hash.
inline uint64_t hash_of(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

// Where samples and their scores come from, and which of them may be kept.
struct ScoreSource {
  std::vector<const float*> log_probs;  // one array a model, over all samples
  std::vector<double> weights;          // float32 values, so that the products below are exact in double
  std::vector<const double*> ranks;     // per model the samples below each bin of its NLL, and at the end all; or empty
  const int32_t* divisor = nullptr;     // per sample; where there is none, of_all.
  float divisor_of_all = 1;
  const int32_t* tokens = nullptr;  // likewise: scored tokens
  int64_t tokens_of_all = 1;
  const int64_t* excluded = nullptr;  // sorted ids
  int64_t num_excluded = 0;
  uint64_t tie_key = 0, gumbel_key = 0;
  double gumbel_temperature = 0;  // 0: scores as they are
  bool drop_negative = false, has_below = false;
  Key below{0, 0};  // only samples whose score, before Gumbel noise, is below this key

  uint64_t hash(int64_t id) const { return hash_of(static_cast<uint64_t>(id) ^ tie_key); }

  double gumbel(int64_t id) const {
    const uint64_t bits = hash_of(static_cast<uint64_t>(id) ^ gumbel_key) >> 11;
    return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-53));
  }
};

struct Range {
  int32_t least = INT32_MAX, most = INT32_MIN;

  void widen(const Range& other) { least = std::min(least, other.least), most = std::max(most, other.most); }
};

struct Survey {
  int64_t candidates = 0, tokens = 0, excluded = 0, empty = 0, negative = 0, num_bad = 0, first_bad = -1;
  Range divisors, token_counts;
  std::vector<double> moments;  // of score s and each model's x: sum s, sum s^2, then sum x, sum x^2, sum s x

  void add(const Survey& other) {
    candidates += other.candidates, tokens += other.tokens, excluded += other.excluded, empty += other.empty;
    negative += other.negative, num_bad += other.num_bad;
    if (first_bad < 0) first_bad = other.first_bad;
    divisors.widen(other.divisors), token_counts.widen(other.token_counts);
    if (moments.size() < other.moments.size()) moments.resize(other.moments.size());
    for (size_t i = 0; i < other.moments.size(); i++) moments[i] += other.moments[i];
  }
};

// Scores, keys and candidates of a block of samples.
class Block {
 public:
  explicit Block(const ScoreSource& source) : source_(source), sum_(kBlock), terms_(source.log_probs.size() * kBlock) {}

  int64_t begin = 0, count = 0;
  bool all = false;  // every sample is a candidate; else see candidate
  float score[kBlock];
  uint32_t image[kBlock];
  uint8_t candidate[kBlock];

  const float* term(size_t model) const { return terms_.data() + model * kBlock; }

  // with_terms: each model's own term is kept too.
  void fill_scores(int64_t from, int64_t to, bool with_terms) {
    begin = from, count = to - from;
    divisors_ = range_of(source_.divisor);
    const float divisor = source_.divisor ? static_cast<float>(divisors_.least) : source_.divisor_of_all;
    const bool uniform = source_.divisor == nullptr || divisors_.least == divisors_.most;
    if (uniform && !with_terms && source_.log_probs.size() == 2 && source_.ranks.empty()) {
      const float *const x = source_.log_probs[0] + begin, *const y = source_.log_probs[1] + begin;
      const double u = source_.weights[0], v = source_.weights[1];
      for (int64_t i = 0; i < count; i++) {
        score[i] = static_cast<float>(u * static_cast<double>(-x[i] / divisor) + v * static_cast<double>(-y[i] / divisor));
      }
      return;
    }
    double* const sum = sum_.data();
    for (size_t model = 0; model < source_.log_probs.size(); model++) {
      fill_term(model, uniform, divisor);
      const double weight = source_.weights[model];
      const float* const x = term(model);
      if (model == 0) {
        for (int64_t i = 0; i < count; i++) sum[i] = weight * static_cast<double>(x[i]);
      } else {
        for (int64_t i = 0; i < count; i++) sum[i] += weight * static_cast<double>(x[i]);
      }
    }
    for (int64_t i = 0; i < count; i++) score[i] = static_cast<float>(sum[i]);
  }

  // The term of one model: its NLL over the divisor, or the rank of that.
  void fill_term(size_t model, bool uniform, float divisor_of_all) {
    float* const x = terms_.data() + model * kBlock;
    const float* const log_probs = source_.log_probs[model] + begin;
    if (uniform) {
      for (int64_t i = 0; i < count; i++) x[i] = -log_probs[i] / divisor_of_all;
    } else {
      const int32_t* const divisor = source_.divisor + begin;
      for (int64_t i = 0; i < count; i++) x[i] = -log_probs[i] / static_cast<float>(divisor[i]);
    }
    if (source_.ranks.empty()) return;
    const double* const below = source_.ranks[model];
    for (int64_t i = 0; i < count; i++) {
      const uint32_t key = image_of(x[i]), bin = key >> kRankLow;
      const double inside = ((key & ((1u << kRankLow) - 1)) + 0.5) / (1 << kRankLow);  // how far into the bin
      x[i] = static_cast<float>((below[bin] + (below[bin + 1] - below[bin]) * inside) / below[1 << kRankBits]);
    }
  }

  // Also tells, where asked, why samples are no candidates. Most blocks have none to leave out, and no mask is made.
  void fill_candidates(Survey* survey) {
    all = true;
    const int64_t* const end = source_.excluded + source_.num_excluded;
    for (const int64_t* id = std::lower_bound(source_.excluded, end, begin); id < end && *id < begin + count; id++) {
      make_mask();
      if (survey) survey->excluded += candidate[*id - begin];  // an id listed twice counts once
      candidate[*id - begin] = 0;
    }
    leave_out_empty(source_.divisor, divisors_, survey);
    const Range tokens = source_.tokens == source_.divisor ? divisors_ : range_of(source_.tokens);
    leave_out_empty(source_.tokens, tokens, survey);
    if (survey) {
      survey->divisors.widen(divisors_);
      survey->token_counts.widen(tokens);
      note_scores(*survey);
    }
    if (source_.drop_negative) {
      make_mask();
      for (int64_t i = 0; i < count; i++) candidate[i] &= !(score[i] < 0);
    }
    if (source_.has_below) {
      make_mask();
      for (int64_t i = 0; i < count; i++) {
        const uint32_t own = image_of(score[i]);
        if (own >= source_.below.score) candidate[i] &= less({own, source_.hash(begin + i)}, source_.below);
      }
    }
  }

  void fill_images() {
    if (source_.gumbel_temperature == 0) {
      for (int64_t i = 0; i < count; i++) image[i] = image_of(score[i]);
      return;
    }
    for (int64_t i = 0; i < count; i++) {
      const double noisy = static_cast<double>(score[i]) / source_.gumbel_temperature + source_.gumbel(begin + i);
      image[i] = image_of(static_cast<float>(noisy));
    }
  }

  int64_t num_candidates() const {
    return all ? count : std::count(candidate, candidate + count, 1);
  }

  int64_t tokens_of_candidates() const {
    if (source_.tokens == nullptr) return num_candidates() * source_.tokens_of_all;
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += all || candidate[i] ? source_.tokens[begin + i] : 0;
    return sum;
  }

  void clear_others() {
    for (int64_t i = 0; !all && i < count; i++) {
      if (candidate[i]) continue;
      score[i] = 0;
      for (size_t model = 0; model < source_.log_probs.size(); model++) terms_[model * kBlock + i] = 0;
    }
  }

  // The places in the block of candidates with images from first to last; returns how many. Without a branch a sample.
  int64_t places_between(uint32_t first, uint32_t last, int32_t* places) const {
    int64_t found = 0;
    if (all) {
      for (int64_t i = 0; i < count; i++) {
        places[found] = static_cast<int32_t>(i);
        found += image[i] - first <= last - first;
      }
    } else {
      for (int64_t i = 0; i < count; i++) {
        places[found] = static_cast<int32_t>(i);
        found += (image[i] - first <= last - first) & candidate[i];
      }
    }
    return found;
  }

  void fill(int64_t from, int64_t to) {
    fill_scores(from, to, false);
    fill_candidates(nullptr);
    fill_images();
  }

 private:
  void make_mask() {
    if (all) std::memset(candidate, 1, count);
    all = false;
  }

  Range range_of(const int32_t* array) const {
    Range range;
    if (array == nullptr) return range;
    array += begin;
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; i++) {
      least = array[i] < least ? array[i] : least;
      most = array[i] > most ? array[i] : most;
    }
    return {least, most};
  }

  // Leaves out samples with none of what the array counts.
  void leave_out_empty(const int32_t* array, const Range& range, Survey* survey) {
    if (array == nullptr || range.least > 0) return;
    make_mask();
    for (int64_t i = 0; i < count; i++) {
      const uint8_t empty = candidate[i] & (array[begin + i] <= 0);
      if (survey) survey->empty += empty;
      candidate[i] ^= empty;
    }
  }

  void note_scores(Survey& survey) {
    int32_t bad = 0, negative = 0;
#pragma omp simd reduction(+ : bad, negative)
    for (int64_t i = 0; i < count; i++) {
      bad += !(std::fabs(score[i]) <= FLT_MAX);
      negative += score[i] < 0;
    }
    if (!all && (bad || negative)) {
      bad = negative = 0;
      for (int64_t i = 0; i < count; i++) {
        bad += candidate[i] & !(std::fabs(score[i]) <= FLT_MAX);
        negative += candidate[i] & (score[i] < 0);
      }
    }
    survey.num_bad += bad, survey.negative += negative;
    for (int64_t i = 0; bad && survey.first_bad < 0; i++) {
      if ((all || candidate[i]) && !(std::fabs(score[i]) <= FLT_MAX)) survey.first_bad = begin + i;
    }
  }

  const ScoreSource& source_;
  Range divisors_;  // of the block
  std::vector<double> sum_;
  std::vector<float> terms_;
};

}  // namespace megakd
