#include "ffi/cuda/tiled_gemm.h"

#include <algorithm>
#include <limits>

#include "ffi/cuda/launch_early.h"
#include "ffi/cuda/load.h"
#include "ffi/plan/cuda.h"

namespace jax_moe::cuda {
namespace {

cudaError_t Launch(const TiledKernel& kernel, dim3 grid, void** parameters, cudaStream_t stream,
                   int cluster = 1) {
  return LaunchEarly(kernel.function, grid, kernel.threads, kernel.shared_bytes, stream, parameters,
                     cluster);
}

// The warps that share a band of down, and the blocks that they are in.
struct DownShape {
  int warps, blocks;
};

// Takes least time: rounds of all the warps that the device has places for, each of a part of a
// band, and no more warps than there are steps for. One block, unless two are spread more evenly.
DownShape ChooseDown(int64_t bands, int64_t steps, bool hopper) {
  if (!hopper) return {kMostDownWarps, 1};
  constexpr int kMost = kMostDownWarps * kMostDownBlocks, kLeast = kMost / 4, kFewestSteps = 3;
  const int64_t multiprocessors = Multiprocessors();
  const auto rounds = [&](int64_t parts, int64_t places) { return (parts + places - 1) / places; };
  const auto cost = [&](int warps) {
    return rounds(bands * warps, multiprocessors * 2 * kMostDownWarps) * (kMost / warps);
  };
  int best = kLeast;
  for (int warps = 2 * kLeast; warps <= kMost && warps * kFewestSteps <= steps; warps *= 2) {
    if (cost(warps) < cost(best)) best = warps;
  }
  if (best == kLeast) return {best, 1};
  const bool even = 2 * rounds(bands, multiprocessors) <= rounds(2 * bands, multiprocessors);
  return {best, best <= kMostDownWarps && even ? 1 : 2};
}

// One block for every place on the device, but no more than there are items.
cudaError_t LaunchPersistent(const TiledKernel& kernel, TiledArgs args, cudaStream_t stream) {
  const int64_t items = args.lists.max_tiles * (args.rows / kernel.block_rows);
  if (items == 0) return cudaSuccess;
  if (items > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const int64_t blocks = std::min(int64_t{Multiprocessors()} * kernel.blocks, items);
  void* parameters[] = {&args};
  return Launch(kernel, dim3(static_cast<unsigned>(blocks)), parameters, stream);
}

}  // namespace

const TiledKernels* FindTiledKernels(int format, bool centred) {
  const TiledKernels* kernels = nullptr;
  VisitFormat(format, [&](auto decoder) {
    using Format = decltype(decoder);
    if constexpr (kHasCentred<Format>) {
      kernels = centred ? &Tiled<Centred<Format>>() : &Tiled<Format>();
    } else {
      kernels = &Tiled<Format>();
    }
  });
  return kernels;
}

cudaError_t LaunchTiled(const TiledKernel& kernel, TiledArgs args, cudaStream_t stream) {
  if (kernel.blocks > 0) return LaunchPersistent(kernel, args, stream);
  const bool paired = args.activate && args.gated;
  const int64_t block_rows = paired ? kernel.block_rows / 2 : kernel.block_rows;
  const int64_t rows = args.activate && kernel.pads_rows ? args.y_pitch : args.rows;
  int64_t blocks = (rows + block_rows - 1) / block_rows;
  if (blocks == 0 || args.lists.max_tiles == 0) return cudaSuccess;
  int64_t splits = 1;
  if (kernel.places > 0) {
    const int64_t multiprocessors = Multiprocessors(), places = kernel.places;
    const int64_t panels = plan::ChooseCudaTiledPanels(blocks, args.columns, args.lists.max_tiles,
                                                       places * multiprocessors);
    // Whole atoms of two chunks, and some for every block.
    const int64_t atoms = (args.columns + 255) / 256;
    if (panels == 1) {
      splits = plan::ChooseCudaTiledSplits(blocks * args.lists.likely_tiles, atoms, places,
                                           multiprocessors, kernel.most_splits);
    }
    const int64_t block_atoms = (atoms + splits - 1) / splits;
    splits = (atoms + block_atoms - 1) / block_atoms;
    args.panels = static_cast<int32_t>(panels);
    args.all_panels = static_cast<int32_t>(blocks);
    args.split_chunks = static_cast<int32_t>(2 * block_atoms);
    blocks = (blocks + panels - 1) / panels * splits;
  }
  const std::optional<dim3> grid = TileGrid(blocks, args.lists.max_tiles);
  if (!grid) return cudaErrorInvalidConfiguration;
  void* parameters[] = {&args};
  return Launch(kernel, *grid, parameters, stream, static_cast<int>(splits));
}

cudaError_t LaunchTiledDown(const TiledKernels& kernels, TiledDownArgs args, cudaStream_t stream) {
  TiledKernel kernel = kernels.down;
  const int64_t bands = args.y_pitch / kernel.block_rows;
  const int64_t steps = int64_t{args.tokens} * args.top_k * ((args.columns + 255) / 256);
  const DownShape shape = ChooseDown(bands, steps, IsHopper());
  const int warps = shape.warps / shape.blocks;
  kernel.threads = 32 * warps;
  kernel.shared_bytes -= (kMostDownWarps - warps) * kernels.down_warp_bytes;
  args.splits = shape.blocks;
  void* parameters[] = {&args};
  return Launch(kernel, dim3(static_cast<unsigned>(bands * shape.blocks)), parameters, stream,
                shape.blocks);
}

cudaError_t LaunchTiledFew(const TiledKernels& kernels, TiledFewArgs args, cudaStream_t stream) {
  const int steps = (args.columns + 255) / 256;
  const int steps_a_warp = (steps + kMostFewWarps - 1) / kMostFewWarps;
  const int warps = (steps + steps_a_warp - 1) / steps_a_warp;
  // Exact, for pairs are below 32 and so is what divides them.
  args.inverse_pairs_a_row = static_cast<uint32_t>((65536 + args.pairs_a_row - 1) / args.pairs_a_row);
  // As many tiles as there can be.
  const int tiles = args.experts == 1 ? (args.pairs + 1) / 2 : args.pairs;
  const dim3 grid(static_cast<unsigned>(args.rows / 16), static_cast<unsigned>(tiles));
  void* parameters[] = {&args};
  return cudaLaunchKernel(kernels.few, grid, dim3(32 * warps), parameters,
                          static_cast<size_t>(warps * kernels.few_warp_bytes), stream);
}

cudaError_t LoadTiled(const TiledKernels& kernels) {
  const auto load = [](const TiledKernel& kernel) {
    return LoadKernel(kernel.function, kernel.shared_bytes);
  };
  cudaError_t status = kernels.few == nullptr ? cudaSuccess : LoadKernel(kernels.few);
  if (status == cudaSuccess) status = load(kernels.down);
  for (const TiledKernel& kernel : kernels.narrow) {
    if (status == cudaSuccess) status = load(kernel);
  }
  if (!IsHopper()) return status;
  for (const TiledKernel& kernel : kernels.wide) {
    if (status == cudaSuccess) status = load(kernel);
  }
  return status;
}

}  // namespace jax_moe::cuda
