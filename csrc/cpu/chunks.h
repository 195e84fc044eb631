// Flat passes over all tensors of a model, cut into chunks of a fixed size.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#include "math/inline.h"

namespace limpet::cpu {
namespace {

constexpr std::int64_t kChunk = 16384;  // elements: 64 KB of each float32 stream

LIMPET_FORMULA std::int64_t chunks_of(std::int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

template <class Tensor>
std::int64_t count_chunks(const Tensor* tensors, std::int64_t count) {
  std::int64_t chunks = 0;
  for (std::int64_t k = 0; k < count; ++k) chunks += chunks_of(tensors[k].numel);
  return chunks;
}

// Calls body(c, tensor, begin, end) once for each chunk c of all tensors, in any order.
template <class Tensor, class Body>
void for_each_chunk(const Tensor* tensors, std::int64_t count, int threads, const Body& body) {
  std::int64_t elements = 0;
  for (std::int64_t k = 0; k < count; ++k) elements += tensors[k].numel;
  if (elements < 2 * kChunk) threads = 1;
  // Each thread takes one run of consecutive chunks: it streams, and finds its first tensor only once.
  const std::int64_t chunks = count_chunks(tensors, count);
  const std::int64_t runs = chunks < threads ? chunks : threads;
  parallel_for(threads, runs, [&](std::int64_t run, int) {
    const std::int64_t first = chunks * run / runs, last = chunks * (run + 1) / runs;
    std::int64_t k = 0, skipped = 0;  // chunks before tensor k
    for (std::int64_t c = first; c < last; ++c) {
      for (std::int64_t here; c - skipped >= (here = chunks_of(tensors[k].numel)); ++k) skipped += here;
      const std::int64_t begin = (c - skipped) * kChunk;
      body(c, tensors[k], begin, begin + kChunk < tensors[k].numel ? begin + kChunk : tensors[k].numel);
    }
  });
}

}  // namespace
}  // namespace limpet::cpu
