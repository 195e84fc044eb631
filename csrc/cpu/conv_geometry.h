// Where a convolution's places and kernel places lie in its padded input.
#pragma once

#include "cpu/contraction.h"
#include "cpu/isa.h"

namespace limpet::cpu {
namespace {

struct ConvGeometry {
  std::int64_t places;            // Y0 * Y1 * Y2
  std::int64_t rows, columns;     // of one group's weight: C / groups * K, O / groups
  std::int64_t channels;          // C / groups
  std::int64_t padded[3], image;  // size of one padded channel

  explicit ConvGeometry(const ConvArgs& args)
      : places(args.output_size[0] * args.output_size[1] * args.output_size[2]),
        rows(args.in_channels / args.groups * args.kernel[0] * args.kernel[1] * args.kernel[2]),
        columns(args.out_channels / args.groups),
        channels(args.in_channels / args.groups),
        image(1) {
    for (int i = 0; i < 3; ++i) image *= padded[i] = args.input_size[i] + 2 * args.padding[i];
  }
};

// The step of `places` in the padded input, and of a group's `rows`, from the channel's first element, times `scale`.
inline void fill_offsets(const ConvArgs& args, const ConvGeometry& geometry, std::int64_t scale, std::int64_t* places,
                         std::int64_t* rows) {
  const std::int64_t s2 = scale, s1 = geometry.padded[2] * s2, s0 = geometry.padded[1] * s1;
  for (std::int64_t y0 = 0; y0 < args.output_size[0]; ++y0)
    for (std::int64_t y1 = 0; y1 < args.output_size[1]; ++y1)
      for (std::int64_t y2 = 0; y2 < args.output_size[2]; ++y2)
        *places++ = y0 * args.stride[0] * s0 + y1 * args.stride[1] * s1 + y2 * args.stride[2] * s2;
  for (std::int64_t c = 0; c < geometry.channels; ++c)
    for (std::int64_t k0 = 0; k0 < args.kernel[0]; ++k0)
      for (std::int64_t k1 = 0; k1 < args.kernel[1]; ++k1)
        for (std::int64_t k2 = 0; k2 < args.kernel[2]; ++k2)
          *rows++ = c * geometry.image * scale + k0 * args.dilation[0] * s0 + k1 * args.dilation[1] * s1 +
                    k2 * args.dilation[2] * s2;
}

// [places, width] from `count` channels of a picture, whose places are numbered through its three dimensions. Strides:
// of channels, then of the dimensions.
template <class Stored, class S>
void pack_places(const Stored* from, const std::int64_t* size, const std::int64_t* strides, std::int64_t place0,
                 std::int64_t places, std::int64_t count, std::int64_t width, S* to) {
  // The stride of a dimension of one is arbitrary: those that a picture lacks have zero.
  const bool lines = size[1] == 1 || strides[2] == strides[3] * size[2];
  const bool flat = lines && (size[0] == 1 || strides[1] == strides[2] * size[1]);
  for (std::int64_t t = 0; t < places;) {  // a line at a time, or all where one follows the other
    const std::int64_t place = place0 + t, y2 = place % size[2], y1 = place / size[2] % size[1];
    const std::int64_t run = flat ? places : min_of(size[2] - y2, places - t);
    const Stored* const line = from + place / size[2] / size[1] * strides[1] + y1 * strides[2] + y2 * strides[3];
    pack(line, strides[0], strides[3], run, count, width, false, to + t * width);
    t += run;
  }
}

// A kernel of one element sees each step-th place of the input: the others are left out.
inline ConvArgs without_steps(ConvArgs args) {
  for (int i = 0; i < 3; ++i)
    if (args.kernel[i] == 1 && args.padding[i] == 0) {
      args.input_size[i] = args.output_size[i];
      args.input_strides[2 + i] *= args.stride[i];
      args.stride[i] = 1;
    }
  return args;
}

}  // namespace
}  // namespace limpet::cpu
