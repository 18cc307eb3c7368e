// Safetensors files written without MPI, and what a call refuses with.
#pragma once

#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "trainer/formats/safetensors.h"

namespace regroup::test {

struct PlainTensor {
  std::string name;
  StoredType type = StoredType::kF32;
  std::vector<index_t> shape;
  std::string bytes;
};

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

inline PlainTensor plain_tensor(std::string name, std::vector<index_t> shape,
                                const std::vector<float>& values) {
  return {std::move(name), StoredType::kF32, std::move(shape), bytes_of(values)};
}

inline void write_plain_file(const std::filesystem::path& path, const std::vector<PlainTensor>& tensors) {
  std::vector<StoredTensor> table;
  std::map<std::string, const PlainTensor*> by_name;
  for (const PlainTensor& t : tensors) {
    table.push_back({.name = t.name, .type = t.type, .shape = t.shape});
    by_name[t.name] = &t;
  }
  const SafetensorsPlan plan = plan_safetensors(table, {});
  std::string file = plan.bytes;
  for (const StoredTensor& t : plan.tensors) file += by_name.at(t.name)->bytes;
  check(file.size() == plan.file_size, "a test's tensors have other sizes than their shapes");
  write_text(path, file);
}

// The message of the UserError that `work` throws; "accepted" where it throws none.
template <class Work>
std::string refusal(Work&& work) {
  try {
    work();
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

}  // namespace regroup::test
