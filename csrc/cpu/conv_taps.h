// The contraction for convolutions whose kernels lie in the padding for much of their way: for each element of the
// kernel, a tap, a linear layer over those places alone at which the tap lies on the input. At 4 x 4 places with a
// kernel of 3 x 3 and zeros around, these are 100 of 144.
#pragma once

#include "cpu/conv_geometry.h"

namespace limpet::cpu {
namespace {

// The outputs [first, end) of a dimension at which an element of the kernel lies on the input.
struct TapRange {
  std::int64_t first, end;

  TapRange(const ConvArgs& args, int dim, std::int64_t element) {
    const std::int64_t shift = element * args.dilation[dim] - args.padding[dim], step = args.stride[dim];
    const std::int64_t size = args.output_size[dim], left = args.input_size[dim] - shift;
    first = min_of(size, shift < 0 ? ceil_div(-shift, step) : 0);
    end = max_of(first, min_of(size, left > 0 ? ceil_div(left, step) : 0));
  }
  std::int64_t size() const { return end - first; }
};

// The places of all taps together.
inline std::int64_t places_of_taps(const ConvArgs& args) {
  std::int64_t places = 1;
  for (int i = 0; i < 3; ++i) {
    std::int64_t size = 0;
    for (std::int64_t k = 0; k < args.kernel[i]; ++k) size += TapRange(args, i, k).size();
    places *= size;
  }
  return places;
}

// Whether leaving out places saves more than it costs that the rows of a register tile are channels at one tap, and
// that a place is looked up for the columns too (measured: a twentieth less work is the border, and 16 x 16 places).
inline bool taps_are_faster(const ConvArgs& args) {
  const ConvGeometry geometry(args);
  const std::int64_t work = geometry.places * ceil_div(geometry.rows, kMR);
  return geometry.places <= 256 && 20 * places_of_taps(args) * ceil_div(geometry.channels, kMR) < 19 * work;
}

// Workspace: where each tap's places begin | of each place, where its input lies, and its number | packed inputs | per
// thread: packed gradients, sums of squares of a register tile at all taps.
template <class S>
struct TapsLayout {
  std::int64_t taps, inputs;                 // elements of the kernel, places of the input
  std::int64_t chunk, batch;                 // samples of a tile, samples that are packed together
  std::int64_t vectors, panels, row_panels;  // of a group: of input channels, panels of output and of input channels
  std::int64_t row_jobs;                     // of a panel of output channels
  std::int64_t vector;                       // elements of a packed vector of input channels
  std::int64_t begins, rows, columns, packed, threads, end;  // in bytes
  std::int64_t sums, thread;                                 // in bytes; within a thread's part

  TapsLayout(const ConvArgs& args, const ConvGeometry& geometry)
      : taps(args.kernel[0] * args.kernel[1] * args.kernel[2]),
        inputs(args.input_size[0] * args.input_size[1] * args.input_size[2]),
        chunk(max_of(1, min_of(args.samples, 2 * kChunkRows / max_of(1, geometry.places)))),
        vectors(ceil_div(geometry.channels, lanes<S>)),
        panels(ceil_div(geometry.columns, kNR<S>)),
        row_panels(ceil_div(geometry.channels, kMR)),
        row_jobs(min_of(row_panels, ceil_div(args.threads, max_of(1, args.groups * panels)))) {
    const auto bytes = [](std::int64_t n, std::int64_t size) { return ceil_div(n * size, 64) * 64; };
    const std::int64_t size = sizeof(S), places = places_of_taps(args);
    const std::int64_t chunk_inputs = chunk * args.groups * vectors * lanes<S> * inputs;
    batch = chunk * max_of(1, min_of(ceil_div(args.samples, chunk), kPacked / max_of(1, chunk_inputs)));
    vector = batch * inputs * lanes<S>;
    begins = 0;
    rows = bytes(taps + 1, 8);
    columns = rows + bytes(places, 8);
    packed = columns + bytes(places, 8);
    threads = packed + bytes(args.groups * vectors * vector, size);
    sums = bytes(batch * geometry.places * kNR<S>, size);
    thread = sums + bytes(taps * kMR * kNR<S>, size);
    end = threads + thread * max_of(1, args.threads);
  }
};

template <class Stored>
class TapsContraction {
  using S = Compute<Stored>;

 public:
  explicit TapsContraction(const ConvArgs& args)
      : args_(args),
        geometry_(args),
        layout_(args, geometry_),
        workspace_(static_cast<char*>(args.workspace)),
        begins_(reinterpret_cast<std::int64_t*>(workspace_ + layout_.begins)),
        rows_(reinterpret_cast<std::int64_t*>(workspace_ + layout_.rows)),
        columns_(reinterpret_cast<std::int64_t*>(workspace_ + layout_.columns)) {}

  void run() const {
    list_places();
    const int threads =
        worthwhile(args_.threads, args_.samples * begins_[layout_.taps] * geometry_.channels * args_.out_channels);
    for (std::int64_t n = 0; n < args_.samples; n += layout_.batch) {
      const std::int64_t batch = min_of(layout_.batch, args_.samples - n);
      parallel_for(threads, args_.groups * layout_.vectors,
                   [&](std::int64_t job, int) { pack_inputs(n, batch, job / layout_.vectors, job % layout_.vectors); });
      parallel_for(threads, args_.groups * layout_.panels * layout_.row_jobs, [&](std::int64_t job, int worker) {
        const std::int64_t panel = job / layout_.row_jobs;
        add_tiles(n, batch, panel / layout_.panels, panel % layout_.panels, job % layout_.row_jobs, worker);
      });
    }
  }

