// sum_n (sum_t d[n,t,:] a[n,t,:]^T)^2 for weights used as y = x W^T: rows are outputs, columns inputs.

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// A sample's places with T = 1 are squared while packing: sum_n (d a)^2 = (d*d)^T (a*a), one product.
struct Shape {
  bool squares;  // whether the tiles square, i.e. T > 1
  std::int64_t samples, places;
  Chunking chunks;

  explicit Shape(const LinearArgs& args)
      : squares(args.places > 1),
        samples(squares ? args.samples : 1),
        places(squares ? args.places : args.samples),
        chunks(squares ? chunking(samples, places) : Chunking{1, min_of(kChunkRows, places), 1}) {
    if (!squares) chunks.segments = ceil_div(places, max_of(1, chunks.segment));
  }

  bool carried() const { return squares && chunks.segments > 1; }
  std::int64_t count() const { return ceil_div(samples, max_of(1, chunks.samples)) * chunks.segments; }
};

constexpr std::int64_t kRowBlock = 340 * kMR;  // rows that are packed at a time: bounds the workspace

// Workspace: panels of rows for several chunks, shared | a panel of columns per thread | offsets | carry.
template <class S>
struct Layout {
  std::int64_t slot, slots;  // elements of one chunk's row panels; chunks at a time
  std::int64_t rows, columns, column_panel, offsets, carry, end;  // in bytes

  Layout(const LinearArgs& args, const Shape& shape) {
    const std::int64_t places = shape.chunks.rows();
    const auto bytes = [](std::int64_t n) { return ceil_div(n * static_cast<std::int64_t>(sizeof(S)), 64) * 64; };
    slot = min_of(kRowBlock, ceil_div(args.rows, kMR) * kMR) * places + lanes<S>;
    slots = max_of(1, min_of(shape.count(), kPacked / slot));
    rows = 0;
    columns = rows + bytes(slot * slots);
    column_panel = bytes(kNR<S> * places);
    offsets = columns + column_panel * max_of(1, args.threads);
    carry = offsets + ceil_div(shape.chunks.segment * 8, 64) * 64;
    end =
        carry + (shape.carried() ? bytes(ceil_div(args.rows, kMR) * kMR * ceil_div(args.columns, kNR<S>) * kNR<S>) : 0);
  }
};

// `count` neighbouring values per place into [places, width] of `to`. Where `readable` values lie behind `from`, whole
// vectors are stored, beyond `width` too: the next place, and what is packed next behind `to`, overwrites them. Between
// `count` and `width` anything may lie: those products are not kept.
template <class Stored, class S>
void pack(const Stored* from, std::int64_t step, std::int64_t place_stride, std::int64_t places, std::int64_t count,
          std::int64_t readable, std::int64_t width, bool square, S* to) {
  const std::int64_t vectors = ceil_div(width, lanes<S>);
  if (step == 1 && readable >= vectors * lanes<S>) {
    for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += width)
      for (std::int64_t v = 0; v < vectors; ++v) {
        const Vector<S> x = load(from + v * lanes<S>);
        store<S>(square ? x * x : x, to + v * lanes<S>);
      }
    return;
  }
  if (place_stride == 1 && step != 1 && width % lanes<S> == 0 && places >= lanes<S>) {  // neighbouring places
    for (std::int64_t v = 0; v < width; v += lanes<S>)
      for (std::int64_t block = 0; block < places; block += lanes<S>) {
        const std::int64_t t = min_of(block, places - lanes<S>);  // the last block may overlap the one before it
        Vector<S> values[lanes<S>];
        for (int i = 0; i < lanes<S>; ++i) {
          values[i] = load(from + min_of(v + i, count - 1) * step + t);
          if (square) values[i] *= values[i];
        }
        transpose<S>(values);
        for (int i = 0; i < lanes<S>; ++i) store<S>(values[i], to + (t + i) * width + v);
      }
    return;
  }
  for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += width) {
    for (std::int64_t i = 0; i < count; ++i) {
      const S x = widen(from[i * step]);
      to[i] = square ? x * x : x;
    }
    for (std::int64_t i = count; i < width; ++i) to[i] = 0;
  }
}

// A chunk: samples [n, n + samples), of each the places [t, t + places).
struct Chunk {
  std::int64_t n, t, samples, places;

  Chunk(const Shape& shape, std::int64_t index)
      : n(index / shape.chunks.segments * shape.chunks.samples),
        t(index % shape.chunks.segments * shape.chunks.segment),
        samples(min_of(shape.chunks.samples, shape.samples - n)),
        places(min_of(shape.chunks.segment, shape.places - t)) {}
};

