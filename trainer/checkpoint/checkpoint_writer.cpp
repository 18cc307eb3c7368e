#include "trainer/checkpoint/checkpoint_writer.h"

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"

namespace regroup {

CheckpointWriter::CheckpointWriter(const ProcessGroup& world, const Layout& layout, Backend& backend,
                                   CheckpointStore store, const std::vector<TensorSet>& sets,
                                   const Options& options)
    : world_(world), store_(std::move(store)), options_(options), files_(plan_files(sets, options.files)) {
  check(options.block_bytes > 0 && options.block_bytes % 8 == 0, "blocks of {} bytes", options.block_bytes);
  const int dp_rank = world.rank() / layout.tensor_parallel;
  const int tp_rank = world.rank() % layout.tensor_parallel;
  const ProcessGroup tp = world.split(dp_rank, tp_rank);
  std::vector<ShardedTensor> tensors = all_tensors(sets);
  std::vector<HeldTensor> held = gather_slices(tp, tensors);
  blocks_ = plan_blocks(files_, held, layout, options.block_bytes);
  std::vector<Block> of_group;
  std::size_t share = 0;
  for (const Block& block : blocks_) {
    if (block.dp_rank != dp_rank) continue;
    of_group.push_back(block);
    if (block.tp_rank == tp_rank) ++share;
  }
  const std::uint64_t memory = options.memory > 0 ? options.memory : share * options.block_bytes;
  // The same on every rank of the group, for their rounds are.
  std::vector<std::uint64_t> slots = {std::max<std::uint64_t>(1, memory / options.block_bytes)};
  tp.all_reduce(slots, ReduceOp::kMax);
  const auto used = std::min<std::uint64_t>(slots[0], share);
  gather_ = std::make_unique<BlockGather>(BlockGather::Parts{.tp = tp,
                                                             .backend = backend,
                                                             .files = files_,
                                                             .tensors = std::move(tensors),
                                                             .held = std::move(held),
                                                             .blocks = std::move(of_group)},
                                          static_cast<std::size_t>(slots[0]));
  staging_ = BlockMemory(backend, used * options.block_bytes);
  checksums_.resize(share);
  open_.resize(files_.files.size());
}

std::span<std::byte> CheckpointWriter::idle_memory() const {
  check(!pending(), "a save's memory is asked for while it is under way");
  const auto used = static_cast<std::uint64_t>(staging_.own_bytes()) - kDirectAlignment;
  return {staging_.data(), static_cast<std::size_t>(used)};
}

CheckpointWriter::~CheckpointWriter() { cancelled_ = true; }

void CheckpointWriter::save(index_t step, nlohmann::json state,
                            const std::map<std::string, std::string>& texts) {
  check(!pending(), "a checkpoint is begun while another one is under way");
  begin(step, texts);
  state_ = std::move(state);
  const std::size_t rounds = gather_->rounds();
  // Every rank takes part in every round, also where it has failed: nobody waits for it.
  std::exception_ptr failure;
  const auto attempt = [&failure](auto&& work) {
    if (failure != nullptr) return;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  for (std::size_t round = 0; round < rounds; ++round) {
    world_.heartbeat().beat("saving a checkpoint");
    gather_->gather(round, staging_.data(), options_.block_bytes);
    if (round + 1 < rounds) attempt([&] { write(round); });
  }
  phase_ = Phase::kWriting;
  job_.start([this, rounds, failure] {
    if (failure != nullptr) std::rethrow_exception(failure);
    if (rounds > 0) write(rounds - 1);
    sync();
  });
}

void CheckpointWriter::begin(index_t step, const std::map<std::string, std::string>& texts) {
  step_ = step;
  cancelled_ = false;
  for (std::optional<SharedOutputFile>& file : open_) file.reset();  // of a save that failed
  world_.run_on(0, [&] {
    PendingStep pending = store_.create(step);
    for (const auto& [name, text] : files_.indexes) pending.write_text(name, text);
    for (const auto& [name, text] : texts) pending.write_text(name, text);
    for (const PlannedFile& file : files_.files) create_file(pending.path() / file.name, file.bytes);
    pending_.emplace(std::move(pending));
  });
}

void CheckpointWriter::write(std::size_t round) {
  const std::byte* from = staging_.data();
  for (const Block& block : gather_->mine(round)) {
    if (cancelled_) return;
    const std::span bytes(from, static_cast<std::size_t>(block.bytes));
    checksums_[block.slot] = checksum(bytes);
    std::optional<SharedOutputFile>& file = open_[block.file];
    if (!file) file.emplace(store_.partial_path_of(step_) / files_.files[block.file].name);
    file->write(block.begin, bytes);
    ++written_;
    from += options_.block_bytes;
  }
}

void CheckpointWriter::sync() {
  for (std::optional<SharedOutputFile>& file : open_) {
    if (cancelled_) return;
    if (file) file->sync();
    file.reset();
    ++written_;
  }
}

std::optional<index_t> CheckpointWriter::advance(bool give_up) {
  // A save that fails is over: whoever catches the error may go on without it.
  const Phase phase = std::exchange(phase_, Phase::kIdle);
  if (phase == Phase::kIdle) return std::nullopt;
  if (give_up) cancelled_ = true;
  wait();
  try {
    world_.run_together([this] { job_.rethrow(); });
  } catch (...) {
    pending_.reset();  // gives its disk space back
    throw;
  }
  if (phase == Phase::kCommitting) {
    pending_.reset();
    return step_;
  }
  auto files = records();
  if (pending_) {
    job_.start([this, files = std::move(files)] { commit(files); });
  }
  phase_ = Phase::kCommitting;
  return std::nullopt;
}

void CheckpointWriter::commit(const std::map<std::string, FileRecord>& files) {
  pending_->commit(std::move(state_), files, options_.block_bytes);
  complaint_.clear();
  try {
    store_.prune(options_.keep_last, options_.keep_every);
  } catch (const Error& error) {
    complaint_ = error.what();
  }
}

// For this rank's work; as long as it moves on, the rank counts as alive.
void CheckpointWriter::wait() {
  constexpr std::chrono::milliseconds kLook(500);
  std::uint64_t seen = 0;
  while (!job_.wait_for(kLook)) {
    const std::uint64_t written = written_;
    if (std::exchange(seen, written) != written) world_.heartbeat().beat("writing a checkpoint");
  }
}

std::optional<index_t> CheckpointWriter::finish() {
  std::optional<index_t> saved;
  while (pending()) saved = advance();
  return saved;
}

// Of the files, from every rank's checksums of its blocks. Collective.
std::map<std::string, FileRecord> CheckpointWriter::records() {
  const auto checksums = file_checksums(files_, blocks_, world_.all_gather(checksums_), gather_->ranks());
  std::map<std::string, FileRecord> result;
  for (std::size_t f = 0; f < files_.files.size(); ++f) {
    const PlannedFile& file = files_.files[f];
    result.emplace(file.name, FileRecord{.bytes = file.bytes, .checksum = checksums[f]});
  }
  return result;
}

}  // namespace regroup
