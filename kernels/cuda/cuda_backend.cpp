#include "kernels/cuda/cuda_backend.h"

#include "kernels/base/json.h"
#include "kernels/cuda/attention_choice.h"
#include "kernels/cuda/matmul.h"
#include "kernels/make_backend.h"

namespace regroup {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  int devices = 0;
  const cudaError_t result = cudaGetDeviceCount(&devices);
  if (result != cudaSuccess || devices == 0) {
    throw UserError(
        "--device cuda needs a GPU and its driver: {} (nvidia-smi tells more); or use --device cpu",
        result == cudaSuccess ? "this process sees none" : cudaGetErrorString(result));
  }
  return std::make_unique<CudaBackend>(options.local_rank % devices, options.deterministic);
}

CudaBackend::CudaBackend(int ordinal, bool deterministic)
    : device_(ordinal),
      deterministic_(deterministic),
      matmul_(std::make_unique<CublasLtMatmul>(device_, deterministic)),
      attention_(
          std::make_unique<AttentionChoice>(device_, attention_choice_options(device_, deterministic))) {}

CudaBackend::~CudaBackend() = default;

Buffer CudaBackend::allocate(index_t bytes) { return device_.allocate(bytes); }
Buffer CudaBackend::allocate_host(index_t bytes) { return device_.allocate_pinned(bytes); }

void CudaBackend::copy_from_host(const void* host, Tensor tensor) {
  check(tensor.is_contiguous(), "copy_from_host: {} has gaps between its rows", tensor.describe());
  device_.upload(host, tensor.data, tensor.bytes());
}

void CudaBackend::copy_to_host(Tensor tensor, void* host) {
  check(tensor.is_contiguous(), "copy_to_host: {} has gaps between its rows", tensor.describe());
  device_.download(tensor.data, host, tensor.bytes());
}

std::string CudaBackend::device_id() const {
  std::string id;
  for (const char byte : device_.properties().uuid.bytes)
    id += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return id;
}

std::string CudaBackend::bus_id() const {
  const cudaDeviceProp& p = device_.properties();
  return fmt::format("{:04x}:{:02x}:{:02x}.0", p.pciDomainID, p.pciBusID, p.pciDeviceID);
}

std::string CudaBackend::tuning() const {
  if (deterministic_) return {};
  return json_text(nlohmann::json{{"matmul", parse_json(matmul_->chosen())},
                                  {"attention", parse_json(attention_->chosen())}},
                   2) +
         "\n";
}

void CudaBackend::set_tuning(const std::string& text) {
  if (deterministic_) return;
  nlohmann::json tables;
  try {
    tables = parse_json(text);
    static_cast<void>(tables.at("matmul"));
    static_cast<void>(tables.at("attention"));
  } catch (const nlohmann::json::exception& error) {
    throw UserError("the tables of measured choices cannot be read: {}", error.what());
  }
  // The first says whether they were measured here.
  if (matmul_->choose(json_text(tables["matmul"]))) attention_->choose(json_text(tables["attention"]));
}

void CudaBackend::synchronize() { device_.synchronize(); }

void CudaBackend::do_matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options) {
  (*matmul_)(a, b, c, options);
}

}  // namespace regroup
