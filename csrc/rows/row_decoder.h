// Bytes of a logits store to rows: two streams decoded side by side, by tables; damaged bytes never make it read outside
// the record or write outside the arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "rows/row_codec.h"

namespace megakd {

struct RecordHead {
  uint32_t rows, most_ids, first_bytes;
};

// Arrays for the rows of a sample, row r at r * width. Slots that a row does not fill get id 0 and -inf.
struct RowsOut {
  int64_t rows, width;
  int64_t* ids;
  float* log_probs;
  float* entropies;
};

constexpr int64_t kWhole = -1;

// The codes of one shard.
class RowDecoder {
 public:
  // ids: the id of each rank. Throws std::invalid_argument for lengths that make no code.
  RowDecoder(const RowFormat& format, const int32_t* ids, const uint8_t* lengths)
      : format_(format), ids_(ids), sizes_(kSizes, lengths), gaps_(kGaps, lengths), least_(kLeast, lengths),
        levels_(kLevels, lengths), counts_(kCounts, lengths) {
    for (int bits = 0; bits < 32; bits++) gap_tables_[bits] = gaps_.table(gap_context((uint64_t(1) << bits) - 1));
    if (format.value == Value::kLevel) log_probs_ = level_log_probs().data();
    if (format.value == Value::kFineLevel) log_probs_ = fine_log_probs().data();
    if (format.value != Value::kCount) return;
    for (uint32_t count = 0; count <= format.draws; count++)
      shares_.push_back(float(std::log(double(count) / format.draws)));
    log_probs_ = shares_.data();
  }

  // Reads the head of the record in [begin, end); false if these bytes cannot be one.
  static bool read_head(const uint8_t* begin, const uint8_t* end, RecordHead& head) {
    if (end - begin < kRecordHead) return false;
    std::memcpy(&head, begin, kRecordHead);
    return head.first_bytes <= end - begin - kRecordHead;
  }

  // Decodes the record in [begin, end), which kReadAhead more bytes of readable memory follow. Returns kWhole, or the
  // number of the first row that the encoder cannot have written.
  int64_t decode(const uint8_t* begin, const uint8_t* end, const RowsOut& out) const {
    switch (format_.value) {
      case Value::kLevel: return decode_as<Value::kLevel>(begin, end, out);
      case Value::kFineLevel: return decode_as<Value::kFineLevel>(begin, end, out);
      case Value::kFloat: return decode_as<Value::kFloat>(begin, end, out);
      default: return decode_as<Value::kCount>(begin, end, out);
    }
  }

 private:
  template <Value kValue>
  int64_t decode_as(const uint8_t* begin, const uint8_t* end, const RowsOut& out) const {
    RecordHead head;
    if (!read_head(begin, end, head) || head.rows > out.rows || head.most_ids > out.width) return 0;
    begin += kRecordHead;
    BitReader first(begin, begin + head.first_bytes), second(begin + head.first_bytes, end);
    for (int64_t row = 0; row < head.rows; row++) {
      int64_t* const ids = out.ids + row * out.width;
      float* const log_probs = out.log_probs + row * out.width;
      uint32_t bad = 0;
      first.refill();
      const uint32_t size = sizes_.next(sizes_.table(0), first, bad);
      if (bad & kBadCode || size > head.most_ids) return row;
      second.refill();
      out.entropies[row] = float(second.take(16) / kEntropySteps);
      const uint32_t tail = format_.mass == Mass::kStored ? second.take(16) : 0;
      if (!decode_row<kValue>(size, tail, first, second, ids, log_probs)) return row;
      std::fill(ids + size, ids + out.width, 0);
      std::fill(log_probs + size, log_probs + out.width, -std::numeric_limits<float>::infinity());
    }
    return first.at_end() && second.at_end() ? kWhole : int64_t(head.rows);
  }

  template <Value kValue>
  bool decode_row(uint32_t size, uint32_t tail, BitReader& first_stream, BitReader& second_stream, int64_t* ids,
                  float* log_probs) const {
    BitReader first = first_stream, second = second_stream;  // local copies, which the stores below cannot alias
    if (size == 0) return !first.beyond_end() && !second.beyond_end();
    uint32_t bad = 0, least = 0, most = 0;
    const uint32_t* table = counts_.table(count_context(size));
    if constexpr (kValue == Value::kLevel || kValue == Value::kFineLevel) {
      least = least_.next(least_.table(0), second, bad);
      table = levels_.table(level_context(size, least));
    }
    uint64_t before = 0, next_rank = 0, drawn = 0;
    double mass = 0;
    const float* const log_prob_of = log_probs_;
    const float* const prob_of = level_probs().data();
    for (uint32_t i = 0; i < size; i++) {
      first.refill(), second.refill();
      const uint32_t* const gap_table = gap_tables_[log2_floor(before + 1) & 31];
      before = next_rank;
      next_rank += gaps_.next(gap_table, first, bad);
      ids[i] = int64_t(next_rank++);
      if constexpr (kValue == Value::kLevel) {
        const uint32_t level = least + levels_.next(table, second, bad);
        most = std::max(most, level);
        log_probs[i] = log_prob_of[level], mass += prob_of[level];
      } else if constexpr (kValue == Value::kFineLevel) {
        const uint32_t level = least + levels_.next(table, second, bad);
        most = std::max(most, level);
        const uint32_t fine = std::min(level, uint32_t(kTop)) << 8 | second.take(8);
        const float root = float(fine_root(fine)), square = root * root;
        log_probs[i] = log_prob_of[fine], mass += square * square * (square * square);
      } else if constexpr (kValue == Value::kFloat) {
        const uint32_t bits = second.take(32);
        std::memcpy(log_probs + i, &bits, 4);
      } else {
        const uint32_t count = counts_.next(table, second, bad);  // the count minus one
        drawn += count + uint64_t(1);
        log_probs[i] = log_prob_of[std::min(count, format_.draws - 1) + 1];
      }
    }
    if (bad & kBadCode || most > kTop || next_rank > uint64_t(format_.vocab_size)) return false;
    if (first.beyond_end() || second.beyond_end()) return false;
    if (kValue == Value::kCount && drawn != format_.draws) return false;
    first_stream = first, second_stream = second;
    const int32_t* const ids_of_ranks = ids_;
    for (uint32_t i = 0; i < size; i++) ids[i] = ids_of_ranks[ids[i]];
    if constexpr (kValue == Value::kLevel || kValue == Value::kFineLevel) {
      if (format_.mass == Mass::kFree) return true;
      const float shift = float(std::log(mass_of(tail) / mass));
      for (uint32_t i = 0; i < size; i++) log_probs[i] += shift;
    }
    return true;
  }

  RowFormat format_;
  const int32_t* ids_;
  Lookup sizes_, gaps_, least_, levels_, counts_;
  const uint32_t* gap_tables_[32];  // by the logarithm of the context
  const float* log_probs_ = nullptr;
  std::vector<float> shares_;
};

}  // namespace megakd
