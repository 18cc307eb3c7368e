#include "trainer/run/loss_plot.h"

#include <cmath>
#include <limits>
#include <regex>
#include <string>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

// Every tag closed in order, no stray < or &, no number that is not finite: what a reader of the SVG relies
// on.
void expect_well_formed(const std::string& svg) {
  std::vector<std::string> open;
  const std::regex tag("<(/?)([A-Za-z]+)((?:\\s+[A-Za-z:-]+=\"[^\"<]*\")*)\\s*(/?)>");
  std::string rest;
  auto last = svg.cbegin();
  for (std::sregex_iterator it(svg.begin(), svg.end(), tag), end; it != end; ++it) {
    rest.append(last, (*it)[0].first);
    last = (*it)[0].second;
    if ((*it)[1].length() > 0) {
      ASSERT_FALSE(open.empty());
      EXPECT_EQ(open.back(), (*it)[2].str());
      open.pop_back();
    } else if ((*it)[4].length() == 0) {
      open.push_back((*it)[2].str());
    }
  }
  rest.append(last, svg.cend());
  EXPECT_TRUE(open.empty());
  EXPECT_FALSE(contains(rest, "<")) << rest;
  EXPECT_FALSE(std::regex_search(rest, std::regex("&(?!(amp|lt|gt|quot|#39);)")));
  EXPECT_FALSE(std::regex_search(svg, std::regex("[ML\"V H](nan|-?inf)")));
}

LossPlot example() {
  LossPlot plot = {.title = "pretraining"};
  PlotSeries train = {.name = "train", .style = PlotStyle::kSmoothed};
  for (int step = 1; step <= 100; ++step) train.points.push_back({double(step), 10.0 / std::sqrt(step)});
  plot.series = {train, {"held-out", {{50, 1.5}, {100, 1.1}}, PlotStyle::kMarkers}};
  plot.references = {{"unigram", 6.8}};
  return plot;
}

