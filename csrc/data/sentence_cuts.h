// Sentence packing: a stream of tokens cut into windows, each cut back to the last end of a sentence in it.
#pragma once

#include <cstdint>

namespace megakd {

// Bits of one entry of the table of token classes, which megakd/data/samples/sentences.py makes.
enum TokenClass : uint8_t {
  kEndsAlways = 1,   // a sentence ends with it
  kEndsIfSpace = 2,  // a sentence ends with it if the next token brings a space
  kBringsSpace = 4,
};

struct SentenceCuts {
  int64_t count = 0;          // filled entries of starts, the given first one included
  int64_t bad_position = -1;  // position of an id that the table lacks, or -1
};

// Fills starts[1], starts[2], ... from starts[0], up to `capacity` entries or the end of the tokens, which is then the
// last entry. A window is cut after the last token that ends a sentence and is not the window's first, because a sample
// of one token would have no label. The token after a window's last one lies outside the window.
template <class Id>
SentenceCuts cut_sentences(const Id* tokens, int64_t num_tokens, const uint8_t* classes, int64_t num_classes,
                           int64_t window, int64_t* starts, int64_t capacity) {
  SentenceCuts result{1, -1};
  const auto class_at = [&](int64_t position) -> uint8_t {
    const auto id = static_cast<int64_t>(tokens[position]);
    if (id >= 0 && id < num_classes) return classes[id];
    result.bad_position = position;
    return kEndsAlways;  // stops the walk; the result is not used
  };
  while (result.count < capacity && starts[result.count - 1] < num_tokens) {
    const int64_t start = starts[result.count - 1];
    int64_t cut = num_tokens;  // the remaining tokens are one sample, if they fit into a window
    if (num_tokens - start > window) {
      cut = start + window;
      uint8_t next = class_at(cut);
      for (int64_t position = cut - 1; position > start; position--) {
        const uint8_t here = class_at(position);
        if ((here & kEndsAlways) || ((here & kEndsIfSpace) && (next & kBringsSpace))) {
          cut = position + 1;
          break;
        }
        next = here;
      }
      if (result.bad_position >= 0) return result;
    }
    starts[result.count++] = cut;
  }
  return result;
}

}  // namespace megakd
