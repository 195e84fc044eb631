// Slots in the order in which their items came, though items leave from anywhere: a log with gaps, and above it a
// Fenwick tree of what is left, so that pushing, removing and finding the k-th take logarithmic time.
#pragma once

#include <cstdint>
#include <vector>

namespace limpet::cpu {

class Arrivals {
 public:
  void push(std::int64_t slot) {
    if (log_.size() > 2 * static_cast<std::size_t>(left_) + 64) close_gaps();
    append(slot);
    ++left_;
  }

  void remove(std::int64_t slot) {
    const std::int64_t at = place_[slot];
    log_[at] = -1;
    for (std::int64_t k = at + 1; k <= size(); k += k & -k) --tree_[k - 1];
    --left_;
  }

  // The slot of the k-th item that is left, k in [0, left).
  std::int64_t select(std::int64_t k) const {
    std::int64_t step = 1, at = 0;
    while (2 * step <= size()) step *= 2;
    for (; step > 0; step /= 2) {
      if (at + step > size() || tree_[at + step - 1] > k) continue;
      at += step;
      k -= tree_[at - 1];
    }
    return log_[at];
  }

 private:
  std::int64_t size() const { return static_cast<std::int64_t>(log_.size()); }

  void append(std::int64_t slot) {
    log_.push_back(slot);
    if (slot >= static_cast<std::int64_t>(place_.size())) place_.resize(slot + 1);
    place_[slot] = size() - 1;
    // Node k counts what lies in (k - lowest bit of k, k], places from 1.
    const std::int64_t k = size(), first = k - (k & -k);
    std::int64_t sum = 1;
    for (std::int64_t child = k - 1; child > first; child -= child & -child) sum += tree_[child - 1];
    tree_.push_back(sum);
  }

  void close_gaps() {
    std::vector<std::int64_t> log;
    log.swap(log_);
    tree_.clear();
    for (const std::int64_t slot : log)
      if (slot >= 0) append(slot);
  }

  std::vector<std::int64_t> log_, tree_, place_;  // place_: of each slot in the log
  std::int64_t left_ = 0;
};

}  // namespace limpet::cpu
