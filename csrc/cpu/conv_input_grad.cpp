// The gradient at the input of a convolution with a kernel of 3 x 3, in Winograd's form (winograd.h). Rows of the
// register tile are tiles of places, columns are input channels, and the products run over output channels.

#include "cpu/isa.h"
#include "cpu/winograd.h"

namespace limpet::cpu::LIMPET_LEVEL {
namespace {

// Output channels at a time, so that a point's operands stay in the first cache.
constexpr std::int64_t kSegmentChannels = 64;
// Elements of the kernels' values at a time, so that they take no more memory than a large layer's weight does. The
// gradient is transformed anew for the next ones.
constexpr std::int64_t kKernels = 4 << 20;

// A step of two and a padding of one: of four inputs the first and the third see the kernel's middle element alone, the
// others the outer ones, which are F(2, 2): 25 products instead of 36.
struct StepsOfTwo {
  static constexpr int kWindow = 3, kStep = 2, kPoints = 5, kOutputs = 4;

  template <class V>
  LIMPET_FORMULA static void inputs(const V* d, V* at) {
    at[0] = d[0] - d[1];
    at[1] = d[1];
    at[2] = d[2] - d[1];
    at[3] = d[0];
    at[4] = d[1];
  }
  template <int count, class V>
  LIMPET_FORMULA static void factor(const V* c, V* at) {
    at[0] = c[0];
    at[1] = c[0] + c[2];
    at[2] = c[2];
    at[3] = c[1];
    at[4] = c[1];
  }
  template <int count, class V>
  LIMPET_FORMULA static void sums(const V* m, V* y) {
    y[0] = m[3];
    y[1] = m[0] + m[1];
    y[2] = m[4];
    y[3] = m[1] + m[2];
  }
};

// Tiles of a strip (measured).
template <class Form>
constexpr std::int64_t kStripTiles = Form::kPoints == 4   ? 64
                                     : Form::kPoints == 6 ? 48
                                                          : 42;

template <class Form>
TileCounts input_tiles(const ConvInputGradArgs& args) {
  return {1, ceil_div(args.input_size[0], Form::kOutputs), ceil_div(args.input_size[1], Form::kOutputs)};
}

// Workspace: the kernels' values, [panel of input channels, point, output channel, width], of so many panels as are
// taken at a time | per thread: a strip of the output's gradient with zeros around it, packed without, its transformed
// values, products, a strip of the input's gradient, where rows lie.
template <class Form, class S>
struct Layout {
  static constexpr std::int64_t panel_width = kNR<S>;
  std::int64_t panel_size, panels;  // elements of a panel of kernels; how many at a time
  Strips<Form> strips;              // of the input's gradient
  std::int64_t jobs;
  int workers;
  std::int64_t channel_panels, blocks;                              // of output channels; register tiles of a job
  std::int64_t sample_values;                                       // transformed, of a strip
  std::int64_t threads, end;                                        // in bytes; the kernels lie at 0
  std::int64_t packed, values, products, out, row_offsets, thread;  // in bytes; within a thread's part

