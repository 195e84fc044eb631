// Which row a keyed reservoir gives up, and where its rows lie. All of it follows from the notes of the slots.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "cpu/arrivals.h"
#include "cpu/keyed.h"
#include "reservoir_rows.h"

namespace limpet::cpu {

// What a reservoir notes of each slot, [capacity]; items is -1 in free ones, which lie behind all others.
struct KeyedNotes {
  std::int64_t *items, *keys, *groups;
};

struct KeyedBatch {
  const RowField* fields;
  int num_fields;
  KeyedNotes notes;
  KeyedItems items;
};

// Of the rows ordered by their rank within their group (by key, then number), then by the group's value, the first
// `capacity` are held. So when there is one too many, the group with the most rows, of several the one of the largest
// value, gives up the row with its largest key.
class KeyedIndex {
 public:
  KeyedIndex(const KeyedNotes& notes, std::int64_t capacity);

  void insert(const KeyedBatch& batch, int threads);

  // What an item that gets a slot takes into it.
  struct Placed {
    std::int64_t place, slot, key, group;  // place in the batch
  };

  // The same without writing any note or row, for whoever writes them elsewhere: of several items in one slot the last
  // one stays.
  std::vector<Placed> choose(const KeyedItems& items, int threads);

  // slots[k] = where the item lies that is number places[k] of those held, counted from the oldest.
  void select(const std::int64_t* places, std::int64_t count, std::int64_t* slots) const {
    for (std::int64_t k = 0; k < count; ++k) slots[k] = arrivals_.select(places[k]);
  }

 private:
  struct Row {
    std::int64_t key, item, slot;
    bool operator<(const Row& other) const { return key != other.key ? key < other.key : item < other.item; }
  };
  using Heap = std::vector<Row>;  // the largest in front

  KeyedBounds bounds() const { return {cells_.data(), bits_}; }
  KeyedCell& cell(std::int64_t value);
  void rebuild_cells(int bits);
  void hold(std::int64_t value, const Row& row);
  void rank_groups();
  std::int64_t place(std::int64_t value, Row row);
  void place_some(const KeyedItems& items, std::int64_t begin, std::int64_t end, int threads,
                  std::vector<Placed>& placed);
  void copy_rows(const KeyedBatch& batch, int threads) const;

  std::int64_t capacity_, held_ = 0;
  int bits_ = 4;
  std::size_t taken_ = 0;  // cells, those of groups that have lost all their rows included
  std::vector<KeyedCell> cells_;
  std::vector<Heap> heaps_;
  std::vector<std::int64_t> free_heaps_;
  std::set<std::pair<std::int64_t, std::int64_t>> ranks_;  // (rows, value) of each group, once all slots are taken
  Arrivals arrivals_;
  std::vector<KeyedCandidate> candidates_;  // kept: small batches come by the thousand
  std::vector<Placed> placed_;
};

}  // namespace limpet::cpu
