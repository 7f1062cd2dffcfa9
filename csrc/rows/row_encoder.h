// Rows of a logits store to bytes: ids in the order of their frequency ranks, numbers in codes made for these rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "rows/row_codec.h"

namespace megakd {

// Sorts entries by their upper half, which has `bits` bits.
inline void sort_by_rank(std::vector<uint64_t>& entries, std::vector<uint64_t>& spare, int rank_bits) {
  if (entries.size() < 32) return std::sort(entries.begin(), entries.end());
  spare.resize(entries.size());
  for (int shift = 32; shift < 32 + rank_bits; shift += 8) {
    uint32_t starts[257] = {};
    for (const uint64_t entry : entries) starts[1 + (entry >> shift & 255)]++;
    for (int digit = 1; digit < 256; digit++) starts[digit] += starts[digit - 1];
    for (const uint64_t entry : entries) spare[starts[entry >> shift & 255]++] = entry;
    entries.swap(spare);
  }
}

// Takes rows in, sample by sample. The codes are made for the first `rows_for_codes` of them (and the rest of that
// sample), which alone are held; records are written from then on.
class RowEncoder {
 public:
  // ranks: the frequency rank of each id, a permutation.
  RowEncoder(const RowFormat& format, const int32_t* ranks, int64_t rows_for_codes)
      : format_(format), ranks_(ranks, ranks + format.vocab_size), rows_for_codes_(rows_for_codes),
        counts_(kCodeLengths) {}

  // Takes one sample: ids [rows, width], the value of each (float log-probabilities, -inf in an empty slot; or int32
  // counts, 0 in an empty slot), entropies [rows]. Returns an empty string, or what is wrong; then nothing was taken.
  std::string add(int64_t rows, int64_t width, const int64_t* ids, const float* log_probs, const int32_t* draws,
                  const float* entropies) {
    const size_t old_heads = heads_.size(), old_gaps = gaps_.size();
    for (int64_t row = 0; row < rows; row++) {
      const auto values = [&](const auto* array) { return array ? array + row * width : nullptr; };
      const std::string wrong = add_row(width, ids + row * width, values(log_probs), values(draws), entropies[row]);
      if (!wrong.empty()) {
        heads_.resize(old_heads), gaps_.resize(old_gaps), values_.resize(old_gaps);
        return "row " + std::to_string(row) + ": " + wrong;
      }
    }
    samples_.push_back(rows);
    if (codes_.empty()) {
      for (size_t h = old_heads, at = old_gaps; h < heads_.size(); at += heads_[h++].size) count(heads_[h], at);
      if (int64_t(heads_.size()) < rows_for_codes_) return {};
      make_codes(true);
    }
    write_held();
    return {};
  }

  void add_without_targets() {
    samples_.push_back(-1);
    if (!codes_.empty()) write_held();
  }

  // Ends the rows. Returns the records one after the other, followed by kReadAhead bytes, the offset of each record, and
  // the code lengths.
  void finish() {
    if (codes_.empty()) make_codes(false);
    write_held();
    payload_.resize(payload_.size() + kReadAhead);
  }
  const std::vector<uint8_t>& payload() const { return payload_; }
  const std::vector<uint64_t>& offsets() const { return offsets_; }
  const std::vector<uint8_t>& lengths() const { return lengths_; }

 private:
  struct Head {
    uint32_t size;
    uint16_t entropy, tail, least;
  };
  struct Code {
    uint16_t bits;
    uint8_t length;
  };

  static constexpr double kMassSlack = 1e-3;  // rounding of low-precision arithmetic

  std::string add_row(int64_t width, const int64_t* ids, const float* log_probs, const int32_t* draws, float entropy) {
    const auto id = [&](int64_t slot) { return std::to_string(ids[slot]); };
    order_.clear();
    double mass = 0;
    int64_t drawn = 0;
    uint32_t least = kTop;
    levels_.resize(width);
    for (int64_t slot = 0; slot < width; slot++) {
      if (draws ? draws[slot] == 0 : log_probs[slot] == -std::numeric_limits<float>::infinity()) continue;
      if (ids[slot] < 0 || ids[slot] >= format_.vocab_size)
        return "id " + id(slot) + " of " + std::to_string(format_.vocab_size);
      if (draws) {
        if (draws[slot] < 0) return "id " + id(slot) + " was drawn " + std::to_string(draws[slot]) + " times";
        drawn += draws[slot];
        levels_[slot] = uint32_t(draws[slot] - 1);
      } else {
        if (!(log_probs[slot] < float(kMassSlack)))
          return "id " + id(slot) + " has log-probability " + std::to_string(log_probs[slot]);
        const double root = std::min(std::exp(double(log_probs[slot]) / kLevelPower), 1.0);
        const double square = root * root, fourth = square * square;
        mass += fourth * fourth;
        levels_[slot] = value_of(log_probs[slot], root);
        least = std::min(least, levels_[slot] >> 8);
      }
      order_.push_back(uint64_t(uint32_t(ranks_[ids[slot]])) << 32 | uint64_t(slot));
    }
    if (draws && !order_.empty() && drawn != format_.draws)
      return std::to_string(drawn) + " draws, expected " + std::to_string(format_.draws);
    const bool is_one = format_.mass == Mass::kOne;
    if (!draws && format_.mass != Mass::kFree &&
        (mass > 1 + kMassSlack || (is_one && !order_.empty() && mass < 1 - kMassSlack)))
      return "the ids carry " + std::to_string(mass) + " together, expected " + (is_one ? "1" : "at most 1");
    if (!(entropy >= 0) || entropy * kEntropySteps > 65535.5) return "entropy " + std::to_string(entropy);
    sort_by_rank(order_, spare_, log2_floor(format_.vocab_size) + 1);
    uint64_t next_rank = 0;
    for (const uint64_t entry : order_) {
      const uint64_t rank = entry >> 32;
      if (rank < next_rank) return "id " + id(uint32_t(entry)) + " is there twice";
      gaps_.push_back(uint32_t(rank - next_rank));
      values_.push_back(levels_[uint32_t(entry)]);
      next_rank = rank + 1;
    }
    heads_.push_back({uint32_t(order_.size()), uint16_t(std::lrint(entropy * kEntropySteps)),
                      uint16_t(tail_code(order_.empty() ? 0 : mass)), uint16_t(least)});
    return {};
  }

