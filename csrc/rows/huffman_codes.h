// The code of small whole numbers in a logits store: canonical Huffman codes of at most 10 bits for classes of numbers,
// followed by the low bits of large numbers, uncoded. Bits are packed from the lowest bit of each byte on.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace megakd {

constexpr int kMaxCodeBits = 10;
constexpr uint32_t kLookups = 1u << kMaxCodeBits;
constexpr uint8_t kOnlySymbol = 255;  // the code length of the only symbol of a code, which takes no bits

inline int log2_floor(uint64_t n) { return 63 - __builtin_clzll(n); }

// Numbers below 2^direct are a class each; the others share one with those of the same two leading bits.
constexpr uint32_t num_classes(int direct) { return (1u << direct) + 2 * (31 - direct); }

struct Classed {
  uint32_t symbol, raw_bits, raw;
};

inline Classed classify(uint32_t number, int direct) {
  if (number < (1u << direct)) return {number, 0, 0};
  const int e = log2_floor(number);
  const uint32_t half = (number >> (e - 1)) & 1;
  return {(1u << direct) + 2 * uint32_t(e - direct) + half, uint32_t(e - 1), number & ((1u << (e - 1)) - 1)};
}

// The smallest number of a class, and the number of uncoded bits that follow the class.
inline std::pair<uint32_t, uint32_t> class_range(uint32_t symbol, int direct) {
  if (symbol < (1u << direct)) return {symbol, 0};
  const uint32_t above = symbol - (1u << direct), e = direct + above / 2;
  return {(2 + above % 2) << (e - 1), e - 1};
}

// One kind of number: `contexts` codes of `symbols` code lengths each, from `first` on in a shard's table.
struct Family {
  uint32_t first, contexts, symbols;
  int direct;
  constexpr uint32_t end() const { return first + contexts * symbols; }
};

constexpr int kTop = 128;  // the largest level: probability 1
constexpr Family kSizes{0, 1, num_classes(8), 8};  // number of ids in a row
constexpr Family kGaps{kSizes.end(), 12, num_classes(3), 3};  // context: the rank reached one gap before
constexpr Family kLeast{kGaps.end(), 1, kTop + 1, 8};  // smallest level of a row
constexpr Family kLevels{kLeast.end(), 2 + kTop / 8, kTop + 1, 8};  // level minus the smallest; context: the smallest
constexpr Family kCounts{kLevels.end(), 9, num_classes(3), 3};  // context: the number of ids
constexpr uint32_t kCodeLengths = kCounts.end();

inline uint32_t gap_context(uint64_t before) {
  return uint32_t(std::clamp(log2_floor(before + 1) - 3, 0, int(kGaps.contexts) - 1));
}
inline uint32_t level_context(uint32_t size, uint32_t least) { return size == 1 ? 0 : 1 + least / 8; }
inline uint32_t count_context(uint32_t size) {
  return uint32_t(std::min(log2_floor(size | 1), int(kCounts.contexts) - 1));
}

// Optimal lengths of at most kMaxCodeBits (package-merge, Larmore and Hirschberg 1990); 0 for symbols that do not occur.
inline void code_lengths(const uint64_t* counts, uint32_t symbols, uint8_t* lengths) {
  std::vector<std::pair<uint64_t, uint32_t>> leaves;
  for (uint32_t s = 0; s < symbols; s++) {
    lengths[s] = 0;
    if (counts[s]) leaves.push_back({counts[s], s});
  }
  if (leaves.size() == 1) lengths[leaves[0].second] = kOnlySymbol;
  if (leaves.size() < 2) return;
  std::sort(leaves.begin(), leaves.end());
  struct Item {
    uint64_t weight;
    bool leaf;
  };
  std::array<std::vector<Item>, kMaxCodeBits> levels;
  for (int bits = 0; bits < kMaxCodeBits; bits++) {
    std::vector<Item> pairs;
    if (bits > 0) {
      const std::vector<Item>& below = levels[bits - 1];
      for (size_t i = 0; i + 1 < below.size(); i += 2) pairs.push_back({below[i].weight + below[i + 1].weight, false});
    }
    std::vector<Item> own;
    for (const auto& leaf : leaves) own.push_back({leaf.first, true});
    levels[bits].resize(own.size() + pairs.size());
    std::merge(own.begin(), own.end(), pairs.begin(), pairs.end(), levels[bits].begin(),
               [](const Item& a, const Item& b) { return a.weight < b.weight; });
  }
  size_t take = 2 * leaves.size() - 2;
  for (int bits = kMaxCodeBits - 1; bits >= 0; bits--) {
    const auto chosen = levels[bits].begin();
    const size_t num_leaves = std::count_if(chosen, chosen + take, [](const Item& item) { return item.leaf; });
    for (size_t i = 0; i < num_leaves; i++) lengths[leaves[i].second]++;
    take = 2 * (take - num_leaves);
  }
}

