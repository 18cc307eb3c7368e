// What cudnn-frontend asks the CUDA runtime before it makes a graph of attention's backward: which device. In
// a program that has this object the answer is "one without properties", not an error.
#include <cuda_runtime_api.h>

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  return cudaSuccess;
}
