#include "trainer/formats/pickle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/formats/torch_writer.h"

namespace regroup {
namespace {

using test::pickle_of;
using test::pickled;
using test::pickled_call;
using test::pickled_global;
using test::pickled_tuple;
using test::refusal;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using Kind = PickleValue::Kind;

constexpr std::string_view kAllowed[] = {"collections.OrderedDict", "torch.FloatStorage"};

Pickle read(const std::string& bytes) {
  return read_pickle(std::as_bytes(std::span(bytes)), kAllowed, "file.bin");
}
std::string refused(const std::string& value) {
  return refusal([&] { read(pickle_of(value)); });
}

TEST(Pickle, ReadsEveryKindOfValue) {
  // Python: (None, True, False, 255, -2, 65535, 2**31-1, -1 (LONG1), 1.5, "a", ["b", "c"], {"k": ()})
  const std::string value =
      std::string("(N\x88\x89K\xffJ\xfe\xff\xff\xffM\xff\xffJ\xff\xff\xff\x7f\x8a\x01\xff", 22) +
      std::string("G\x3f\xf8\0\0\0\0\0\0", 9) + std::string("X\1\0\0\0a", 6) +
      std::string("](\x8c\1bU\1ce", 9) + std::string("}T\1\0\0\0k)s", 9) + "t";
  const Pickle pickle = read(pickle_of(value));
  const auto& items = pickle.root->items;
  ASSERT_EQ(items.size(), 12U);
  std::vector<Kind> kinds;
  std::vector<std::int64_t> numbers;
  for (const PickleValue* item : items) {
    kinds.push_back(item->kind);
    numbers.push_back(item->number);
  }
  EXPECT_THAT(kinds, testing::ElementsAre(Kind::kNone, Kind::kBool, Kind::kBool, Kind::kInt, Kind::kInt,
                                          Kind::kInt, Kind::kInt, Kind::kInt, Kind::kNumber, Kind::kText,
                                          Kind::kList, Kind::kDict));
  EXPECT_THAT(numbers, testing::ElementsAre(0, 1, 0, 255, -2, 65535, 2147483647, -1, 0, 0, 0, 0));
  EXPECT_EQ(items[9]->text, "a");
  EXPECT_EQ(items[10]->items[1]->text, "c");
  EXPECT_EQ(items[11]->items[0]->text, "k");
  EXPECT_EQ(items[11]->items[1]->kind, Kind::kTuple);
}

TEST(Pickle, EndsAtItsStopAndKeepsItsMemo) {
  // ["x", "x", the list itself] by protocol 4: frame, MEMOIZE, BINGET, APPEND.
  const std::string bytes = std::string(
      "\x80\4\x95\x10\0\0\0\0\0\0\0]\x94\x8c\1x\x94"
      "a"
      "h\1"
      "a"
      "h\0"
      "a.",
      25);
  const Pickle pickle = read(bytes + "what follows");
  EXPECT_EQ(pickle.size, bytes.size());
  ASSERT_EQ(pickle.root->items.size(), 3U);
  EXPECT_EQ(pickle.root->items[0], pickle.root->items[1]);
  EXPECT_EQ(pickle.root->items[2], pickle.root);
}

TEST(Pickle, CallsNothing) {
  const Pickle pickle = read(pickle_of(pickled_call(pickled_global("torch", "FloatStorage"), {pickled(3)})));
  EXPECT_EQ(pickle.root->kind, Kind::kCall);
  EXPECT_EQ(pickle.root->items[0]->text, "torch.FloatStorage");
  EXPECT_EQ(pickle.root->items[1]->items[0]->number, 3);
  // An OrderedDict with attributes (a state dict's _metadata) is a dictionary.
  const std::string dict = pickled_global("collections", "OrderedDict") + ")R";
  const Pickle built = read(pickle_of(dict + pickled("k") + "Ns" + "}b"));
  EXPECT_EQ(built.root->kind, Kind::kDict);
  EXPECT_EQ(built.root->items.size(), 2U);
}

TEST(Pickle, RefusesEveryOtherNameByName) {
  const std::vector<std::pair<std::string, std::string>> names = {
      {"os", "system"},          {"posix", "system"},        {"builtins", "eval"},
      {"builtins", "getattr"},   {"numpy", "ndarray"},       {"numpy.core.multiarray", "_reconstruct"},
      {"torch", "load"},         {"torch.hub", "load"},      {"subprocess", "Popen"},
      {"collections", "deque"},  {"torch", "FloatStorage2"}, {"collections.OrderedDict", "fromkeys"},
      {"torch.FloatStorage", ""}};
  for (const auto& [module, name] : names) {
    const std::string expected = "file.bin: the pickle asks for '" + module + "." + name + "', which is not";
    EXPECT_THAT(refused(pickled_call(pickled_global(module, name), {pickled("echo")})), HasSubstr(expected));
    EXPECT_THAT(refused(pickled(module) + pickled(name) + "\x93"), HasSubstr(expected));
  }
  // A name that would make the message more than a line.
  const std::string odd =
      refused(pickled(std::string("a\nb\x1b[2J")) + pickled(std::string(5000, 'c')) + "\x93");
  EXPECT_THAT(odd, AllOf(HasSubstr("asks for 'a?b?[2J.ccc"), Not(HasSubstr("\n"))));
  EXPECT_LT(odd.size(), 300U);
}

TEST(Pickle, RefusesWhatIsNotAProgramForDictionaries) {
  EXPECT_THAT(refusal([] { read(""); }), HasSubstr("does not begin as a pickle"));
  EXPECT_THAT(refusal([] { read("(lp0\n."); }), HasSubstr("does not begin as a pickle"));
  EXPECT_THAT(refusal([] { read("\x80\x06N."); }), HasSubstr("protocol 6"));
  EXPECT_THAT(refusal([] { read("\x80\x01N."); }), HasSubstr("protocol 1"));
  EXPECT_THAT(refusal([] { read("\x80\x02N"); }), HasSubstr("ends in the middle"));
  // INST, OBJ, NEWOBJ, EXT1, PERSID, FLOAT, DUP.
  for (const char opcode : std::string("io\x81\x82PF2")) {
    EXPECT_THAT(refused(std::string("NN") + opcode), HasSubstr("has the opcode 0x"));
  }
  EXPECT_THAT(refused(""), HasSubstr("empty stack"));
  EXPECT_THAT(refused("NN"), HasSubstr("more than one value"));
  EXPECT_THAT(refused("(N"), HasSubstr("more than one value"));
  EXPECT_THAT(refused("N("), HasSubstr("empty stack"));
  EXPECT_THAT(refused("N(a"), HasSubstr("empty stack"));
  EXPECT_THAT(refused("t"), HasSubstr("mark too few"));
  EXPECT_THAT(refused("N\x87"), HasSubstr("empty stack"));
  EXPECT_THAT(refused("h\x05"), HasSubstr("entry 5 of its memo"));
  EXPECT_THAT(refused("NNa"), HasSubstr("adds items to None"));
  EXPECT_THAT(refused("}(Nu"), HasSubstr("adds items to a dictionary"));
  EXPECT_THAT(refused("](NNu"), HasSubstr("adds items to a list"));
  EXPECT_THAT(refused("NNb"), HasSubstr("gives attributes (None) to None"));
  EXPECT_THAT(refused("N)R"), HasSubstr("calls None with a tuple"));
  EXPECT_THAT(refused(pickled_global("torch", "FloatStorage") + "NR"), HasSubstr("with None"));
  EXPECT_THAT(refused("NN\x93"), HasSubstr("name is no text"));
  EXPECT_THAT(refused(std::string("c") + std::string(1000, 'x')), HasSubstr("does not end"));
  EXPECT_THAT(refused("X\xff\xff\xff\xffzzz"), HasSubstr("ends in the middle"));
  EXPECT_THAT(refused("\x8a\xff"), HasSubstr("ends in the middle"));
}

TEST(Pickle, IsBounded) {
  const std::size_t many = kMaxPickleValues + 1;
  EXPECT_THAT(refused(std::string("(") + std::string(many, 'N') + "t"), HasSubstr("more than 524288 values"));
  EXPECT_THAT(refused(std::string("N") + std::string(many, '\x94')), HasSubstr("more than 524288 values"));
  EXPECT_THAT(refused(std::string(kMaxPickleBytes, '(')), HasSubstr("larger than 4194304 bytes"));
  // Values in one another, deeper than any stack of calls.
  std::string deep = "N";
  for (int i = 0; i < 500000; ++i) deep += "\x85";
  EXPECT_EQ(refused(deep), "accepted");
}

}  // namespace
}  // namespace regroup