// Calls use(symbol, code, length) for each symbol, the code's bits as they are packed. Returns false if the lengths do
// not make a complete code.
template <class Use>
bool canonical_codes(const uint8_t* lengths, uint32_t symbols, const Use& use) {
  uint32_t used = 0, only = 0, next = 0;
  for (uint32_t s = 0; s < symbols; s++) {
    used += lengths[s] != 0;
    only += lengths[s] == kOnlySymbol;
    if (lengths[s] > kMaxCodeBits && lengths[s] != kOnlySymbol) return false;
  }
  if (only && used > 1) return false;
  for (uint32_t bits = only ? kOnlySymbol : 1; bits <= (only ? kOnlySymbol : kMaxCodeBits); bits++) {
    next <<= only ? 0 : 1;
    for (uint32_t s = 0; s < symbols; s++) {
      if (lengths[s] != bits) continue;
      uint32_t reversed = 0;
      const uint32_t length = only ? 0 : bits;
      for (uint32_t b = 0; b < length; b++) reversed |= ((next >> b) & 1) << (length - 1 - b);
      if (!only && next >= (1u << bits)) return false;
      use(s, reversed, length);
      next++;
    }
  }
  return only || used == 0 || next == kLookups;
}

class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>& out) : out_(out) {}
  void put(uint64_t value, uint32_t bits) {  // at most 32
    held_ |= value << num_held_;
    for (num_held_ += bits; num_held_ >= 8; num_held_ -= 8, held_ >>= 8) out_.push_back(uint8_t(held_));
  }
  void finish() {
    if (num_held_) out_.push_back(uint8_t(held_));
    held_ = num_held_ = 0;
  }

 private:
  std::vector<uint8_t>& out_;
  uint64_t held_ = 0;
  uint32_t num_held_ = 0;
};

constexpr int64_t kReadAhead = 16;  // bytes after a stream that a reader may touch

class BitReader {
 public:
  BitReader(const uint8_t* begin, const uint8_t* end) : begin_(begin), at_(begin), last_(end + 8), end_(end) {}

  // Makes at least 56 bits available; those after the end of the stream mean nothing.
  void refill() {
    uint64_t word;
    std::memcpy(&word, at_, 8);
    held_ |= word << num_held_;
    at_ = std::min(at_ + ((63 - num_held_) >> 3), last_);
    num_held_ |= 56;
  }
  uint64_t peek() const { return held_; }
  void skip(uint32_t bits) {
    held_ >>= bits;
    num_held_ -= bits;
  }
  uint32_t take(uint32_t bits) {  // at most 32, after a refill
    const uint32_t value = uint32_t(held_ & ((uint64_t(1) << bits) - 1));
    skip(bits);
    return value;
  }
  int64_t bits_used() const { return 8 * (at_ - begin_) - int64_t(num_held_); }
  bool beyond_end() const { return bits_used() > 8 * (end_ - begin_); }
  bool at_end() const { return (bits_used() + 7) / 8 == end_ - begin_; }

 private:
  const uint8_t *begin_, *at_, *last_, *end_;
  uint64_t held_ = 0;
  uint64_t num_held_ = 0;
};

constexpr uint32_t kBadCode = 128;  // marks table entries whose bits are no code

// The decoding tables of one family: for each context, the symbol that the next kMaxCodeBits bits begin with.
class Lookup {
 public:
  // Throws std::invalid_argument for lengths that make no code.
  Lookup(const Family& family, const uint8_t* lengths) : entries_(family.contexts * kLookups, kBadCode) {
    for (uint32_t symbol = 0; symbol < family.symbols; symbol++)
      bases_.push_back(class_range(symbol, family.direct).first);
    for (uint32_t context = 0; context < family.contexts; context++) {
      uint32_t* const entries = entries_.data() + context * kLookups;
      const auto fill = [&](uint32_t symbol, uint32_t code, uint32_t length) {
        const uint32_t bits = length + class_range(symbol, family.direct).second;
        for (uint32_t at = code; at < kLookups; at += 1u << length) entries[at] = symbol << 16 | bits << 8 | length;
      };
      if (!canonical_codes(lengths + family.first + context * family.symbols, family.symbols, fill))
        throw std::invalid_argument("rows: the code lengths are those of no code");
    }
  }

  const uint32_t* table(uint32_t context) const { return entries_.data() + context * kLookups; }

  // Returns the next number; sets kBadCode in `bad` if the bits are no code.
  uint32_t next(const uint32_t* table, BitReader& in, uint32_t& bad) const {
    const uint64_t held = in.peek();
    const uint32_t entry = table[held & (kLookups - 1)], length = entry & 63, bits = (entry >> 8) & 63;
    bad |= entry;
    in.skip(bits);
    return bases_[entry >> 16] + uint32_t((held & ((uint64_t(1) << bits) - 1)) >> length);
  }

 private:
  std::vector<uint32_t> entries_, bases_;
};

}  // namespace megakd
