// Running one function on several threads: on the OpenMP team that torch works with, where the process has one.
#pragma once

namespace megakd {

// Calls work(data) on `threads` threads, this one among them, and returns when all have returned.
//
// torch's threads spin for milliseconds while they wait for work. Threads of our own would compete with them for the
// cores, so torch's team gets the work. Where the process has no OpenMP library, threads are started for the call. Like
// torch's own work on several threads, this must not be called in a child that was forked after a first call.
void run_on_team(int threads, void (*work)(void*), void* data);

}  // namespace megakd
