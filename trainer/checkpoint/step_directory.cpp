#include "trainer/checkpoint/step_directory.h"

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"

namespace regroup {
namespace {

constexpr const char* kStateFile = "trainer.json";
constexpr const char* kLatestFile = "latest";
constexpr const char* kPartial = ".partial";
constexpr const char* kDeleting = ".deleting";
constexpr const char* kDamaged = ".damaged";

std::string name_of_step(index_t step) { return fmt::format("step-{:08}", step); }

// The step a directory is of, if its name is exactly that of a complete one.
std::optional<index_t> step_of(const std::string& name) {
  constexpr std::size_t kPrefix = 5;
  constexpr std::size_t kMostDigits = 18;  // fits into index_t
  if (!name.starts_with("step-") || name.size() == kPrefix || name.size() > kPrefix + kMostDigits ||
      name.find_first_not_of("0123456789", kPrefix) != std::string::npos) {
    return std::nullopt;
  }
  const index_t step = std::stoll(name.substr(kPrefix));
  return name == name_of_step(step) ? std::optional(step) : std::nullopt;
}

std::string hexadecimal(std::uint64_t value) { return fmt::format("{:016x}", value); }

std::string text_of(const nlohmann::json& json) { return json_text_of_any_bytes(json, 2) + "\n"; }

// Of everything in `state` but the checksum itself.
std::string own_checksum(nlohmann::json state) {
  state.erase("checksum");
  const std::string text = text_of(state);
  return hexadecimal(checksum(std::as_bytes(std::span(text.data(), text.size()))));
}

// The names in a directory, sorted; none where there is no such directory.
std::vector<std::string> names_in(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  const bool there = std::filesystem::exists(directory, error);
  // What cannot be looked at is not empty: a run must not begin anew because of it.
  if (error) throw_file_error("look at", directory, error.value());
  if (!there) return names;
  for (std::filesystem::directory_iterator at(directory, error), end; !error && at != end;
       at.increment(error)) {
    names.push_back(at->path().filename().string());
  }
  if (error) throw_file_error("list", directory, error.value());
  std::sort(names.begin(), names.end());
  return names;
}

// The complete steps in a directory, ascending.
std::vector<index_t> steps_in(const std::filesystem::path& directory) {
  std::vector<index_t> found;
  for (const std::string& name : names_in(directory)) {
    const auto step = step_of(name);
    if (step && std::filesystem::is_directory(directory / name)) found.push_back(*step);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Rank 0's answer, on every rank; its error, on every rank.
template <class Work>
nlohmann::json ask_root(const ProcessGroup& group, Work&& work) {
  std::string answer;
  group.run_on(0, [&] { answer = json_text(nlohmann::json(work())); });
  return parse_json(group.broadcast(answer));
}

// Whether every entry of "files" is {plain name: {"bytes": count, "checksum": text}}.
bool lists_files(const nlohmann::json& state) {
  if (!state.contains("files") || !state["files"].is_object()) return false;
  if (state.contains("block_bytes") &&
      (!state["block_bytes"].is_number_unsigned() || state["block_bytes"].get<std::uint64_t>() == 0)) {
    return false;
  }
  for (const auto& [name, entry] : state["files"].items()) {
    const bool sound = entry.is_object() && entry.contains("bytes") && entry["bytes"].is_number_unsigned() &&
                       entry.contains("checksum") && entry["checksum"].is_string();
    if (!sound || name.empty() || name.find('/') != std::string::npos) return false;
  }
  return true;
}

// A step as its trainer.json describes it, or what is wrong with that file.
struct StepRecord {
  nlohmann::json state;
  std::string damage;
};

StepRecord read_record(const std::filesystem::path& directory) {
  constexpr std::uint64_t kLimit = std::uint64_t{1} << 26;
  const std::filesystem::path file = directory / kStateFile;
  if (!std::filesystem::exists(file)) return {.damage = fmt::format("{} is missing", file.string())};
  const std::string text = read_text(file, kLimit);
  auto state = parse_json_or_discard(text);
  const bool intact = state.is_object() && lists_files(state) && state.contains("checksum") &&
                      state["checksum"] == own_checksum(state) && text == text_of(state);
  if (!intact) return {.damage = fmt::format("{} is damaged", file.string())};
  return {.state = std::move(state)};
}

// Which of the files that `state` lists is not there or does not have its size, if one is so.
std::string wrong_size(const std::filesystem::path& directory, const nlohmann::json& state) {
  for (const auto& [name, entry] : state["files"].items()) {
    const auto path = directory / name;
    const auto expected = entry.at("bytes").get<std::uint64_t>();
    std::error_code error;
    const auto found = std::filesystem::file_size(path, error);
    if (error == std::errc::no_such_file_or_directory) return fmt::format("{} is missing", path.string());
    if (error) throw_file_error("look at", path, error.value());
    if (found != expected) {
      return fmt::format("{} is damaged: it has {} bytes, not the {} that were written", path.string(), found,
                         expected);
    }
  }
  return "";
}

[[noreturn]] void refuse(const std::string& damage, const std::filesystem::path& directory) {
  throw UserError("{}; remove {} to go on from an earlier checkpoint", damage, directory.string());
}

// The checksum of a file that has these bytes.
std::uint64_t tree_checksum(std::span<const std::byte> bytes, std::uint64_t block_bytes) {
  std::vector<std::uint64_t> blocks;
  for (std::size_t begin = 0; begin < bytes.size(); begin += block_bytes) {
    blocks.push_back(
        checksum(bytes.subspan(begin, std::min<std::size_t>(block_bytes, bytes.size() - begin))));
  }
  return checksum(std::as_bytes(std::span(blocks)));
}

// `latest` is for people and scripts; the step is there whether or not it can be written.
void point_latest_to(const std::filesystem::path& step) {
  try {
    write_text(step.parent_path() / kLatestFile, step.filename().string() + "\n");
  } catch (const Error&) {
  }
}

// Of a name like step-00012000.partial that only `ending` makes different from a step's.
bool is_step_with(const std::string& name, std::string_view ending) {
  return name.ends_with(ending) && step_of(name.substr(0, name.size() - ending.size())).has_value();
}

// Some bytes of one of several files.
struct FilePart {
  std::size_t file = 0;
  std::uint64_t begin = 0, bytes = 0;
};

// The blocks of the files, counted through all of them, that are `rank`'s of `ranks`.
std::vector<FilePart> blocks_of(const std::vector<std::uint64_t>& sizes, std::uint64_t block_bytes,
                                std::uint64_t rank, std::uint64_t ranks) {
  std::vector<FilePart> result;
  std::uint64_t number = 0;
  for (std::size_t f = 0; f < sizes.size(); ++f) {
    for (std::uint64_t begin = 0; begin < sizes[f]; begin += block_bytes) {
      if (number++ % ranks == rank) {
        result.push_back({.file = f, .begin = begin, .bytes = std::min(block_bytes, sizes[f] - begin)});
      }
    }
  }
  return result;
}

std::vector<std::uint64_t> checksums_of(const std::vector<FilePart>& parts,
                                        const std::vector<std::filesystem::path>& files,
                                        Heartbeat& heartbeat) {
  constexpr std::size_t kAhead = 8;       // parts: the disk has work while one is summed
  std::map<std::size_t, InputFile> open;  // those that parts lie in from the present one on
  std::vector<std::uint64_t> result;
  std::vector<std::byte> memory;
  std::size_t asked = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    heartbeat.beat("checking a checkpoint");
    for (; asked < std::min(parts.size(), i + kAhead); ++asked) {
      const FilePart& part = parts[asked];
      const auto file = open.try_emplace(part.file, files[part.file]).first;
      file->second.prefetch(part.begin, part.bytes);
    }
    memory.resize(parts[i].bytes);
    open.at(parts[i].file).read(parts[i].begin, memory);
    open.erase(open.begin(), open.lower_bound(parts[i].file));
    result.push_back(checksum(memory));
  }
  return result;
}

}  // namespace

std::vector<std::uint64_t> tree_checksums(const ProcessGroup& group,
                                          const std::vector<std::filesystem::path>& files,
                                          std::uint64_t block_bytes) {
  const std::vector<std::uint64_t> sizes = ask_root(group, [&] {
    std::vector<std::uint64_t> found;
    found.reserve(files.size());
    for (const auto& file : files) found.push_back(InputFile(file).size());
    return found;
  });
  const auto ranks = static_cast<std::uint64_t>(group.size());
  const auto me = static_cast<std::uint64_t>(group.rank());
  std::vector<std::uint64_t> mine;
  group.run_together(
      [&] { mine = checksums_of(blocks_of(sizes, block_bytes, me, ranks), files, group.heartbeat()); });
  const auto blocks = group.all_gather(mine);
  std::vector<std::uint64_t> result;
  std::uint64_t number = 0;
  for (const std::uint64_t size : sizes) {
    std::vector<std::uint64_t> of_file;
    for (std::uint64_t offset = 0; offset < size; offset += block_bytes, ++number) {
      of_file.push_back(blocks[number % ranks][number / ranks]);
    }
    result.push_back(checksum(std::as_bytes(std::span(of_file))));
  }
  return result;
}

PendingStep::PendingStep(std::filesystem::path path, std::filesystem::path final_path)
    : path_(std::move(path)), final_path_(std::move(final_path)) {}

PendingStep::PendingStep(PendingStep&& other) noexcept
    : path_(std::exchange(other.path_, {})),
      final_path_(std::move(other.final_path_)),
      texts_(std::move(other.texts_)) {}

PendingStep::~PendingStep() {
  if (path_.empty()) return;
  std::error_code ignored;  // what cannot be removed now, the next job's prepare() removes
  std::filesystem::remove_all(path_, ignored);
}

void PendingStep::write_text(const std::string& name, std::string_view text) {
  regroup::write_text(path_ / name, text);
  texts_[name] = text;
}

void PendingStep::commit(nlohmann::json state, std::map<std::string, FileRecord> files,
                         std::uint64_t block_bytes) {
  check(!path_.empty() && state.is_object(),
        "a checkpoint is committed twice, or its state is not an object");
  for (const auto& [name, text] : texts_) {
    const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
    files[name] = {.bytes = text.size(), .checksum = tree_checksum(bytes, block_bytes)};
  }
  state["block_bytes"] = block_bytes;
  state["files"] = nlohmann::json::object();
  for (const auto& [name, record] : files) {
    state["files"][name] = {{"bytes", record.bytes}, {"checksum", hexadecimal(record.checksum)}};
  }
  state["checksum"] = own_checksum(state);
  regroup::write_text(path_ / kStateFile, text_of(state));
  sync_to_disk(path_);
  rename_durably(path_, final_path_);
  path_.clear();
  point_latest_to(final_path_);
}

CheckpointStore::CheckpointStore(ProcessGroup group, std::filesystem::path run_directory)
    : group_(std::move(group)), directory_(std::move(run_directory)) {
  directory_ /= "checkpoints";
}

void CheckpointStore::prepare() const {
  group_.run_on(0, [&] {
    regroup::create_directories(directory_);
    for (const std::string& name : names_in(directory_)) {
      std::error_code ignored;  // no run is refused for rubbish; create() insists where it must
      if (name.ends_with(kPartial) || name.ends_with(kDeleting)) {
        std::filesystem::remove_all(directory_ / name, ignored);
      }
    }
    sync_to_disk(directory_.parent_path());
  });
}

std::vector<index_t> CheckpointStore::steps() const {
  return ask_root(group_, [&] { return steps_in(directory_); });
}

std::optional<index_t> CheckpointStore::latest() const {
  const auto all = steps();
  return all.empty() ? std::nullopt : std::optional(all.back());
}

std::vector<std::string> CheckpointStore::damaged() const {
  return ask_root(group_, [&] {
    std::vector<std::string> names = names_in(directory_);
    std::erase_if(names, [](const std::string& name) { return !is_step_with(name, kDamaged); });
    return names;
  });
}

std::filesystem::path CheckpointStore::path_of(index_t step) const { return directory_ / name_of_step(step); }

std::filesystem::path CheckpointStore::partial_path_of(index_t step) const {
  return directory_ / (name_of_step(step) + kPartial);
}

PendingStep CheckpointStore::create(index_t step) const {
  check(step >= 0, "a checkpoint of step {}", step);
  if (std::filesystem::exists(path_of(step))) {
    throw UserError("{} exists already; choose another run directory, or remove it", path_of(step).string());
  }
  const std::filesystem::path path = partial_path_of(step);
  remove_tree(path);
  regroup::create_directories(path);
  return PendingStep(path, path_of(step));
}

void CheckpointStore::set_aside(index_t step) const {
  group_.run_on(0, [&] {
    const std::filesystem::path aside = directory_ / (name_of_step(step) + kDamaged);
    remove_tree(aside);
    rename_durably(path_of(step), aside);
    const std::vector<index_t> left = steps_in(directory_);
    if (!left.empty()) point_latest_to(path_of(left.back()));
  });
}

nlohmann::json step_state(const ProcessGroup& group, const std::filesystem::path& directory) {
  return ask_root(group, [&] {
    StepRecord record = read_record(directory);
    if (!record.damage.empty()) refuse(record.damage, directory);
    return record.state;
  });
}

std::optional<std::string> find_damage(const ProcessGroup& group, const std::filesystem::path& directory,
                                       Verification extent) {
  const nlohmann::json known = ask_root(group, [&] {
    StepRecord record = read_record(directory);
    if (record.damage.empty()) record.damage = wrong_size(directory, record.state);
    return record.damage.empty() ? record.state : nlohmann::json(record.damage);
  });
  if (known.is_string()) return known.get<std::string>();
  std::vector<std::string> names;
  std::vector<std::filesystem::path> files;
  for (const auto& [name, entry] : known["files"].items()) {
    if (extent == Verification::kSmall && name.ends_with(".safetensors")) continue;
    names.push_back(name);
    files.push_back(directory / name);
  }
  const auto checksums = tree_checksums(group, files, known.value("block_bytes", kChecksumBlock));
  std::map<std::string, std::uint64_t> found;
  for (std::size_t i = 0; i < names.size(); ++i) found.emplace(names[i], checksums[i]);
  return compare_checksums(directory, known, found);
}

std::optional<std::string> compare_checksums(const std::filesystem::path& directory,
                                             const nlohmann::json& state,
                                             const std::map<std::string, std::uint64_t>& found) {
  for (const auto& [name, checksum] : found) {
    const auto expected = state.at("files").at(name).at("checksum").get<std::string>();
    if (hexadecimal(checksum) == expected) continue;
    return fmt::format("{} is damaged: its checksum is {}, not {}", (directory / name).string(),
                       hexadecimal(checksum), expected);
  }
  return std::nullopt;
}

void verify_step(const ProcessGroup& group, const std::filesystem::path& directory, Verification extent) {
  const std::optional<std::string> damage = find_damage(group, directory, extent);
  if (!damage) return;
  group.run_together([&] { refuse(*damage, directory); });
}

void CheckpointStore::prune(index_t keep_last, index_t keep_every) const {
  const std::vector<index_t> all = steps_in(directory_);
  const auto kept = static_cast<std::size_t>(std::max<index_t>(keep_last, 1));
  for (std::size_t i = 0; i + kept < all.size(); ++i) {
    if (keep_every > 0 && all[i] % keep_every == 0) continue;
    const auto path = path_of(all[i]);
    auto aside = path;
    aside += kDeleting;
    remove_tree(aside);
    rename_durably(path, aside);
    remove_tree(aside);
  }
}

}  // namespace regroup
