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

}  // namespace
}  // namespace limpet::cpu
