#include "ffi/operands.h"

#include <algorithm>

#include "ffi/blocks/formats.h"
#include "ffi/blocks/tiled.h"

namespace jax_moe {
namespace {

bool Absent(const ffi::AnyBuffer& buffer) { return buffer.element_count() == 0; }

bool HasShape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// DenseType of a float element type, -1 for any other.
int DenseTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return kF32;
    case ffi::DataType::F16: return kF16;
    case ffi::DataType::BF16: return kBF16;
    default: return -1;
  }
}

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

// A call's parts, counted before they are read.
class Call {
 public:
  Call(Checker& check, const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results,
       const ffi::Dictionary& attributes, size_t num_arguments, size_t num_results)
      : check_(check), arguments_(arguments), results_(results), attributes_(attributes) {
    check.Require(arguments.size() == num_arguments && results.size() == num_results,
                  "has " + std::to_string(arguments.size()) + " operands and " +
                      std::to_string(results.size()) + " results, expected " +
                      std::to_string(num_arguments) + " and " + std::to_string(num_results));
  }

  ffi::AnyBuffer Operand(size_t index) const {
    return arguments_.get<ffi::AnyBuffer>(index).value();
  }
  ffi::AnyBuffer Result(size_t index) const {
    return *results_.get<ffi::AnyBuffer>(index).value();
  }
  template <typename T>
  T Attribute(const char* name) const {
    const auto value = attributes_.get<T>(name);
    return check_.Require(value.has_value(), std::string("attribute ") + name + " is missing")
               ? value.value()
               : T{};
  }

 private:
  Checker& check_;
  const ffi::RemainingArgs& arguments_;
  const ffi::RemainingRets& results_;
  const ffi::Dictionary& attributes_;
};

// A weight operand of a format (ffi/targets.h) and its aux.
Weight ReadWeight(Checker& check, const char* name, const ffi::AnyBuffer& buffer, int format,
                  const ffi::AnyBuffer& aux) {
  Weight weight;
  weight.tiled = plan::IsTiled(format);
  weight.format = weight.tiled ? format & ~kTiledFormat : format;
  int64_t elements = 0, bytes = 0;
  if (!check.Require(BlockSize(weight.format, &elements, &bytes),
                     std::string(name) + " has unknown format " + std::to_string(weight.format)) ||
      !check.Require(buffer.dimensions().size() == 3,
                     std::string(name) + " has shape " + ShapeText(buffer) + ", expected rank 3")) {
    return weight;
  }
  weight.packed = elements > 1;
  if (weight.packed && weight.tiled) bytes = BlockBytesOf(weight.format).tiled;
  weight.experts = buffer.dimensions()[0];
  weight.rows = buffer.dimensions()[1];
  const int64_t last = buffer.dimensions()[2];
  const bool type_matches = weight.packed ? buffer.element_type() == ffi::DataType::U8
                                          : DenseTypeOf(buffer.element_type()) == weight.format;
  check.Require(type_matches, std::string(name) + " has an element type that is not its format's");
  check.Require(!weight.packed || last % bytes == 0,
                std::string(name) + " has rows of " + std::to_string(last) +
                    " bytes, expected a multiple of " + std::to_string(bytes));
  const std::string aux_name = std::string(name) + "_aux";
  if (weight.tiled) {
    check.Require(weight.packed && weight.rows % kBandRows == 0,
                  std::string(name) + " cannot be tiled: ggml_type " +
                      std::to_string(weight.format) + ", " + ShapeText(buffer));
    check.RequireShape(aux_name.c_str(), aux, ffi::DataType::F32,
                       {weight.experts, weight.rows, 2});
    weight.aux = Data<float>(aux);
  } else {
    check.Require(Absent(aux), aux_name + " must be absent");
  }
  weight.data = Data<uint8_t>(buffer);
  weight.columns = weight.packed ? last / bytes * elements : last;
  weight.row_bytes = weight.packed ? last : last * bytes;
  return weight;
}

// SCALAR_GGUF rounds float32 activations for packed weights.
void RequireVariant(Checker& check, Variant variant, int x_type,
                    std::initializer_list<const Weight*> weights) {
  if (variant != Variant::kScalarGguf) return;
  check.Require(x_type == kF32, "variant SCALAR_GGUF takes float32 x");
  for (const Weight* weight : weights) {
    check.Require(weight == nullptr || weight->packed, "variant SCALAR_GGUF takes packed weights");
  }
}

// x, y, .. have a float element type.
int RequireFloats(Checker& check, const char* name, const ffi::AnyBuffer& buffer) {
  const int type = DenseTypeOf(buffer.element_type());
  check.Require(type >= 0, std::string(name) + " must be float32, float16 or bfloat16");
  return type;
}

const Weight* PointerTo(const std::optional<Weight>& weight) { return weight ? &*weight : nullptr; }

}  // namespace

