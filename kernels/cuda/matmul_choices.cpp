#include "kernels/cuda/matmul_choices.h"

#include <charconv>
#include <utility>

#include "kernels/base/json.h"

namespace regroup {
namespace {

constexpr std::size_t kDigits = 16;  // of a word

std::string hexadecimal(const MatmulAlgorithm& algorithm) {
  std::string text;
  for (const std::uint64_t word : algorithm) text += fmt::format("{:016x}", word);
  return text;
}

MatmulAlgorithm algorithm_of(const std::string& shape, const std::string& text) {
  MatmulAlgorithm algorithm{};
  bool good = text.size() == kDigits * algorithm.size();
  for (std::size_t i = 0; good && i < algorithm.size(); ++i) {
    const char* begin = text.data() + i * kDigits;
    const auto [end, error] = std::from_chars(begin, begin + kDigits, algorithm[i], 16);
    good = error == std::errc() && end == begin + kDigits;
  }
  if (!good) {
    throw UserError(
        "the table of matrix products has '{}' for the product '{}', where {} hexadecimal digits belong",
        text, shape, kDigits * algorithm.size());
  }
  return algorithm;
}

}  // namespace

std::string name_of(const MatmulShape& s) {
  return fmt::format("{} to {}, {} x {} x {}, rows {} {} {}, aligned {} {} {}{}{}{}", name_of(s.type),
                     name_of(s.c_type), s.m, s.n, s.k, s.a_stride, s.b_stride, s.c_stride, s.a_alignment,
                     s.b_alignment, s.c_alignment, s.transpose_a ? ", transpose a" : "",
                     s.transpose_b ? ", transpose b" : "", s.accumulate ? ", add" : "");
}

std::optional<MatmulAlgorithm> MatmulChoices::find(const std::string& shape) const {
  const auto found = algorithms_.find(shape);
  return found == algorithms_.end() ? std::nullopt : std::optional(found->second);
}

std::string MatmulChoices::write() const {
  nlohmann::json products = nlohmann::json::object();
  for (const auto& [shape, algorithm] : algorithms_) products[shape] = hexadecimal(algorithm);
  return json_text(nlohmann::json{{"library", library_}, {"device", device_}, {"products", products}}, 2) +
         "\n";
}

bool MatmulChoices::read(const std::string& text) {
  std::map<std::string, MatmulAlgorithm> algorithms;
  try {
    const nlohmann::json table = parse_json(text);
    const bool mine = table.at("library").get<std::uint64_t>() == library_ &&
                      table.at("device").get<std::string>() == device_;
    for (const auto& [shape, algorithm] : table.at("products").items()) {
      algorithms[shape] = algorithm_of(shape, algorithm.get<std::string>());
    }
    if (!mine) return false;
  } catch (const nlohmann::json::exception& error) {
    throw UserError("the table of matrix products cannot be read: {}", error.what());
  }
  algorithms.merge(algorithms_);
  algorithms_ = std::move(algorithms);
  return true;
}

}  // namespace regroup
