#include "kernels/cpu/onednn_matmul.h"

#include <algorithm>
#include <cstddef>
#include <new>
#include <unordered_map>
#include <vector>

#include <omp.h>
#include <oneapi/dnnl/dnnl.hpp>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// The number of threads of parallel regions (oneDNN's too) opened by this thread while it lives.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : previous_(omp_get_max_threads()) { omp_set_num_threads(threads); }
  ~ThreadCount() { omp_set_num_threads(previous_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int previous_;
};

// Everything a oneDNN primitive depends on.
struct Product {
  index_t m = 0, n = 0, k = 0;
  index_t a_stride = 0, b_stride = 0, c_stride = 0;
  DType type = DType::kFloat32, c_type = DType::kFloat32;
  bool transpose_a = false, transpose_b = false, accumulate = false;

  bool operator==(const Product&) const = default;
};

struct ProductHash {
  std::size_t operator()(const Product& p) const {
    std::size_t hash = 0xCBF29CE484222325;
    for (const index_t field : {p.m, p.n, p.k, p.a_stride, p.b_stride, p.c_stride,
                                static_cast<index_t>(p.type) * 64 + static_cast<index_t>(p.c_type) * 8 +
                                    p.transpose_a * 4 + p.transpose_b * 2 + p.accumulate}) {
      hash = (hash ^ static_cast<std::size_t>(field)) * 0x100000001B3;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

Product describe_product(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options) {
  return {.m = c[0],
          .n = c[1],
          .k = options.transpose_a ? a[0] : a[1],
          .a_stride = a.stride[0],
          .b_stride = b.stride[0],
          .c_stride = c.stride[0],
          .type = a.dtype,
          .c_type = c.dtype,
          .transpose_a = options.transpose_a,
          .transpose_b = options.transpose_b,
          .accumulate = options.accumulate};
}

dnnl::memory::data_type data_type_of(DType dtype) {
  return dtype == DType::kBFloat16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc matrix(index_t rows, index_t columns, DType dtype, index_t stride, bool transposed) {
  return {{rows, columns},
          data_type_of(dtype),
          transposed ? dnnl::memory::dims{1, stride} : dnnl::memory::dims{stride, 1}};
}

// float64 is for gradient checks: clear, not fast. One thread owns a row, so sums have one order.
void matmul_float64(const Product& p, const double* a, const double* b, double* c, int threads) {
  const index_t a_row = p.transpose_a ? 1 : p.a_stride, a_column = p.transpose_a ? p.a_stride : 1;
  const index_t b_row = p.transpose_b ? 1 : p.b_stride, b_column = p.transpose_b ? p.b_stride : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (index_t i = 0; i < p.m; ++i) {
    double* row = c + i * p.c_stride;
    if (!p.accumulate) std::fill(row, row + p.n, 0.0);
    for (index_t k = 0; k < p.k; ++k) {
      const double factor = a[i * a_row + k * a_column];
      const double* b_k = b + k * b_row;
      for (index_t j = 0; j < p.n; ++j) row[j] += factor * b_k[j * b_column];
    }
  }
}

}  // namespace

class OneDnnMatmul::Primitives {
 public:
  void execute(const Product& product, void* a, void* b, void* c) {
    Entry& entry = find(product);
    entry.a.set_data_handle(a);
    entry.b.set_data_handle(b);
    entry.c.set_data_handle(c);
    entry.scratchpad.set_data_handle(scratchpad_.data());
    entry.primitive.execute(stream_, entry.arguments);
    stream_.wait();
  }

 private:
  struct alignas(64) CacheLine {
    std::byte bytes[64];
  };
  struct Entry {
    dnnl::matmul primitive;
    dnnl::memory a, b, c, scratchpad;
    std::unordered_map<int, dnnl::memory> arguments;
  };

  Entry& find(const Product& product) {
    const auto found = entries_.find(product);
    return found != entries_.end() ? found->second : entries_.emplace(product, make(product)).first->second;
  }

  Entry make(const Product& p) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (p.accumulate) {
      dnnl::post_ops post_ops;
      post_ops.append_sum(1.0F);
      attributes.set_post_ops(post_ops);
    }
    const dnnl::matmul::primitive_desc descriptor(
        {matrix(p.m, p.k, p.type, p.a_stride, p.transpose_a),
         matrix(p.k, p.n, p.type, p.b_stride, p.transpose_b), matrix(p.m, p.n, p.c_type, p.c_stride, false)},
        attributes, engine_);
    const auto scratchpad_bytes = descriptor.scratchpad_desc().get_size();
    const std::size_t lines = (scratchpad_bytes + sizeof(CacheLine) - 1) / sizeof(CacheLine);
    if (lines > scratchpad_.size()) scratchpad_.resize(lines);
    Entry entry{.primitive = dnnl::matmul(descriptor),
                .a = dnnl::memory(descriptor.src_desc(), engine_, DNNL_MEMORY_NONE),
                .b = dnnl::memory(descriptor.weights_desc(), engine_, DNNL_MEMORY_NONE),
                .c = dnnl::memory(descriptor.dst_desc(), engine_, DNNL_MEMORY_NONE),
                .scratchpad = dnnl::memory(descriptor.scratchpad_desc(), engine_, DNNL_MEMORY_NONE),
                .arguments = {}};
    // Memory objects are handles: the arguments share the data pointers set on the four above.
    entry.arguments = {{DNNL_ARG_SRC, entry.a},
                       {DNNL_ARG_WEIGHTS, entry.b},
                       {DNNL_ARG_DST, entry.c},
                       {DNNL_ARG_SCRATCHPAD, entry.scratchpad}};
    return entry;
  }

  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::unordered_map<Product, Entry, ProductHash> entries_;
  std::vector<CacheLine> scratchpad_;
};

OneDnnMatmul::OneDnnMatmul(int threads) : threads_(threads), primitives_(std::make_unique<Primitives>()) {}
OneDnnMatmul::~OneDnnMatmul() = default;

void OneDnnMatmul::operator()(const Tensor& a, const Tensor& b, const Tensor& c,
                              const MatmulOptions& options) {
  const Product product = describe_product(a, b, c, options);
  if (product.m == 0 || product.n == 0 || (product.k == 0 && product.accumulate)) return;
  if (product.k == 0) {
    for (index_t i = 0; i < product.m; ++i) {
      std::byte* row = static_cast<std::byte*>(c.data) + i * product.c_stride * size_of(c.dtype);
      std::fill(row, row + product.n * size_of(c.dtype), std::byte{0});
    }
    return;
  }
  if (product.type == DType::kFloat64) {
    matmul_float64(product, a.as<double>(), b.as<double>(), c.as<double>(), threads_);
    return;
  }
  const ThreadCount thread_count(threads_);
  try {
    primitives_->execute(product, a.data, b.data, c.data);
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_unimplemented) {
      throw UserError("this oneDNN has no product of {} and {} into {} for this processor", a.describe(),
                      b.describe(), c.describe());
    }
    if (error.status == dnnl_out_of_memory) throw std::bad_alloc();
    throw SystemError("oneDNN: the product of {} and {} into {} failed: {}", a.describe(), b.describe(),
                      c.describe(), error.message);
  }
}

bool OneDnnMatmul::multiplies_bfloat16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

void limit_onednn(CpuLevel level) {
  const auto isa = [level] {
    switch (level) {
      case CpuLevel::kPortable:
        return dnnl::cpu_isa::sse41;
      case CpuLevel::kAvx2:
        return dnnl::cpu_isa::avx2;
      case CpuLevel::kAvx512:
        return dnnl::cpu_isa::avx512_core_vnni;
      case CpuLevel::kAvx512Bf16:
        return dnnl::cpu_isa::avx512_core_bf16;
    }
    throw InternalError("unknown level");
  }();
  check(dnnl::set_max_cpu_isa(isa) == dnnl::status::success,
        "oneDNN has chosen its instructions before it was limited to the level {}", name_of(level));
}

}  // namespace regroup
