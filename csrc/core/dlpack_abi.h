// The part of the DLPack 1.x C ABI that reading a tensor needs.
//
// Written from the DLPack specification (https://dmlc.github.io/dlpack/latest/c_api.html): a struct
// layout is an agreement between binaries, so the field order and the widths below must not change.
#pragma once

#include <cstdint>

namespace fusedopt::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kROCm = 10, kOneAPI = 14 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// A borrowed view of a tensor: valid as long as the tensor is alive and not resized.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // elements, ndim of them
  int64_t* strides;  // elements, ndim of them
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// What `torch.Tensor.__dlpack_c_exchange_api__` points to (torch >= 2.10). Only `borrow` is called;
// the other members are listed because they fix its position.
struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* export_owning;
  void* import_owning;
  int (*borrow)(void* py_object, Tensor* out);  // 0, or -1 with a Python error set
  void* current_stream;
};

inline constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";
inline constexpr uint32_t kMajorVersion = 1;

}  // namespace fusedopt::dlpack
