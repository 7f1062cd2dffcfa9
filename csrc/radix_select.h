// Sweeps over the scores of samples: the exact k-th largest by histograms of 16-bit digits, and the ids above it.
//
// A sample's key has 96 bits: the order-preserving image of its float32 score, then a keyed hash of its id, which breaks
// ties. Keys are made anew in every sweep, from files that stay on disk; what is held does not grow with the samples.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace megakd {

constexpr int64_t kBlock = 2048;          // keys of a block stay in the first cache
constexpr int64_t kStretch = 32 * kBlock;  // what a thread takes at a time
constexpr int kDigits = 65536;
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

  // Whether a sample can be out of question at all.
  bool all_candidates() const {
    return divisor == nullptr && tokens == nullptr && num_excluded == 0 && !drop_negative && !has_below;
  }

  uint64_t hash(int64_t id) const { return hash_of(static_cast<uint64_t>(id) ^ tie_key); }

  double gumbel(int64_t id) const {
    const uint64_t bits = hash_of(static_cast<uint64_t>(id) ^ gumbel_key) >> 11;
    return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-53));
  }
};

struct Survey {
  int64_t candidates = 0, tokens = 0, excluded = 0, empty = 0, negative = 0, num_bad = 0, first_bad = -1;
  int32_t least_divisor = INT32_MAX, largest_divisor = INT32_MIN, least_tokens = INT32_MAX, most_tokens = INT32_MIN;
  std::vector<double> moments;  // of score s and each model's x: sum s, sum s^2, then sum x, sum x^2, sum s x

