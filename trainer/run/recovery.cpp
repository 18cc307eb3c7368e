#include "trainer/run/recovery.h"

#include <cmath>

#include <fmt/format.h>

namespace regroup {
namespace {

constexpr double kNil = 1e-4;       // of the parent's loss
constexpr double kSmallGap = 0.01;  // nats

// As good as the parent, up to what is too little to measure.
bool reaches(double parent, double loss) { return loss <= parent * (1 + kNil); }

}  // namespace

bool ConversionGap::nil() const { return reaches(parent, converted); }

double recovered_share(const ConversionGap& gap, double loss) {
  if (!std::isfinite(gap.parent) || !std::isfinite(gap.converted) || !std::isfinite(loss)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (gap.nil()) return reaches(gap.parent, loss) ? 1 : 0;
  return (gap.converted - loss) / gap.nats();
}

std::string describe_recovered(const ConversionGap& gap, double share) {
  if (gap.nil()) {
    return share > 0 ? "as good as the parent, and the conversion had lost nothing"
                     : "worse than the parent, though the conversion had lost nothing";
  }
  const std::string recovered = fmt::format("{:.1f} % of the gap recovered", 100 * share);
  if (gap.nats() >= kSmallGap) return recovered;
  return fmt::format("{} (the conversion lost only {:.4f} nats)", recovered, gap.nats());
}

}  // namespace regroup
