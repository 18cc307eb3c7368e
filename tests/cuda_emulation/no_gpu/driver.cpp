// libcuda.so.1 of a host without a GPU. cuDNN looks these functions up before it compiles a kernel, for a
// device that is only described too, and gives up where one is missing; it calls none but the first three.
extern "C" {

constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE

int cuInit(unsigned) { return kNoDevice; }
int cuDeviceGetCount(int* count) {
  *count = 0;
  return kNoDevice;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

int cuDeviceGet() { return kNoDevice; }
int cuDeviceGetAttribute() { return kNoDevice; }
int cuGetErrorString() { return kNoDevice; }
int cuGetErrorName() { return kNoDevice; }
int cuCtxGetCurrent() { return kNoDevice; }
int cuCtxGetDevice() { return kNoDevice; }
int cuCtxPushCurrent() { return kNoDevice; }
int cuCtxPopCurrent() { return kNoDevice; }
int cuCtxGetLimit() { return kNoDevice; }
int cuStreamGetCtx() { return kNoDevice; }
int cuStreamSynchronize() { return kNoDevice; }
int cuDevicePrimaryCtxRetain() { return kNoDevice; }
int cuDevicePrimaryCtxRelease() { return kNoDevice; }
int cuDevicePrimaryCtxReset() { return kNoDevice; }
int cuLibraryLoadData() { return kNoDevice; }
int cuLibraryLoadFromFile() { return kNoDevice; }
int cuLibraryUnload() { return kNoDevice; }
int cuLibraryGetKernel() { return kNoDevice; }
int cuKernelSetAttribute() { return kNoDevice; }
int cuKernelGetAttribute() { return kNoDevice; }
int cuModuleLoadData() { return kNoDevice; }
int cuModuleLoadDataEx() { return kNoDevice; }
int cuModuleLoadFatBinary() { return kNoDevice; }
int cuModuleUnload() { return kNoDevice; }
int cuModuleGetFunction() { return kNoDevice; }
int cuModuleGetGlobal_v2() { return kNoDevice; }
int cuFuncSetAttribute() { return kNoDevice; }
int cuFuncGetAttribute() { return kNoDevice; }
int cuLinkCreate() { return kNoDevice; }
int cuLinkCreate_v2() { return kNoDevice; }
int cuLinkAddData() { return kNoDevice; }
int cuLinkAddData_v2() { return kNoDevice; }
int cuLinkAddFile_v2() { return kNoDevice; }
int cuLinkComplete() { return kNoDevice; }
int cuLinkDestroy() { return kNoDevice; }
int cuLaunchKernel() { return kNoDevice; }
int cuLaunchKernelEx() { return kNoDevice; }
int cuLaunchCooperativeKernel() { return kNoDevice; }
int cuMemcpyDtoH_v2() { return kNoDevice; }
int cuOccupancyMaxPotentialClusterSize() { return kNoDevice; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor() { return kNoDevice; }
int cuTensorMapEncodeTiled() { return kNoDevice; }
int cuGetProcAddress_v2() { return kNoDevice; }

}  // extern "C"
