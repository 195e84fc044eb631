// Reservoir sampling (Vitter 1985, algorithm R) by the batch: every item's slot is drawn from its own number, so no
// result depends on how a stream is cut into batches nor on the number of threads.

#include "math/reservoir.h"

#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

using math::kBits63;

constexpr std::int64_t kItems = 16384;          // of a chunk that one thread decides on
constexpr std::int64_t kStride = 1024;          // items that share their bounds
constexpr std::int64_t kSerialBytes = 1 << 20;  // copied by one thread: less than this is not worth waking another

constexpr std::int64_t kGatheredBytes = 1 << 17;  // the same for rows that are read from anywhere
constexpr std::int64_t kFetched = 1 << 12;        // bytes of a row

struct Accepted {
  std::int64_t slot, item;
};

// Calls accept(slot, item) for the items in [first, last) that get one, in their order.
//
// Nearly all items of a long stream are passed over, and the upper half of their bits shows it: what is not below
// bounds that hold for a whole stride of items is not looked at further.
template <class Accept>
void decide(std::int64_t first, std::int64_t last, std::int64_t capacity, std::uint64_t seed, const Accept& accept) {
  const auto whole = [&](std::int64_t item) {
    const std::int64_t slot = math::reservoir_slot(item, capacity, seed);
    if (slot >= 0) accept(slot, item);
  };
  constexpr std::int64_t step = 2 * kBlocks;  // a block serves two items
  std::int64_t item = first;
  for (; item < last && (item < capacity || item % 2 == 1); ++item) whole(item);

  Words lane;
  for (int k = 0; k < kBlocks; ++k) lane[k] = static_cast<std::uint64_t>(k);
  while (last - item >= step) {
    const std::int64_t end = last - item < kStride ? item + (last - item) / step * step : item + kStride;
    // Runs get shorter with every item: the first item's bound holds for all, and so does the last one's for what is
    // drawn again. Both regions lie around zero, so one comparison tells them.
    const std::uint64_t kept =
        math::run_length(static_cast<std::uint64_t>(item) + 1) * static_cast<std::uint64_t>(capacity) >> 31;
    const std::uint64_t again = (kBits63 - static_cast<std::uint64_t>(end)) >> 31;
    const std::uint64_t width = kept + (1ull << 32) - again;
    for (; item < end; item += step) {
      const Words number = lane + static_cast<std::uint64_t>(item) / 2;
      const PhiloxBlocks drawn = philox(
          {{number, number >> 32, Words{}, Words{} + math::draw_counter(0, 0, math::Purpose::reservoir, 0).word[3]}},
          seed);
      const Words even = (drawn.word[0] - again) & 0xFFFFFFFFu, odd = (drawn.word[2] - again) & 0xFFFFFFFFu;
      if (!any(reinterpret_cast<Words>((even <= width) | (odd <= width)))) continue;
      for (std::int64_t k = 0; k < step; ++k) {
        const bool second = k % 2 == 1;
        const std::int64_t at = k / 2;
        if ((second ? odd : even)[at] > width) continue;
        const auto range = static_cast<std::uint64_t>(item + k) + 1;
        const std::uint64_t high = drawn.word[second ? 2 : 0][at], low = drawn.word[second ? 3 : 1][at];
        const std::uint64_t value = ((high & 0xFFFFFFFFu) << 31 | (low & 0xFFFFFFFFu) >> 1) / math::run_length(range);
        if (value >= range)
          whole(item + k);
        else if (value < static_cast<std::uint64_t>(capacity))
          accept(static_cast<std::int64_t>(value), item + k);
      }
    }
  }
  for (; item < last; ++item) whole(item);
}

void reservoir_slots(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                     std::int64_t* slots, int threads) {
  parallel_for(threads, (count + kItems - 1) / kItems, [&](std::int64_t chunk, int) {
    const std::int64_t begin = chunk * kItems, end = begin + kItems < count ? begin + kItems : count;
    for (std::int64_t k = begin; k < end; ++k) slots[k] = -1;
    decide(seen + begin, seen + end, capacity, seed,
           [&](std::int64_t slot, std::int64_t item) { slots[item - seen] = slot; });
  });
}

