// libFuzzer: whatever the bytes of a msgpack file, it is a tree whose arrays lie inside the file, or it is
// refused with a UserError of one line.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "kernels/base/error.h"
#include "trainer/formats/msgpack.h"

namespace {

void check_arrays(const regroup::MsgpackValue& value, std::uint64_t size) {
  if (value.kind == regroup::MsgpackValue::Kind::kArray) {
    regroup::check(value.array.begin <= value.array.end && value.array.end <= size,
                   "an array outside its file");
    if (regroup::type_of_numpy(value.type_name)) {
      regroup::check(
          regroup::stored_bytes(value.array.type, value.array.shape) == value.array.end - value.array.begin,
          "an array of other bytes");
    }
  }
  for (const auto& item : value.list) check_arrays(item, size);
  for (const auto& [key, item] : value.map) check_arrays(item, size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto source = regroup::source_of(std::as_bytes(std::span(data, size)));
    check_arrays(regroup::parse_msgpack(source, "fuzzed"), size);
  } catch (const regroup::UserError& error) {
    regroup::check(std::string(error.what()).size() < 1000, "a long message");
  }
  return 0;
}
