// Module jax_moe._native: handler capsules of the CPU, the plan, and the decoders for the host.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <utility>

#include "ffi/blocks/dequantize.h"
#include "ffi/blocks/tiled.h"
#include "ffi/cpu/handlers.h"
#include "ffi/cpu/kernels.h"
#include "ffi/cpu/route_handlers.h"
#include "ffi/plan/cpu.h"
#include "ffi/plan/cuda.h"
#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_moe {
namespace {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

nb::dict CpuHandlers() {
  const std::pair<const char*, Handler*> handlers[] = {
      {"jax_moe_route", JaxMoeRouteCpu},
      {"jax_moe_sort", JaxMoeSortCpu},
      {"jax_moe_gemm", JaxMoeGemmCpu},
      {"jax_moe_ffn", JaxMoeFfnCpu},
      {"jax_moe_dequantize", JaxMoeDequantizeCpu},
      {"jax_moe_repack", JaxMoeRepackCpu},
      {"jax_moe_unpack", JaxMoeUnpackCpu},
  };
  nb::dict capsules;
  for (const auto& [name, handler] : handlers) {
    capsules[name] = nb::capsule(reinterpret_cast<void*>(handler));
  }
  return capsules;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_MOE_VERSION;
  info["ffi_api"] = std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  info["compiler"] = __VERSION__;
  info["cpu_isa"] = cpu::SelectKernels().isa;
  return info;
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Floats DequantizeRows(int type, const Bytes& data) {
  int64_t block = 0, bytes = 0;
  VisitFormat(type, [&](auto format) {
    block = decltype(format)::kBlock;
    bytes = decltype(format)::kBytes;
  });
  if (block == 0) throw nb::value_error("no block format has this ggml_type");
  const int64_t rows = data.shape(0), row_bytes = data.shape(1);
  if (row_bytes % bytes != 0) throw nb::value_error("row_bytes is not a multiple of a block's bytes");
  const int64_t blocks = row_bytes / bytes;
  float* weights = new float[rows * blocks * block];
  nb::capsule owner(weights, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  Dequantize(type, data.data(), rows * blocks, weights);
  return Floats(weights, {static_cast<size_t>(rows), static_cast<size_t>(blocks * block)}, owner);
}

nb::tuple Pair(const plan::Workspace& w) { return nb::make_tuple(w.fixed_bytes, w.bytes_per_token); }

int ElementType(const std::string& dtype) {
  if (dtype == "float16") return kF16;
  if (dtype == "bfloat16") return kBF16;
  return kF32;
}

bool IsPacked(int format) {
  return format >= 0 && format != kF32 && format != kF16 && format != kBF16;
}

nb::dict Describe(const std::string& platform, bool is_ffn, int variant, int format,
                  const std::string& x_dtype, const std::string& y_dtype, int64_t rows, int64_t k,
                  int64_t pairs, int64_t experts, int capability, int64_t workspace_bytes,
                  std::optional<int64_t> layer_tokens) {
  const Variant asked = static_cast<Variant>(variant);
  const int x = ElementType(x_dtype), y = ElementType(y_dtype);
  const plan::Kernel kernel =
      platform == "cpu"
          ? plan::CpuKernel(is_ffn, asked, IsPacked(format), x, y, workspace_bytes)
      : layer_tokens.has_value()
          ? plan::CudaLayerKernel(asked, x, *layer_tokens, workspace_bytes)
      : plan::IsTiled(format)
          ? plan::CudaTiledKernel(is_ffn, asked, x, y, rows, k, pairs, experts, capability,
                                  workspace_bytes)
          : plan::CudaKernel(is_ffn, asked, format, IsPacked(format), x, y, k, pairs, experts,
                             capability, workspace_bytes);
  nb::dict info;
  info["kernel"] = kernel.name;
  info["architecture"] = kernel.arch;
  info["tile"] = nb::make_tuple(kernel.tile_rows, kernel.tile_tokens);
  info["workspace_bytes"] = kernel.workspace_bytes;
  info["accumulator"] = kernel.accumulator;
  info["deterministic"] = kernel.deterministic;
  info["error_bound"] = kernel.error_bound;
  return info;
}

}  // namespace

NB_MODULE(_native, m) {
  using nb::literals::operator""_a;

  m.def("ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("build_info", &BuildInfo);
  m.def("cpu_handlers", &CpuHandlers);
  m.def("dequantize", &DequantizeRows, "type"_a, "data"_a);
  m.def("tiled_block_bytes", [](int type) { return BlockBytesOf(type).tiled; }, "type"_a);

  nb::class_<plan::GemmProblem>(m, "GemmProblem")
      .def(
          "__init__",
          [](plan::GemmProblem* self, int64_t top_k, int64_t experts, int64_t n, int64_t k,
             bool rows_are_pairs, int format) {
            new (self) plan::GemmProblem{{top_k, experts, n, k, rows_are_pairs}, format};
          },
          "top_k"_a, "experts"_a, "n"_a, "k"_a, "rows_are_pairs"_a, "format"_a);
  nb::class_<plan::FfnProblem>(m, "FfnProblem")
      .def(
          "__init__",
          [](plan::FfnProblem* self, int64_t top_k, int64_t experts, int64_t d_model,
             int64_t d_expert, int gate_format, int up_format, int down_format, int variant,
             int activation, float limit, bool biased) {
            new (self) plan::FfnProblem{{top_k, experts, d_model, d_expert},
                                        gate_format,
                                        up_format,
                                        down_format,
                                        static_cast<Variant>(variant),
                                        static_cast<Activation>(activation),
                                        limit,
                                        biased};
          },
          "top_k"_a, "experts"_a, "d_model"_a, "d_expert"_a, "gate_format"_a, "up_format"_a,
          "down_format"_a, "variant"_a, "activation"_a, "limit"_a, "biased"_a)
      // Of a GPU with the 132 multiprocessors of Hopper's large ones.
      .def(
          "in_one_launch",
          [](const plan::FfnProblem& self, int64_t tokens, int capability) {
            return plan::ChooseCudaLayer(self, tokens, 132, capability / 10 == 9).has_value();
          },
          "tokens"_a, "capability"_a);

  // Bytes as (fixed, a token): what a call allocates.
  m.def("workspace", [](const plan::GemmProblem& p) { return Pair(plan::GemmWorkspace(p)); });
  m.def("workspace", [](const plan::FfnProblem& p) { return Pair(plan::FfnWorkspace(p)); });
  // What the CUDA handler takes of it.
  m.def("cuda_workspace_used", [](const plan::GemmProblem& p, int64_t tokens) {
    return plan::LayoutCudaGemm(p, tokens).bytes;
  });
  m.def("cuda_workspace_used", [](const plan::FfnProblem& p, int64_t tokens) {
    return plan::LayoutCudaFfn(p, tokens).bytes;
  });
  m.def("describe", &Describe, "platform"_a, "is_ffn"_a, "variant"_a, "format"_a, "x_dtype"_a,
        "y_dtype"_a, "rows"_a, "k"_a, "pairs"_a, "experts"_a, "capability"_a,
        "workspace_bytes"_a, "layer_tokens"_a);
}

}  // namespace jax_moe
