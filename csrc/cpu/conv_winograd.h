// The contraction for kernels of 3 x 3 with a step of one, in Winograd's form (winograd.h): per sample 16 products over
// the tiles of 2 x 2 places instead of 9 over all places, or 36 over those of 4 x 4. They go through the register tile
// of contraction.h, point by point; then the kernel's gradient is put together, squared and added, in vectors of output
// channels. Of very few tiles all of that is done at once, in registers.
#pragma once

#include "cpu/conv_geometry.h"
#include "cpu/winograd.h"

namespace limpet::cpu {
namespace {

// Tiles of a strip.
template <class Form>
constexpr std::int64_t kStripTiles = Form::kPoints == 4 ? 64 : 32;
constexpr std::int64_t kFewTiles = 4;  // of a sample, at most, whose products stay in registers

template <class Form>
TileCounts gradient_tiles(const ConvArgs& args) {
  return {args.output_size[0], ceil_div(args.output_size[1], Form::kOutputs),
          ceil_div(args.output_size[2], Form::kOutputs)};
}

template <class Form>
bool has_few(const TileCounts& tiles) {
  return std::is_same_v<Form, TilesOfFour> && tiles.frames == 1 && tiles.count() > 1 && tiles.count() <= kFewTiles;
}

// The work of a sample, for a pair of channels: to put its kernel together and to add its squares is as much as so many
// products (measured).
template <class Form>
std::int64_t products(const ConvArgs& args) {
  const TileCounts tiles = gradient_tiles<Form>(args);
  const std::int64_t together = Form::kPoints == 4 || has_few<Form>(tiles) ? 200 : 480;
  return kPoints<Form> * tiles.count() + together;
}

inline bool large_tiles_are_faster(const ConvArgs& args) {
  return products<TilesOfFour>(args) < products<TilesOfTwo>(args);
}

// Whether tiles take less work than 9 products a place (7 x 7 places gain, 6 x 6 are as fast either way).
// What is transformed must be met by enough channels of the other side: at 32 of each with vectors of 16, tiles gain.
template <class S>
bool tiles_are_faster(const ConvArgs& args) {
  const auto is = [](const std::int64_t* v, std::int64_t a, std::int64_t b, std::int64_t c) {
    return v[0] == a && v[1] == b && v[2] == c;
  };
  if (!is(args.kernel, 1, 3, 3) || !is(args.stride, 1, 1, 1) || !is(args.dilation, 1, 1, 1) || args.padding[0] != 0)
    return false;
  const std::int64_t channels = args.in_channels / args.groups, columns = args.out_channels / args.groups;
  if (channels * columns < lanes<S> * (channels + columns)) return false;
  return min_of(products<TilesOfTwo>(args), products<TilesOfFour>(args)) <
         kTaps * args.output_size[0] * args.output_size[1] * args.output_size[2];
}

// What a job computes is some panels of output channels for some blocks of input channels. It transforms what it needs
// by itself, strip by strip of a picture, or some small pictures at a time: values that went through memory to other
// cores cost more than transforming them again (a half of all time with 64 channels on two threads).
constexpr std::int64_t kRowBlocks = 22;
template <class S>
constexpr std::int64_t kJobPanels = 128 / kNR<S>;

// Of a small kernel, samples are cut too, into so many parts with sums of their own: cutting channels alone, all jobs
// transform much the same (a seventh of the time with 64 channels on two threads). Shapes alone say how many.
constexpr std::int64_t kPartSamples = 8;     // at least
constexpr std::int64_t kPartSums = 1 << 14;  // channels of both sides, at most

inline std::int64_t sample_parts(const ConvArgs& args) {
  if (args.in_channels / args.groups * args.out_channels > kPartSums) return 1;
  return args.samples >= 4 * kPartSamples ? 4 : args.samples >= 2 * kPartSamples ? 2 : 1;
}

// Workspace: offsets of tiles | per thread: a strip with zeros around it, packed without, panels of inputs, a panel of
// gradients, products | sums of squares, of each thread or, where samples are cut, of each job.
template <class Form, class S>
struct TilesLayout {
  Strips<Form> strips;
  std::int64_t blocks, panels;         // of a job, at most
  std::int64_t row_jobs, column_jobs;  // of a group
  std::int64_t parts, jobs;            // of the samples; of each part
  int workers;
  std::int64_t sample_inputs, sample_grads, job_sums;    // elements of a strip, of a job's sums
  std::int64_t offsets, threads, sums, end;              // in bytes
  std::int64_t packed, inputs, grads, products, thread;  // in bytes; within a thread's part

