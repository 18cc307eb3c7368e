// How much of what a conversion cost has been won back: the share of its gap in held-out loss.
#pragma once

#include <limits>
#include <string>

namespace regroup {

// Held-out losses before an uptraining's first step, in nats per token. NaN: not known.
struct ConversionGap {
  double parent = std::numeric_limits<double>::quiet_NaN();
  double converted = std::numeric_limits<double>::quiet_NaN();  // without any training

  double nats() const { return converted - parent; }
  // The conversion lost nothing, or less than 1e-4 of the parent's loss: too little to measure a share of.
  bool nil() const;
};

// (converted - loss) / (converted - parent): 0 right after the conversion, 1 at the parent's loss. Above 1
// where the model is better than the parent, negative where it is worse than the conversion alone.
//
// Of a nil gap there is no share: then 1 where the loss is at most 1e-4 above the parent's, relatively (as
// it is right after such a conversion), and 0 where training has made the model worse than that.
//
// NaN where one of the three losses is not finite; so is no share that a run could wait for.
double recovered_share(const ConversionGap& gap, double loss);

// For a log line: "93.5 % of the gap recovered", with "(the conversion lost only 0.0040 nats)" where the gap
// is below 0.01 nats, for then the share jumps with every evaluation; or what is to say of a nil gap.
std::string describe_recovered(const ConversionGap& gap, double share);

}  // namespace regroup
