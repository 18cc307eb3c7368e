#include "trainer/run/loss_plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string_view>

#include <fmt/format.h>

#include "kernels/base/file.h"
#include "trainer/run/progress.h"

namespace regroup {
namespace {

// In pixels.
constexpr double kWidth = 880;
constexpr double kHeight = 520;
constexpr double kLeft = 72;
constexpr double kRight = kWidth - 40;
constexpr double kTop = 56;
constexpr double kBottom = kHeight - 60;
constexpr double kLegendRow = 21;
constexpr double kLegendCharacter = 6.7;  // mean width at 13 px

constexpr std::array<std::string_view, 7> kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                      "#E69F00", "#56B4E9", "#000000"};
constexpr std::array<std::string_view, 4> kDashes = {"7 4", "2 3", "9 3 2 3", "14 4"};
constexpr std::string_view kGrey = "#555555";

constexpr std::size_t kBins = 800;  // about one for each pixel of the plot's width

using Points = std::vector<PlotPoint>;

// Far beyond any loss, and far enough from the end of double's range for the arithmetic below.
bool is_finite(double value) { return std::abs(value) < 1e100; }
bool is_finite(const PlotPoint& p) { return is_finite(p.x) && is_finite(p.y); }

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;  // XML 1.0 has no control characters
    }
  }
  return out;
}

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void include(double value) {
    if (!is_finite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return low > high; }
  // Room around the values; a single value gets some too.
  Range widened(double share) const {
    const double size = high - low;
    const double margin = size > 0 ? share * size : std::max(std::abs(high) * 0.05, 0.5);
    return {low - margin, high + margin};
  }
};

// At most four points for each of kBins equal stretches of x: the first, the lowest, the highest and the
// last, so that the line looks as it would with all of them. Gaps of a thinned series are left out.
Points thinned(const Points& points) {
  if (points.size() <= 4 * kBins) return points;
  Points finite;
  std::copy_if(points.begin(), points.end(), std::back_inserter(finite),
               [](const PlotPoint& p) { return is_finite(p); });
  if (finite.size() <= 4 * kBins) return finite;
  const double first = finite.front().x;
  const double scale = kBins / std::max(finite.back().x - first, std::numeric_limits<double>::min());
  const auto bin_of = [&](const PlotPoint& p) { return std::floor((p.x - first) * scale); };
  const auto below = [](const PlotPoint& a, const PlotPoint& b) { return a.y < b.y; };
  Points out;
  for (auto begin = finite.begin(); begin != finite.end();) {
    const double bin = bin_of(*begin);
    const auto end = std::find_if(begin, finite.end(), [&](const PlotPoint& p) { return bin_of(p) != bin; });
    std::array kept = {begin, std::min_element(begin, end, below), std::max_element(begin, end, below),
                       end - 1};
    std::sort(kept.begin(), kept.end());
    const auto kept_end = std::unique(kept.begin(), kept.end());
    std::for_each(kept.begin(), kept_end, [&](const auto& point) { out.push_back(*point); });
    begin = end;
  }
  return out;
}

// The smoothed line of a series: half-life 1/200 of its extent.
Points smooth_line(const Points& points) {
  Range x;
  for (const auto& p : points) {
    if (is_finite(p)) x.include(p.x);
  }
  return x.empty() ? Points{} : smoothed(points, (x.high - x.low) / 200);
}

std::string tick_label(double value, double spacing) {
  if (value != 0 && (std::abs(value) >= 1e9 || spacing < 1e-4)) return fmt::format("{:g}", value);
  int decimals = 0;
  for (double unit = spacing; decimals < 4 && std::abs(unit - std::round(unit)) > 1e-6; unit *= 10)
    ++decimals;
  if (decimals == 0) return format_count(std::llround(value));
  return fmt::format("{:.{}f}", value == 0 ? 0.0 : value, decimals);
}