LIMPET_FORMULA char* row(void* rows, std::int64_t k, std::int64_t row_bytes) {
  return static_cast<char*>(rows) + k * row_bytes;
}

std::int64_t bytes_per_item(const ReservoirBatch& batch) {
  std::int64_t bytes = 0;
  for (int f = 0; f < batch.num_fields; ++f) bytes += batch.fields[f].row_bytes;
  return bytes;
}

// The first items have their slots to themselves, in order.
void fill(const ReservoirBatch& batch, std::int64_t seen, std::int64_t count, int threads) {
  const std::int64_t rows = 1 + kSerialBytes / (1 + bytes_per_item(batch));
  parallel_for(threads, (count + rows - 1) / rows, [&](std::int64_t run, int) {
    const std::int64_t begin = run * rows, some = begin + rows < count ? rows : count - begin;
    for (std::int64_t k = begin; k < begin + some; ++k) batch.items[seen + k] = seen + k;
    for (int f = 0; f < batch.num_fields; ++f) {
      const RowField& field = batch.fields[f];
      std::memcpy(row(field.stored, seen + begin, field.row_bytes), row(field.batch, begin, field.row_bytes),
                  static_cast<std::size_t>(some * field.row_bytes));
    }
  });
}

// Copies the accepted rows whose slots lie in [first, last); the lists are in the items' order, so the last one stays.
void copy_rows(const ReservoirBatch& batch, std::int64_t seen, const std::vector<Accepted>* lists, std::int64_t count,
               std::int64_t first, std::int64_t last) {
  for (std::int64_t list = 0; list < count; ++list) {
    for (const Accepted& accepted : lists[list]) {
      if (accepted.slot < first || accepted.slot >= last) continue;
      batch.items[accepted.slot] = accepted.item;
      for (int f = 0; f < batch.num_fields; ++f) {
        const RowField& field = batch.fields[f];
        std::memcpy(row(field.stored, accepted.slot, field.row_bytes),
                    row(field.batch, accepted.item - seen, field.row_bytes), static_cast<std::size_t>(field.row_bytes));
      }
    }
  }
}

void reservoir_insert(const ReservoirBatch& batch, int threads) {
  static thread_local std::vector<std::vector<Accepted>> lists;  // kept: small batches come by the thousand
  const std::int64_t seen = *batch.seen, capacity = batch.capacity;
  const std::int64_t free = seen < capacity ? capacity - seen : 0;
  std::int64_t done = free < batch.count ? free : batch.count;
  if (done > 0) fill(batch, seen, done, threads);
  if (lists.size() < static_cast<std::size_t>(threads)) lists.resize(static_cast<std::size_t>(threads));
  std::vector<Accepted>* const wave = lists.data();  // the name `lists` is another vector in every thread
  while (done < batch.count) {
    const std::int64_t left = batch.count - done, chunks = (left + kItems - 1) / kItems;
    const std::int64_t some = chunks < threads ? chunks : threads;
    parallel_for(threads, some, [&](std::int64_t chunk, int) {
      std::vector<Accepted>& list = wave[chunk];
      list.clear();
      const std::int64_t begin = done + chunk * kItems,
                         end = begin + kItems < batch.count ? begin + kItems : batch.count;
      decide(seen + begin, seen + end, capacity, batch.seed,
             [&](std::int64_t slot, std::int64_t item) { list.push_back({slot, item}); });
    });
    std::int64_t accepted = 0;
    for (std::int64_t chunk = 0; chunk < some; ++chunk) accepted += static_cast<std::int64_t>(wave[chunk].size());
    const std::int64_t parts = accepted * bytes_per_item(batch) < kSerialBytes ? 1 : threads;
    parallel_for(threads, parts, [&](std::int64_t part, int) {
      copy_rows(batch, seen, wave, some, capacity * part / parts, capacity * (part + 1) / parts);
    });
    done += some * kItems < left ? some * kItems : left;
  }
  *batch.seen = seen + batch.count;
}