  // level << 8 | place inside the level; or the bits of the float.
  uint32_t value_of(float log_prob, double root) const {
    if (format_.value == Value::kFloat) {
      uint32_t bits;
      std::memcpy(&bits, &log_prob, 4);
      return bits;
    }
    const uint32_t fine = uint32_t((root * kTop + 0.5) * 256);
    return std::clamp(fine, 128u, uint32_t(kTop << 8 | 128));  // from 0 to 1
  }

  // Calls use(family, context, number) for every coded number of a row, in the order of encoding, both streams mixed.
  template <class First, class Second>
  void walk(const Head& head, size_t at, const First& first, const Second& second) const {
    first(kSizes, 0u, head.size);
    if (format_.has_levels() && head.size) second(kLeast, 0u, uint32_t(head.least), 0u);
    uint64_t before = 0, next_rank = 0;  // the context lags one gap, so that decoding need not wait for it
    for (size_t i = at; i < at + head.size; i++) {
      first(kGaps, gap_context(before), gaps_[i]);
      before = next_rank;
      next_rank += gaps_[i] + 1;
      if (format_.value == Value::kCount) second(kCounts, count_context(head.size), values_[i], 0u);
      else if (format_.has_levels())
        second(kLevels, level_context(head.size, head.least), (values_[i] >> 8) - head.least, values_[i] & 255);
    }
  }

  void count(const Head& head, size_t at) {
    const auto add = [&](const Family& family, uint32_t context, uint32_t number, auto...) {
      counts_[family.first + context * family.symbols + classify(number, family.direct).symbol]++;
    };
    walk(head, at, add, add);
  }

  // more: true if rows are still to come, which may have any number.
  void make_codes(bool more) {
    codes_.resize(kCodeLengths), lengths_.resize(kCodeLengths);
    if (more)
      for (uint64_t& times : counts_) times = times * 256 + 1;
    for (const Family& family : {kSizes, kGaps, kLeast, kLevels, kCounts}) {
      for (uint32_t first = family.first; first < family.end(); first += family.symbols) {
        code_lengths(&counts_[first], family.symbols, &lengths_[first]);
        canonical_codes(&lengths_[first], family.symbols, [&](uint32_t symbol, uint32_t code, uint32_t length) {
          codes_[first + symbol] = {uint16_t(code), uint8_t(length)};
        });
      }
    }
  }

  void write_held() {
    size_t head = 0, at = 0;
    for (const int64_t rows : samples_) {
      if (rows >= 0) write_sample(rows, head, at);
      offsets_.push_back(payload_.size());
    }
    samples_.clear(), heads_.clear(), gaps_.clear(), values_.clear();
  }

  void write_sample(int64_t rows, size_t& head, size_t& at) {
    first_.clear(), second_.clear();
    BitWriter ids(first_), values(second_);
    uint32_t most = 0;
    const auto put = [&](BitWriter& out, const Family& family, uint32_t context, uint32_t number) {
      const Classed classed = classify(number, family.direct);
      const Code code = codes_[family.first + context * family.symbols + classed.symbol];
      out.put(code.bits, code.length);
      out.put(classed.raw, classed.raw_bits);
    };
    for (const size_t end = head + rows; head < end; at += heads_[head++].size) {
      const Head& row = heads_[head];
      most = std::max(most, row.size);
      values.put(row.entropy, 16);
      if (format_.mass == Mass::kStored) values.put(row.tail, 16);
      if (format_.value == Value::kFloat)
        for (size_t i = at; i < at + row.size; i++) values.put(values_[i], 32);
      walk(
          row, at,
          [&](const Family& family, uint32_t context, uint32_t number) { put(ids, family, context, number); },
          [&](const Family& family, uint32_t context, uint32_t number, uint32_t inside) {
            put(values, family, context, number);
            if (format_.value == Value::kFineLevel && family.first == kLevels.first) values.put(inside, 8);
          });
    }
    ids.finish(), values.finish();
    const uint32_t record[3] = {uint32_t(rows), most, uint32_t(first_.size())};
    static_assert(sizeof record == kRecordHead);
    const auto* bytes = reinterpret_cast<const uint8_t*>(record);
    payload_.insert(payload_.end(), bytes, bytes + kRecordHead);
    payload_.insert(payload_.end(), first_.begin(), first_.end());
    payload_.insert(payload_.end(), second_.begin(), second_.end());
  }

  RowFormat format_;
  std::vector<int32_t> ranks_;
  int64_t rows_for_codes_;
  std::vector<uint64_t> counts_;  // occurrences of each coded number
  std::vector<Code> codes_;       // empty until they are made
  std::vector<uint8_t> lengths_;
  // samples held until the codes are made: the number of rows of each, -1 for one without targets, and the rows
  std::vector<int64_t> samples_;
  std::vector<Head> heads_;
  std::vector<uint32_t> gaps_, values_;
  std::vector<uint8_t> payload_;
  std::vector<uint64_t> offsets_{0};
  // scratch memory for one row or sample
  std::vector<uint64_t> order_, spare_;
  std::vector<uint32_t> levels_;
  std::vector<uint8_t> first_, second_;
};

}  // namespace megakd
