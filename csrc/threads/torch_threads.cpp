#include "threads/torch_threads.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace megakd {
namespace {

// The entry point of libgomp for a parallel region; LLVM's and Intel's libraries have it too, under the same name.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// Finds the file of an OpenMP library among the libraries of the process; torch's own if there are several.
int keep_openmp(dl_phdr_info* info, size_t, void* found) {
  const char* const path = info->dlpi_name;
  if (path == nullptr) return 0;
  if (!std::strstr(path, "libgomp") && !std::strstr(path, "libomp") && !std::strstr(path, "libiomp")) return 0;
  std::string& kept = *static_cast<std::string*>(found);
  if (kept.empty() || std::strstr(path, "/torch/")) kept = path;
  return 0;
}

Parallel find_parallel() {
  std::string path;
  dl_iterate_phdr(keep_openmp, &path);
  if (path.empty()) return nullptr;
  void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
}

}  // namespace

void run_on_team(int threads, void (*work)(void*), void* data) {
  if (threads <= 1) return work(data);
  static const Parallel parallel = find_parallel();
  if (parallel != nullptr) return parallel(work, data, threads, 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

}  // namespace megakd
