// Work shared among threads: items are handed out in small runs, so that slow runs do not hold up the end.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads/torch_threads.h"

namespace megakd {

// Calls body(begin, end) on disjoint runs that cover [0, count). The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t run, int threads, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next;
    int64_t count, run;
    const Body& body;
  } shared{{0}, count, run, body};
  const auto work = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    for (;;) {
      const int64_t begin = s.next.fetch_add(s.run);
      if (begin >= s.count) return;
      s.body(begin, std::min(begin + s.run, s.count));
    }
  };
  const int64_t runs = (count + run - 1) / run;
  run_on_team(int(std::min<int64_t>(threads, runs)), work, &shared);
}

}  // namespace megakd
