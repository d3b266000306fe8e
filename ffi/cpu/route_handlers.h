// The CPU handlers of jax_moe_route and jax_moe_sort (ffi/targets.h).
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxMoeRouteCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeSortCpu(XLA_FFI_CallFrame* call_frame);
}
