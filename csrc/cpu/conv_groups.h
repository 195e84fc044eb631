// The contraction for convolutions in many small groups, depthwise ones above all. A panel of columns would be nearly
// empty, so the lanes of a vector are groups: input and output gradient are packed to [places, lanes], and each weight
// element of a block of groups is one vector of sums, with neither broadcasts nor sums across lanes.
#pragma once

#include "cpu/conv_geometry.h"

namespace limpet::cpu {
namespace {

// Whether lanes that are groups take fewer products than lanes that are a group's output channels.
template <class S>
bool lanes_are_groups(const ConvArgs& args) {
  const std::int64_t columns = args.out_channels / args.groups;
  return ceil_div(args.groups, lanes<S>) * columns < args.groups * ceil_div(columns, lanes<S>);
}

// Workspace: offsets of places, of rows, of the input's places | per thread: input, output gradient, sums of squares.
template <class S>
struct GroupsLayout {
  std::int64_t places, rows, inside, threads, thread;  // in bytes
  std::int64_t input, output_grad, sums, end;          // in bytes; the first three within a thread's part

  GroupsLayout(const ConvArgs& args, const ConvGeometry& geometry) {
    const auto bytes = [](std::int64_t n, std::int64_t size) { return ceil_div(n * size, 64) * 64; };
    const std::int64_t vector = lanes<S> * sizeof(S);
    places = 0;
    rows = places + bytes(geometry.places, 8);
    inside = rows + bytes(geometry.rows, 8);
    threads = inside + bytes(args.input_size[0] * args.input_size[1] * args.input_size[2], 8);
    input = 0;
    output_grad = input + bytes(geometry.channels * geometry.image, vector);
    sums = output_grad + bytes(geometry.places, vector);
    thread = sums + bytes(geometry.columns * geometry.rows, vector);
    end = threads + thread * max_of(1, args.threads);
  }
};

// One channel of each of `count` groups, `step` apart: the place at [i0, i1, i2] goes to `to` + `at`[i], or where there
// is no `at` to `to` + i * lanes. Lanes from `count` on are undefined.
template <class Stored, class S>
void pack_groups(const Stored* from, std::int64_t step, std::int64_t count, const std::int64_t* sizes,
                 const std::int64_t* strides, const std::int64_t* at, S* to) {
  const std::int64_t places = sizes[0] * sizes[1] * sizes[2];
  const auto target = [&](std::int64_t i) { return to + (at ? at[i] : i * lanes<S>); };
  const bool lines = strides[2] == 1 && (sizes[1] == 1 || strides[1] == sizes[2]) &&
                     (sizes[0] == 1 || strides[0] == sizes[1] * sizes[2]);
  if (lines && step != 1 && places >= lanes<S>) {
    for (std::int64_t block = 0; block < places; block += lanes<S>) {
      const std::int64_t first = min_of(block, places - lanes<S>);  // the last block may overlap the one before it
      Vector<S> square[lanes<S>];
      for (int g = 0; g < lanes<S>; ++g) square[g] = load(from + min_of(g, count - 1) * step + first);
      transpose<S>(square);
      for (int i = 0; i < lanes<S>; ++i) store<S>(square[i], target(first + i));
    }
    return;
  }
  std::int64_t i = 0;
  for (std::int64_t i0 = 0; i0 < sizes[0]; ++i0)
    for (std::int64_t i1 = 0; i1 < sizes[1]; ++i1)
      for (std::int64_t i2 = 0; i2 < sizes[2]; ++i2, ++i) {
        const Stored* const place = from + i0 * strides[0] + i1 * strides[1] + i2 * strides[2];
        if (step == 1 && count == lanes<S>)
          store<S>(load(place), target(i));
        else
          for (std::int64_t g = 0; g < count; ++g) target(i)[g] = widen(place[g * step]);
      }
}

constexpr int kGroupRows = 9;  // sums in registers: a 3x3 kernel's, and few enough for 16 registers

// Adds the squares of one sample's sums over places of d times MR rows of the input.
template <class S, int MR>
void add_rows(const S* input, const std::int64_t* rows, const std::int64_t* offsets, std::int64_t places, const S* d,
              S* sums) {
  const S* base[MR];
  for (int r = 0; r < MR; ++r) base[r] = input + rows[r];
  Vector<S> acc[MR] = {};
  for (std::int64_t t = 0; t < places; ++t, d += lanes<S>) {
    const std::int64_t offset = offsets[t];
    const Vector<S> grad = load(d);
    for (int r = 0; r < MR; ++r) acc[r] += grad * load(base[r] + offset);
  }
  for (int r = 0; r < MR; ++r) {
    Vector<S> sum = load(sums + r * lanes<S>);
    math::add_square(sum, acc[r]);
    store<S>(sum, sums + r * lanes<S>);
  }
}

template <class S, int most = kGroupRows>
void add_squares(int count, const S* input, const std::int64_t* rows, const std::int64_t* offsets, std::int64_t places,
                 const S* d, S* sums) {
  if constexpr (most > 1)
    if (count < most) return add_squares<S, most - 1>(count, input, rows, offsets, places, d, sums);
  add_rows<S, most>(input, rows, offsets, places, d, sums);
}

template <class Stored>
void contract_groups(const ConvArgs& args) {
  using S = Compute<Stored>;
  const ConvGeometry geometry(args);
  const GroupsLayout<S> layout(args, geometry);
  char* const workspace = static_cast<char*>(args.workspace);
  std::int64_t* const offsets = reinterpret_cast<std::int64_t*>(workspace + layout.places);
  std::int64_t* const rows = reinterpret_cast<std::int64_t*>(workspace + layout.rows);
  std::int64_t* const inside = reinterpret_cast<std::int64_t*>(workspace + layout.inside);
  fill_offsets(args, geometry, lanes<S>, offsets, rows);
  std::int64_t* at = inside;
  for (std::int64_t x0 = 0; x0 < args.input_size[0]; ++x0)
    for (std::int64_t x1 = 0; x1 < args.input_size[1]; ++x1)
      for (std::int64_t x2 = 0; x2 < args.input_size[2]; ++x2)
        *at++ = (((x0 + args.padding[0]) * geometry.padded[1] + x1 + args.padding[1]) * geometry.padded[2] + x2 +
                 args.padding[2]) *
                lanes<S>;

  const std::int64_t *const ds = args.output_grad_strides, *const xs = args.input_strides;
  const int threads = worthwhile(args.threads, args.samples * geometry.places * geometry.rows * args.out_channels);
  // A job is a block of groups, or where there are few blocks a part of its columns.
  const std::int64_t blocks = ceil_div(args.groups, lanes<S>);
  const std::int64_t parts = min_of(geometry.columns, threads == 1 ? 1 : ceil_div(2 * threads, blocks));
  parallel_for(threads, blocks * parts, [&](std::int64_t job, int worker) {
    const std::int64_t g0 = job / parts * lanes<S>, count = min_of(lanes<S>, args.groups - g0), part = job % parts;
    const std::int64_t column0 = geometry.columns * part / parts, column1 = geometry.columns * (part + 1) / parts;
    char* const scratch = workspace + layout.threads + layout.thread * worker;
    S* const input = reinterpret_cast<S*>(scratch + layout.input);
    S* const d = reinterpret_cast<S*>(scratch + layout.output_grad);
    S* const sums = reinterpret_cast<S*>(scratch + layout.sums);
    // The padding stays zero: samples write between it.
    for (std::int64_t i = 0; i < geometry.channels * geometry.image * lanes<S>; ++i) input[i] = 0;
    for (std::int64_t i = 0; i < geometry.columns * geometry.rows * lanes<S>; ++i) sums[i] = 0;

    for (std::int64_t n = 0; n < args.samples; ++n) {
      for (std::int64_t c = 0; c < geometry.channels; ++c)
        pack_groups(static_cast<const Stored*>(args.input) + n * xs[0] + (g0 * geometry.channels + c) * xs[1],
                    geometry.channels * xs[1], count, args.input_size, xs + 2, inside,
                    input + c * geometry.image * lanes<S>);
      for (std::int64_t o = column0; o < column1; ++o) {
        pack_groups(static_cast<const Stored*>(args.output_grad) + n * ds[0] + (g0 * geometry.columns + o) * ds[1],
                    geometry.columns * ds[1], count, args.output_size, ds + 2, nullptr, d);
        for (std::int64_t row = 0; row < geometry.rows; row += kGroupRows) {
          S* const to = sums + (o * geometry.rows + row) * lanes<S>;
          add_squares<S>(static_cast<int>(min_of(kGroupRows, geometry.rows - row)), input, rows + row, offsets,
                         geometry.places, d, to);
        }
      }
    }

    for (std::int64_t g = 0; g < count; ++g)
      for (std::int64_t o = column0; o < column1; ++o) {
        S* const to = static_cast<S*>(args.total) + ((g0 + g) * geometry.columns + o) * geometry.rows;
        for (std::int64_t row = 0; row < geometry.rows; ++row)
          to[row] += sums[(o * geometry.rows + row) * lanes<S> + g];
      }
  });
}

}  // namespace
}  // namespace limpet::cpu
