// The gradient at the input of a convolution with a kernel of 3 x 3 and a step of one: a convolution of the output's
// gradient with the kernel turned round, in Winograd's form (winograd.h). Rows of the register tile are tiles of 2 x 2
// places, columns are input channels, and the products run over output channels.

#include "cpu/isa.h"
#include "cpu/winograd.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// Output channels at a time, so that a point's operands stay in the first cache.
constexpr std::int64_t kSegmentChannels = 64;

// Workspace: transformed kernels, [panel, point, output channel, width] | per thread: a strip of the output's gradient
// with zeros around it, packed without, its transformed values, products, a strip of the input's gradient, where rows
// lie.
template <class S>
struct Layout {
  std::int64_t size[2];  // of the input's pictures
  Strips strips;         // of the input's gradient
  std::int64_t jobs;
  int workers;
  std::int64_t panels, channel_panels, blocks;  // of input channels, of output channels; register tiles of a job
  std::int64_t sample_values;                   // transformed, of a strip
  Panel<S> kernels;
  std::int64_t threads, end;                                        // in bytes
  std::int64_t packed, values, products, out, row_offsets, thread;  // in bytes; within a thread's part

  explicit Layout(const ConvInputGradArgs& args)
      : size{args.output_size[0] + 2 - 2 * args.padding[0], args.output_size[1] + 2 - 2 * args.padding[1]},
        strips({1, (size[0] + 1) / 2, (size[1] + 1) / 2}, args.samples) {
    const auto bytes = [](std::int64_t n) { return ceil_div(n * static_cast<std::int64_t>(sizeof(S)), 64) * 64; };
    jobs = ceil_div(args.samples, strips.samples) * strips.count;
    workers = static_cast<int>(max_of(1, min_of(args.threads, jobs)));
    panels = ceil_div(args.in_channels, kNR<S>);
    channel_panels = ceil_div(args.out_channels, lanes<S>);
    blocks = ceil_div(strips.samples * strips.size(), kMR);
    sample_values = channel_panels * Panel<S>{strips.size(), lanes<S>}.size();
    kernels = {args.out_channels, kNR<S>};
    threads = bytes(panels * kernels.size());
    packed = bytes(strips.rows * strips.across * lanes<S>);
    values = packed + bytes(strips.rows * strips.across * lanes<S>);
    products = values + bytes(strips.samples * sample_values);
    out = products + bytes(kPoints * blocks * kBlock<S>);
    row_offsets = out + bytes(2 * strips.height * size[1] * lanes<S>);
    thread = row_offsets + ceil_div(blocks * kMR * 8, 64) * 64;
    end = threads + thread * workers;
  }
};

// The kernels' values at the points, of one output channel and a vector of input channels; turned round.
template <class S>
void transform_kernel(const S* weight, std::int64_t count, std::int64_t point, S* to) {
  using V = Vector<S>;
  const V half_of_one = broadcast(static_cast<S>(0.5));
  const auto line = [&](const V& w0, const V& w1, const V& w2, V* at) {
    const V outer = (w0 + w2) * half_of_one, middle = w1 * half_of_one;
    at[0] = w0;
    at[1] = outer + middle;
    at[2] = outer - middle;
    at[3] = w2;
  };
  alignas(64) S taps[kTaps * lanes<S>];
  pack(weight, kTaps, 1, kTaps, count, lanes<S>, false, taps);
  const auto tap = [&](int k, int l) { return load(taps + (8 - 3 * k - l) * lanes<S>); };
  V lines[3][4];
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) line(tap(k, 0), tap(k, 1), tap(k, 2), lines[k]);
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    V column[4];
    line(lines[0][l], lines[1][l], lines[2][l], column);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store<S>(column[k], to + (4 * k + l) * point);
  }
}