  explicit TilesLayout(const ConvArgs& args) : strips(gradient_tiles<Form>(args), args.samples, kStripTiles<Form>) {
    const auto bytes = [](std::int64_t n, std::int64_t size) { return ceil_div(n * size, 64) * 64; };
    const std::int64_t size = sizeof(S);
    blocks = min_of(kRowBlocks, ceil_div(args.in_channels / args.groups, kMR));
    panels = min_of(kJobPanels<S>, ceil_div(args.out_channels / args.groups, kNR<S>));
    const std::int64_t row_blocks = ceil_div(args.in_channels / args.groups, kMR);
    column_jobs = ceil_div(ceil_div(args.out_channels / args.groups, kNR<S>), panels);
    parts = sample_parts(args);
    // Rows are cut as little as will do: no thread is to have nothing to do for more than a quarter of the time.
    const std::int64_t threads_given = max_of(1, args.threads), units = max_of(1, args.groups * column_jobs * parts);
    row_jobs = max_of(ceil_div(row_blocks, blocks), min_of(row_blocks, ceil_div(threads_given, units)));
    const auto idle = [&] { return ceil_div(units * row_jobs, threads_given) * threads_given - units * row_jobs; };
    while (row_jobs < row_blocks && 3 * idle() > units * row_jobs) ++row_jobs;
    jobs = args.groups * column_jobs * row_jobs;
    workers = static_cast<int>(max_of(1, min_of(args.threads, parts * jobs)));
    sample_inputs = ceil_div(blocks * kMR, lanes<S>) * Panel<S>{strips.size(), lanes<S>}.size(kPoints<Form>);
    sample_grads = Panel<S>{strips.size(), kNR<S>}.size(kPoints<Form>);
    offsets = 0;
    threads = bytes(strips.size(), 8);
    packed = bytes(strips.rows * strips.across * lanes<S>, size);
    inputs = packed + bytes(strips.rows * strips.across * lanes<S>, size);
    grads = inputs + bytes(strips.samples * sample_inputs, size);
    products = grads + bytes(strips.samples * sample_grads, size);
    thread = products + bytes((strips.count == 1 ? 1 : panels) * blocks * kPoints<Form> * kBlock<S>, size);
    job_sums = panels * blocks * kTaps * kBlock<S>;
    sums = threads + thread * workers;
    end = sums + bytes(job_sums * (parts > 1 ? parts * jobs : workers), size);
  }
};

// The gradients' values at the points.
template <class Form, class S>
void transform_grads(const Picture<S>& picture, const TileCounts& tiles, std::int64_t point, std::int64_t tile, S* to) {
  using V = Vector<S>;
  transform_tiles<Form::kOutputs, Form::kPoints>(
      picture, tiles, Form::kOutputs,
      [](const V* g, V* at) LIMPET_INLINE { Form::template factor<Form::kOutputs>(g, at); }, point, tile, to);
}

template <class S>
LIMPET_FORMULA void add_square_to(const Vector<S>& gradient, S* to) {
  Vector<S> sum = load(to);
  math::add_square(sum, gradient);
  store<S>(sum, to);
}

// Adds the squares of the kernel's gradient of one input channel and a vector of output channels. sums: [tap, kNR]
template <class Form, class S>
LIMPET_FORMULA void add_squares_of_kernel(const S* products, std::int64_t point, S* sums) {
  using V = Vector<S>;
  along_both<Form::kPoints, 3, V>(
      [&](int k, int l) LIMPET_INLINE { return load(products + (Form::kPoints * k + l) * point); },
      [](const V* m, V* w) LIMPET_INLINE { Form::template sums<3>(m, w); },
      [&](int k, int l, const V& gradient) LIMPET_INLINE { add_square_to<S>(gradient, sums + (3 * k + l) * kNR<S>); });
}

// Two rows by two vectors of columns, as one value.
template <class S>
struct Square {
  Vector<S> a, b, c, d;  // the first row's two, the second's

  LIMPET_FORMULA friend Square operator+(const Square& x, const Square& y) {
    return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d};
  }
  LIMPET_FORMULA friend Square operator-(const Square& x, const Square& y) {
    return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d};
  }
  LIMPET_FORMULA friend Square times(double factor, const Square& x) {
    return {times(factor, x.a), times(factor, x.b), times(factor, x.c), times(factor, x.d)};
  }
};

