// The CUDA handlers of ffi/targets.h, registered for platform "CUDA", and their initialize stages.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxMoeRouteCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeRouteCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeSortCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeSortCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeGemmCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeGemmCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeFfnCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeFfnCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeDequantizeCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeDequantizeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeRepackCudaInitialize(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeRepackCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeUnpackCuda(XLA_FFI_CallFrame* call_frame);
}