// The first `count` places of a Fisher-Yates shuffle of [0, population), of which only what moved is held.
void sample_without_replacement(std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw,
                                std::int64_t* sample) {
  struct Moved {
    std::int64_t place = -1, value;
  };
  static thread_local std::vector<Moved> table;  // open addressing
  int bits = 4;
  while ((std::int64_t{1} << bits) < 2 * count) ++bits;
  table.assign(std::size_t{1} << bits, Moved{});
  const std::size_t mask = table.size() - 1;
  const auto at_place = [&](std::int64_t place) -> Moved& {
    std::size_t k = static_cast<std::size_t>(static_cast<std::uint64_t>(place) * 0x9E3779B97F4A7C15ull >> (64 - bits));
    while (table[k].place != -1 && table[k].place != place) k = (k + 1) & mask;
    return table[k];
  };
  Words lane;
  for (int k = 0; k < kBlocks; ++k) lane[k] = static_cast<std::uint64_t>(k);
  const math::PhiloxWords counter = math::draw_counter(draw, 0, math::Purpose::sample, 0);
  PhiloxBlocks drawn;
  for (std::int64_t step = 0; step < count; ++step) {
    constexpr std::int64_t steps = 2 * kBlocks;  // a block serves two
    const std::int64_t at = step % steps / 2;
    if (step % steps == 0)
      drawn = philox({{Words{} + counter.word[0], Words{} + counter.word[1],
                       lane + static_cast<std::uint64_t>(step) / 2, Words{} + counter.word[3]}},
                     seed);
    const std::uint64_t high = drawn.word[step % 2 * 2][at] & 0xFFFFFFFFu,
                        low = drawn.word[step % 2 * 2 + 1][at] & 0xFFFFFFFFu;
    const auto range = static_cast<std::uint64_t>(population - step);
    const std::uint64_t value = (high << 31 | low >> 1) / math::run_length(range);
    const std::int64_t target =
        value < range ? step + static_cast<std::int64_t>(value) : math::shuffle_target(step, population, seed, draw);
    const Moved own = at_place(step);
    Moved& other = at_place(target);
    sample[step] = other.place == -1 ? target : other.value;
    other = {target, own.place == -1 ? step : own.value};
  }
}

// Sampled rows lie anywhere, so they are asked for two rows before they are copied.
LIMPET_FORMULA void fetch(const char* row, std::int64_t row_bytes) {
  const std::int64_t most = row_bytes < kFetched ? row_bytes : kFetched;
  for (std::int64_t k = 0; k < most; k += 64) __builtin_prefetch(row + k);
}

void gather_rows(const RowField* fields, int num_fields, std::int64_t ahead, const std::int64_t* index,
                 std::int64_t count, int threads) {
  std::int64_t bytes = 0;
  for (int f = 0; f < num_fields; ++f) bytes += fields[f].row_bytes;
  parallel_shares((ahead + count) * bytes < kGatheredBytes ? 1 : threads, [&](std::int64_t share, std::int64_t shares) {
    for (int f = 0; f < num_fields; ++f) {
      const RowField& field = fields[f];
      const auto size = static_cast<std::size_t>(field.row_bytes);
      const std::int64_t begin = count * share / shares, end = count * (share + 1) / shares;
      const std::int64_t first = ahead * share / shares, last = ahead * (share + 1) / shares;
      if (last > first)
        std::memcpy(row(field.batch, first, field.row_bytes), row(field.ahead, first, field.row_bytes),
                    static_cast<std::size_t>(last - first) * size);
      for (std::int64_t k = begin; k < end; ++k) {
        if (k + 2 < end) fetch(row(field.stored, index[k + 2], field.row_bytes), field.row_bytes);
        std::memcpy(row(field.batch, ahead + k, field.row_bytes), row(field.stored, index[k], field.row_bytes), size);
      }
    }
  });
}

}  // namespace

void fill_reservoir(Kernels& kernels) {
  kernels.reservoir_slots = reservoir_slots;
  kernels.reservoir_insert = reservoir_insert;
  kernels.sample_without_replacement = sample_without_replacement;
  kernels.gather_rows = gather_rows;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
