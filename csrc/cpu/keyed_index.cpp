#include "cpu/keyed_index.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace limpet::cpu {

namespace {

constexpr std::int64_t kItems = 16384;          // of a chunk whose keys one thread draws
constexpr std::int64_t kSerialBytes = 1 << 20;  // copied by one thread: less than this is not worth waking another

char* row(void* rows, std::int64_t k, std::int64_t row_bytes) {
  return static_cast<char*>(rows) + k * row_bytes;
}

}  // namespace

KeyedIndex::KeyedIndex(const KeyedNotes& notes, std::int64_t capacity)
    : capacity_(capacity), cells_(std::size_t{1} << bits_) {
  while (held_ < capacity && notes.items[held_] >= 0) ++held_;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(held_));
  std::iota(slots.begin(), slots.end(), 0);
  std::sort(slots.begin(), slots.end(), [&](auto a, auto b) { return notes.items[a] < notes.items[b]; });
  for (const std::int64_t slot : slots) hold(notes.groups[slot], {notes.keys[slot], notes.items[slot], slot});
  if (held_ == capacity_) rank_groups();
}

// A group's cell, made where there is none; where a bound is found, others move.
KeyedCell& KeyedIndex::cell(std::int64_t value) {
  if (2 * (taken_ + 1) > cells_.size()) {
    const auto left = static_cast<std::size_t>(std::count_if(
        cells_.begin(), cells_.end(), [&](const KeyedCell& c) { return c.heap >= 0 && !heaps_[c.heap].empty(); }));
    rebuild_cells(4 * (left + 1) > cells_.size() ? bits_ + 1 : bits_);
  }
  KeyedCell& found = cells_[bounds().find(value)];
  if (found.heap < 0) {
    if (free_heaps_.empty()) {
      free_heaps_.push_back(static_cast<std::int64_t>(heaps_.size()));
      heaps_.emplace_back();
    }
    found = {value, INT64_MAX, free_heaps_.back()};
    free_heaps_.pop_back();
    ++taken_;
  }
  return found;
}

// Groups without rows are forgotten: a stream may have more of them than memory.
void KeyedIndex::rebuild_cells(int bits) {
  std::vector<KeyedCell> old(std::size_t{1} << bits);
  old.swap(cells_);
  bits_ = bits;
  taken_ = 0;
  for (const KeyedCell& c : old) {
    if (c.heap < 0) continue;
    if (heaps_[c.heap].empty()) {
      free_heaps_.push_back(c.heap);
    } else {
      cells_[bounds().find(c.value)] = c;
      ++taken_;
    }
  }
}

void KeyedIndex::hold(std::int64_t value, const Row& row) {
  Heap& heap = heaps_[cell(value).heap];
  heap.push_back(row);
  std::push_heap(heap.begin(), heap.end());
  arrivals_.push(row.slot);
}

void KeyedIndex::rank_groups() {
  for (const KeyedCell& c : cells_)
    if (c.heap >= 0 && !heaps_[c.heap].empty()) ranks_.insert({heaps_[c.heap].size(), c.value});
}

// The slot that an item takes, or -1.
std::int64_t KeyedIndex::place(std::int64_t value, Row row) {
  if (held_ < capacity_) {
    row.slot = held_++;
    hold(value, row);
    if (held_ == capacity_) rank_groups();
    return row.slot;
  }
  const auto most = *ranks_.rbegin();
  KeyedCell& own = cells_[bounds().find(value)];
  const std::int64_t rows = own.heap < 0 ? 0 : static_cast<std::int64_t>(heaps_[own.heap].size());
  if (std::make_pair(rows + 1, value) > most) {  // the group itself has one too many, and will have from now on
    if (rows == 0) return -1;
    Heap& heap = heaps_[own.heap];
    own.bound = heap.front().key;
    if (!(row < heap.front())) return -1;
    std::pop_heap(heap.begin(), heap.end());
    row.slot = heap.back().slot;
    heap.back() = row;
    std::push_heap(heap.begin(), heap.end());
    own.bound = heap.front().key;
    arrivals_.remove(row.slot);
    arrivals_.push(row.slot);
    return row.slot;
  }
  KeyedCell& giver = cells_[bounds().find(most.second)];
  Heap& heap = heaps_[giver.heap];
  std::pop_heap(heap.begin(), heap.end());
  row.slot = heap.back().slot;
  heap.pop_back();
  giver.bound = heap.empty() ? -1 : heap.front().key;
  ranks_.erase(most);
  if (most.first > 1) ranks_.insert({most.first - 1, most.second});
  ranks_.erase({rows, value});
  ranks_.insert({rows + 1, value});
  arrivals_.remove(row.slot);
  hold(value, row);
  return row.slot;
}

