// The keys of the items of a stream, and which of them their groups' bounds let through.

#include "cpu/keyed.h"

#include "cpu/isa.h"
#include "cpu/philox.h"
#include "math/keyed.h"
#include "math/reservoir.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

typedef std::int64_t Bits __attribute__((vector_size(LIMPET_VECTOR_BYTES)));
using Reals = Vector<double>;

constexpr int kStep = 2 * kBlocks;     // a block serves two items
constexpr std::int64_t kStride = 512;  // items whose keys are held at a time

// The random bits of items number, number + 1, ...; number is even, and up to kStep - 1 more are written than asked
// for.
void draw(std::int64_t number, std::int64_t count, std::uint64_t seed, std::int64_t* bits) {
  Words lane;
  for (int k = 0; k < kBlocks; ++k) lane[k] = static_cast<std::uint64_t>(k);
  const Words purpose = Words{} + math::draw_counter(0, 0, math::Purpose::key, 0).word[3];
  for (std::int64_t k = 0; k < count; k += kStep) {
    const Words pair = lane + static_cast<std::uint64_t>(number + k) / 2;
    const PhiloxBlocks drawn = philox({{pair, pair >> 32, Words{}, purpose}}, seed);
    const auto joined = [](const Words& high, const Words& low) {
      return (high & 0xFFFFFFFFu) << 31 | (low & 0xFFFFFFFFu) >> 1;
    };
    const Words even = joined(drawn.word[0], drawn.word[1]), odd = joined(drawn.word[2], drawn.word[3]);
    for (int i = 0; i < kBlocks; ++i) {
      bits[k + 2 * i] = static_cast<std::int64_t>(even[i]);
      bits[k + 2 * i + 1] = static_cast<std::int64_t>(odd[i]);
    }
  }
}

void weigh(const double* weight, std::int64_t count, std::int64_t* keys) {
  const auto real = [](const Bits& bits) { return __builtin_convertvector(bits, Reals); };
  for (std::int64_t k = 0; k < count; k += kBlocks) {
    Bits bits;
    std::memcpy(&bits, keys + k, sizeof(bits));
    const Reals weights = count - k < kBlocks ? load(Padded<double>(weight + k, count - k).elements) : load(weight + k);
    bits = math::weighted_key(bits, weights, real);
    std::memcpy(keys + k, &bits, sizeof(bits));
  }
}

std::int64_t keyed_candidates(const KeyedBounds& bounds, const KeyedItems& items, KeyedCandidate* candidates) {
  std::int64_t drawn[kStride + 2 * kStep], found = 0;
  const std::int64_t common = items.group == nullptr ? bounds.bound(0) : 0;
  for (std::int64_t done = 0; done < items.count; done += kStride) {
    const std::int64_t number = items.first + done, odd = number % 2;
    const std::int64_t some = items.count - done < kStride ? items.count - done : kStride;
    draw(number - odd, some + odd, items.seed, drawn);
    std::int64_t* const keys = drawn + odd;
    if (items.weight != nullptr) weigh(items.weight + done, some, keys);
    for (std::int64_t k = 0; k < some; ++k) {
      const std::int64_t bound = items.group == nullptr ? common : bounds.bound(items.group[done + k]);
      candidates[found] = {done + k, keys[k]};
      found += keys[k] <= bound;
    }
  }
  return found;
}

}  // namespace

void fill_keyed(Kernels& kernels) {
  kernels.keyed_candidates = keyed_candidates;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