// The 2 x 2 outputs of a tile's products.
template <class S>
LIMPET_FORMULA void outputs_of(const S* products, std::int64_t point, Vector<S> to[2][2]) {
  using V = Vector<S>;
  const auto line = [](const V& m0, const V& m1, const V& m2, const V& m3, V& y0, V& y1) {
    y0 = m0 + (m1 + m2);
    y1 = (m1 - m2) + m3;
  };
  V lines[2][4];
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l)
    line(load(products + l * point), load(products + (4 + l) * point), load(products + (8 + l) * point),
         load(products + (12 + l) * point), lines[0][l], lines[1][l]);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) line(lines[k][0], lines[k][1], lines[k][2], lines[k][3], to[k][0], to[k][1]);
}

// A strip's outputs, [height, width, lanes], from its tiles' products; tiles may reach beyond.
template <class S>
void outputs_of_strip(const S* products, std::int64_t point, const OutputTiles& strip, std::int64_t height,
                      std::int64_t width, S* to) {
  for (std::int64_t i = 0; i < strip.down; ++i)
    for (std::int64_t j = 0; j < strip.across; ++j, products += kNR<S>) {
      Vector<S> y[2][2];
      outputs_of<S>(products, point, y);
      for (int k = 0; k < 2; ++k)
        for (int l = 0; l < 2; ++l)
          if (2 * i + k < height && 2 * j + l < width)
            store<S>(y[k][l], to + ((2 * i + k) * width + 2 * j + l) * lanes<S>);
    }
}

// [places, lanes] to `count` channels of neighbouring places, `step` apart.
template <class S>
void unpack(const S* from, std::int64_t places, std::int64_t count, std::int64_t step, S* to) {
  if (places < lanes<S>) {
    for (std::int64_t c = 0; c < count; ++c)
      for (std::int64_t t = 0; t < places; ++t) to[c * step + t] = from[t * lanes<S> + c];
    return;
  }
  for (std::int64_t block = 0; block < places; block += lanes<S>) {
    const std::int64_t t = min_of(block, places - lanes<S>);  // the last block may overlap the one before it
    Vector<S> square[lanes<S>];
    for (int i = 0; i < lanes<S>; ++i) square[i] = load(from + (t + i) * lanes<S>);
    transpose<S>(square);
    for (std::int64_t c = 0; c < count; ++c) store<S>(square[c], to + c * step + t);
  }
}