  void add(const Survey& other) {
    candidates += other.candidates, tokens += other.tokens, excluded += other.excluded, empty += other.empty;
    negative += other.negative, num_bad += other.num_bad;
    if (first_bad < 0) first_bad = other.first_bad;
    least_divisor = std::min(least_divisor, other.least_divisor);
    largest_divisor = std::max(largest_divisor, other.largest_divisor);
    least_tokens = std::min(least_tokens, other.least_tokens);
    most_tokens = std::max(most_tokens, other.most_tokens);
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

  void fill_scores(int64_t from, int64_t to) {
    begin = from, count = to - from;
    double* const sum = sum_.data();
    for (size_t model = 0; model < source_.log_probs.size(); model++) {
      fill_term(model);
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
  void fill_term(size_t model) {
    float* const x = terms_.data() + model * kBlock;
    const float* const log_probs = source_.log_probs[model] + begin;
    if (source_.divisor) {
      const int32_t* const divisor = source_.divisor + begin;
      for (int64_t i = 0; i < count; i++) x[i] = -log_probs[i] / static_cast<float>(divisor[i]);
    } else {
      const float divisor = source_.divisor_of_all;
      for (int64_t i = 0; i < count; i++) x[i] = -log_probs[i] / divisor;
    }
    if (source_.ranks.empty()) return;
    const double* const below = source_.ranks[model];
    for (int64_t i = 0; i < count; i++) {
      const uint32_t key = image_of(x[i]), bin = key >> kRankLow;
      const double inside = ((key & ((1u << kRankLow) - 1)) + 0.5) / (1 << kRankLow);  // how far into the bin
      x[i] = static_cast<float>((below[bin] + (below[bin + 1] - below[bin]) * inside) / below[1 << kRankBits]);
    }
  }

  // Also tells, where asked, why samples are no candidates.
  void fill_candidates(Survey* survey) {
    all = survey == nullptr && source_.all_candidates();
    if (all) return;
    std::fill(candidate, candidate + count, 1);
    const int64_t* const end = source_.excluded + source_.num_excluded;
    for (const int64_t* id = std::lower_bound(source_.excluded, end, begin); id < end && *id < begin + count; id++) {
      if (survey) survey->excluded += candidate[*id - begin];  // an id listed twice counts once
      candidate[*id - begin] = 0;
    }
    for (const int32_t* array : {source_.divisor, source_.tokens}) {
      if (array == nullptr) continue;
      for (int64_t i = 0; i < count; i++) {
        if (survey) survey->empty += candidate[i] & (array[begin + i] <= 0);
        candidate[i] &= array[begin + i] > 0;
      }
    }
    if (survey) note_bad(*survey);
    if (source_.drop_negative) {
      for (int64_t i = 0; i < count; i++) candidate[i] &= !(score[i] < 0);
    }
    if (source_.has_below) {
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

  void fill(int64_t from, int64_t to) {
    fill_scores(from, to);
    fill_candidates(nullptr);
    fill_images();
  }

 private:
  void note_bad(Survey& survey) {
    int64_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
      survey.negative += candidate[i] & (score[i] < 0);
      bad += candidate[i] & !(std::fabs(score[i]) <= FLT_MAX);
    }
    for (int64_t i = 0; bad && i < count; i++) {
      if (candidate[i] && !std::isfinite(score[i])) {
        if (survey.first_bad < 0) survey.first_bad = begin + i;
        survey.num_bad++;
      }
    }
  }

  const ScoreSource& source_;
  std::vector<double> sum_;
  std::vector<float> terms_;
};

// Counts of a digit; four of them side by side, so that neighbours in the same bucket do not wait for one another.
template <class Count>
class Histogram {
 public:
  explicit Histogram(int64_t buckets) : buckets_(buckets), counts_(4 * buckets) {}
  void add(int64_t i, uint32_t bucket, Count amount) { counts_[(i & 3) * buckets_ + bucket] += amount; }
  void add_to(uint64_t* out) const {
    for (size_t i = 0; i < counts_.size(); i++) out[i % buckets_] += counts_[i];
  }

 private:
  int64_t buckets_;
  std::vector<Count> counts_;
};

// Adds the block's samples that begin with the digits of prefix to the counts of the next digit: 0 and 1 are of the
// score, 2 to 5 of the hash. Each sample counts for one, or for its scored tokens.
template <class Count>
void count_digits(const ScoreSource& source, const Block& block, int digit, const Key& prefix, bool by_tokens,
                  Histogram<Count>& histogram) {
  const auto amount = [&](int64_t i) -> Count {
    if (!by_tokens) return 1;
    return static_cast<Count>(source.tokens ? source.tokens[block.begin + i] : source.tokens_of_all);
  };
  if (digit == 0 && block.all && !by_tokens) {
    for (int64_t i = 0; i < block.count; i++) histogram.add(i, block.image[i] >> 16, 1);
    return;
  }
  for (int64_t i = 0; i < block.count; i++) {
    if (!block.all && !block.candidate[i]) continue;
    const uint32_t image = block.image[i];
    if (digit == 0) {
      histogram.add(i, image >> 16, amount(i));
    } else if (digit == 1) {
      if (image >> 16 == prefix.score >> 16) histogram.add(i, image & 0xffff, amount(i));
    } else if (image == prefix.score) {
      const uint64_t hash = source.hash(block.begin + i);
      const int shift = 16 * (5 - digit);
      const bool fits = digit == 2 || (hash ^ prefix.hash) >> (shift + 16) == 0;
      if (fits) histogram.add(i, (hash >> shift) & 0xffff, amount(i));
    }
  }
}

// Calls work(state, from, to, stretch) on stretches of [begin, end), by threads with a state each, then
// gather(state) one after the other.
template <class State, class Make, class Work, class Gather>
void over_stretches(int64_t begin, int64_t end, int threads, const Make& make, const Work& work, const Gather& gather) {
  const int64_t stretches = (end - begin + kStretch - 1) / kStretch;
  std::atomic<int64_t> next{0};
  std::vector<State> states;
  for (int64_t i = 0; i < std::max<int64_t>(1, std::min<int64_t>(threads, stretches)); i++) states.push_back(make());
  const auto run = [&](State& state) {
    for (int64_t s; (s = next.fetch_add(1)) < stretches;) {
      work(state, begin + s * kStretch, std::min(begin + (s + 1) * kStretch, end), s);
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < states.size(); i++) others.emplace_back(run, std::ref(states[i]));
  run(states[0]);
  for (std::thread& other : others) other.join();
  for (const State& state : states) gather(state);
}

template <class Count>
void histogram_of(const ScoreSource& source, int64_t begin, int64_t end, int digit, const Key& prefix, bool by_tokens,
                  int threads, uint64_t* out) {
  over_stretches<Histogram<Count>>(
      begin, end, threads, [] { return Histogram<Count>(kDigits); },
      [&](Histogram<Count>& histogram, int64_t from, int64_t to, int64_t) {
        Block block(source);
        for (int64_t at = from; at < to; at += kBlock) {
          block.fill(at, std::min(at + kBlock, to));
          count_digits(source, block, digit, prefix, by_tokens, histogram);
        }
      },
      [&](const Histogram<Count>& histogram) { histogram.add_to(out); });
}

inline void add_moments(const Block& block, size_t models, std::vector<double>& moments) {
  double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < block.count; i++) {
    const double s = block.candidate[i] ? block.score[i] : 0;
    sum += s, squares += s * s;
  }
  moments[0] += sum, moments[1] += squares;
  for (size_t model = 0; model < models; model++) {
    const float* const term = block.term(model);
    double own = 0, own_squares = 0, products = 0;
#pragma omp simd reduction(+ : own, own_squares, products)
    for (int64_t i = 0; i < block.count; i++) {
      const double x = block.candidate[i] ? term[i] : 0, s = block.candidate[i] ? block.score[i] : 0;
      own += x, own_squares += x * x, products += x * s;
    }
    moments[2 + 3 * model] += own, moments[3 + 3 * model] += own_squares, moments[4 + 3 * model] += products;
  }
}

// What there is: candidates, the least and largest divisors, moments; and the counts of the first digit on the way.
template <class Count>
Survey survey_of(const ScoreSource& source, int64_t begin, int64_t end, bool by_tokens, int threads, uint64_t* out) {
  std::vector<Survey> parts((end - begin + kStretch - 1) / kStretch);  // added in order, whichever thread made them
  over_stretches<Histogram<Count>>(
      begin, end, threads, [] { return Histogram<Count>(kDigits); },
      [&](Histogram<Count>& histogram, int64_t from, int64_t to, int64_t stretch) {
        Block block(source);
        Survey survey;
        survey.moments.resize(2 + 3 * source.log_probs.size());
        for (int64_t at = from; at < to; at += kBlock) {
          block.fill_scores(at, std::min(at + kBlock, to));
          block.fill_candidates(&survey);
          block.fill_images();
          count_digits(source, block, 0, {0, 0}, by_tokens, histogram);
          add_moments(block, source.log_probs.size(), survey.moments);
          for (int64_t i = 0; i < block.count; i++) survey.candidates += block.candidate[i];
          if (source.divisor) {
            const auto [least, largest] = std::minmax_element(source.divisor + at, source.divisor + at + block.count);
            survey.least_divisor = std::min(survey.least_divisor, *least);
            survey.largest_divisor = std::max(survey.largest_divisor, *largest);
          }
          if (source.tokens) {
            for (int64_t i = 0; i < block.count; i++) {
              const int32_t tokens = source.tokens[at + i];
              survey.tokens += block.candidate[i] ? tokens : 0;
              survey.least_tokens = std::min(survey.least_tokens, tokens);
              survey.most_tokens = std::max(survey.most_tokens, tokens);
            }
          }
        }
        if (!source.tokens) survey.tokens = survey.candidates * source.tokens_of_all;
        parts[stretch] = std::move(survey);
      },
      [&](const Histogram<Count>& histogram) { histogram.add_to(out); });
  Survey whole;
  for (const Survey& part : parts) whole.add(part);
  return whole;
}

// Adds the candidates of [begin, end) to bins of the first bits of one model's NLL.
inline void rank_histogram_of(const ScoreSource& source, int64_t begin, int64_t end, size_t model, uint64_t* out) {
  Block block(source);
  for (int64_t at = begin; at < end; at += kBlock) {
    block.fill_scores(at, std::min(at + kBlock, end));
    block.fill_candidates(nullptr);
    for (int64_t i = 0; i < block.count; i++) {
      if (block.all || block.candidate[i]) out[image_of(block.term(model)[i]) >> kRankLow]++;
    }
  }
}

struct Kept {
  int64_t samples = 0, tokens = 0;
};

// Writes the ids of the candidates in [begin, end) whose key is at least this one; room for all of them is needed.
inline Kept keep(const ScoreSource& source, int64_t begin, int64_t end, const Key& at_least, int64_t* out) {
  Block block(source);
  Kept kept;
  for (int64_t at = begin; at < end; at += kBlock) {
    block.fill(at, std::min(at + kBlock, end));
    const int64_t before = kept.samples;
    for (int64_t i = 0; i < block.count; i++) {
      out[kept.samples] = at + i;
      bool is_kept = block.image[i] > at_least.score;
      if (block.image[i] == at_least.score) is_kept = source.hash(at + i) >= at_least.hash;
      kept.samples += is_kept && (block.all || block.candidate[i]);
    }
    for (int64_t k = before; source.tokens && k < kept.samples; k++) kept.tokens += source.tokens[out[k]];
  }
  if (!source.tokens) kept.tokens = kept.samples * source.tokens_of_all;
  return kept;
}

}  // namespace megakd
