// DLPack's C functions for tensors of Python (`__dlpack_c_exchange_api__`, DLPack 1.3): as much of that interface as
// the core needs. Layout and names are dlpack.h's, https://github.com/dmlc/dlpack.
#pragma once

#include <cstdint>

namespace limpet::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::int32_t kCpu = 1;                 // a device's type
constexpr std::uint8_t kFloat = 2, kBfloat = 4;  // a dtype's code: IEEE floats of 16 bits and more, and bfloat16

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;

  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;    // [ndim]
  std::int64_t* strides;  // [ndim], in elements
  std::uint64_t byte_offset;
};

inline void* address(const Tensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

struct ManagedTensor;

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  Version version;
  const void* previous;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, SetError set_error);
  int (*export_managed)(void* object, ManagedTensor** out);
  int (*to_object)(ManagedTensor* tensor, void** object);  // takes the tensor
  int (*view)(void* object, Tensor* out);                  // the object keeps what it points to; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace limpet::dlpack
