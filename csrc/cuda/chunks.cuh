// Flat passes over the tensors of a model in one launch: which block takes which elements of which tensor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace limpet::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kBlockElements = 8192;  // 32 a thread

// Up to `capacity` tensors cut into blocks; a part of a kernel's parameter.
template <int capacity>
struct Chunks {
  std::int64_t numel[capacity];
  int first_block[capacity];  // ascending
  int count = 0, blocks = 0;

  int add(std::int64_t elements) {  // returns the tensor's place
    numel[count] = elements;
    first_block[count] = blocks;
    blocks += static_cast<int>((elements + kBlockElements - 1) / kBlockElements);
    return count++;
  }

  // The last tensor whose first block is not behind `block`.
  __device__ int tensor_of(int block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

template <class T>
__device__ bool aligned(const T* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace
}  // namespace limpet::cuda