template <class S>
void input_grad(const ConvInputGradArgs& args) {
  const Layout<S> layout(args);
  char* const workspace = static_cast<char*>(args.workspace);
  S* const kernels = reinterpret_cast<S*>(workspace);
  const std::int64_t channels = args.in_channels, out_channels = args.out_channels;
  const std::int64_t places = layout.size[0] * layout.size[1];
  const int threads =
      worthwhile(layout.workers, args.samples * kPoints * layout.strips.tiles.count() * channels * out_channels);

  const std::int64_t vectors = ceil_div(channels, lanes<S>);
  parallel_for(threads, vectors, [&](std::int64_t v, int) {
    const std::int64_t c = v * lanes<S>, q = c / kNR<S>;
    const Panel<S> panel{out_channels, panel_vectors<S>(channels, q * kNR<S>) * lanes<S>};
    for (std::int64_t o = 0; o < out_channels; ++o)
      transform_kernel<S>(static_cast<const S*>(args.weight) + (o * channels + c) * kTaps,
                          min_of(lanes<S>, channels - c), panel.point(),
                          kernels + q * layout.kernels.size() + o * panel.width + c % kNR<S>);
  });

  parallel_for(threads, layout.jobs, [&](std::int64_t job, int worker) {
    const Strips& strips = layout.strips;
    const std::int64_t n0 = job / strips.count * strips.samples, s = job % strips.count, down = strips.down(s);
    const std::int64_t samples = min_of(strips.samples, args.samples - n0);
    const OutputTiles strip = strips[s];
    const std::int64_t rows = samples * strip.count(), blocks = ceil_div(rows, kMR);
    const Panel<S> value_panel{strip.count(), lanes<S>};
    char* const scratch = workspace + layout.threads + layout.thread * worker;
    const Picture<S> picture{reinterpret_cast<S*>(scratch), strips.rows, strips.across};
    S* const packed = reinterpret_cast<S*>(scratch + layout.packed);
    S* const values = reinterpret_cast<S*>(scratch + layout.values);
    S* const products = reinterpret_cast<S*>(scratch + layout.products);
    S* const out = reinterpret_cast<S*>(scratch + layout.out);

    const std::int64_t picture_size = args.output_size[0] * args.output_size[1];
    const std::int64_t strides[2] = {args.output_size[1], 1};
    for (std::int64_t n = 0; n < samples; ++n)
      for (std::int64_t o = 0; o < out_channels; o += lanes<S>) {
        picture.fill(static_cast<const S*>(args.output_grad) + ((n0 + n) * out_channels + o) * picture_size,
                     picture_size, args.output_size, strides, min_of(lanes<S>, out_channels - o),
                     2 - args.padding[0] - 2 * down, 2 - args.padding[1], packed);
        transform_picture<S>(picture, strip, value_panel.point(), lanes<S>,
                             values + n * layout.sample_values + o / lanes<S> * value_panel.size());
      }

    std::int64_t* const row_offsets = reinterpret_cast<std::int64_t*>(scratch + layout.row_offsets);
    for (std::int64_t i = 0; i < blocks * kMR; ++i) {
      const std::int64_t t = min_of(i, rows - 1);
      row_offsets[i] = t / strip.count() * layout.sample_values + t % strip.count() * lanes<S>;
    }
    std::int64_t offsets[kSegmentChannels];
    for (std::int64_t o = 0; o < kSegmentChannels; ++o) offsets[o] = o / lanes<S> * value_panel.size() + o % lanes<S>;

    for (std::int64_t q = 0; q < layout.panels; ++q) {
      const int width = panel_vectors<S>(channels, q * kNR<S>);
      const Panel<S> panel{out_channels, width * lanes<S>};
      PointProducts<S> p;
      p.rows = values;
      p.row_point = value_panel.point();
      p.row_run = kSegmentChannels / lanes<S> * value_panel.size();
      p.row_offsets = row_offsets;
      p.place_offsets = offsets;
      p.columns = kernels + q * layout.kernels.size();
      p.column_point = panel.point();
      p.num_rows = rows;
      p.places = out_channels;
      p.run = kSegmentChannels;
      p.vectors = width;
      p.add = false;
      p.products = products;
      multiply(p);

      for (int v = 0; v < width; ++v) {
        const std::int64_t c = q * kNR<S> + v * lanes<S>;
        S* const to = static_cast<S*>(args.input_grad) + (n0 * channels + c) * places + 2 * down * layout.size[1];
        const std::int64_t height = min_of(2 * strip.down, layout.size[0] - 2 * down);
        for (std::int64_t n = 0; n < samples; ++n) {
          outputs_of_strip<S>(products + n * strip.count() * kNR<S> + v * lanes<S>, blocks * kBlock<S>, strip, height,
                              layout.size[1], out);
          unpack(out, height * layout.size[1], min_of(lanes<S>, channels - c), places, to + n * channels * places);
        }
      }
    }
  });
}

std::int64_t conv_input_grad_workspace(const ConvInputGradArgs& args) {
  return args.dtype == Dtype::f64 ? Layout<double>(args).end : Layout<float>(args).end;
}

void conv_input_grad(const ConvInputGradArgs& args) {
  if (args.dtype == Dtype::f64)
    input_grad<double>(args);
  else
    input_grad<float>(args);
}

}  // namespace

void fill_conv_input_grad(Kernels& kernels) {
  kernels.conv_input_grad_workspace = conv_input_grad_workspace;
  kernels.conv_input_grad = conv_input_grad;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