// The same for two input channels and two vectors of output channels, of a sample of few tiles: their products stay in
// registers, a line of points at a time. Operands as Panel has them, with panels of one vector and of kNR.
template <class Form, int tiles, class S>
void add_squares_of_few(const S* const* rows, const S* columns, S* const* sums) {
  constexpr std::int64_t row_point = Panel<S>{tiles, lanes<S>}.point(), point = Panel<S>{tiles, kNR<S>}.point();
  const S *const first = rows[0], *const second = rows[1];
  along_both<Form::kPoints, 3, Square<S>>(
      [&](int k, int l) LIMPET_INLINE {
        const std::int64_t f = Form::kPoints * k + l;
        Square<S> m{};
#pragma GCC unroll 4
        for (int t = 0; t < tiles; ++t) {
          const Vector<S> x = broadcast(first[f * row_point + t * lanes<S>]);
          const Vector<S> y = broadcast(second[f * row_point + t * lanes<S>]);
          Vector<S> v = load(columns + f * point + t * kNR<S>), w = load(columns + f * point + t * kNR<S> + lanes<S>);
#if defined(__AVX512F__)
          asm("" : "+v"(v), "+v"(w));  // or else they are loaded twice, which takes longer than what is computed
#endif
          m.a += x * v, m.b += x * w, m.c += y * v, m.d += y * w;
        }
        return m;
      },
      [](const Square<S>* m, Square<S>* w) LIMPET_INLINE { Form::template sums<3>(m, w); },
      [&](int k, int l, const Square<S>& gradient) LIMPET_INLINE {
        const std::int64_t at = (3 * k + l) * kNR<S>;
        add_square_to<S>(gradient.a, sums[0] + at), add_square_to<S>(gradient.b, sums[0] + at + lanes<S>);
        add_square_to<S>(gradient.c, sums[1] + at), add_square_to<S>(gradient.d, sums[1] + at + lanes<S>);
      });
}

// One job: input channels [row0, row0 + rows) of a group with output channels [column0, column0 + columns).
template <class Form, class Stored>
class TilesJob {
  using S = Compute<Stored>;

 public:
  TilesJob(const ConvArgs& args, const TilesLayout<Form, S>& layout, int worker, S* sums, std::int64_t group,
           std::int64_t row0, std::int64_t rows, std::int64_t column0, std::int64_t columns)
      : args_(args),
        layout_(layout),
        channels_(args.in_channels / args.groups),
        rows_(rows),
        columns_(columns),
        first_channel_(group * channels_ + row0),
        first_column_(group * (args.out_channels / args.groups) + column0),
        total_(static_cast<S*>(args.total) + (first_column_ * channels_ + row0) * kTaps),
        scratch_(static_cast<char*>(args.workspace) + layout.threads + layout.thread * worker),
        sums_(sums) {}

  // Sums over the samples [first, end).
  void run(std::int64_t first, std::int64_t end) {
    for (std::int64_t i = 0; i < panels() * blocks() * kTaps * kBlock<S>; ++i) sums_[i] = 0;
    const Strips<Form>& strips = layout_.strips;
    for (std::int64_t n = first; n < end; n += strips.samples)
      for (std::int64_t s = 0; s < strips.count; ++s)
        add_strip(n, min_of(strips.samples, end - n), s, s + 1 == strips.count);
  }

  void add_to_total() const {
    for (std::int64_t q = 0; q < panels(); ++q)
      add_transposed(sums_ + q * blocks() * kTaps * kBlock<S>, kNR<S>, rows_ * kTaps,
                     min_of(kNR<S>, columns_ - q * kNR<S>), total_ + q * kNR<S> * channels_ * kTaps, channels_ * kTaps);
  }

 private:
  std::int64_t blocks() const { return ceil_div(rows_, kMR); }
  std::int64_t panels() const { return ceil_div(columns_, kNR<S>); }
  S* inputs() const { return reinterpret_cast<S*>(scratch_ + layout_.inputs); }
  S* grads() const { return reinterpret_cast<S*>(scratch_ + layout_.grads); }

