// Rows of a logits store to bytes and back. A row holds a teacher's ids for one token position, with their mass.
//
// The record of a sample: u32 rows, u32 largest number of ids in a row, u32 bytes of the first stream, then two streams.
// The first has for each row the number of ids and the gaps between their frequency ranks, in rising order; the second
// the entropy, the mass that is not listed, and the value that each id carries. docs/formats.md has every bit.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows/huffman_codes.h"

namespace megakd {

constexpr int64_t kRecordHead = 12;
constexpr double kEntropySteps = 2048;        // steps a nat
constexpr double kTailStep = 22.0 / 32767;    // nats, of the smaller of the listed and the unlisted mass
constexpr double kLevelPower = 8;             // levels are equal steps of the 8th root of a probability

enum class Value { kLevel, kFineLevel, kFloat, kCount };

// Total mass of a row's ids: 1; a number stored with the row; or free, the sum of the values whatever it is.
enum class Mass { kOne, kStored, kFree };

struct RowFormat {
  int64_t vocab_size;
  Value value;
  Mass mass;
  uint32_t draws;    // of each row, for counts
  bool has_levels() const { return value == Value::kLevel || value == Value::kFineLevel; }
};

// Up to 32767 the mass that is not listed is at most one half, 0 is none; above, the listed mass is less than that.
inline uint32_t tail_code(double mass) {
  const double tail = 1 - mass;
  if (!(tail > 0)) return 0;
  const bool most = tail > 0.5;
  const int64_t steps = std::llround(-std::log(2 * std::max(most ? mass : tail, 1e-300)) / kTailStep);
  return most ? 32768 + uint32_t(std::clamp<int64_t>(steps, 0, 32767))
              : 32767 - uint32_t(std::clamp<int64_t>(steps, 0, 32766));
}

inline double mass_of(uint32_t code) {
  if (code == 0) return 1;
  return code < 32768 ? 1 - std::exp(-kTailStep * (32767 - code)) / 2 : std::exp(-kTailStep * (code - 32768)) / 2;
}

// What levels mean. Level 0 is everything below half a step; above kTop is nothing, which damaged bytes may ask for.
inline double level_root(int level) { return std::max<double>(level, 0.25) / kTop; }
inline double fine_root(uint32_t fine) { return (std::max(fine, 128u) - 127.5) / (256 * kTop); }

inline const std::array<float, 2 * kTop + 1>& level_log_probs() {
  static const auto table = [] {
    std::array<float, 2 * kTop + 1> made{};
    for (size_t level = 0; level < made.size(); level++)
      made[level] = float(kLevelPower * std::log(level_root(int(level))));
    return made;
  }();
  return table;
}

inline const std::array<float, 2 * kTop + 1>& level_probs() {
  static const auto table = [] {
    std::array<float, 2 * kTop + 1> made{};
    for (size_t level = 0; level < made.size(); level++)
      made[level] = float(std::pow(level_root(int(level)), kLevelPower));
    return made;
  }();
  return table;
}

inline const std::vector<float>& fine_log_probs() {
  static const auto table = [] {
    std::vector<float> made((kTop + 1) << 8);
    for (size_t fine = 0; fine < made.size(); fine++)
      made[fine] = float(kLevelPower * std::log(fine_root(uint32_t(fine))));
    return made;
  }();
  return table;
}

}  // namespace megakd
