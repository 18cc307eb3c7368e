// Python's pickles (docs.python.org, "pickle"; opcodes: CPython, Lib/pickletools.py) read as data: a pickle
// is a program for a stack machine that may call anything. This reader knows the opcodes that torch.save()
// writes for a dictionary of tensors, calls nothing, and refuses every name that it was not told of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace regroup {

struct PickleValue {
  enum class Kind : std::uint8_t {
    kNone,
    kBool,
    kInt,     // number
    kNumber,  // a float, or a whole number beyond 63 bits: text is its bytes
    kText,    // text
    kTuple,   // items
    kList,
    kDict,        // items: key, value, key, value, ...; dict or collections.OrderedDict
    kGlobal,      // text: "collections.OrderedDict", one of those allowed
    kCall,        // items: the global that would be called, and its arguments
    kPersistent,  // items: the id (a tuple, in torch's files) of something kept outside the pickle
  };
  Kind kind = Kind::kNone;
  std::int64_t number = 0;
  std::string text;
  std::vector<const PickleValue*> items;  // into Pickle::values; a value may hold itself
};
// "a dictionary", "a number", ... for messages.
std::string_view describe(PickleValue::Kind kind);

// What a pickle makes, unevaluated. Move-only: the values point to one another.
struct Pickle {
  Pickle() = default;
  ~Pickle() = default;
  Pickle(Pickle&&) = default;
  Pickle& operator=(Pickle&&) = default;
  Pickle(const Pickle&) = delete;
  Pickle& operator=(const Pickle&) = delete;

  std::deque<PickleValue> values;
  const PickleValue* root = nullptr;
  std::size_t size = 0;  // bytes, up to and with its STOP
};

// Bytes of a pickle, and values in it; more are refused. That of T5 1.1 XXL has about 130 kB.
inline constexpr std::size_t kMaxPickleBytes = std::size_t{4} << 20;
inline constexpr std::size_t kMaxPickleValues = std::size_t{1} << 19;

// The pickle (protocols 2 to 5) that `bytes` begin with; what follows it is left alone.
// collections.OrderedDict called without arguments is a dictionary; attributes given to it (its "_metadata")
// are dropped. UserError
// "<where>: ..." for a global that is not among `allowed` ("module.name"), an opcode other than those of
// dictionaries of tensors (each by name), bytes that end before the pickle, and a pickle too large. Memory is
// a small multiple of the bytes; there is no recursion. Throws nothing else, whatever the bytes are.
Pickle read_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> allowed,
                   std::string_view where);

}  // namespace regroup
