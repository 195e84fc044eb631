// Reservoir sampling: one launch decides, one copies the rows of those that stay.
//
// An item's number settles who is the last writer of a slot: an atomic maximum, whose result depends on no order. So
// the list of accepted items may be in any order, and nothing has to be sorted.

#include "cuda/reservoir.h"

#include "cuda/launch.cuh"
#include "math/reservoir.h"

namespace limpet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kFields = 64;       // in one launch
constexpr int kMaxBlocks = 2048;  // of kernels whose threads go round: enough to fill any device

struct Accepted {
  std::int64_t slot, item;
};

struct Workspace {
  unsigned long long accepted;  // entries of the list
  long long padding;
  Accepted list[1];  // as many as there are items
};

struct Fields {
  RowField field[kFields];
  int count;
};

int blocks_for(std::int64_t threads) {
  const std::int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ std::int64_t first_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ std::int64_t all_threads() {
  return static_cast<std::int64_t>(gridDim.x) * kThreads;
}

// Where an item goes, from the block that it shares with its neighbour.
__device__ std::int64_t slot_of(std::int64_t item, const math::PhiloxWords& words, std::int64_t capacity,
                                std::uint64_t seed) {
  if (item < capacity) return item;
  const auto range = static_cast<std::uint64_t>(item) + 1;
  const std::uint64_t bits = math::bits63(words, item % 2 == 1);
  // Nearly all are passed over, and a product in floating point shows it: 64-bit division is a long routine here.
  // The bounds are relaxed by far more than its rounding.
  const double position = static_cast<double>(bits) * static_cast<double>(range);
  const double bound = static_cast<double>(math::kBits63) * static_cast<double>(capacity + 1) * (1 + 1e-12);
  if (position > bound && bits < math::kBits63 - range) return -1;
  return math::reservoir_slot(item, capacity, seed);
}

// Calls emit(item, slot) for the `count` items from `seen` on, two to a block of random words.
template <class Emit>
__device__ void decide(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                       const Emit& emit) {
  const std::int64_t first = seen / 2, last = (seen + count + 1) / 2;
  for (std::int64_t pair = first + first_thread(); pair < last; pair += all_threads()) {
    math::PhiloxWords words{};
    if (2 * pair + 1 >= capacity)
      words = math::philox(math::draw_counter(static_cast<std::uint64_t>(pair), 0, math::Purpose::reservoir, 0), seed);
    for (int k = 0; k < 2; ++k) {
      const std::int64_t item = 2 * pair + k;
      if (item >= seen && item < seen + count) emit(item, slot_of(item, words, capacity, seed));
    }
  }
}

__global__ void slots_kernel(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                             std::int64_t* slots) {
  decide(seen, count, capacity, seed, [&](std::int64_t item, std::int64_t slot) { slots[item - seen] = slot; });
}

__global__ void decide_kernel(const std::int64_t* seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                              std::int64_t* items, Workspace* workspace) {
  decide(*seen, count, capacity, seed, [&](std::int64_t item, std::int64_t slot) {
    if (slot < 0) return;
    atomicMax(reinterpret_cast<long long*>(items) + slot, static_cast<long long>(item));
    workspace->list[atomicAdd(&workspace->accepted, 1ull)] = {slot, item};
  });
}

// A warp copies a row.
__device__ void copy_row(char* to, const char* from, std::int64_t bytes, int lane) {
  const bool wide = (reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) % 16 == 0;
  const std::int64_t packed = wide ? bytes / 16 * 16 : 0;
  for (std::int64_t k = 16 * lane; k < packed; k += 16 * kWarp)
    *reinterpret_cast<uint4*>(to + k) = *reinterpret_cast<const uint4*>(from + k);
  for (std::int64_t k = packed + lane; k < bytes; k += kWarp) to[k] = from[k];
}

__global__ void copy_kernel(const __grid_constant__ Fields fields, const std::int64_t* seen, const std::int64_t* items,
                            const Workspace* workspace) {
  const auto accepted = static_cast<std::int64_t>(workspace->accepted);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t k = first_thread() / kWarp; k < accepted; k += all_threads() / kWarp) {
    const Accepted entry = workspace->list[k];
    if (items[entry.slot] != entry.item) continue;  // a later item of this batch has the slot
    for (int f = 0; f < fields.count; ++f) {
      const RowField& field = fields.field[f];
      copy_row(static_cast<char*>(field.stored) + entry.slot * field.row_bytes,
               static_cast<const char*>(field.batch) + (entry.item - *seen) * field.row_bytes, field.row_bytes, lane);
    }
  }
}

