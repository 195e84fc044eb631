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
};

// Workspace: panels of columns | per-job block of rows | offsets | carry.
template <class S>
struct Layout {
  std::int64_t columns, rows, offsets, carry, end;  // in bytes

  Layout(const LinearArgs& args, const Shape& shape) {
    const std::int64_t places = shape.chunks.rows();
    const std::int64_t block = kBlockPanels * kMR * places + lanes<S>;
    const auto bytes = [](std::int64_t n) { return ceil_div(n * static_cast<std::int64_t>(sizeof(S)), 64) * 64; };
    columns = 0;
    rows = columns + bytes(panels_size<S>(args.columns, places));
    offsets = rows + bytes(block) * (args.threads > 0 ? args.threads : 1);
    carry = offsets + ceil_div(shape.chunks.segment * 8, 64) * 64;
    const bool carried = shape.squares && shape.chunks.segments > 1;
    end = carry + (carried ? bytes(ceil_div(args.rows, kMR) * kMR * ceil_div(args.columns, kNR<S>) * kNR<S>) : 0);
  }
};

// `count` neighbouring values per place into [place, stride] of `to`; what lies behind them is overwritten by the
// next place's, so whole vectors may be stored. `to` has a vector's room behind its end.
template <class Stored, class S>
void pack(const Stored* from, std::int64_t step, std::int64_t place_stride, std::int64_t places, std::int64_t count,
          std::int64_t readable, std::int64_t width, bool square, S* to) {
  for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += width) {
    std::int64_t i = 0;
    if (step == 1) {
      for (; i < count && i + lanes<S> <= readable; i += lanes<S>) {
        Vector<S> v = load(from + i);
        if (square) v *= v;
        store<S>(v, to + i);
      }
    }
    for (; i < count; ++i) {
      const S v = widen(from[i * step]);
      to[i] = square ? v * v : v;
    }
    for (i = max_of(i, count); i < width; ++i) to[i] = 0;
  }
}

template <class Stored>
void contract(const LinearArgs& args) {
  using S = Compute<Stored>;
  const Shape shape(args);
  const Layout<S> layout(args, shape);
  const Chunking& chunks = shape.chunks;
  char* const workspace = static_cast<char*>(args.workspace);
  S* const column_panels = reinterpret_cast<S*>(workspace + layout.columns);
  std::int64_t* const offsets = reinterpret_cast<std::int64_t*>(workspace + layout.offsets);
  S* const carry = reinterpret_cast<S*>(workspace + layout.carry);
  S* const total = static_cast<S*>(args.total);

  // T = 1: the samples are the places.
  const std::int64_t* const dn = args.output_grad_strides;
  const std::int64_t* const an = args.input_strides;
  const std::int64_t d_place = shape.squares ? dn[1] : dn[0], d_sample = shape.squares ? dn[0] : 0;
  const std::int64_t a_place = shape.squares ? an[1] : an[0], a_sample = shape.squares ? an[0] : 0;

  const int threads = worthwhile(args.threads, args.samples * args.places * args.rows * args.columns);
  const Grid jobs = grid<S>(args.rows, args.columns, threads);
  for (std::int64_t t = 0; t < chunks.segment; ++t) offsets[t] = t * kMR;

  for (std::int64_t n0 = 0; n0 < shape.samples; n0 += chunks.samples)
    for (std::int64_t t0 = 0; t0 < shape.places; t0 += chunks.segment) {
      const std::int64_t samples = min_of(chunks.samples, shape.samples - n0);
      const std::int64_t places = min_of(chunks.segment, shape.places - t0);
      const std::int64_t rows = samples * places;
      const Stored* const d = static_cast<const Stored*>(args.output_grad) + n0 * d_sample + t0 * d_place;
      const Stored* const a = static_cast<const Stored*>(args.input) + n0 * a_sample + t0 * a_place;

      parallel_for(threads, jobs.column_panels, [&](std::int64_t p, int) {
        const std::int64_t first = p * kNR<S>;
        const std::int64_t width = panel_vectors<S>(args.columns, first) * lanes<S>;
        const std::int64_t count = min_of(width, args.columns - first);
        for (std::int64_t n = 0; n < samples; ++n)
          pack(a + n * a_sample + first * an[2], an[2], a_place, places, count, args.columns - first, width,
               !shape.squares, column_panels + panel_offset<S>(p, rows) + n * places * width);
      });

      parallel_for(threads, jobs.jobs(), [&](std::int64_t job, int worker) {
        // A row block per thread, on the thread's own stripe of the workspace.
        const std::int64_t row_block = job / jobs.column_groups, group = job % jobs.column_groups;
        const std::int64_t panel0 = row_block * jobs.block;
        const std::int64_t panels = min_of(jobs.block, jobs.row_panels - panel0);
        const std::int64_t stripe = (layout.offsets - layout.rows) / (args.threads > 0 ? args.threads : 1);
        S* const block = reinterpret_cast<S*>(workspace + layout.rows + stripe * worker);
        for (std::int64_t p = 0; p < panels; ++p) {
          const std::int64_t first = (panel0 + p) * kMR;
          for (std::int64_t n = 0; n < samples; ++n)
            pack(d + n * d_sample + first * dn[2], dn[2], d_place, places, min_of(kMR, args.rows - first),
                 args.rows - first, kMR, !shape.squares, block + (p * rows + n * places) * kMR);
        }

        const std::int64_t q0 = jobs.column_panels * group / jobs.column_groups;
        const std::int64_t q1 = jobs.column_panels * (group + 1) / jobs.column_groups;
        for (std::int64_t q = q0; q < q1; ++q)
          for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t row = (panel0 + p) * kMR, column = q * kNR<S>;
            const int height = static_cast<int>(min_of(kMR, args.rows - row));
            alignas(64) S sum[kMR * kNR<S>] = {};
            Tile<S> tile;
            for (int r = 0; r < kMR; ++r) tile.rows[r] = block + p * rows * kMR + r;
            tile.row_sample = places * kMR;
            tile.offsets = offsets;
            tile.columns = column_panels + panel_offset<S>(q, rows);
            tile.samples = samples;
            tile.places = places;
            tile.sum = sum;
            tile.squares = shape.squares;
            const bool carried = shape.squares && chunks.segments > 1;
            tile.carry = carried ? carry + ((panel0 + p) * jobs.column_panels + q) * kMR * kNR<S> : nullptr;
            tile.first = !carried || t0 == 0;
            tile.last = !carried || t0 + places == shape.places;
            run_tile(tile, height, panel_vectors<S>(args.columns, column));
            if (!tile.last) continue;

            const std::int64_t width = min_of(kNR<S>, args.columns - column);
            for (int r = 0; r < height; ++r) {
              S* const to = total + (row + r) * args.columns + column;
              for (std::int64_t c = 0; c < width; ++c) to[c] += sum[r * kNR<S> + c];
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
  switch (args.dtype) {
    case Dtype::f32: return contract<float>(args);
    case Dtype::f64: return contract<double>(args);
    case Dtype::bf16: return contract<BFloat16>(args);
    case Dtype::f16: return contract<Half>(args);
  }
}

}  // namespace

void fill_fisher_linear(Kernels& kernels) {
  kernels.linear_workspace = linear_workspace;
  kernels.sum_grad_squared_linear = sum_grad_squared_linear;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
