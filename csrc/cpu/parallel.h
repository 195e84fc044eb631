// The one threading seam: the thread count is an argument, and no result depends on it.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace limpet::cpu {
namespace {

// Calls body(i, worker) once for each i in [0, count), in any order; `worker` is below `threads` and says whose scratch
// area to use, nothing else.
template <class Body>
inline void parallel_for([[maybe_unused]] int threads, std::int64_t count, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && count > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = 0; i < count; ++i) body(i, worker);
    }
    return;
  }
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i, 0);
}

// Calls body(share, shares) once for each of at most `threads` shares of a work, each share by the same thread as in
// the call before: rows that come again are then in the cache of the core that copies them.
template <class Body>
inline void parallel_shares([[maybe_unused]] int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

}  // namespace
}  // namespace limpet::cpu
