#include "trainer/formats/pickle.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "kernels/base/error.h"
#include "trainer/formats/little_endian.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {
namespace {

using Kind = PickleValue::Kind;

// The opcodes that are known, by their names in pickletools.
enum class Opcode : std::uint8_t {
  kMark = '(',
  kStop = '.',
  kNone = 'N',
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kLong1 = 0x8A,
  kBinFloat = 'G',
  kBinUnicode = 'X',
  kShortBinUnicode = 0x8C,
  kBinString = 'T',  // texts of Python 2
  kShortBinString = 'U',
  kEmptyTuple = ')',
  kTuple = 't',
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kEmptyList = ']',
  kAppend = 'a',
  kAppends = 'e',
  kEmptyDict = '}',
  kSetItem = 's',
  kSetItems = 'u',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kMemoize = 0x94,
  kGlobal = 'c',
  kStackGlobal = 0x93,
  kReduce = 'R',
  kBuild = 'b',
  kBinPersId = 'Q',
  kProto = 0x80,
  kFrame = 0x95,
};

// The stack machine. Every opcode adds at most one value, and every item of a value was once pushed by an
// opcode of its own, so memory is bounded by the bytes.
class Machine {
 public:
  Machine(std::span<const std::byte> bytes, std::span<const std::string_view> allowed, std::string_view where)
      : bytes_(bytes), allowed_(allowed), where_(where) {}

  Pickle run() {
    if (bytes_.empty() || byte() != static_cast<std::uint8_t>(Opcode::kProto)) {
      fail("it does not begin as a pickle does");
    }
    const std::uint8_t protocol = byte();
    if (protocol < 2 || protocol > 5) fail("a pickle of protocol {} cannot be read, only 2 to 5", protocol);
    while (step(static_cast<Opcode>(byte()))) {
    }
    result_.root = pop();
    if (!stack_.empty() || !marks_.empty()) fail("the pickle leaves more than one value");
    result_.size = at_;
    return std::move(result_);
  }

 private:
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw UserError("{}: {} (at byte {} of the pickle)", where_,
                    fmt::format(format, std::forward<Args>(args)...), at_);
  }

