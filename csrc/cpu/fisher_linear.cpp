// sum_n (sum_t d[n,t,:] a[n,t,:]^T)^2 for weights used as y = x W^T: rows are outputs, columns inputs. A bias's
// sum_n (sum_t d[n,t,:])^2 is taken from the packed rows on the way: the gradient is then read from memory once.

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

// One side is packed by all threads and shared, a block of it at a time. The other is cut into jobs, which pack their
// own part chunk by chunk, so that it is read from the core's own cache: the longer side, as what one core has written
// another has to fetch (16 samples of 64 places, 1024 x 256, two threads: 1.24 of torch's product with the rows shared,
// 1.13 with the columns; 256 x 1024: 1.04 and 1.22).
constexpr std::int64_t kBlock = 2040;    // rows or columns that are shared at a time: bounds the workspace
constexpr std::int64_t kRowPanels = 42;  // in a job's own rows, at most
// Panels that are packed side by side: a place's values for them are whole lines, which are read once, and each panel
// is written from its beginning to its end.
constexpr std::int64_t kPackPanels = 8;

// Panels of kMR neighbouring values per place, `panel` elements apart.
template <class Stored, class S>
void pack_whole(const Stored* from, std::int64_t place_stride, std::int64_t places, std::int64_t panels,
                std::int64_t panel, bool square, S* to) {
  for (std::int64_t t = 0; t < places; ++t, from += place_stride, to += kMR)
    for (std::int64_t p = 0; p < panels; ++p) {
      const Stored* const values = from + p * kMR;
      S* const packed = to + p * panel;
      if constexpr (sizeof(Stored) == sizeof(S)) {  // in two vectors, which the compiler finds no way to by itself
        static_assert(kMR == 6, "4 + 2");
        typedef S Four __attribute__((vector_size(4 * sizeof(S))));
        typedef S Two __attribute__((vector_size(2 * sizeof(S))));
        Four four;
        Two two;
        std::memcpy(&four, values, sizeof four);
        std::memcpy(&two, values + 4, sizeof two);
        if (square) four *= four, two *= two;
        std::memcpy(packed, &four, sizeof four);
        std::memcpy(packed + 4, &two, sizeof two);
      } else {
        for (int i = 0; i < kMR; ++i) {
          const S x = widen(values[i]);
          packed[i] = square ? x * x : x;
        }
      }
    }
}

bool rows_are_shared(const LinearArgs& args) {
  return args.rows <= args.columns;
}

// Workspace: the shared side's panels for several chunks | a job's own panels, per thread | offsets | carry | bias's.
template <class S>
struct Layout {
  std::int64_t slot, slots, own;  // elements of a chunk's shared panels; chunks at a time; elements of own panels
  std::int64_t owned, offsets, carry, bias_carry, end;  // in bytes; the shared panels lie at 0

  Layout(const LinearArgs& args, const Shape& shape) {
    const std::int64_t places = shape.chunks.rows();
    const auto bytes = [](std::int64_t n) { return ceil_div(n * static_cast<std::int64_t>(sizeof(S)), 64) * 64; };
    const std::int64_t rows = ceil_div(args.rows, kMR);
    const bool shared = rows_are_shared(args);
    slot = shared ? min_of(kBlock / kMR, rows) * kMR * places : panels_size<S>(min_of(kBlock, args.columns), places);
    own = shared ? kNR<S> * places : min_of(kRowPanels, rows) * kMR * places;
    slots = max_of(1, min_of(shape.count(), kPacked / max_of(1, (args.rows + args.columns) * places)));
    owned = bytes(slot * slots);
    offsets = owned + bytes(own) * max_of(1, args.threads);
    carry = offsets + ceil_div(shape.chunks.segment * 8, 64) * 64;
    bias_carry = carry + (shape.carried() ? bytes(rows * kMR * ceil_div(args.columns, kNR<S>) * kNR<S>) : 0);
    end = bias_carry + (shape.carried() ? bytes(rows * kMR) : 0);
  }
};

// A chunk: samples [n, n + samples), of each the places [t, t + places).
struct Chunk {
  std::int64_t n, t, samples, places;

  Chunk(const Shape& shape, std::int64_t index)
      : n(index / shape.chunks.segments * shape.chunks.samples),
        t(index % shape.chunks.segments * shape.chunks.segment),
        samples(min_of(shape.chunks.samples, shape.samples - n)),
        places(min_of(shape.chunks.segment, shape.places - t)) {}
};