TEST(NiceTicksTest, AreRoundAndInside) {
  EXPECT_EQ(nice_ticks(0, 10, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(nice_ticks(0.3, 3.9, 4), (std::vector<double>{1, 2, 3}));
  EXPECT_EQ(nice_ticks(-1, 1, 4), (std::vector<double>{-1, -0.5, 0, 0.5, 1}));
  EXPECT_EQ(nice_ticks(0, 1000, 4), (std::vector<double>{0, 250, 500, 750, 1000}));
  EXPECT_TRUE(nice_ticks(1, 1, 5).empty());
  EXPECT_TRUE(nice_ticks(kNaN, 1, 5).empty());
  for (const double high : {3.7e-9, 0.02, 1.0, 63.0, 1e6, 7.7e20}) {
    for (int wanted = 2; wanted <= 10; ++wanted) {
      const auto n = nice_ticks(0, high, wanted).size();
      EXPECT_GE(n, static_cast<std::size_t>(wanted) / 2) << high;
      EXPECT_LE(n, static_cast<std::size_t>(wanted) + 1) << high;
    }
  }
}

TEST(SmoothedTest, IsTheMeanWeightedByDistance) {
  const auto out = smoothed({{0, 4}, {1, 2}, {3, 8}}, 1);
  EXPECT_DOUBLE_EQ(out[0].y, (4 + 2 * 0.5 + 8 * 0.125) / 1.625);
  EXPECT_DOUBLE_EQ(out[1].y, (4 * 0.5 + 2 + 8 * 0.25) / 1.75);
  EXPECT_DOUBLE_EQ(out[2].y, (4 * 0.125 + 2 * 0.25 + 8) / 1.375);
  EXPECT_EQ(smoothed({{0, 4}, {1, 2}}, 0)[1].y, 2);
  const auto gap = smoothed({{kNaN, 1}, {0, 4}, {1, kNaN}, {2, 4}}, 1);
  EXPECT_TRUE(std::isnan(gap[2].y));
  EXPECT_DOUBLE_EQ(gap[1].y, 4) << "a constant stays constant across a gap";
  EXPECT_DOUBLE_EQ(gap[3].y, 4);
}

TEST(LossPlotTest, HoldsTitleLabelsLegendSeriesAndReferences) {
  const std::string svg = loss_plot_svg(example());
  expect_well_formed(svg);
  for (const char* text : {">pretraining<", ">step<", ">loss (nats per token)<", ">train<", ">held-out<",
                           ">unigram 6.800<", ">100<", "stroke-dasharray"}) {
    EXPECT_TRUE(contains(svg, text)) << text;
  }
  EXPECT_EQ(svg, loss_plot_svg(example()));
}

TEST(LossPlotTest, PointsLandWhereTheAxesSay) {
  // x 0..10 spans pixels 72..840; y 0..10 widened by 6 % spans 460..56.
  const std::string svg = loss_plot_svg({.title = "", .series = {{"a", {{0, 0}, {5, 5}, {10, 10}}}}});
  EXPECT_TRUE(contains(svg, "M72.0 438.4L456.0 258.0L840.0 77.6")) << svg;
}

TEST(LossPlotTest, TextIsEscaped) {
  LossPlot plot = example();
  plot.title = "a < b & \"c\" > 'd'\x01\n";
  plot.series[0].name = plot.references[0].name = plot.x_label = plot.y_label = plot.title;
  const std::string svg = loss_plot_svg(plot);
  expect_well_formed(svg);
  EXPECT_EQ(count(svg, "a &lt; b &amp; &quot;c&quot; &gt; &#39;d&#39;"),
            6U);  // the title twice: <title> and text
}

TEST(LossPlotTest, EmptyOnePointAndNonFiniteDataAreDrawn) {
  expect_well_formed(loss_plot_svg({}));
  EXPECT_TRUE(contains(loss_plot_svg({}), ">no data<"));
  EXPECT_FALSE(contains(loss_plot_svg(example()), ">no data<"));
  for (const auto style : {PlotStyle::kLine, PlotStyle::kSmoothed, PlotStyle::kMarkers}) {
    for (const std::vector<PlotPoint>& points : {std::vector<PlotPoint>{},
                                                 {{7, 3}},
                                                 {{1, kNaN}},
                                                 {{kNaN, 1}, {1, kInfinity}, {2, -kInfinity}},
                                                 {{1, 2}, {2, kNaN}, {3, 1}},
                                                 {{1, 0}, {1, 0}},
                                                 {{1, 1e308}, {2, -1e308}},
                                                 {{0, 1e99}, {1, -1e99}}}) {
      const std::string svg = loss_plot_svg(
          {.title = "t", .series = {{"s", points, style}}, .references = {{"r", kNaN}, {"q", kInfinity}}});
      expect_well_formed(svg);
      EXPECT_FALSE(contains(svg, "stroke-dasharray")) << "a reference that is not finite is not drawn";
    }
  }
  EXPECT_EQ(count(loss_plot_svg({.title = "", .series = {{"s", {{7, 3}}}}}), "fill=\"#0072B2\""), 1U)
      << "a line of one point gets a marker";
}

TEST(LossPlotTest, NaNLeavesAGapInTheLine) {
  const std::string svg =
      loss_plot_svg({.title = "", .series = {{"s", {{0, 1}, {1, 2}, {2, kNaN}, {3, 1}, {4, 2}}}}});
  EXPECT_TRUE(std::regex_search(svg, std::regex("d=\"M[0-9. ]+L[0-9. ]+M[0-9. ]+L[0-9. ]+\"")));
}

TEST(LossPlotTest, LongSeriesGiveABoundedDocumentThatKeepsExtremes) {
  LossPlot plot = {.title = "long", .series = {{"s", {}}}};
  for (int i = 0; i < 200000; ++i) plot.series[0].points.push_back({double(i), i % 2 == 0 ? 1.0 : 2.0});
  plot.series[0].points[123457].y = 9;
  const std::string svg = loss_plot_svg(plot);
  EXPECT_LT(svg.size(), 100000U);
  EXPECT_EQ(count(svg, " 77.6"), 1U) << "the single highest value: 0.06 / 1.12 of 404 pixels below the top";
}

TEST(LossPlotTest, WritesTheFile) {
  const test::TemporaryDirectory directory;
  write_loss_plot(directory / "loss.svg", example());
  EXPECT_EQ(read_text(directory / "loss.svg"), loss_plot_svg(example()));
  EXPECT_THROW(write_loss_plot(directory / "no/such/loss.svg", example()), UserError);
}

}  // namespace
}  // namespace regroup