  // Reading.
  std::span<const std::byte> take(std::uint64_t count) {
    if (count > bytes_.size() - at_) {
      fail("the pickle ends in the middle, or is larger than {} bytes; the file is truncated or damaged",
           kMaxPickleBytes);
    }
    const auto part = bytes_.subspan(at_, static_cast<std::size_t>(count));
    at_ += part.size();
    return part;
  }
  std::uint64_t number(std::size_t width) { return little_endian(take(width)); }
  std::uint8_t byte() { return static_cast<std::uint8_t>(number(1)); }
  static std::string text_of(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  std::string line() {
    constexpr std::size_t kLongest = 256;
    const auto rest = bytes_.subspan(at_, std::min(kLongest, bytes_.size() - at_));
    const auto end = std::find(rest.begin(), rest.end(), std::byte{'\n'});
    if (end == rest.end()) fail("a name in the pickle does not end");
    const auto length = static_cast<std::size_t>(end - rest.begin());
    return text_of(take(length + 1).first(length));
  }

  // The stack: values above the last mark.
  void push(PickleValue value) {
    if (result_.values.size() == kMaxPickleValues)
      fail("the pickle has more than {} values", kMaxPickleValues);
    stack_.push_back(&result_.values.emplace_back(std::move(value)));
  }
  void push(Kind kind, std::int64_t value = 0) {
    push({.kind = kind, .number = value, .text = {}, .items = {}});
  }
  void push_text(Kind kind, std::string text) { push({.kind = kind, .text = std::move(text), .items = {}}); }
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  PickleValue* top() const {
    if (stack_.size() <= floor()) fail("the pickle takes a value from an empty stack");
    return stack_.back();
  }
  PickleValue* pop() {
    PickleValue* const value = top();
    stack_.pop_back();
    return value;
  }
  using Items = std::vector<const PickleValue*>;
  Items pop_many(std::size_t count) {
    if (stack_.size() - floor() < count) fail("the pickle takes a value from an empty stack");
    Items items(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }
  Items pop_to_mark() {
    if (marks_.empty()) fail("the pickle has a mark too few");
    Items items = pop_many(stack_.size() - floor());
    marks_.pop_back();
    return items;
  }
  void extend(Kind kind, const Items& items) {
    PickleValue* const value = top();
    if (value->kind != kind || (kind == Kind::kDict && items.size() % 2 != 0)) {
      fail("the pickle adds items to {}", describe(value->kind));
    }
    value->items.insert(value->items.end(), items.begin(), items.end());
  }

  // The memo.
  void put(std::uint64_t key) {
    if (memo_.size() == kMaxPickleValues) fail("the pickle has more than {} values", kMaxPickleValues);
    memo_[key] = top();
  }
  void get(std::uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) fail("the pickle takes entry {} of its memo, which is not there", key);
    stack_.push_back(found->second);
  }

  void push_long(std::span<const std::byte> bytes) {
    if (bytes.size() > sizeof(std::int64_t)) return push_text(Kind::kNumber, text_of(bytes));
    std::uint64_t value = little_endian(bytes);
    const std::size_t bits = 8 * bytes.size();
    if (bits != 0 && bits < 64 && ((value >> (bits - 1)) & 1) != 0) value |= ~std::uint64_t{0} << bits;
    push(Kind::kInt, static_cast<std::int64_t>(value));
  }

  void push_global(const std::string& module, const std::string& name) {
    std::string global = module + "." + name;
    if (std::find(allowed_.begin(), allowed_.end(), global) == allowed_.end()) {
      fail("the pickle asks for '{}', which is not a tensor; only dictionaries of tensors are read",
           printable(global));
    }
    push_text(Kind::kGlobal, std::move(global));
  }
  void stack_global() {
    const Items names = pop_many(2);
    if (names[0]->kind != Kind::kText || names[1]->kind != Kind::kText) {
      fail("the pickle asks for something whose name is no text");
    }
    push_global(names[0]->text, names[1]->text);
  }

  void reduce() {
    Items call = pop_many(2);
    if (call[0]->kind != Kind::kGlobal || call[1]->kind != Kind::kTuple) {
      fail("the pickle calls {} with {}", describe(call[0]->kind), describe(call[1]->kind));
    }
    if (call[0]->text == "collections.OrderedDict" && call[1]->items.empty()) return push(Kind::kDict);
    push({.kind = Kind::kCall, .text = {}, .items = std::move(call)});
  }
  void build() {
    const PickleValue* const state = pop();
    if (top()->kind != Kind::kDict || state->kind != Kind::kDict) {
      fail("the pickle gives attributes ({}) to {}", describe(state->kind), describe(top()->kind));
    }
  }

  bool step(Opcode opcode);

  std::span<const std::byte> bytes_;
  std::span<const std::string_view> allowed_;
  std::string_view where_;
  std::size_t at_ = 0;
  Pickle result_;
  std::vector<PickleValue*> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, PickleValue*> memo_;
};

// One opcode; false where it ends the pickle.
bool Machine::step(Opcode opcode) {
  switch (opcode) {
    case Opcode::kStop:
      return false;
    case Opcode::kMark:
      marks_.push_back(stack_.size());
      break;
    case Opcode::kNone:
      push(Kind::kNone);
      break;
    case Opcode::kNewTrue:
      push(Kind::kBool, 1);
      break;
    case Opcode::kNewFalse:
      push(Kind::kBool, 0);
      break;
    case Opcode::kBinInt:
      push_long(take(4));
      break;
    case Opcode::kBinInt1:
      push(Kind::kInt, byte());
      break;
    case Opcode::kBinInt2:
      push(Kind::kInt, static_cast<std::int64_t>(number(2)));
      break;
    case Opcode::kLong1:
      push_long(take(byte()));
      break;
    case Opcode::kBinFloat:
      push_text(Kind::kNumber, text_of(take(8)));
      break;
    case Opcode::kBinUnicode:
    case Opcode::kBinString:
      push_text(Kind::kText, text_of(take(number(4))));
      break;
    case Opcode::kShortBinUnicode:
    case Opcode::kShortBinString:
      push_text(Kind::kText, text_of(take(byte())));
      break;
    case Opcode::kEmptyTuple:
      push(Kind::kTuple);
      break;
    case Opcode::kTuple:
      push({.kind = Kind::kTuple, .text = {}, .items = pop_to_mark()});
      break;
    case Opcode::kTuple1:
      push({.kind = Kind::kTuple, .text = {}, .items = pop_many(1)});
      break;
    case Opcode::kTuple2:
      push({.kind = Kind::kTuple, .text = {}, .items = pop_many(2)});
      break;
    case Opcode::kTuple3:
      push({.kind = Kind::kTuple, .text = {}, .items = pop_many(3)});
      break;
    case Opcode::kEmptyList:
      push(Kind::kList);
      break;
    case Opcode::kAppend:
      extend(Kind::kList, pop_many(1));
      break;
    case Opcode::kAppends:
      extend(Kind::kList, pop_to_mark());
      break;
    case Opcode::kEmptyDict:
      push(Kind::kDict);
      break;
    case Opcode::kSetItem:
      extend(Kind::kDict, pop_many(2));
      break;
    case Opcode::kSetItems:
      extend(Kind::kDict, pop_to_mark());
      break;
    case Opcode::kBinGet:
      get(byte());
      break;
    case Opcode::kLongBinGet:
      get(number(4));
      break;
    case Opcode::kBinPut:
      put(byte());
      break;
    case Opcode::kLongBinPut:
      put(number(4));
      break;
    case Opcode::kMemoize:
      put(memo_.size());
      break;
    case Opcode::kGlobal: {
      const std::string module = line();
      push_global(module, line());
      break;
    }
    case Opcode::kStackGlobal:
      stack_global();
      break;
    case Opcode::kReduce:
      reduce();
      break;
    case Opcode::kBuild:
      build();
      break;
    case Opcode::kBinPersId:
      push({.kind = Kind::kPersistent, .text = {}, .items = pop_many(1)});
      break;
    case Opcode::kFrame:
      take(8);  // how many bytes belong together: of use to streams only
      break;
    default:
      fail("the pickle has the opcode {:#04x}, which dictionaries of tensors do not need",
           static_cast<unsigned>(opcode));
  }
  return true;
}

}  // namespace

std::string_view describe(PickleValue::Kind kind) {
  switch (kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "a boolean";
    case Kind::kInt:
    case Kind::kNumber:
      return "a number";
    case Kind::kText:
      return "a text";
    case Kind::kTuple:
      return "a tuple";
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dictionary";
    case Kind::kGlobal:
      return "a class or function";
    case Kind::kCall:
      return "an object";
    case Kind::kPersistent:
      return "a storage";
  }
  return "something unknown";
}

Pickle read_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> allowed,
                   std::string_view where) {
  return Machine(bytes.first(std::min(bytes.size(), kMaxPickleBytes)), allowed, where).run();
}

}  // namespace regroup
