// A token corpus on disk, read through memory maps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

#include "data/corpus_manifest.h"
#include "kernels/base/heartbeat.h"

namespace regroup {

inline constexpr std::string_view kManifestFile = "manifest.json";

// A folder that corpus_writer.h made:
//   manifest.json  tokenizer.model  tokens-00000.bin  documents-00000.bin  tokens-00001.bin  ...
// Each split is one sequence of tokens, its shards end to end, documents end to end without separators.
// Immutable; read() may be called by several threads at once.
class Corpus {
 public:
  // Opens a corpus: reads the manifest, maps the shards, compares the sizes (not the checksums, see
  // verify()). Throws UserError naming the file that is missing, damaged or of another size than the manifest
  // says.
  explicit Corpus(std::filesystem::path folder);
  ~Corpus();
  Corpus(Corpus&&) noexcept;
  Corpus& operator=(Corpus&&) noexcept;
  Corpus(const Corpus&) = delete;
  Corpus& operator=(const Corpus&) = delete;

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  std::filesystem::path tokenizer_file() const { return folder_ / manifest_.tokenizer_file; }
  std::int64_t vocab_size() const { return static_cast<std::int64_t>(manifest_.vocab_size); }
  std::int64_t tokens(Split split) const { return static_cast<std::int64_t>(manifest_.tokens(split)); }
  // A 64-bit name of the corpus' whole content (a checksum of the manifest, which holds all others).
  std::uint64_t fingerprint() const { return fingerprint_; }

  // The tokens [begin, begin + out.size()) of `split`, which may span shards. InternalError for a range
  // outside the split; UserError naming the shard for a token that is no piece of the vocabulary.
  void read(Split split, std::int64_t begin, std::span<std::int32_t> out) const;

  // For each document of the split's shard number `shard`, the index of its first token in the split.
  std::vector<std::int64_t> document_starts(Split split, std::size_t shard) const;

  // Reads every byte of the shards number `part`, `part` + `parts`, ... (over both splits) and of the
  // tokenizer, and compares the checksums. Throws UserError naming the first file that differs. `heartbeat`,
  // where there is one, gets a beat for every megabyte.
  void verify(int part = 0, int parts = 1, Heartbeat* heartbeat = nullptr) const;

 private:
  class MappedFile;
  struct MappedShard;

  std::filesystem::path folder_;
  Manifest manifest_;
  std::uint64_t fingerprint_ = 0;
  std::array<std::vector<MappedShard>, 2> shards_;
};

}  // namespace regroup