// A range of panels.
struct Panels {
  std::int64_t first, end;

  // The part `index` of `parts` equal ones.
  Panels part(std::int64_t index, std::int64_t parts) const {
    return {first + (end - first) * index / parts, first + (end - first) * (index + 1) / parts};
  }
  std::int64_t count() const { return end - first; }
};

template <class Stored>
class Contraction {
  using S = Compute<Stored>;

 public:
  explicit Contraction(const LinearArgs& args)
      : args(args),
        shape(args),
        layout(args, shape),
        workspace(static_cast<char*>(args.workspace)),
        offsets(reinterpret_cast<std::int64_t*>(workspace + layout.offsets)),
        threads(worthwhile(args.threads, args.samples * args.places * args.rows * args.columns)),
        row_panels(ceil_div(args.rows, kMR)),
        column_panels(ceil_div(args.columns, kNR<S>)) {
    for (std::int64_t t = 0; t < shape.chunks.segment; ++t) offsets[t] = t * kMR;
  }

  void run() const {
    const bool rows_shared = rows_are_shared(args);
    const std::int64_t block = kBlock / (rows_shared ? kMR : kNR<S>), panels = rows_shared ? row_panels : column_panels;
    for (std::int64_t first = 0; first < panels; first += block)
      for (std::int64_t chunk0 = 0; chunk0 < shape.count(); chunk0 += layout.slots) {
        const Panels shared{first, min_of(panels, first + block)};
        const std::int64_t slots = min_of(layout.slots, shape.count() - chunk0);
        if (rows_shared)
          with_shared_rows(shared, chunk0, slots);
        else
          with_shared_columns(shared, chunk0, slots);
      }
  }

 private:
  // Into how many parts to cut each of `units` units of work: so that there are at least two jobs per thread, as one
  // that was held up can then be helped, and, of few more, so many that all threads have nearly the same to do.
  std::int64_t parts(std::int64_t units, std::int64_t least, std::int64_t most) const {
    if (threads == 1) return least;
    const auto idle = [&](std::int64_t parts) {  // of the threads' time
      const std::int64_t jobs = units * parts, slots = ceil_div(jobs, threads) * threads;
      return static_cast<double>(slots - jobs) / static_cast<double>(slots);
    };
    const std::int64_t first = min_of(most, max_of(least, ceil_div(2 * threads, units)));
    std::int64_t best = first;
    for (std::int64_t parts = first; parts <= min_of(most, first + threads) && idle(best) > 1.0 / 32; ++parts)
      if (idle(parts) < idle(best)) best = parts;
    return best;
  }
  // Threads to pack so many elements: to wake another takes as long as packing some thousands.
  int packers(std::int64_t elements) const { return elements < 8192 ? 1 : threads; }
  S* shared_panels(std::int64_t slot) const { return reinterpret_cast<S*>(workspace) + slot * layout.slot; }
  S* own_panels(int worker) const {
    return reinterpret_cast<S*>(workspace + layout.owned + ceil_div(layout.own * sizeof(S), 64) * 64 * worker);
  }
  int vectors(std::int64_t q) const { return panel_vectors<S>(args.columns, q * kNR<S>); }

