// The kernels of the CPU, compiled once per instruction set and chosen once, at load.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/keyed.h"
#include "dtype.h"
#include "optim_tensor.h"
#include "path_integral_tensor.h"
#include "quadratic_tensor.h"
#include "reservoir_rows.h"

namespace limpet::cpu {

// Strides are in elements.
struct LinearArgs {
  void* total;                                  // [O, I] contiguous, compute type of dtype; added to
  void* bias_total;                             // [O], the same; or null
  const void* output_grad;                      // [N, T, O]
  const void* input;                            // [N, T, I]
  std::int64_t samples, places, rows, columns;  // N, T, O, I
  std::int64_t output_grad_strides[3], input_strides[3];
  Dtype dtype;
  void* workspace;  // linear_workspace() bytes
  int threads;
};

struct ConvArgs {
  void* total;              // [O, C / groups, K0, K1, K2] contiguous, compute type of dtype; added to
  const void* output_grad;  // [N, O, Y0, Y1, Y2]
  const void* input;        // [N, C, X0, X1, X2]
  std::int64_t samples, out_channels, in_channels, groups;
  std::int64_t output_size[3], input_size[3], kernel[3], stride[3], padding[3], dilation[3];
  std::int64_t output_grad_strides[5], input_strides[5];
  Dtype dtype;
  void* workspace;  // conv_workspace() bytes
  int threads;
};

// A convolution of pictures with a kernel of 3 x 3, a step of one and a padding of at most 2, or a step of two and a
// padding of 1; all tensors are contiguous, float32 or float64.
struct ConvInputGradArgs {
  void* input_grad;         // [N, C, X0, X1]; written
  const void* output_grad;  // [N, O, Y0, Y1]
  const void* weight;       // [O, C, 3, 3]
  std::int64_t samples, out_channels, in_channels;
  std::int64_t output_size[2], input_size[2], padding[2], stride;
  Dtype dtype;
  void* workspace;  // conv_input_grad_workspace() bytes
  int threads;
};

struct BatchNormGradsArgs {
  void* input_grad;         // [N, C, B]; written
  void* weight_grads;       // [N, C]; written, null without an input
  void* bias_grads;         // [N, C]; written
  const void* output_grad;  // [N, C, B]
  const void* input;        // [N, C, B], or null
  const void* mean;         // [C], taken from the input
  const void* factor;       // [C], of the input's gradient
  std::int64_t samples, channels, places;
  Dtype dtype;  // of all, float32 or float64; all contiguous
  int threads;
};

// A canonical [N, A, C, B] view: bias and scale act along C, a sample's places are A x B.
struct ChannelArgs {
  void* total;              // [C] compute type of dtype; added to
  const void* output_grad;  // [N, A, C, B]
  const void* input;        // [N, A, C, B], or null for a bias
  const void* shift;        // [C] contiguous, compute type of dtype, taken from the input; or null
  std::int64_t sizes[4];
  std::int64_t output_grad_strides[4], input_strides[4];
  Dtype dtype;
  int threads;
};

// Channels are neighbours in memory.
struct NormArgs {
  void* total;              // [C] compute type of dtype; added to
  void* bias_total;         // [C], the same; or null
  const void* output_grad;  // [N, T, C]
  const void* input;        // [N, T, C]
  const void *mean, *rstd;  // [N, T] compute type of dtype, the same strides
  std::int64_t samples, places, channels;
  std::int64_t output_grad_strides[2], input_strides[2], mean_strides[2];  // of samples and places
  Dtype dtype;
  int threads;
};

struct EmbeddingArgs {
  void* total;                  // [V, E] contiguous, compute type of dtype; added to
  const void* output_grad;      // [N, T, E]
  const std::int64_t* indices;  // [N, T] contiguous, each in [0, V)
  std::int64_t samples, places, num_embeddings, width, padding_idx;
  std::int64_t output_grad_strides[3];
  Dtype dtype;
  int threads;
};

// [N, C, P] contiguous tensors of samples, channels and places; those marked so may be null.
struct GatedLateralArgs {
  const void *x, *h;
  const void* product;                 // h W^T along the channels
  const void* bias;                    // [C]; or null
  void* y;                             // forward: written; may lie where the product does
  const void* grad;                    // backward: the gradient at y, and what is written
  void *x_grad, *h_grad, *logit_grad;  // each or null; h_grad without what comes through the gate
  void* bias_grad;                     // [C]; or null
  std::int64_t samples, channels, places;
  Dtype dtype;
  void* workspace;  // backward: gated_lateral_workspace() bytes if there is a bias_grad
  int threads;
};

struct Kernels {
  // Returns sum_i F_i (theta_i - anchor_i)^2; grad gets (or is given) factor * F_i (theta_i - anchor_i).
  double (*quadratic)(const QuadraticTensor* tensors, std::int64_t count, QuadraticGrad grad, double factor,
                      int threads);
  std::int64_t (*linear_workspace)(const LinearArgs&);
  void (*sum_grad_squared_linear)(const LinearArgs&);
  std::int64_t (*conv_workspace)(const ConvArgs&);
  void (*sum_grad_squared_conv)(const ConvArgs&);
  std::int64_t (*conv_input_grad_workspace)(const ConvInputGradArgs&);
  void (*conv_input_grad)(const ConvInputGradArgs&);
  void (*batch_norm_grads)(const BatchNormGradsArgs&);
  void (*sum_grad_squared_channel)(const ChannelArgs&);
  void (*sum_grad_squared_norm)(const NormArgs&);
  void (*sum_grad_squared_embedding)(const EmbeddingArgs&);
  // integral -= (grad - strength F (previous - anchor)) (theta - previous); previous = theta.
  void (*path_integral)(const PathIntegralTensor* tensors, std::int64_t count, double strength, int threads);
  // One step; every *step is raised first.
  void (*adamw_step)(const OptimTensor* tensors, std::int64_t count, const AdamWOptions& options, int threads);
  void (*sgd_step)(const OptimTensor* tensors, std::int64_t count, const SgdOptions& options, int threads);
  // slots[k] = where item seen + k goes, -1 where it is passed over.
  void (*reservoir_slots)(std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                          std::int64_t* slots, int threads);
  void (*reservoir_insert)(const ReservoirBatch& batch, int threads);
  // sample[k] in [0, population), all different; population at least count, below 2^63, and count at most 2^32.
  void (*sample_without_replacement)(std::int64_t population, std::int64_t count, std::uint64_t seed,
                                     std::uint64_t draw, std::int64_t* sample);
  // The items whose keys are at most their groups' bounds, in their order; returns how many. Room for all of them.
  std::int64_t (*keyed_candidates)(const KeyedBounds& bounds, const KeyedItems& items, KeyedCandidate* candidates);
  // Each field's batch: `ahead` new rows, and behind them stored[index[k]].
  void (*gather_rows)(const RowField* fields, int num_fields, std::int64_t ahead, const std::int64_t* index,
                      std::int64_t count, int threads);
  void (*gated_lateral)(const GatedLateralArgs&);
  std::int64_t (*gated_lateral_workspace)(const GatedLateralArgs&);
  void (*gated_lateral_backward)(const GatedLateralArgs&);
};

// The table in use, and its name: the best that the processor has, or the one LIMPET_CPU asks for.
const Kernels& kernels();
const std::string& instruction_set();
// All that were compiled, worst first.
std::vector<std::string> instruction_sets();

}  // namespace limpet::cpu