template <class Stored>
void contract(const LinearArgs& args) {
  using S = Compute<Stored>;
  const Shape shape(args);
  const Layout<S> layout(args, shape);
  char* const workspace = static_cast<char*>(args.workspace);
  S* const row_panels = reinterpret_cast<S*>(workspace + layout.rows);
  std::int64_t* const offsets = reinterpret_cast<std::int64_t*>(workspace + layout.offsets);
  S* const carry = reinterpret_cast<S*>(workspace + layout.carry);
  S* const total = static_cast<S*>(args.total);

  // T = 1: the samples are the places.
  const std::int64_t* const dn = args.output_grad_strides;
  const std::int64_t* const an = args.input_strides;
  const std::int64_t d_place = shape.squares ? dn[1] : dn[0], d_sample = shape.squares ? dn[0] : 0;
  const std::int64_t a_place = shape.squares ? an[1] : an[0], a_sample = shape.squares ? an[0] : 0;
  const Stored* const d = static_cast<const Stored*>(args.output_grad);
  const Stored* const a = static_cast<const Stored*>(args.input);

  const int threads = worthwhile(args.threads, args.samples * args.places * args.rows * args.columns);
  const std::int64_t column_panels = ceil_div(args.columns, kNR<S>);
  for (std::int64_t t = 0; t < shape.chunks.segment; ++t) offsets[t] = t * kMR;

  for (std::int64_t row0 = 0; row0 < args.rows; row0 += kRowBlock)
    for (std::int64_t chunk0 = 0; chunk0 < shape.count(); chunk0 += layout.slots) {
      const std::int64_t slots = min_of(layout.slots, shape.count() - chunk0);
      const std::int64_t panels = ceil_div(min_of(kRowBlock, args.rows - row0), kMR);

      // `pack` may run over into the next panel: a job packs a run of panels in order, its last one value by value.
      const std::int64_t runs = min_of(panels, ceil_div(4 * threads, slots));
      parallel_for(threads, slots * runs, [&](std::int64_t job, int) {
        const std::int64_t slot = job / runs, run = job % runs, end = panels * (run + 1) / runs;
        const Chunk chunk(shape, chunk0 + slot);
        for (std::int64_t p = panels * run / runs; p < end; ++p) {
          const std::int64_t row = row0 + p * kMR, count = min_of(kMR, args.rows - row);
          S* const to = row_panels + slot * layout.slot + p * chunk.samples * chunk.places * kMR;
          for (std::int64_t n = 0; n < chunk.samples; ++n)
            pack(d + (chunk.n + n) * d_sample + chunk.t * d_place + row * dn[2], dn[2], d_place, chunk.places, count,
                 p + 1 < end ? args.rows - row : count, kMR, !shape.squares, to + n * chunk.places * kMR);
        }
      });

      // Tiles are numbered column panel by column panel. A run of them packs each column panel that it enters.
      const std::int64_t tiles = column_panels * panels, tile_jobs = min_of(tiles, tile_runs(threads));
      parallel_for(threads, tile_jobs, [&](std::int64_t job, int worker) {
        S* const panel = reinterpret_cast<S*>(workspace + layout.columns + layout.column_panel * worker);
        const std::int64_t tile0 = tiles * job / tile_jobs, tile1 = tiles * (job + 1) / tile_jobs;
        for (std::int64_t slot = 0; slot < slots; ++slot) {
          const Chunk chunk(shape, chunk0 + slot);
          for (std::int64_t index = tile0; index < tile1; ++index) {
            const std::int64_t q = index / panels, p = index % panels;
            const std::int64_t column = q * kNR<S>, row = row0 + p * kMR;
            const int vectors = panel_vectors<S>(args.columns, column);
            const std::int64_t width = vectors * lanes<S>, count = min_of(width, args.columns - column);
            if (p == 0 || index == tile0)
              for (std::int64_t n = 0; n < chunk.samples; ++n)
                pack(a + (chunk.n + n) * a_sample + chunk.t * a_place + column * an[2], an[2], a_place, chunk.places,
                     count, count, width, !shape.squares, panel + n * chunk.places * width);

            const int height = static_cast<int>(min_of(kMR, args.rows - row));
            const S* const rows = row_panels + slot * layout.slot + p * chunk.samples * chunk.places * kMR;
            S* const to = total + row * args.columns + column;
            // The tile's part of the result, on its way from memory while the tile is computed.
            for (int r = 0; r < height; ++r)
              for (std::int64_t c = 0; c < count; c += lanes<S>) __builtin_prefetch(to + r * args.columns + c, 1);
            const bool in_place = !shape.squares && count == width;
            alignas(64) S sum[kMR * kNR<S>];
            if (!shape.squares && !in_place)
              for (S& element : sum) element = 0;
            Tile<S> tile;
            for (int r = 0; r < kMR; ++r) tile.rows[r] = rows + r;
            tile.row_sample = chunk.places * kMR;
            tile.offsets = offsets;
            tile.columns = panel;
            tile.width = width;
            tile.samples = chunk.samples;
            tile.places = chunk.places;
            tile.sum = in_place ? to : sum;
            tile.sum_step = in_place ? args.columns : kNR<S>;
            tile.squares = shape.squares;
            tile.carry = shape.carried() ? carry + (row / kMR * column_panels + q) * kMR * kNR<S> : nullptr;
            tile.first = !shape.carried() || chunk.t == 0;
            tile.last = !shape.carried() || chunk.t + chunk.places == shape.places;
            run_tile(tile, height, vectors);
            if (in_place || !tile.last) continue;

            for (int r = 0; r < height; ++r)
              for (std::int64_t c = 0; c < count; ++c) to[r * args.columns + c] += sum[r * kNR<S> + c];
          }
        }
      });
    }
}

std::int64_t linear_workspace(const LinearArgs& args) {
  const Shape shape(args);
  return args.dtype == Dtype::f64 ? Layout<double>(args, shape).end : Layout<float>(args, shape).end;
}

void sum_grad_squared_linear(const LinearArgs& args) {
  if (!args.samples || !args.places || !args.rows || !args.columns) return;
  dispatch(args.dtype, [&](auto stored) { contract<decltype(stored)>(args); });
}

}  // namespace

void fill_fisher_linear(Kernels& kernels) {
  kernels.linear_workspace = linear_workspace;
  kernels.sum_grad_squared_linear = sum_grad_squared_linear;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