  // Strip s of some samples, the last of theirs or not.
  void add_strip(std::int64_t n0, std::int64_t samples, std::int64_t s, bool last) {
    const std::int64_t frame = layout_.strips.frame(s), down = layout_.strips.down(s);
    const TileCounts strip = layout_.strips[s];
    const Panel<S> panel{strip.count(), lanes<S>};
    std::int64_t row_offsets[kRowBlocks * kMR];
    for (std::int64_t i = 0; i < blocks() * kMR; ++i) {
      const std::int64_t c = min_of(i, rows_ - 1);
      row_offsets[i] = c / lanes<S> * panel.size(kPoints<Form>) + c % lanes<S>;
    }
    for (std::int64_t n = 0; n < samples; ++n) transform_inputs_of(n0 + n, frame, down, strip, n);

    // With some tiles a block's products and sums stay in the first cache, with many a point's gradients.
    const std::int64_t together = layout_.strips.count == 1 && strip.count() <= 32 ? kMR : rows_;
    for (std::int64_t q = 0; q < panels(); ++q) {
      for (std::int64_t n = 0; n < samples; ++n) transform_grads_of(n0 + n, frame, down, strip, q, n);
      if (has_few<Form>(layout_.strips.tiles)) {
        for (std::int64_t n = 0; n < samples; ++n) add_few(row_offsets, q, n);
        continue;
      }
      for (std::int64_t row = 0; row < rows_; row += together)
        for (std::int64_t n = 0; n < samples; ++n) {
          PointProducts<S> p;
          p.points = kPoints<Form>;
          p.rows = inputs() + n * layout_.sample_inputs;
          p.row_point = panel.point();
          p.row_run = 0;
          p.row_offsets = row_offsets + row;
          p.place_offsets = reinterpret_cast<std::int64_t*>(static_cast<char*>(args_.workspace) + layout_.offsets);
          p.columns = grads() + n * layout_.sample_grads;
          p.column_panel = 0;
          p.num_rows = min_of(together, rows_ - row);
          p.num_columns = min_of(kNR<S>, columns_ - q * kNR<S>);
          p.places = p.run = strip.count();
          p.add = s > 0;
          p.products = reinterpret_cast<S*>(scratch_ + layout_.products) +
                       (layout_.strips.count == 1 ? 0 : q * blocks() * kPoints<Form> * kBlock<S>);
          multiply(p);
          if (last) add_squares(p, sums_ + (q * blocks() * kMR + row) * kTaps * kNR<S>);
        }
    }
  }

  // A sample of few tiles.
  void add_few(const std::int64_t* row_offsets, std::int64_t q, std::int64_t slot) const {
    if constexpr (std::is_same_v<Form, TilesOfFour>) {
      switch (layout_.strips.size()) {
        case 2: return add_few<2>(row_offsets, q, slot);
        case 3: return add_few<3>(row_offsets, q, slot);
        default: static_assert(kFewTiles == 4, "cases above"); return add_few<4>(row_offsets, q, slot);
      }
    }
  }
  template <int tiles>
  void add_few(const std::int64_t* row_offsets, std::int64_t q, std::int64_t slot) const {
    const S* const x = inputs() + slot * layout_.sample_inputs;
    const S* const columns = grads() + slot * layout_.sample_grads;
    for (std::int64_t column = 0; column < min_of(kNR<S>, columns_ - q * kNR<S>); column += 2 * lanes<S>)
      for (std::int64_t row = 0; row < rows_; row += 2) {
        S* const to = sums_ + (q * blocks() * kMR + row) * kTaps * kNR<S> + column;
        const S* const rows[2] = {x + row_offsets[row], x + row_offsets[row + 1]};
        S* const sums[2] = {to, to + kTaps * kNR<S>};
        add_squares_of_few<Form, tiles>(rows, columns + column, sums);
      }
  }

  void transform_inputs_of(std::int64_t n, std::int64_t frame, std::int64_t down, const TileCounts& strip,
                           std::int64_t slot) {
    const std::int64_t* const strides = args_.input_strides;
    const Panel<S> panel{strip.count(), lanes<S>};
    for (std::int64_t c = 0; c < rows_; c += lanes<S>)
      transform_picture<Form>(
          picture(args_.input, n, first_channel_ + c, frame, args_.input_size, strides, min_of(lanes<S>, rows_ - c),
                  args_.padding[1] - Form::kOutputs * down, args_.padding[2]),
          strip, panel.point(), lanes<S>,
          inputs() + slot * layout_.sample_inputs + c / lanes<S> * panel.size(kPoints<Form>));
  }