 private:
  void list_places() const {
    std::int64_t tap = 0, listed = 0;
    const auto list = [&](std::int64_t k0, std::int64_t k1, std::int64_t k2) {
      begins_[tap++] = listed;
      const TapRange range[3] = {{args_, 0, k0}, {args_, 1, k1}, {args_, 2, k2}};
      const auto input = [&](int dim, std::int64_t k, std::int64_t y) {
        return y * args_.stride[dim] + k * args_.dilation[dim] - args_.padding[dim];
      };
      for (std::int64_t y0 = range[0].first; y0 < range[0].end; ++y0)
        for (std::int64_t y1 = range[1].first; y1 < range[1].end; ++y1)
          for (std::int64_t y2 = range[2].first; y2 < range[2].end; ++y2, ++listed) {
            const std::int64_t line = input(0, k0, y0) * args_.input_size[1] + input(1, k1, y1);
            rows_[listed] = (line * args_.input_size[2] + input(2, k2, y2)) * lanes<S>;
            columns_[listed] = (y0 * args_.output_size[1] + y1) * args_.output_size[2] + y2;
          }
    };
    for (std::int64_t k0 = 0; k0 < args_.kernel[0]; ++k0)
      for (std::int64_t k1 = 0; k1 < args_.kernel[1]; ++k1)
        for (std::int64_t k2 = 0; k2 < args_.kernel[2]; ++k2) list(k0, k1, k2);
    begins_[tap] = listed;
  }

  // A vector of input channels, [samples, inputs, lanes].
  S* packed(std::int64_t group, std::int64_t v) const {
    return reinterpret_cast<S*>(workspace_ + layout_.packed) + (group * layout_.vectors + v) * layout_.vector;
  }

  void pack_inputs(std::int64_t n0, std::int64_t batch, std::int64_t group, std::int64_t v) const {
    const std::int64_t* const strides = args_.input_strides;
    const Stored* const from = static_cast<const Stored*>(args_.input) + n0 * strides[0] +
                               (group * geometry_.channels + v * lanes<S>)*strides[1];
    for (std::int64_t n = 0; n < batch; ++n)
      pack_places(from + n * strides[0], args_.input_size, strides + 1, 0, layout_.inputs,
                  min_of(lanes<S>, geometry_.channels - v * lanes<S>), lanes<S>,
                  packed(group, v) + n * layout_.inputs * lanes<S>);
  }

  // Part `part` of panel q's tiles.
  void add_tiles(std::int64_t n0, std::int64_t batch, std::int64_t group, std::int64_t q, std::int64_t part,
                 int worker) const {
    char* const own = workspace_ + layout_.threads + layout_.thread * worker;
    S* const grads = reinterpret_cast<S*>(own);
    const std::int64_t* const strides = args_.output_grad_strides;
    const std::int64_t column = q * kNR<S>, count = min_of(kNR<S>, geometry_.columns - column);
    const std::int64_t width = panel_vectors<S>(geometry_.columns, column) * lanes<S>;
    const Stored* const from = static_cast<const Stored*>(args_.output_grad) + n0 * strides[0] +
                               (group * geometry_.columns + column) * strides[1];
    for (std::int64_t n = 0; n < batch; ++n)
      pack_places(from + n * strides[0], args_.output_size, strides + 1, 0, geometry_.places, count, width,
                  grads + n * geometry_.places * width);

    const std::int64_t first = layout_.row_panels * part / layout_.row_jobs;
    const std::int64_t end = layout_.row_panels * (part + 1) / layout_.row_jobs;
    for (std::int64_t n = 0; n < batch; n += layout_.chunk)
      for (std::int64_t p = first; p < end; ++p) {
        Tile<S> tile;
        tile.samples = min_of(layout_.chunk, batch - n);
        tile.row_sample = layout_.inputs * lanes<S>;
        tile.columns = grads + n * geometry_.places * width;
        tile.column_sample = geometry_.places * width;
        tile.width = width;
        add_tile(tile, group, n, p * kMR, column, count, reinterpret_cast<S*>(own + layout_.sums));
      }
  }

  // A register tile at all taps; sums: [row, tap, column].
  void add_tile(Tile<S>& tile, std::int64_t group, std::int64_t n, std::int64_t row, std::int64_t column,
                std::int64_t count, S* sums) const {
    const std::int64_t height = min_of(kMR, geometry_.channels - row);
    for (std::int64_t r = 0; r < kMR; ++r) {
      const std::int64_t c = row + min_of(r, height - 1);
      tile.rows[r] = packed(group, c / lanes<S>) + n * tile.row_sample + c % lanes<S>;
    }
    tile.sum_step = layout_.taps * kNR<S>;
    tile.squares = tile.first = tile.last = true;
    for (std::int64_t k = 0; k < layout_.taps; ++k) {
      tile.offsets = rows_ + begins_[k];
      tile.listed = columns_ + begins_[k];
      tile.places = begins_[k + 1] - begins_[k];
      tile.sum = sums + k * kNR<S>;
      run_tile<true>(tile, static_cast<int>(height), static_cast<int>(tile.width / lanes<S>));
    }
    add_transposed(
        sums, kNR<S>, height * layout_.taps, count,
        static_cast<S*>(args_.total) + ((group * geometry_.columns + column) * geometry_.channels + row) * layout_.taps,
        geometry_.rows);
  }

  const ConvArgs& args_;
  const ConvGeometry geometry_;
  const TapsLayout<S> layout_;
  char* const workspace_;
  std::int64_t *const begins_, *const rows_, *const columns_;
};

}  // namespace
}  // namespace limpet::cpu