// The extent of the points. Of a noisy series that of its line and all but the outermost hundredth of its
// values: a spike may leave the picture.
void include(Range& x, Range& y, const PlotSeries& series) {
  std::vector<double> values;
  for (const auto& p : series.points) {
    if (!is_finite(p)) continue;
    x.include(p.x);
    values.push_back(p.y);
  }
  if (values.empty()) return;
  const std::size_t spared = series.style == PlotStyle::kSmoothed ? values.size() / 200 : 0;
  std::sort(values.begin(), values.end());
  y.include(values[spared]);
  y.include(values[values.size() - 1 - spared]);
  if (series.style != PlotStyle::kSmoothed) return;
  for (const auto& p : smooth_line(series.points)) {
    if (is_finite(p)) y.include(p.y);
  }
}

class Drawing {
 public:
  Drawing(Range x, Range y) : x_(x), y_(y) {}

  void open(const LossPlot& plot);
  void axes();
  void series(const PlotSeries& series, std::size_t index);
  void reference(const PlotReference& reference, std::size_t index);
  void legend(const LossPlot& plot);
  void text(double x, double y, std::string_view attributes, std::string_view content) {
    put("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, attributes, escape(content));
  }
  std::string close() && {
    svg_ += "</svg>\n";
    return std::move(svg_);
  }

 private:
  template <class... Args>
  void put(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(svg_), format, std::forward<Args>(args)...);
  }
  double to_x(double x) const { return kLeft + (x - x_.low) / (x_.high - x_.low) * (kRight - kLeft); }
  double to_y(double y) const { return kBottom - (y - y_.low) / (y_.high - y_.low) * (kBottom - kTop); }
  void polyline(const Points& points, std::string_view attributes);
  void marker(double x, double y, std::size_t index);

  Range x_;
  Range y_;
  std::string svg_;
};

void Drawing::open(const LossPlot& plot) {
  put("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
      "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#222222\" "
      "role=\"img\">\n"
      "<title>{2}</title>\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n"
      "<clipPath id=\"plot\"><rect x=\"{3}\" y=\"{4}\" width=\"{5}\" height=\"{6}\"/></clipPath>\n",
      kWidth, kHeight, escape(plot.title), kLeft, kTop, kRight - kLeft, kBottom - kTop);
  text(kLeft, 32, "font-size=\"17\" font-weight=\"bold\"", plot.title);
  text((kLeft + kRight) / 2, kHeight - 16, "text-anchor=\"middle\"", plot.x_label);
  const double middle = (kTop + kBottom) / 2;
  text(20, middle, fmt::format("text-anchor=\"middle\" transform=\"rotate(-90 20 {:.1f})\"", middle),
       plot.y_label);
}

void Drawing::axes() {
  const auto x_ticks = nice_ticks(x_.low, x_.high, 8);
  const auto y_ticks = nice_ticks(y_.low, y_.high, 7);
  const auto spacing = [](const std::vector<double>& ticks) {
    return ticks.size() > 1 ? ticks[1] - ticks[0] : 1.0;
  };
  put("<g stroke=\"#e4e4e4\">\n");
  for (const double x : x_ticks) put("<path d=\"M{:.1f} {:.1f}V{:.1f}\"/>\n", to_x(x), kTop, kBottom);
  for (const double y : y_ticks) put("<path d=\"M{:.1f} {:.1f}H{:.1f}\"/>\n", kLeft, to_y(y), kRight);
  put("</g>\n<g fill=\"{}\">\n", kGrey);
  for (const double x : x_ticks) {
    text(to_x(x), kBottom + 20, "text-anchor=\"middle\"", tick_label(x, spacing(x_ticks)));
  }
  for (const double y : y_ticks) {
    text(kLeft - 9, to_y(y) + 4.5, "text-anchor=\"end\"", tick_label(y, spacing(y_ticks)));
  }
  put("</g>\n<path d=\"M{0:.1f} {1:.1f}V{2:.1f}H{3:.1f}\" fill=\"none\" stroke=\"#888888\"/>\n", kLeft, kTop,
      kBottom, kRight);
}

