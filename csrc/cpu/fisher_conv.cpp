// The same contraction for convolutions: rows are the weight's (channel, kernel place) pairs, read where the padded
// input lies, so no patch is ever copied; columns are output channels, packed from the output's gradient.

#include "cpu/conv_geometry.h"
#include "cpu/conv_groups.h"
#include "cpu/conv_taps.h"
#include "cpu/conv_winograd.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

struct Shape : ConvGeometry {
  Chunking chunks;

  explicit Shape(const ConvArgs& args) : ConvGeometry(args), chunks(chunking(args.samples, places)) {}
};

// Workspace: panels of columns | padded input | offsets of places | offsets of rows | carry. The first two hold a
// batch: as many chunks of samples, with all their segments, as fit into kPacked.
template <class S>
struct Layout {
  std::int64_t group_panels, segment_panels, chunk_panels;  // elements of a group's, a segment's, a chunk's panels
  std::int64_t batch;                                       // samples at a time
  std::int64_t columns, input, places, rows, carry, end;    // in bytes

  Layout(const ConvArgs& args, const Shape& shape) {
    const auto bytes = [](std::int64_t n, std::int64_t size) { return ceil_div(n * size, 64) * 64; };
    const std::int64_t size = sizeof(S);
    group_panels = panels_size<S>(shape.columns, shape.chunks.rows());
    segment_panels = group_panels * args.groups;
    chunk_panels = segment_panels * shape.chunks.segments;
    const std::int64_t images = shape.chunks.samples * args.in_channels * shape.image;
    const std::int64_t chunks =
        max_of(1, min_of(ceil_div(args.samples, shape.chunks.samples), kPacked / (chunk_panels + images)));
    batch = chunks * shape.chunks.samples;
    columns = 0;
    input = columns + bytes(chunk_panels * chunks, size);
    places = input + bytes(images * chunks, size);
    rows = places + bytes(shape.places, 8);
    carry = rows + bytes(shape.rows, 8);
    const std::int64_t tiles = args.groups * ceil_div(shape.rows, kMR) * ceil_div(shape.columns, kNR<S>);
    end = carry + (shape.chunks.segments > 1 ? bytes(tiles * kMR * kNR<S>, size) : 0);
  }
};

// One channel of one sample, with zeros around it.
template <class Stored, class S>
void pad(const ConvArgs& args, const Shape& shape, const Stored* from, S* to) {
  const std::int64_t* const strides = args.input_strides + 2;
  for (std::int64_t i = 0; i < shape.image; ++i) to[i] = 0;
  for (std::int64_t x0 = 0; x0 < args.input_size[0]; ++x0)
    for (std::int64_t x1 = 0; x1 < args.input_size[1]; ++x1) {
      const Stored* const line = from + x0 * strides[0] + x1 * strides[1];
      S* const padded =
          to + ((x0 + args.padding[0]) * shape.padded[1] + x1 + args.padding[1]) * shape.padded[2] + args.padding[2];
      if (strides[2] == 1)
        for (std::int64_t x2 = 0; x2 < args.input_size[2]; ++x2) padded[x2] = widen(line[x2]);
      else
        for (std::int64_t x2 = 0; x2 < args.input_size[2]; ++x2) padded[x2] = widen(line[x2 * strides[2]]);
    }
}

