// Sweeps over the scores of samples: the exact k-th largest by histograms of 16-bit digits, and the ids above it.
//
// What is held does not grow with the number of samples.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "select/score_keys.h"

namespace megakd {

constexpr int64_t kStretch = 32 * kBlock;  // what a thread takes at a time
constexpr int kDigits = 65536;

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
  if (digit == 0) {
    for (int64_t i = 0; i < block.count; i++) {
      if (block.all || block.candidate[i]) histogram.add(i, block.image[i] >> 16, amount(i));
    }
    return;
  }
  const uint32_t last = digit == 1 ? prefix.score | 0xffff : prefix.score;
  int32_t places[kBlock];
  const int64_t found = block.places_between(digit == 1 ? prefix.score & ~0xffffu : prefix.score, last, places);
  for (int64_t k = 0; k < found; k++) {
    const int64_t i = places[k];
    if (digit == 1) {
      histogram.add(i, block.image[i] & 0xffff, amount(i));
      continue;
    }
    const uint64_t hash = source.hash(block.begin + i);
    const int shift = 16 * (5 - digit);
    if (digit == 2 || (hash ^ prefix.hash) >> (shift + 16) == 0) histogram.add(i, (hash >> shift) & 0xffff, amount(i));
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

// The block's scores and terms must be zero where there is no candidate.
inline void add_moments(const Block& block, size_t models, std::vector<double>& moments) {
  double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < block.count; i++) {
    const double s = block.score[i];
    sum += s, squares += s * s;
  }
  moments[0] += sum, moments[1] += squares;
  for (size_t model = 0; model < models; model++) {
    const float* const term = block.term(model);
    double own = 0, own_squares = 0, products = 0;
#pragma omp simd reduction(+ : own, own_squares, products)
    for (int64_t i = 0; i < block.count; i++) {
      const double x = term[i], s = block.score[i];
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
          block.fill_scores(at, std::min(at + kBlock, to), true);
          block.fill_candidates(&survey);
          block.fill_images();
          count_digits(source, block, 0, {0, 0}, by_tokens, histogram);
          survey.candidates += block.num_candidates();
          survey.tokens += block.tokens_of_candidates();
          block.clear_others();
          add_moments(block, source.log_probs.size(), survey.moments);
        }
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
    block.fill_scores(at, std::min(at + kBlock, end), true);
    block.fill_candidates(nullptr);
    for (int64_t i = 0; i < block.count; i++) {
      if (block.all || block.candidate[i]) out[image_of(block.term(model)[i]) >> kRankLow]++;
    }
  }
}

// Keys of the candidates in [begin, end) with images from first to last, and their tokens; returns how many. It stops
// where there is no more room.
inline int64_t collect(const ScoreSource& source, int64_t begin, int64_t end, uint32_t first, uint32_t last,
                       int64_t room, uint32_t* images, uint64_t* hashes, int32_t* tokens) {
  Block block(source);
  int32_t places[kBlock];
  int64_t collected = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    block.fill(at, std::min(at + kBlock, end));
    const int64_t found = std::min(block.places_between(first, last, places), room - collected);
    for (int64_t k = 0; k < found; k++, collected++) {
      images[collected] = block.image[places[k]];
      hashes[collected] = source.hash(at + places[k]);
      tokens[collected] = source.tokens ? source.tokens[at + places[k]] : static_cast<int32_t>(source.tokens_of_all);
    }
  }
  return collected;
}

struct Kept {
  int64_t samples = 0, tokens = 0;
};

// Writes the ids of the candidates in [begin, end) whose key is at least this one; room for all of them is needed.
inline Kept keep(const ScoreSource& source, int64_t begin, int64_t end, const Key& at_least, int64_t* out) {
  Block block(source);
  Kept kept;
  int32_t places[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    block.fill(at, std::min(at + kBlock, end));
    const int64_t found = block.places_between(at_least.score, UINT32_MAX, places), before = kept.samples;
    for (int64_t k = 0; k < found; k++) {
      out[kept.samples] = at + places[k];
      kept.samples += block.image[places[k]] > at_least.score || source.hash(at + places[k]) >= at_least.hash;
    }
    for (int64_t k = before; source.tokens && k < kept.samples; k++) kept.tokens += source.tokens[out[k]];
  }
  if (!source.tokens) kept.tokens = kept.samples * source.tokens_of_all;
  return kept;
}

}  // namespace megakd
