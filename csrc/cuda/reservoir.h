// Reservoir sampling on a CUDA device. Plain C++: no CUDA type in sight.
//
// All of it only launches on `stream` (a cudaStream_t) of `device`: it allocates nothing there, never waits for the
// device and can be captured into a CUDA graph. The results are those of the CPU, whatever order threads run in. Throws
// std::runtime_error when CUDA refuses a launch.
#pragma once

#include "reservoir_rows.h"

namespace limpet::cuda {

// slots[k] = where item seen + k goes, -1 where it is passed over.
void reservoir_slots(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                     std::int64_t* slots, int device, void* stream);

// All pointers of `batch` but `fields` itself are the device's. `workspace`: reservoir_workspace_bytes() there.
std::int64_t reservoir_workspace_bytes(std::int64_t count);
void reservoir_insert(const ReservoirBatch& batch, void* workspace, int device, void* stream);

// `workspace`: 8 * count bytes on the device. Time grows with the square of count, at 4096 about as a launch's.
void sample_without_replacement(std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw,
                                std::int64_t* sample, void* workspace, int device, void* stream);

// Each field's batch[k] = stored[index[k]]; an index outside [0, rows) stops the kernel, as in torch.
void gather_rows(const RowField* fields, int num_fields, std::int64_t rows, const std::int64_t* index,
                 std::int64_t count, int device, void* stream);

}  // namespace limpet::cuda
