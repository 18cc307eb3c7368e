// A run's losses as a picture: a self-contained SVG that a browser, a README or a slide shows as it is.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace regroup {

// A point with a coordinate that is not finite is a gap.
struct PlotPoint {
  double x = 0;
  double y = 0;
};

enum class PlotStyle {
  kLine,      // a line; for what is known at every step
  kSmoothed,  // the line smoothed, over the raw values drawn pale; for noisy losses
  kMarkers,   // a line with a marker at each point; for what is measured now and then
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points = {};  // by ascending x
  PlotStyle style = PlotStyle::kLine;
};

// A dashed horizontal line, for example the unigram loss or the parent's held-out loss. NaN: none.
struct PlotReference {
  std::string name;
  double y = 0;
};

struct LossPlot {
  std::string title;
  std::string x_label = "step";
  std::string y_label = "loss (nats per token)";
  std::vector<PlotSeries> series = {};
  std::vector<PlotReference> references = {};  // the legend gives their values
  bool rising = false;                         // the legend is at the bottom, out of a rising line's way
};

// Each y replaced by the mean of all, weighted with 2^(-distance in x / half_life): both sides count, so the
// line does not lag behind. Points that are not finite stay gaps. A half-life of 0 changes nothing.
std::vector<PlotPoint> smoothed(const std::vector<PlotPoint>& points, double half_life);

// Round tick values (1, 2, 2.5 or 5 times a power of ten apart) within [low, high], about `count` of them.
std::vector<double> nice_ticks(double low, double high, int count);

// The plot as an SVG document, a function of `plot` alone. Colours are those of Okabe and Ito
// (jfly.uni-koeln.de/color), told apart by all common kinds of colour vision; markers and dashes differ too.
// Text is escaped. Series of any length give a document of bounded size. With nothing finite to draw it says
// "no data".
std::string loss_plot_svg(const LossPlot& plot);

// Writes it; UserError where `path` cannot be written.
void write_loss_plot(const std::filesystem::path& path, const LossPlot& plot);

}  // namespace regroup
