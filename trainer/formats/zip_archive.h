// Zip archives (PKWARE's APPNOTE.TXT 6.3.10) whose entries are stored as they are, as torch.save() writes
// them. Nothing is ever unpacked: an entry is a range of the file's bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/file.h"

namespace regroup {

struct ZipEntry {
  std::string name;         // to look things up by; no path on this machine
  std::uint64_t begin = 0;  // of its data, from the start of the file
  std::uint64_t bytes = 0;
};

// Bounds of what is read for the directory.
inline constexpr std::uint64_t kMaxZipEntries = 100'000;
inline constexpr std::uint64_t kMaxZipDirectoryBytes = std::uint64_t{16} << 20;

// The entries, by position in the file; zip64 too. UserError "<file>: ..." naming the entry where one is
// compressed or encrypted, lies on another disk, reaches beyond the entries' part of the file, overlaps
// another, is there twice, or is described otherwise at its place than in the directory; and for a file that
// is no zip archive or does not end as one (truncated, or followed by a comment).
std::vector<ZipEntry> read_zip_directory(const InputFile& file);

}  // namespace regroup