void Drawing::polyline(const Points& points, std::string_view attributes) {
  std::string path;
  bool pen_down = false;
  for (const auto& p : points) {
    if (is_finite(p)) path += fmt::format("{}{:.1f} {:.1f}", pen_down ? 'L' : 'M', to_x(p.x), to_y(p.y));
    pen_down = is_finite(p);
  }
  if (path.empty()) return;
  put("<path d=\"{}\" fill=\"none\" stroke-linejoin=\"round\" stroke-linecap=\"round\" {}/>\n", path,
      attributes);
}

void Drawing::marker(double x, double y, std::size_t index) {
  const auto colour = kColours[index % kColours.size()];
  constexpr std::array<std::string_view, 4> kShapes = {"m-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
                                                       "m-3.8 -3.8h7.6v7.6h-7.6z", "m0 -5.2l5 8.6h-10z",
                                                       "m0 -5.4l5.4 5.4l-5.4 5.4l-5.4 -5.4z"};
  put("<path d=\"M{:.1f} {:.1f}{}\" fill=\"{}\" stroke=\"#ffffff\"/>\n", x, y,
      kShapes[index % kShapes.size()], colour);
}

void Drawing::series(const PlotSeries& series, std::size_t index) {
  const auto colour = kColours[index % kColours.size()];
  const auto stroke = [&](double width, double opacity) {
    return fmt::format("stroke=\"{}\" stroke-width=\"{}\" stroke-opacity=\"{}\"", colour, width, opacity);
  };
  const Points points = thinned(series.points);
  put("<g clip-path=\"url(#plot)\">\n");
  if (series.style == PlotStyle::kSmoothed) {
    polyline(points, stroke(1, 0.25));
    polyline(thinned(smooth_line(series.points)), stroke(2, 1));
  } else {
    polyline(points, stroke(2, 1));
  }
  put("</g>\n");
  // A line of one point would not be seen.
  if (series.style == PlotStyle::kMarkers || points.size() == 1) {
    for (const auto& p : points) {
      if (is_finite(p)) marker(to_x(p.x), to_y(p.y), index);
    }
  }
}

void Drawing::reference(const PlotReference& reference, std::size_t index) {
  if (!is_finite(reference.y)) return;
  put("<path d=\"M{:.1f} {:.1f}H{:.1f}\" stroke=\"{}\" stroke-width=\"1.5\" stroke-dasharray=\"{}\"/>\n",
      kLeft, to_y(reference.y), kRight, kGrey, kDashes[index % kDashes.size()]);
}

// On the right, where a falling loss leaves room at the top and what rises at the bottom.
void Drawing::legend(const LossPlot& plot) {
  const auto label = [](const PlotReference& r) { return fmt::format("{} {:.3f}", r.name, r.y); };
  std::size_t characters = 0;
  std::size_t rows = plot.series.size();
  for (const auto& s : plot.series) characters = std::max(characters, s.name.size());
  for (const auto& r : plot.references) {
    if (!is_finite(r.y)) continue;
    characters = std::max(characters, label(r).size());
    ++rows;
  }
  if (rows == 0) return;
  const double width = 56 + kLegendCharacter * static_cast<double>(characters);
  const double x = kRight - width - 10;
  const double height = kLegendRow * static_cast<double>(rows) + 9;
  double y = plot.rising ? kBottom - height - 10 : kTop + 10;
  put("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" rx=\"4\" fill=\"#ffffff\" "
      "fill-opacity=\"0.88\" stroke=\"#cccccc\"/>\n",
      x, y, width, height);
  y += 15;
  for (std::size_t i = 0; i < plot.series.size(); ++i, y += kLegendRow) {
    put("<path d=\"M{:.1f} {:.1f}h26\" stroke=\"{}\" stroke-width=\"2\"/>\n", x + 10, y,
        kColours[i % kColours.size()]);
    if (plot.series[i].style == PlotStyle::kMarkers) marker(x + 23, y, i);
    text(x + 44, y + 4.5, "", plot.series[i].name);
  }
  for (std::size_t i = 0; i < plot.references.size(); ++i) {
    if (!is_finite(plot.references[i].y)) continue;
    put("<path d=\"M{:.1f} {:.1f}h26\" stroke=\"{}\" stroke-width=\"1.5\" stroke-dasharray=\"{}\"/>\n",
        x + 10, y, kGrey, kDashes[i % kDashes.size()]);
    text(x + 44, y + 4.5, "", label(plot.references[i]));
    y += kLegendRow;
  }
}

}  // namespace