  void transform_grads_of(std::int64_t n, std::int64_t frame, std::int64_t down, const TileCounts& strip,
                          std::int64_t q, std::int64_t slot) {
    const std::int64_t* const strides = args_.output_grad_strides;
    const std::int64_t end = min_of(columns_, (q + 1) * kNR<S>);
    const bool few = has_few<Form>(layout_.strips.tiles);
    const Panel<S> panel{strip.count(), few ? kNR<S> : panel_vectors<S>(columns_, q * kNR<S>) * lanes<S>};
    for (std::int64_t c = q * kNR<S>; c < end; c += lanes<S>)
      transform_grads<Form>(picture(args_.output_grad, n, first_column_ + c, frame, args_.output_size, strides,
                                    min_of(lanes<S>, end - c), -Form::kOutputs * down, 0),
                            strip, panel.point(), panel.width, grads() + slot * layout_.sample_grads + c % kNR<S>);
  }

  // `count` channels of one sample's frame, from its first place that belongs at [row0, column0] on.
  Picture<S> picture(const void* tensor, std::int64_t n, std::int64_t channel, std::int64_t frame,
                     const std::int64_t* size, const std::int64_t* strides, std::int64_t count, std::int64_t row0,
                     std::int64_t column0) const {
    const Picture<S> picture{reinterpret_cast<S*>(scratch_), layout_.strips.rows, layout_.strips.across};
    picture.fill(static_cast<const Stored*>(tensor) + n * strides[0] + channel * strides[1] + frame * strides[2],
                 strides[1], size + 1, strides + 3, count, row0, column0,
                 reinterpret_cast<S*>(scratch_ + layout_.packed));
    return picture;
  }

  // sums: [row, tap, column]
  void add_squares(const PointProducts<S>& p, S* sums) const {
    for (std::int64_t row = 0; row < p.num_rows; ++row)
      for (int v = 0; v < panel_vectors<S>(p.num_columns, 0); ++v)
        add_squares_of_kernel<Form>(p.products + row * kNR<S> + v * lanes<S>, p.point(),
                                    sums + row * kTaps * kNR<S> + v * lanes<S>);
  }

  const ConvArgs& args_;
  const TilesLayout<Form, S>& layout_;
  const std::int64_t channels_;  // of the group
  const std::int64_t rows_, columns_, first_channel_, first_column_;
  S* const total_;
  char* const scratch_;
  S* const sums_;  // [panel, block, row, tap, column]
};

template <class Form, class Stored>
void contract_tiles(const ConvArgs& args) {
  using S = Compute<Stored>;
  const TilesLayout<Form, S> layout(args);
  const std::int64_t channels = args.in_channels / args.groups, columns = args.out_channels / args.groups;
  const std::int64_t tiles = layout.strips.tiles.count();
  std::int64_t* const offsets = reinterpret_cast<std::int64_t*>(static_cast<char*>(args.workspace) + layout.offsets);
  for (std::int64_t t = 0; t < layout.strips.size(); ++t) offsets[t] = t * lanes<S>;

  const int threads = worthwhile(layout.workers, args.samples * kPoints<Form> * tiles * channels * args.out_channels);
  const std::int64_t row_jobs = layout.row_jobs, column_jobs = layout.column_jobs;
  const std::int64_t blocks = ceil_div(channels, kMR), panels = ceil_div(columns, kNR<S>);
  S* const sums = reinterpret_cast<S*>(static_cast<char*>(args.workspace) + layout.sums);
  const auto job_of = [&](std::int64_t index, int worker) {  // of all parts' jobs
    const std::int64_t job = index % layout.jobs;
    const std::int64_t part = job % row_jobs, q = job / row_jobs % column_jobs, group = job / row_jobs / column_jobs;
    const std::int64_t row0 = blocks * part / row_jobs * kMR, row1 = blocks * (part + 1) / row_jobs * kMR;
    const std::int64_t column0 = panels * q / column_jobs * kNR<S>, column1 = panels * (q + 1) / column_jobs * kNR<S>;
    return TilesJob<Form, Stored>(args, layout, worker, sums + (layout.parts > 1 ? index : worker) * layout.job_sums,
                                  group, row0, min_of(row1, channels) - row0, column0,
                                  min_of(column1, columns) - column0);
  };
  parallel_for(threads, layout.parts * layout.jobs, [&](std::int64_t index, int worker) {
    const std::int64_t part = index / layout.jobs;
    TilesJob<Form, Stored> job = job_of(index, worker);
    job.run(args.samples * part / layout.parts, args.samples * (part + 1) / layout.parts);
    if (layout.parts == 1) job.add_to_total();
  });
  if (layout.parts > 1)
    parallel_for(threads, layout.jobs, [&](std::int64_t job, int worker) {
      for (std::int64_t part = 0; part < layout.parts; ++part) job_of(part * layout.jobs + job, worker).add_to_total();
    });
}

}  // namespace
}  // namespace limpet::cpu
