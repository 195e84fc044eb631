// What every launcher needs: errors as exceptions, and the right device for the length of a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define LIMPET_CUDA_CHECK(call) ::limpet::cuda::check((call), #call)

namespace limpet::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("limpet: ") + what + ": " + cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    LIMPET_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device != previous_) LIMPET_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }  // a failure here would only repeat the one that is being thrown
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace limpet::cuda