// Places the items in [begin, end), which are at most kItems for each thread.
void KeyedIndex::place_some(const KeyedItems& items, std::int64_t begin, std::int64_t end, int threads,
                            std::vector<Placed>& placed) {
  const std::int64_t chunks = (end - begin + kItems - 1) / kItems;
  if (static_cast<std::int64_t>(candidates_.size()) < end - begin)
    candidates_.resize(static_cast<std::size_t>(end - begin));
  std::vector<std::int64_t> found(static_cast<std::size_t>(chunks));
  parallel_for(threads, chunks, [&](std::int64_t chunk, int) {
    const std::int64_t first = begin + chunk * kItems, count = std::min(kItems, end - first);
    found[chunk] = kernels().keyed_candidates(
        bounds(),
        {items.group == nullptr ? nullptr : items.group + first,
         items.weight == nullptr ? nullptr : items.weight + first, items.first + first, count, items.seed},
        candidates_.data() + chunk * kItems);
  });
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (std::int64_t k = 0; k < found[chunk]; ++k) {
      const KeyedCandidate& candidate = candidates_[chunk * kItems + k];
      const std::int64_t at = begin + chunk * kItems + candidate.place;
      const std::int64_t value = items.group == nullptr ? 0 : items.group[at];
      const std::int64_t slot = place(value, {candidate.key, items.first + at, -1});
      if (slot >= 0) placed.push_back({at, slot, candidate.key, value});
    }
  }
}

void KeyedIndex::insert(const KeyedBatch& batch, int threads) {
  const std::int64_t count = batch.items.count, wave = std::max(1, threads) * kItems;
  for (std::int64_t done = 0; done < count; done += wave) {
    placed_.clear();
    place_some(batch.items, done, std::min(count, done + wave), threads, placed_);
    for (const Placed& row : placed_) {
      batch.notes.items[row.slot] = batch.items.first + row.place;
      batch.notes.keys[row.slot] = row.key;
      batch.notes.groups[row.slot] = row.group;
    }
    copy_rows(batch, threads);
  }
}

std::vector<KeyedIndex::Placed> KeyedIndex::choose(const KeyedItems& items, int threads) {
  std::vector<Placed> placed;
  const std::int64_t wave = std::max(1, threads) * kItems;
  for (std::int64_t done = 0; done < items.count; done += wave)
    place_some(items, done, std::min(items.count, done + wave), threads, placed);
  return placed;
}

// Copies the rows that were placed and have not been given up since.
void KeyedIndex::copy_rows(const KeyedBatch& batch, int threads) const {
  std::int64_t bytes = 1;
  for (int f = 0; f < batch.num_fields; ++f) bytes += batch.fields[f].row_bytes;
  const auto count = static_cast<std::int64_t>(placed_.size()), rows = 1 + kSerialBytes / bytes;
  parallel_for(threads, (count + rows - 1) / rows, [&](std::int64_t run, int) {
    for (std::int64_t k = run * rows; k < std::min(count, (run + 1) * rows); ++k) {
      const std::int64_t at = placed_[k].place, slot = placed_[k].slot;
      if (batch.notes.items[slot] != batch.items.first + at) continue;
      for (int f = 0; f < batch.num_fields; ++f) {
        const RowField& field = batch.fields[f];
        std::memcpy(row(field.stored, slot, field.row_bytes), row(field.batch, at, field.row_bytes),
                    static_cast<std::size_t>(field.row_bytes));
      }
    }
  });
}

}  // namespace limpet::cpu
