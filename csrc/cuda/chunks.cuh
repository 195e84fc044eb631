// Flat passes over the tensors of a model in one launch: which block takes which elements of which tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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

// Calls launch(kernel, table) for tables of tensors that one kernel takes, in the tensors' order. pick(tensor) is the
// kernel; a Table has `chunks`, a Chunks<Table::capacity>, and set(place, tensor).
template <class Table, class Tensor, class Pick, class Launch>
void launch_tables(const Tensor* tensors, int count, const Pick& pick, const Launch& launch) {
  std::vector<decltype(pick(*tensors))> waiting;  // null once it is in a table
  for (int k = 0; k < count; ++k) waiting.push_back(pick(tensors[k]));
  for (int first = 0; first < count; ++first) {
    const auto kernel = waiting[first];
    if (kernel == nullptr) continue;
    Table table;
    for (int k = first; k < count && table.chunks.count < Table::capacity; ++k) {
      if (waiting[k] != kernel) continue;
      waiting[k] = nullptr;
      table.set(table.chunks.add(tensors[k].numel), tensors[k]);
    }
    launch(kernel, table);
  }
}

template <class T>
__device__ bool aligned(const T* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace
}  // namespace limpet::cuda