__global__ void advance_kernel(std::int64_t* seen, std::int64_t count) {
  *seen += count;
}

__global__ void targets_kernel(std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw,
                               std::int64_t* targets) {
  for (std::int64_t step = first_thread(); step < count; step += all_threads())
    targets[step] = math::shuffle_target(step, population, seed, draw);
}

// What a shuffle's step takes: the place it is swapped with was last written by the latest earlier step with that
// target, which put there what its own place held; and so on, until nothing was written.
__global__ void follow_kernel(const std::int64_t* targets, std::int64_t count, std::int64_t* sample) {
  for (std::int64_t step = first_thread(); step < count; step += all_threads()) {
    std::int64_t place = targets[step];
    for (std::int64_t before = step - 1; before >= 0; --before)
      if (targets[before] == place) place = before;
    sample[step] = place;
  }
}

__global__ void gather_kernel(const __grid_constant__ Fields fields, std::int64_t rows, const std::int64_t* index,
                              std::int64_t count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t k = first_thread() / kWarp; k < count; k += all_threads() / kWarp) {
    const std::int64_t place = index[k];
    if (place < 0 || place >= rows) __trap();
    for (int f = 0; f < fields.count; ++f) {
      const RowField& field = fields.field[f];
      copy_row(static_cast<char*>(field.batch) + k * field.row_bytes,
               static_cast<const char*>(field.stored) + place * field.row_bytes, field.row_bytes, lane);
    }
  }
}

// Calls launch(fields) for as many at a time as a kernel's parameters hold.
template <class Launch>
void for_fields(const RowField* fields, int count, const Launch& launch) {
  for (int first = 0; first < count; first += kFields) {
    Fields some;
    some.count = count - first < kFields ? count - first : kFields;
    for (int f = 0; f < some.count; ++f) some.field[f] = fields[first + f];
    launch(some);
    LIMPET_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace

void reservoir_slots(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                     std::int64_t* slots, int device, void* stream) {
  if (count == 0) return;
  const DeviceGuard guard(device);
  slots_kernel<<<blocks_for(count / 2 + 1), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(seen, count, capacity,
                                                                                              seed, slots);
  LIMPET_CUDA_CHECK(cudaGetLastError());
}

std::int64_t reservoir_workspace_bytes(std::int64_t count) {
  return static_cast<std::int64_t>(sizeof(Workspace) + sizeof(Accepted) * static_cast<std::size_t>(count));
}

void reservoir_insert(const ReservoirBatch& batch, void* workspace, int device, void* stream) {
  if (batch.count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* list = static_cast<Workspace*>(workspace);
  LIMPET_CUDA_CHECK(cudaMemsetAsync(&list->accepted, 0, sizeof(list->accepted), queue));
  decide_kernel<<<blocks_for(batch.count / 2 + 1), kThreads, 0, queue>>>(batch.seen, batch.count, batch.capacity,
                                                                         batch.seed, batch.items, list);
  LIMPET_CUDA_CHECK(cudaGetLastError());
  const std::int64_t most = batch.count < batch.capacity ? batch.count : batch.capacity;
  for_fields(batch.fields, batch.num_fields, [&](const Fields& fields) {
    copy_kernel<<<blocks_for(most * kWarp), kThreads, 0, queue>>>(fields, batch.seen, batch.items, list);
  });
  advance_kernel<<<1, 1, 0, queue>>>(batch.seen, batch.count);
  LIMPET_CUDA_CHECK(cudaGetLastError());
}

void sample_without_replacement(std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw,
                                std::int64_t* sample, void* workspace, int device, void* stream) {
  if (count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* targets = static_cast<std::int64_t*>(workspace);
  targets_kernel<<<blocks_for(count), kThreads, 0, queue>>>(population, count, seed, draw, targets);
  LIMPET_CUDA_CHECK(cudaGetLastError());
  follow_kernel<<<blocks_for(count), kThreads, 0, queue>>>(targets, count, sample);
  LIMPET_CUDA_CHECK(cudaGetLastError());
}

void gather_rows(const RowField* fields, int num_fields, std::int64_t rows, const std::int64_t* index,
                 std::int64_t count, int device, void* stream) {
  if (count == 0) return;
  const DeviceGuard guard(device);
  for_fields(fields, num_fields, [&](const Fields& some) {
    gather_kernel<<<blocks_for(count * kWarp), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(some, rows, index,
                                                                                                 count);
  });
}

}  // namespace limpet::cuda
