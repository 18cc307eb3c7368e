// Every option once: its name, the member of Options it sets, its default and its help.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <boost/program_options.hpp>

#include "trainer/options.h"

namespace regroup {

// "pretrain" and so on.
const std::vector<std::pair<std::string, Mode>>& modes();

boost::program_options::options_description describe_modes(Options& options);
// The other options, by group. notify() sets the members of `options`, which outlives the descriptions.
std::vector<boost::program_options::options_description> describe_options(Options& options);
// Both in one.
boost::program_options::options_description all_options(Options& options);

}  // namespace regroup