  void with_shared_rows(Panels rows, std::int64_t chunk0, std::int64_t slots) const {
    const std::int64_t runs = min_of(rows.count(), ceil_div(4 * threads, slots));
    parallel_for(packers(slots * layout.slot), slots * runs, [&](std::int64_t job, int) {
      const Chunk chunk(shape, chunk0 + job / runs);
      const Panels run = rows.part(job % runs, runs);
      pack_rows(chunk, run, shared_panels(job / runs) + (run.first - rows.first) * chunk.samples * chunk.places * kMR);
    });
    // Each job packs its panel of columns: only those are cut that would leave threads idle.
    const std::int64_t cut = column_panels % threads, whole = column_panels - cut;
    const std::int64_t parts =
        whole ? min_of(rows.count(), ceil_div(threads, max_of(1, cut))) : this->parts(cut, 1, rows.count());
    parallel_for(threads, whole + cut * parts, [&](std::int64_t job, int worker) {
      const bool is_cut = job >= whole;
      const std::int64_t q = is_cut ? whole + (job - whole) / parts : job;
      const Panels column{q, q + 1}, part = is_cut ? rows.part((job - whole) % parts, parts) : rows;
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        const Chunk chunk(shape, chunk0 + slot);
        pack_columns(chunk, column.first, own_panels(worker));
        tiles(chunk, part, shared_panels(slot) + (part.first - rows.first) * chunk.samples * chunk.places * kMR, column,
              own_panels(worker));
      }
    });
  }

  void with_shared_columns(Panels columns, std::int64_t chunk0, std::int64_t slots) const {
    const auto at = [&](std::int64_t slot, const Chunk& chunk, std::int64_t q) {
      return shared_panels(slot) + panel_offset<S>(q - columns.first, chunk.samples * chunk.places);
    };
    parallel_for(packers(slots * layout.slot), slots * columns.count(), [&](std::int64_t job, int) {
      const std::int64_t slot = job / columns.count(), q = columns.first + job % columns.count();
      const Chunk chunk(shape, chunk0 + slot);
      pack_columns(chunk, q, at(slot, chunk, q));
    });
    const std::int64_t blocks = parts(1, ceil_div(row_panels, kRowPanels), row_panels);
    parallel_for(threads, blocks, [&](std::int64_t job, int worker) {
      const Panels rows = Panels{0, row_panels}.part(job, blocks);
      for (std::int64_t slot = 0; slot < slots; ++slot) {
        const Chunk chunk(shape, chunk0 + slot);
        pack_rows(chunk, rows, own_panels(worker));
        tiles(chunk, rows, own_panels(worker), columns, at(slot, chunk, columns.first));
      }
    });
  }

  // T = 1: the samples are the places.
  const Stored* output_grad(const Chunk& chunk, std::int64_t n, std::int64_t t) const {
    const std::int64_t* const strides = args.output_grad_strides;
    return static_cast<const Stored*>(args.output_grad) + (shape.squares ? (chunk.n + n) * strides[0] : 0) +
           (chunk.t + t) * place_stride(strides);
  }
  const Stored* input(const Chunk& chunk, std::int64_t n) const {
    const std::int64_t* const strides = args.input_strides;
    return static_cast<const Stored*>(args.input) + (shape.squares ? (chunk.n + n) * strides[0] : 0) +
           chunk.t * place_stride(strides);
  }
  std::int64_t place_stride(const std::int64_t* strides) const { return strides[shape.squares ? 1 : 0]; }

  void pack_rows(const Chunk& chunk, Panels rows, S* to) const {
    const std::int64_t step = args.output_grad_strides[2], place = place_stride(args.output_grad_strides);
    const std::int64_t panel = chunk.samples * chunk.places * kMR;
    const std::int64_t whole = step == 1 ? min_of(rows.end, args.rows / kMR) : rows.first;
    for (std::int64_t p = rows.first; p < rows.end;) {
      const std::int64_t together = max_of(1, min_of(kPackPanels, whole - p));
      S* panels = to + (p - rows.first) * panel;
      for (std::int64_t n = 0; n < chunk.samples; ++n, panels += chunk.places * kMR) {
        const Stored* const from = output_grad(chunk, n, 0) + p * kMR * step;
        if (p < whole)
          pack_whole(from, place, chunk.places, together, panel, !shape.squares, panels);
        else
          pack(from, step, place, chunk.places, min_of(kMR, args.rows - p * kMR), kMR, !shape.squares, panels);
      }
      p += together;
    }
  }

  void pack_columns(const Chunk& chunk, std::int64_t q, S* to) const {
    const std::int64_t step = args.input_strides[2], column = q * kNR<S>, width = vectors(q) * lanes<S>;
    for (std::int64_t n = 0; n < chunk.samples; ++n)
      pack(input(chunk, n) + column * step, step, place_stride(args.input_strides), chunk.places,
           min_of(width, args.columns - column), width, !shape.squares, to + n * chunk.places * width);
  }

  void tiles(const Chunk& chunk, Panels rows, const S* packed_rows, Panels columns, const S* packed_columns) const {
    for (std::int64_t q = columns.first; q < columns.end; ++q)
      for (std::int64_t p = rows.first; p < rows.end; ++p) {
        const std::int64_t row = p * kMR, column = q * kNR<S>, width = vectors(q) * lanes<S>;
        const int height = static_cast<int>(min_of(kMR, args.rows - row));
        const std::int64_t count = min_of(width, args.columns - column);
        S* const to = static_cast<S*>(args.total) + row * args.columns + column;
        const bool in_place = !shape.squares && count == width;
        if (!in_place)  // the tile's part of the result, on its way from memory while the tile is computed
          for (int r = 0; r < height; ++r)
            for (std::int64_t c = 0; c < count; c += lanes<S>) __builtin_prefetch(to + r * args.columns + c, 1);
        alignas(64) S sum[kMR * kNR<S>];
        if (!shape.squares && !in_place)
          for (S& element : sum) element = 0;
        Tile<S> tile;
        for (int r = 0; r < kMR; ++r)
          tile.rows[r] = packed_rows + (p - rows.first) * chunk.samples * chunk.places * kMR + r;
        tile.row_sample = chunk.places * kMR;
        tile.offsets = offsets;
        tile.columns = packed_columns + panel_offset<S>(q - columns.first, chunk.samples * chunk.places);
        tile.width = width;
        tile.samples = chunk.samples;
        tile.places = chunk.places;
        tile.sum = in_place ? to : sum;
        tile.sum_step = in_place ? args.columns : kNR<S>;
        tile.squares = shape.squares;
        tile.carry = reinterpret_cast<S*>(workspace + layout.carry) + (p * column_panels + q) * kMR * kNR<S>;
        tile.first = !shape.carried() || chunk.t == 0;
        tile.last = !shape.carried() || chunk.t + chunk.places == shape.places;
        run_tile(tile, height, vectors(q));
        if (q == 0 && args.bias_total) add_bias(tile, p, height);
        if (in_place || !tile.last) continue;

        for (int r = 0; r < height; ++r)
          for (std::int64_t c = 0; c < count; ++c) to[r * args.columns + c] += sum[r * kNR<S> + c];
      }
  }

  // The bias's part of a tile's rows, packed without gaps: of each panel of rows, with the first panel of columns.
  void add_bias(const Tile<S>& tile, std::int64_t p, int height) const {
    S* const total = static_cast<S*>(args.bias_total) + p * kMR;
    S* const carry = reinterpret_cast<S*>(workspace + layout.bias_carry) + p * kMR;
    for (std::int64_t n = 0; n < tile.samples; ++n) {
      S sum[kMR];
      sum_places(tile.rows[0] + n * tile.row_sample, tile.places, sum);
      for (int r = 0; r < height; ++r) {
        if (!tile.first) sum[r] += carry[r];
        if (!tile.last)
          carry[r] = sum[r];
        else if (tile.squares)
          math::add_square(total[r], sum[r]);
        else
          total[r] += sum[r];
      }
    }
  }

  // Three vectors hold a whole number of places: kMR values each.
  static void sum_places(const S* rows, std::int64_t places, S* sum) {
    static_assert(3 * lanes<S> % kMR == 0, "6 and a power of two");
    constexpr std::int64_t step = 3 * lanes<S> / kMR;
    Vector<S> sums[3] = {};
    std::int64_t t = 0;
    for (; t + step <= places; t += step, rows += step * kMR)
      for (int v = 0; v < 3; ++v) sums[v] += load(rows + v * lanes<S>);
    alignas(64) S values[step * kMR];
    for (int v = 0; v < 3; ++v) store<S>(sums[v], values + v * lanes<S>);
    for (int r = 0; r < kMR; ++r) sum[r] = 0;
    for (std::int64_t i = 0; i < step; ++i)
      for (int r = 0; r < kMR; ++r) sum[r] += values[i * kMR + r];
    for (; t < places; ++t, rows += kMR)
      for (int r = 0; r < kMR; ++r) sum[r] += rows[r];
  }

  const LinearArgs& args;
  const Shape shape;
  const Layout<S> layout;
  char* const workspace;
  std::int64_t* const offsets;
  const int threads;
  const std::int64_t row_panels, column_panels;
};

std::int64_t linear_workspace(const LinearArgs& args) {
  const Shape shape(args);
  return args.dtype == Dtype::f64 ? Layout<double>(args, shape).end : Layout<float>(args, shape).end;
}

void sum_grad_squared_linear(const LinearArgs& args) {
  if (!args.samples || !args.places || !args.rows || !args.columns) return;
  dispatch(args.dtype, [&](auto stored) { Contraction<decltype(stored)>(args).run(); });
}

}  // namespace

void fill_fisher_linear(Kernels& kernels) {
  kernels.linear_workspace = linear_workspace;
  kernels.sum_grad_squared_linear = sum_grad_squared_linear;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
