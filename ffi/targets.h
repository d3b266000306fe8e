// The FFI targets: names, operands, results and attributes, the same on the CPU and on CUDA.
// jax_moe/_ffi.py is the other side of this file. Integer attributes are int32, the others float32.
// An operand that is absent is an array of zero elements. Dimensions: notation of docs/design.md:
// T tokens, k = top_k, E experts, H = d_model, F = d_expert, P = T * k pairs.
//
// jax_moe_route        logits f32 [T, E], selection_bias f32 [E] | [0]
//                   -> expert_ids s32 [T, k], weights f32 [T, k]
//                      gating (Gating), normalize (0|1), scale, num_groups, num_groups_used
// jax_moe_sort         expert_ids s32 [B, P], every row sorted on its own
//                   -> sorted_token_ids s32 [B, P], flat_expert_ids s32 [B, P],
//                      expert_offsets s32 [B, E + 1]
// jax_moe_gemm         x [T | P, K] f32|f16|bf16, weight u8 [E, N, row_bytes] | f32|f16|bf16 [E, N, K],
//                      sorted_token_ids s32 [P], flat_expert_ids s32 [P], topk_weights f32 [P] | [0],
//                      weight_aux f32 [E, N, 2] | [0]
//                   -> y [P, N] f32|f16|bf16, workspace u8 [plan::GemmWorkspace]
//                      format (ggml_type; F32 0, F16 1, BF16 30 where dense), top_k, variant (Variant)
// jax_moe_ffn          x [T, H] f32|f16|bf16, expert_ids s32 [T, k], weights f32 [T, k],
//                      gate, up, down (as `weight` above; merged: gate holds gate rows then up rows and
//                      up is absent; ungated: gate is absent), gate_bias, up_bias, down_bias f32 [E, N] | [0],
//                      gate_scale, up_scale, down_scale f32 [E] | [0],
//                      gate_aux, up_aux, down_aux f32 [E, N, 2] | [0]
//                   -> y [T, H] of x's dtype, workspace u8 [plan::FfnWorkspace]
//                      gate_format, up_format, down_format (-1 where absent), merged (0|1),
//                      activation (Activation), limit, beta, linear_beta,
//                      weights_before (0|1), variant (Variant)
// jax_moe_dequantize   data u8 [rows, row_bytes] -> f32 [rows, K]
//                      format
// jax_moe_repack       data u8 [E, N, row_bytes] in GGUF's layout, N a multiple of 16
//                   -> data u8 [E, N, tiled row_bytes], aux f32 [E, N, 2]   (ffi/blocks/tiled.h)
//                      format
// jax_moe_unpack       data u8 [E, N, tiled row_bytes] -> data u8 [E, N, row_bytes]
//                      format
//
// A weight of jax_moe_gemm and jax_moe_ffn in the tiled layout has the format ggml_type | kTiledFormat
// and its aux; any other has no aux. Only CUDA takes tiled weights; elsewhere they are unpacked first.
#pragma once

namespace jax_moe {

enum class Gating : int { kSoftmax = 0, kSigmoid = 1, kSoftmaxAfterTopk = 2, kSqrtSoftplus = 3 };

enum class Variant : int { kDefault = 0, kScalarGguf = 1, kWmma = 2, kWmmaGguf = 3 };

// Those before kSilu are gated: they combine gate g and up u. The others see u alone.
enum class Activation : int {
  kSwiglu = 0,            // silu(g) * u
  kSwigluClamp = 1,       // silu(min(g, L)) * clamp(u, -L, L)
  kSwigluClampAfter = 2,  // min(silu(g), L) * clamp(u, -L, L)
  kGeglu = 3,             // gelu(g) * u, tanh form
  kReglu = 4,             // relu(g) * u
  kSwigluOai = 5,         // a = min(g, L), b = clamp(u, -L, L): a * sigmoid(1.702 a) * (b + 1)
  kSitu = 6,              // beta tanh(g / beta) sigmoid(g) * lb tanh(u / lb); u itself where lb <= 0
  kSilu = 7,
  kGelu = 8,
  kRelu2 = 9,             // relu(u)^2
};

inline constexpr bool IsGated(Activation activation) { return activation < Activation::kSilu; }

// Calls X(NAME) for every activation.
#define JAX_MOE_ACTIVATIONS(X)                                                      \
  X(kSwiglu) X(kSwigluClamp) X(kSwigluClampAfter) X(kGeglu) X(kReglu) X(kSwigluOai) \
  X(kSitu) X(kSilu) X(kGelu) X(kRelu2)

// ggml_type of the dense element types.
enum DenseType : int { kF32 = 0, kF16 = 1, kBF16 = 30 };

// Added to the ggml_type of a weight in the tiled layout.
inline constexpr int kTiledFormat = 0x10000;

}  // namespace jax_moe