std::vector<PlotPoint> smoothed(const std::vector<PlotPoint>& points, double half_life) {
  if (!(half_life > 0)) return points;
  struct Sums {
    double values = 0;
    double weights = 0;
  };
  // At each finite point, the weighted sums over it and the points before it in the iterators' order.
  const auto sums_along = [half_life](auto begin, auto end, auto out) {
    Sums sums;
    double last_x = begin == end ? 0.0 : begin->x;
    for (; begin != end; ++begin, ++out) {
      if (!is_finite(*begin)) continue;
      const double decay = sums.weights > 0 ? std::exp2(-std::abs(begin->x - last_x) / half_life) : 0.0;
      sums = {decay * sums.values + begin->y, decay * sums.weights + 1};
      last_x = begin->x;
      *out = sums;
    }
  };
  std::vector<Sums> before(points.size());
  std::vector<Sums> after(points.size());
  sums_along(points.begin(), points.end(), before.begin());
  sums_along(points.rbegin(), points.rend(), after.rbegin());

  std::vector<PlotPoint> out = points;
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (!is_finite(points[i])) continue;  // the point itself is in both sums
    out[i].y =
        (before[i].values + after[i].values - points[i].y) / (before[i].weights + after[i].weights - 1);
  }
  return out;
}

std::vector<double> nice_ticks(double low, double high, int count) {
  if (!(high > low) || !std::isfinite(high - low) || count < 1) return {};
  const double raw = (high - low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  double spacing = 10 * power;
  for (const double factor : {5.0, 2.5, 2.0, 1.0}) {
    if (factor * power >= raw * (1 - 1e-9)) spacing = factor * power;
  }
  std::vector<double> ticks;
  const double first = std::ceil(low / spacing - 1e-9);
  for (double i = first; i * spacing <= high + 1e-9 * spacing; ++i) ticks.push_back(i * spacing);
  return ticks;
}

std::string loss_plot_svg(const LossPlot& plot) {
  Range x;
  Range y;
  for (const auto& series : plot.series) include(x, y, series);
  const bool empty = x.empty();
  for (const auto& reference : plot.references) y.include(reference.y);
  if (x.empty()) x = {0, 1};
  if (y.empty()) y = {0, 1};
  Drawing drawing(x.widened(x.high > x.low ? 0 : 0.05), y.widened(0.06));
  drawing.open(plot);
  drawing.axes();
  for (std::size_t i = 0; i < plot.references.size(); ++i) drawing.reference(plot.references[i], i);
  for (std::size_t i = 0; i < plot.series.size(); ++i) drawing.series(plot.series[i], i);
  if (empty) {
    drawing.text((kLeft + kRight) / 2, (kTop + kBottom) / 2, "text-anchor=\"middle\" font-size=\"16\"",
                 "no data");
  }
  drawing.legend(plot);
  return std::move(drawing).close();
}

void write_loss_plot(const std::filesystem::path& path, const LossPlot& plot) {
  write_text(path, loss_plot_svg(plot));
}

}  // namespace regroup