  explicit Layout(const ConvInputGradArgs& args)
      : panel_size(Panel<S>{args.out_channels, kNR<S>}.size(kPoints<Form>)),
        panels(max_of(1, min_of(ceil_div(args.in_channels, kNR<S>), kKernels / panel_size))),
        strips(input_tiles<Form>(args), args.samples, kStripTiles<Form>) {
    const auto bytes = [](std::int64_t n) { return ceil_div(n * static_cast<std::int64_t>(sizeof(S)), 64) * 64; };
    if (strips.count == 1) {  // all threads have as many samples
      const std::int64_t threads = max_of(1, args.threads), rounds = ceil_div(args.samples, strips.samples * threads);
      strips.samples = ceil_div(args.samples, max_of(1, rounds * threads));
    }
    jobs = ceil_div(args.samples, max_of(1, strips.samples)) * strips.count;
    workers = static_cast<int>(max_of(1, min_of(args.threads, jobs)));
    channel_panels = ceil_div(args.out_channels, lanes<S>);
    blocks = ceil_div(strips.samples * strips.size(), kMR);
    sample_values = channel_panels * Panel<S>{strips.size(), lanes<S>}.size(kPoints<Form>);
    packed = bytes(strips.rows * strips.across * lanes<S>);
    values = packed + bytes(strips.rows * strips.across * lanes<S>);
    products = values + bytes(strips.samples * sample_values);
    out = products + bytes(kPoints<Form> * panels * blocks * kBlock<S>);
    row_offsets = out + bytes(Form::kOutputs * strips.height * args.input_size[1] * lanes<S>);
    thread = row_offsets + ceil_div(blocks * kMR * 8, 64) * 64;
    threads = bytes(panels * panel_size);
    end = threads + thread * workers;
  }
};

// The kernels' values at the points, turned round, of one output channel and a vector of input channels.
template <class Form, class S>
void transform_kernel(const S* weight, std::int64_t count, std::int64_t point, S* to) {
  using V = Vector<S>;
  constexpr int points = Form::kPoints;
  alignas(64) S taps[kTaps * lanes<S>];
  pack(weight, kTaps, 1, kTaps, count, lanes<S>, false, taps);
  along_both<3, points, V>([&](int k, int l) LIMPET_INLINE { return load(taps + (8 - 3 * k - l) * lanes<S>); },
                           [](const V* w, V* at) LIMPET_INLINE { Form::template factor<3>(w, at); },
                           [&](int k, int l, const V& value)
                               LIMPET_INLINE { store<S>(value, to + (points * k + l) * point); });
}

// The kernels' values of the input channels [channel0, end), in runs of output channels: whole lines of a panel then
// follow one another in memory.
template <class Form, class S>
void transform_kernels(const ConvInputGradArgs& args, const Layout<Form, S>& layout, std::int64_t channel0,
                       std::int64_t end) {
  const std::int64_t out_channels = args.out_channels, panels = ceil_div(end - channel0, kNR<S>);
  const int threads = worthwhile(args.threads, out_channels * (end - channel0) * kPoints<Form>);
  const std::int64_t runs = min_of(out_channels, ceil_div(4 * threads, panels));
  parallel_for(threads, panels * runs, [&](std::int64_t job, int) {
    const std::int64_t q = job / runs, run = job % runs, c0 = channel0 + q * kNR<S>;
    const Panel<S> panel{out_channels, panel_vectors<S>(end, c0) * lanes<S>};
    S* const to = static_cast<S*>(args.workspace) + q * layout.panel_size;
    for (std::int64_t o = out_channels * run / runs; o < out_channels * (run + 1) / runs; ++o)
      for (std::int64_t c = c0; c < min_of(end, c0 + kNR<S>); c += lanes<S>)
        transform_kernel<Form, S>(static_cast<const S*>(args.weight) + (o * args.in_channels + c) * kTaps,
                                  min_of(lanes<S>, end - c), panel.point(), to + o * panel.width + c - c0);
  });
}

// A strip's outputs, [height, width, lanes], from its tiles' products; tiles may reach beyond.
template <class Form, class S>
void outputs_of_strip(const S* products, std::int64_t point, const TileCounts& strip, std::int64_t height,
                      std::int64_t width, S* to) {
  using V = Vector<S>;
  constexpr int size = Form::kOutputs;
  for (std::int64_t i = 0; i < strip.down; ++i)
    for (std::int64_t j = 0; j < strip.across; ++j, products += kNR<S>) {
      const std::int64_t rows = height - size * i, columns = width - size * j;
      S* const at = to + (size * i * width + size * j) * lanes<S>;
      along_both<Form::kPoints, size, V>(
          [&](int k, int l) LIMPET_INLINE { return load(products + (Form::kPoints * k + l) * point); },
          [](const V* m, V* y) LIMPET_INLINE { Form::template sums<Form::kOutputs>(m, y); },
          [&](int k, int l, const V& y) LIMPET_INLINE {
            if (k < rows && l < columns) store<S>(y, at + (k * width + l) * lanes<S>);
          });
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

// The gradient at the input channels [channel0, end), whose kernels' values are there.
template <class Form, class S>
void input_grad(const ConvInputGradArgs& args, const Layout<Form, S>& layout, std::int64_t channel0, std::int64_t end) {
  const std::int64_t channels = end - channel0, out_channels = args.out_channels, width = args.input_size[1];
  const std::int64_t places = args.input_size[0] * width;
  const int threads =
      worthwhile(layout.workers, args.samples * kPoints<Form> * layout.strips.tiles.count() * channels * out_channels);

  parallel_for(threads, layout.jobs, [&](std::int64_t job, int worker) {
    const Strips<Form>& strips = layout.strips;
    const std::int64_t n0 = job / strips.count * strips.samples, s = job % strips.count, down = strips.down(s);
    const std::int64_t samples = min_of(strips.samples, args.samples - n0);
    const TileCounts strip = strips[s];
    const std::int64_t rows = samples * strip.count(), blocks = ceil_div(rows, kMR);
    const Panel<S> value_panel{strip.count(), lanes<S>};
    const std::int64_t value_panel_size = value_panel.size(kPoints<Form>);
    char* const scratch = static_cast<char*>(args.workspace) + layout.threads + layout.thread * worker;
    const Picture<S> picture{reinterpret_cast<S*>(scratch), strips.rows, strips.across};
    S* const packed = reinterpret_cast<S*>(scratch + layout.packed);
    S* const values = reinterpret_cast<S*>(scratch + layout.values);
    S* const products = reinterpret_cast<S*>(scratch + layout.products);
    S* const out = reinterpret_cast<S*>(scratch + layout.out);

    const std::int64_t picture_size = args.output_size[0] * args.output_size[1];
    const std::int64_t strides[2] = {args.output_size[1], 1};
    // Where in the first tile's window the first gradient lies.
    const auto origin = [&](int dim) { return args.stride == 2 ? 0 : 2 - args.padding[dim]; };
    for (std::int64_t n = 0; n < samples; ++n)
      for (std::int64_t o = 0; o < out_channels; o += lanes<S>) {
        picture.fill(static_cast<const S*>(args.output_grad) + ((n0 + n) * out_channels + o) * picture_size,
                     picture_size, args.output_size, strides, min_of(lanes<S>, out_channels - o),
                     origin(0) - Form::kStep * down, origin(1), packed);
        transform_picture<Form>(picture, strip, value_panel.point(), lanes<S>,
                                values + n * layout.sample_values + o / lanes<S> * value_panel_size);
      }

    std::int64_t* const row_offsets = reinterpret_cast<std::int64_t*>(scratch + layout.row_offsets);
    for (std::int64_t i = 0; i < blocks * kMR; ++i) {
      const std::int64_t t = min_of(i, rows - 1);
      row_offsets[i] = t / strip.count() * layout.sample_values + t % strip.count() * lanes<S>;
    }
    std::int64_t offsets[kSegmentChannels];
    for (std::int64_t o = 0; o < kSegmentChannels; ++o) offsets[o] = o / lanes<S> * value_panel_size + o % lanes<S>;

    PointProducts<S> p;
    p.points = kPoints<Form>;
    p.rows = values;
    p.row_point = value_panel.point();
    p.row_run = kSegmentChannels / lanes<S> * value_panel_size;
    p.row_offsets = row_offsets;
    p.place_offsets = offsets;
    p.columns = static_cast<const S*>(args.workspace);
    p.column_panel = layout.panel_size;
    p.num_rows = rows;
    p.num_columns = channels;
    p.places = out_channels;
    p.run = kSegmentChannels;
    p.add = false;
    p.products = products;
    multiply(p);

    const std::int64_t first = Form::kOutputs * down;
    const std::int64_t height = min_of(Form::kOutputs * strip.down, args.input_size[0] - first);
    for (std::int64_t c = 0; c < channels; c += lanes<S>) {
      const S* const at = products + c / kNR<S> * blocks * kBlock<S> + c % kNR<S>;
      S* const to = static_cast<S*>(args.input_grad) + (n0 * args.in_channels + channel0 + c) * places + first * width;
      for (std::int64_t n = 0; n < samples; ++n) {
        outputs_of_strip<Form>(at + n * strip.count() * kNR<S>, p.point(), strip, height, width, out);
        unpack(out, height * width, min_of(lanes<S>, channels - c), places, to + n * args.in_channels * places);
      }
    }
  });
}

// Whether tiles of 4 x 4 places take less than those of 2 x 2; forming the kernels' values takes as long as 32 tiles.
bool large_tiles_are_faster(const ConvInputGradArgs& args) {
  const auto products = [&](auto form) {
    using Form = decltype(form);
    return kPoints<Form> * (args.samples * input_tiles<Form>(args).count() + 32);
  };
  return products(TilesOfFour{}) < products(TilesOfTwo{});
}

// Calls body(Layout).
template <class Body>
void with_layout(const ConvInputGradArgs& args, const Body& body) {
  const auto of_dtype = [&](auto form) {
    using Form = decltype(form);
    args.dtype == Dtype::f64 ? body(Layout<Form, double>(args)) : body(Layout<Form, float>(args));
  };
  if (args.stride == 2) return of_dtype(StepsOfTwo{});
  large_tiles_are_faster(args) ? of_dtype(TilesOfFour{}) : of_dtype(TilesOfTwo{});
}

std::int64_t conv_input_grad_workspace(const ConvInputGradArgs& args) {
  std::int64_t bytes = 0;
  with_layout(args, [&](const auto& layout) { bytes = layout.end; });
  return bytes;
}

void conv_input_grad(const ConvInputGradArgs& args) {
  with_layout(args, [&](const auto& layout) {
    const std::int64_t step = layout.panels * layout.panel_width;
    for (std::int64_t c = 0; c < args.in_channels; c += step) {
      const std::int64_t end = min_of(args.in_channels, c + step);
      transform_kernels(args, layout, c, end);
      input_grad(args, layout, c, end);
    }
  });
}

}  // namespace

void fill_conv_input_grad(Kernels& kernels) {
  kernels.conv_input_grad_workspace = conv_input_grad_workspace;
  kernels.conv_input_grad = conv_input_grad;
}

}  // namespace limpet::cpu::LIMPET_LEVEL
