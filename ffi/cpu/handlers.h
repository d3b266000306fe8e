// CPU handlers of the FFI targets in ffi/targets.h.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxMoeGemmCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeFfnCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeDequantizeCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeRepackCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxMoeUnpackCpu(XLA_FFI_CallFrame* call_frame);
}