template <class Stored>
void contract(const ConvArgs& args) {
  using S = Compute<Stored>;
  const Shape shape(args);
  const Layout<S> layout(args, shape);
  const Chunking& chunks = shape.chunks;
  char* const workspace = static_cast<char*>(args.workspace);
  S* const column_panels = reinterpret_cast<S*>(workspace + layout.columns);
  S* const padded = reinterpret_cast<S*>(workspace + layout.input);
  std::int64_t* const place_offsets = reinterpret_cast<std::int64_t*>(workspace + layout.places);
  std::int64_t* const row_offsets = reinterpret_cast<std::int64_t*>(workspace + layout.rows);
  S* const carry = reinterpret_cast<S*>(workspace + layout.carry);
  S* const total = static_cast<S*>(args.total);
  fill_offsets(args, shape, 1, place_offsets, row_offsets);

  const std::int64_t sample_image = args.in_channels * shape.image;
  const int threads = worthwhile(args.threads, args.samples * shape.places * shape.rows * args.out_channels);
  const std::int64_t row_panels = ceil_div(shape.rows, kMR), panels = ceil_div(shape.columns, kNR<S>);

  for (std::int64_t n0 = 0; n0 < args.samples; n0 += layout.batch) {
    const std::int64_t batch = min_of(layout.batch, args.samples - n0);
    const Stored* const d = static_cast<const Stored*>(args.output_grad) + n0 * args.output_grad_strides[0];
    const Stored* const x = static_cast<const Stored*>(args.input) + n0 * args.input_strides[0];
    // Where sample n's panels of group g lie: chunks, segments, groups, panels, then the chunk's samples.
    const auto panels_of = [&](std::int64_t chunk, std::int64_t segment, std::int64_t g) {
      return column_panels + chunk * layout.chunk_panels + segment * layout.segment_panels + g * layout.group_panels;
    };
    const auto samples_of = [&](std::int64_t chunk) { return min_of(chunks.samples, batch - chunk * chunks.samples); };
    const auto places_of = [&](std::int64_t segment) {
      return min_of(chunks.segment, shape.places - segment * chunks.segment);
    };

    parallel_for(threads, batch, [&](std::int64_t n, int) {
      for (std::int64_t c = 0; c < args.in_channels; ++c)
        pad(args, shape, x + n * args.input_strides[0] + c * args.input_strides[1],
            padded + n * sample_image + c * shape.image);
      const std::int64_t chunk = n / chunks.samples, within = n % chunks.samples;
      for (std::int64_t segment = 0; segment < chunks.segments; ++segment)
        for (std::int64_t g = 0; g < args.groups; ++g)
          for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t first = p * kNR<S>, places = places_of(segment);
            const std::int64_t width = panel_vectors<S>(shape.columns, first) * lanes<S>;
            pack_places(d + n * args.output_grad_strides[0] + (g * shape.columns + first) * args.output_grad_strides[1],
                        args.output_size, args.output_grad_strides + 1, segment * chunks.segment, places,
                        min_of(width, shape.columns - first), width,
                        panels_of(chunk, segment, g) + panel_offset<S>(p, samples_of(chunk) * places) +
                            within * places * width);
          }
    });

    // Tiles are numbered group by group, column panel by column panel.
    const std::int64_t tiles = args.groups * panels * row_panels,
                       tile_jobs = tile_runs(tiles, args.groups * panels, threads);
    parallel_for(threads, tile_jobs, [&](std::int64_t job, int) {
      const std::int64_t tile0 = tiles * job / tile_jobs, tile1 = tiles * (job + 1) / tile_jobs;
      for (std::int64_t chunk = 0; chunk * chunks.samples < batch; ++chunk)
        for (std::int64_t segment = 0; segment < chunks.segments; ++segment)
          for (std::int64_t index = tile0; index < tile1; ++index) {
            const std::int64_t row = index % row_panels * kMR, q = index / row_panels % panels, column = q * kNR<S>;
            const std::int64_t g = index / row_panels / panels;
            const int height = static_cast<int>(min_of(kMR, shape.rows - row));
            const int vectors = panel_vectors<S>(shape.columns, column);
            alignas(64) S sum[kMR * kNR<S>];
            Tile<S> tile;
            for (int r = 0; r < kMR; ++r)
              tile.rows[r] = padded + chunk * chunks.samples * sample_image + g * shape.channels * shape.image +
                             row_offsets[row + min_of(r, height - 1)];
            tile.row_sample = sample_image;
            tile.offsets = place_offsets + segment * chunks.segment;
            tile.samples = samples_of(chunk);
            tile.places = places_of(segment);
            tile.columns = panels_of(chunk, segment, g) + panel_offset<S>(q, tile.samples * tile.places);
            tile.width = vectors * lanes<S>;
            tile.sum = sum;
            tile.sum_step = kNR<S>;
            tile.squares = true;
            tile.carry = carry + index * kMR * kNR<S>;
            tile.first = segment == 0;
            tile.last = segment + 1 == chunks.segments;
            run_tile(tile, height, vectors);
            if (!tile.last) continue;

            const std::int64_t width = min_of(kNR<S>, shape.columns - column);
            for (std::int64_t c = 0; c < width; ++c) {
              S* const to = total + (g * shape.columns + column + c) * shape.rows + row;
              for (int r = 0; r < height; ++r) to[r] += sum[r * kNR<S> + c];
            }
          }
    });
  }
}

template <class S>
std::int64_t workspace_bytes(const ConvArgs& args) {
  if (lanes_are_groups<S>(args)) return GroupsLayout<S>(args, ConvGeometry(args)).end;
  if (tiles_are_faster<S>(args))
    return large_tiles_are_faster(args) ? TilesLayout<TilesOfFour, S>(args).end : TilesLayout<TilesOfTwo, S>(args).end;
  if (taps_are_faster(args)) return TapsLayout<S>(args, ConvGeometry(args)).end;
  return Layout<S>(args, Shape(args)).end;
}

std::int64_t conv_workspace(const ConvArgs& given) {
  const ConvArgs args = without_steps(given);
  return args.dtype == Dtype::f64 ? workspace_bytes<double>(args) : workspace_bytes<float>(args);
}

void sum_grad_squared_conv(const ConvArgs& given) {
  const ConvArgs args = without_steps(given);
  dispatch(args.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    if (lanes_are_groups<Compute<Stored>>(args))
      contract_groups<Stored>(args);
    else if (tiles_are_faster<Compute<Stored>>(args))
      large_tiles_are_faster(args) ? contract_tiles<TilesOfFour, Stored>(args)
                                   : contract_tiles<TilesOfTwo, Stored>(args);
    else if (taps_are_faster(args))
      TapsContraction<Stored>(args).run();
    else
      contract<Stored>(args);
  });
}

}  // namespace

void fill_fisher_conv(Kernels& kernels) {
  kernels.conv_workspace = conv_workspace;
  kernels.sum_grad_squared_conv = sum_grad_squared_conv;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
