// Flax's msgpack files (msgpack's specification; flax/serialization.py): trees of maps with arrays as leaves.
// An array is an extension of type 1, a numpy scalar one of type 3, whose bytes are again msgpack: [shape,
// name of the type, elements (little-endian, row-major)].
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "trainer/formats/byte_source.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {

struct MsgpackValue {
  enum class Kind { kNil, kBool, kInteger, kReal, kText, kList, kMap, kArray, kOther };
  Kind kind = Kind::kNil;
  std::int64_t integer = 0;  // also of a bool
  double real = 0;
  std::string text;
  std::vector<MsgpackValue> list;
  std::map<std::string, MsgpackValue, std::less<>> map;
  // An array, which stays in the file: name, shape, place. Only its type may be unknown (type_name says it).
  StoredTensor array;
  std::string type_name;

  // The member of a map; null where there is none, or this is no map.
  const MsgpackValue* find(std::string_view key) const;
};

// The type that numpy or TensorStore calls so ("float32", "bfloat16", ...).
std::optional<StoredType> type_of_numpy(std::string_view name);

// The tree, without the elements of its arrays: memory is bounded by what is not one of those, and by 64 MiB
// of text and 2^18 values. Binary data, complex numbers and unknown extensions are kOther. UserError
// "<where>: ..." for anything broken: cut short, bytes behind the end, counts that cannot be, nesting deeper
// than 32, keys that are not texts, that are there twice or have control characters, arrays whose shape does
// not suit their bytes. Throws nothing else, whatever the bytes are.
MsgpackValue parse_msgpack(const ByteSource& source, std::string_view where);

}  // namespace regroup
