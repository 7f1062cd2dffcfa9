// Work shared among threads that live for one call: items are handed out in small runs, so that slow ones even out.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace megakd {

// Calls body(begin, end) on disjoint runs that cover [0, count). The body must not throw.
template <class Body>
void parallel_for(int64_t count, int64_t run, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(run);
      if (begin >= count) return;
      body(begin, std::min(begin + run, count));
    }
  };
  const int64_t runs = (count + run - 1) / run;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, runs); i++) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace megakd