bool BlockSize(int format, int64_t* elements, int64_t* bytes) {
  if (format == kF32 || format == kF16 || format == kBF16) {
    *elements = 1;
    *bytes = format == kF32 ? 4 : 2;
    return true;
  }
  return VisitFormat(format, [&](auto decoder) {
    *elements = decltype(decoder)::kBlock;
    *bytes = decltype(decoder)::kBytes;
  });
}

bool Checker::Require(bool condition, const std::string& message) {
  if (!condition && message_.empty()) message_ = std::string(target_) + ": " + message;
  return condition;
}

bool Checker::RequireShape(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                           std::initializer_list<int64_t> shape) {
  std::string wanted;
  for (const int64_t dim : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(dim);
  return Require(buffer.element_type() == type && HasShape(buffer, shape),
                 std::string(name) + " has shape " + ShapeText(buffer) + ", expected [" + wanted +
                     "] of the type in the target's signature");
}

const float* Checker::OptionalFloats(const char* name, const ffi::AnyBuffer& buffer,
                                     std::initializer_list<int64_t> shape) {
  if (Absent(buffer) || !RequireShape(name, buffer, ffi::DataType::F32, shape)) return nullptr;
  return Data<float>(buffer);
}

void Checker::RequireWorkspace(int64_t bytes, int64_t expected) {
  Require(bytes >= expected, "workspace has " + std::to_string(bytes) + " bytes, expected " +
                                 std::to_string(expected));
}

GemmOperands ReadGemm(Checker& check, const ffi::RemainingArgs& arguments,
                      const ffi::RemainingRets& results, const ffi::Dictionary& attributes) {
  GemmOperands call = {};
  const Call parts(check, arguments, results, attributes, 6, 2);
  if (!check.ok()) return call;
  const int format = parts.Attribute<int32_t>("format");
  const int64_t top_k = parts.Attribute<int32_t>("top_k");
  call.variant = static_cast<Variant>(parts.Attribute<int32_t>("variant"));
  const ffi::AnyBuffer x = parts.Operand(0), sorted_token_ids = parts.Operand(2),
                       flat_expert_ids = parts.Operand(3), y = parts.Result(0),
                       workspace = parts.Result(1);
  call.weight = ReadWeight(check, "weight", parts.Operand(1), format, parts.Operand(5));
  check.Require(top_k > 0, "top_k is " + std::to_string(top_k) + ", expected at least 1");
  check.Require(x.dimensions().size() == 2, "x has shape " + ShapeText(x) + ", expected rank 2");
  check.Require(sorted_token_ids.dimensions().size() == 1,
                "sorted_token_ids has shape " + ShapeText(sorted_token_ids) + ", expected rank 1");
  if (!check.ok()) return call;

  const Weight& weight = call.weight;
  const int64_t pairs = sorted_token_ids.dimensions()[0], x_rows = x.dimensions()[0];
  call.pairs = pairs;
  call.tokens = pairs / top_k;
  call.problem = {{top_k, weight.experts, weight.rows, weight.columns, x_rows != call.tokens},
                  format};
  check.Require(pairs % top_k == 0, "sorted_token_ids has " + std::to_string(pairs) +
                                        " entries, expected a multiple of top_k = " +
                                        std::to_string(top_k));
  check.Require(pairs <= INT32_MAX, "more than 2^31 - 1 pairs");
  check.Require(x_rows == call.tokens || x_rows == pairs,
                "x has " + std::to_string(x_rows) + " rows, expected " +
                    std::to_string(call.tokens) + " (tokens) or " + std::to_string(pairs) +
                    " (pairs)");
  check.Require(x.dimensions()[1] == weight.columns,
                "x has rows of " + std::to_string(x.dimensions()[1]) + ", weight of " +
                    std::to_string(weight.columns));
  check.RequireShape("sorted_token_ids", sorted_token_ids, ffi::DataType::S32, {pairs});
  check.RequireShape("flat_expert_ids", flat_expert_ids, ffi::DataType::S32, {pairs});
  check.RequireShape("y", y, y.element_type(), {pairs, weight.rows});
  call.workspace_bytes = static_cast<int64_t>(workspace.element_count());
  check.RequireShape("workspace", workspace, ffi::DataType::U8, {call.workspace_bytes});
  call.topk_weights = check.OptionalFloats("topk_weights", parts.Operand(4), {pairs});
  call.x_type = RequireFloats(check, "x", x);
  call.y_type = RequireFloats(check, "y", y);
  RequireVariant(check, call.variant, call.x_type, {&weight});
  call.x = x.untyped_data();
  call.sorted_token_ids = Data<int32_t>(sorted_token_ids);
  call.flat_expert_ids = Data<int32_t>(flat_expert_ids);
  call.y = y.untyped_data();
  call.workspace = static_cast<uint8_t*>(workspace.untyped_data());
  return call;
}

FfnOperands ReadFfn(Checker& check, const ffi::RemainingArgs& arguments,
                    const ffi::RemainingRets& results, const ffi::Dictionary& attributes) {
  FfnOperands call = {};
  const Call parts(check, arguments, results, attributes, 15, 2);
  if (!check.ok()) return call;
  const int gate_format = parts.Attribute<int32_t>("gate_format");
  const int up_format = parts.Attribute<int32_t>("up_format");
  const int down_format = parts.Attribute<int32_t>("down_format");
  const int activation = parts.Attribute<int32_t>("activation");
  const auto variant = static_cast<Variant>(parts.Attribute<int32_t>("variant"));
  const float limit = parts.Attribute<float>("limit");
  call.beta = parts.Attribute<float>("beta");
  call.linear_beta = parts.Attribute<float>("linear_beta");
  call.weights_before = parts.Attribute<int32_t>("weights_before") != 0;
  check.Require(activation >= 0 && activation <= static_cast<int>(Activation::kRelu2),
                "unknown activation " + std::to_string(activation));
  const bool gated = IsGated(static_cast<Activation>(activation));
  call.merged = gated && parts.Attribute<int32_t>("merged") != 0;
  check.Require(gated == (gate_format >= 0), "gate must be given for a gated activation only");
  check.Require(call.merged == (up_format < 0), "up must be given unless gate is merged");
  const ffi::AnyBuffer x = parts.Operand(0), expert_ids = parts.Operand(1),
                       weights = parts.Operand(2), y = parts.Result(0),
                       workspace = parts.Result(1);
  check.Require(x.dimensions().size() == 2, "x has shape " + ShapeText(x) + ", expected rank 2");
  check.Require(expert_ids.dimensions().size() == 2,
                "expert_ids has shape " + ShapeText(expert_ids) + ", expected rank 2");
  const auto read = [&](const char* name, size_t index, int format) {
    return ReadWeight(check, name, parts.Operand(index), format, parts.Operand(index + 9));
  };
  call.down = read("down", 5, down_format);
  if (gate_format >= 0) call.gate = read("gate", 3, gate_format);
  if (up_format >= 0) call.up = read("up", 4, up_format);
  if (!check.ok()) return call;

  const int64_t experts = call.down.experts, d_model = call.down.rows, d_expert = call.down.columns;
  const int64_t tokens = x.dimensions()[0], top_k = expert_ids.dimensions()[1];
  call.tokens = tokens;
  call.pairs = tokens * top_k;
  check.Require(call.pairs <= INT32_MAX, "more than 2^31 - 1 pairs");
  check.RequireShape("x", x, x.element_type(), {tokens, d_model});
  check.RequireShape("expert_ids", expert_ids, ffi::DataType::S32, {tokens, top_k});
  check.RequireShape("weights", weights, ffi::DataType::F32, {tokens, top_k});
  check.RequireShape("y", y, x.element_type(), {tokens, d_model});
  call.workspace_bytes = static_cast<int64_t>(workspace.element_count());
  check.RequireShape("workspace", workspace, ffi::DataType::U8, {call.workspace_bytes});
  const int64_t gate_rows = call.merged ? 2 * d_expert : d_expert;
  const auto require_match = [&](const char* name, const std::optional<Weight>& weight,
                                 int64_t rows) {
    check.Require(!weight || (weight->experts == experts && weight->rows == rows &&
                              weight->columns == d_model),
                  std::string(name) + " is not [experts, " + std::to_string(rows) + ", " +
                      std::to_string(d_model) + "] as down demands");
  };
  require_match("gate", call.gate, gate_rows);
  require_match("up", call.up, d_expert);
  call.gate_bias = check.OptionalFloats("gate_bias", parts.Operand(6), {experts, gate_rows});
  call.up_bias = check.OptionalFloats("up_bias", parts.Operand(7), {experts, d_expert});
  call.down_bias = check.OptionalFloats("down_bias", parts.Operand(8), {experts, d_model});
  call.gate_scale = check.OptionalFloats("gate_scale", parts.Operand(9), {experts});
  call.up_scale = check.OptionalFloats("up_scale", parts.Operand(10), {experts});
  call.down_scale = check.OptionalFloats("down_scale", parts.Operand(11), {experts});
  call.type = RequireFloats(check, "x", x);
  RequireVariant(check, variant, call.type,
                 {PointerTo(call.gate), PointerTo(call.up), &call.down});
  call.problem = {{top_k, experts, d_model, d_expert},
                  gate_format,
                  up_format,
                  down_format,
                  variant,
                  static_cast<Activation>(activation),
                  limit,
                  call.gate_bias != nullptr || call.up_bias != nullptr};
  call.x = x.untyped_data();
  call.expert_ids = Data<int32_t>(expert_ids);
  call.weights = Data<float>(weights);
  call.y = y.untyped_data();
  call.workspace = static_cast<uint8_t*>(workspace.untyped_data());
  return call;
}

}  // namespace jax_moe
