"""What conversion_study.py measured, as a Markdown table, JSON and plots. Of an unfinished study: what is there, and
what is missing."""

import json
import math
import statistics
from pathlib import Path

import study_plot

MEAN, OURS = "mean", "calibrated"
CLOSED_AT_ONCE = 0.9  # share of mean pooling's gap, without uptraining
MEAN_ALPHA = "0.05"  # the paper's uptraining, which ours without any is to beat
RECOVERED, RECOVERED_ALPHA = 0.99, "0.0125"


class NoStudy(Exception):
    """There is nothing to make a table of."""


def run_name(method, groups, seed):
    return f"{method}-g{groups}-s{seed}"


def evaluations(metrics):
    """{(name, step): loss} of a run's metrics.jsonl; of a repeated step the last; empty where there is none."""
    losses = {}
    if Path(metrics).exists():
        for line in Path(metrics).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a run that was killed while it wrote
            if record.get("kind") == "evaluation":
                losses[record["name"], record["step"]] = record["loss"]
    return losses


# ---- Numbers -------------------------------------------------------------------------------------------------------


class Results:
    """Losses by method, G, seed and alpha; alphas are the keys of study.json, "0" the model as converted."""

    def __init__(self, work):
        self.work = Path(work)
        if not (self.work / "study.json").exists():
            raise NoStudy(f"{work} holds no study yet")
        self.settings = json.loads((self.work / "study.json").read_text(encoding="utf-8"))
        self.alphas = ["0", *self.settings["alphas"]]
        self.runs = {}  # (method, groups, seed) -> {alpha: loss}
        self.parents = set()  # the parent's losses that the runs saw: one, where all is well

    def add(self, method, groups, seed):
        """Whether the run is whole."""
        losses = evaluations(self.work / "runs" / run_name(method, groups, seed) / "metrics.jsonl")
        first = self.settings["parent_steps"]
        found = {alpha: losses.get(("held-out", first + steps)) for alpha, steps in self.settings["alphas"].items()}
        found["0"] = losses.get(("converted", first))
        self.parents |= {loss for (name, _), loss in losses.items() if name == "parent"}
        self.runs[method, groups, seed] = {alpha: loss for alpha, loss in found.items() if loss is not None}
        return len(self.runs[method, groups, seed]) == len(self.alphas)

    def control(self):
        """The parent trained on from its own optimizer state."""
        losses = evaluations(self.work / "control" / "metrics.jsonl")
        first = self.settings["parent_steps"]
        found = {alpha: losses.get(("held-out", first + steps)) for alpha, steps in self.settings["alphas"].items()}
        return {alpha: loss for alpha, loss in found.items() if loss is not None}

    def parent(self):
        if self.parents:
            return statistics.mean(self.parents)
        return math.nan

    def losses(self, method, groups, alpha):
        return [run[alpha] for (name, count, _), run in self.runs.items()
                if (name, count) == (method, groups) and alpha in run]

    def mean(self, method, groups, alpha):
        losses = self.losses(method, groups, alpha)
        return statistics.mean(losses) if losses else math.nan

    def deviation(self, method, groups, alpha):
        """The sample standard deviation over seeds; 0 where there is one."""
        losses = self.losses(method, groups, alpha)
        return statistics.stdev(losses) if len(losses) > 1 else 0.0

    def closed(self, method, groups, alpha):
        """The share of mean pooling's gap to the parent, before uptraining, that is gone."""
        gap = self.mean(MEAN, groups, "0") - self.parent()
        return 1 - (self.mean(method, groups, alpha) - self.parent()) / gap if gap else math.nan


# ---- Goals ---------------------------------------------------------------------------------------------------------


def verdict(holds):
    return "HOLDS" if holds else "DOES NOT HOLD"


def goals(results, groups):
    """One line for each goal and G, from the means over seeds."""
    parent, control = results.parent(), results.control()
    for count in groups:
        ours, theirs = results.mean(OURS, count, "0"), results.mean(MEAN, count, MEAN_ALPHA)
        closed = results.closed(OURS, count, "0")
        if math.isnan(closed):
            yield f"G = {count}: cannot be judged: {OURS} or {MEAN} at alpha 0 is missing"
            continue
        yield (f"G = {count}: {verdict(closed >= CLOSED_AT_ONCE)}: {OURS} at alpha 0 closes {closed:.2%} of {MEAN} "
               f"pooling's gap to the parent (goal: {CLOSED_AT_ONCE:.0%}); {OURS} {ours:.4f}, {MEAN} "
               f"{results.mean(MEAN, count, '0'):.4f}, parent {parent:.4f}")
        if math.isnan(theirs):
            yield f"G = {count}: cannot be judged: {MEAN} at alpha {MEAN_ALPHA} is missing"
        else:
            yield (f"G = {count}: {verdict(ours < theirs)}: {OURS} at alpha 0 ({ours:.4f}) is better than {MEAN} at "
                   f"alpha {MEAN_ALPHA} ({theirs:.4f}); difference {theirs - ours:+.4f}")
        recovered = results.closed(OURS, count, RECOVERED_ALPHA)
        if math.isnan(recovered):
            yield f"G = {count}: cannot be judged: {OURS} at alpha {RECOVERED_ALPHA} is missing"
            continue
        line = (f"G = {count}: {verdict(recovered >= RECOVERED)}: {OURS} at alpha {RECOVERED_ALPHA} recovers "
                f"{recovered:.2%} of {MEAN} pooling's gap to the parent (goal: {RECOVERED:.0%})")
        if RECOVERED_ALPHA in control:  # the parent learns too while it is trained on
            trained_on = control[RECOVERED_ALPHA]
            gap = results.mean(MEAN, count, "0") - trained_on
            share = 1 - (results.mean(OURS, count, RECOVERED_ALPHA) - trained_on) / gap
            line += f"; {share:.2%} of that to the parent trained on for as long"
        yield line


# ---- The table -----------------------------------------------------------------------------------------------------


def cell(results, method, groups, alpha):
    losses = results.losses(method, groups, alpha)
    if not losses:
        return "-"
    if len(losses) == 1:
        return f"{losses[0]:.4f}"
    return f"{statistics.mean(losses):.4f} +- {results.deviation(method, groups, alpha):.4f}"


def percent(value):
    return "-" if math.isnan(value) else f"{value:.1%}"


def table(results, methods, groups):
    """The rows of one G."""
    heads = results.settings["heads"]
    parent, control = results.parent(), results.control()
    yield f"| method | {' | '.join('alpha ' + alpha for alpha in results.alphas)} | gap closed at alpha 0 |"
    yield "|---" * (len(results.alphas) + 2) + "|"
    row = [f"{parent:.4f}", *(f"{control[alpha]:.4f}" if alpha in control else "-" for alpha in results.alphas[1:])]
    yield f"| *parent, trained on* | {' | '.join(row)} | |"
    if "unconverted" in methods:
        row = [cell(results, "unconverted", heads, alpha) for alpha in results.alphas]
        yield f"| *unconverted (G = {heads}), uptrained* | {' | '.join(row)} | |"
    for method in methods:
        if method == "unconverted" or (groups == 1 and "+" in method):
            continue
        row = [cell(results, method, groups, alpha) for alpha in results.alphas]
        yield f"| {method} | {' | '.join(row)} | {percent(results.closed(method, groups, '0'))} |"


def document(results, methods, groups, seeds, missing):
    settings = results.settings
    yield (f"Held-out loss (nats per token, {settings['evaluation_samples']} samples), mean +- standard deviation "
           f"over seeds {', '.join(map(str, seeds))}; parent: {settings['heads']} heads, "
           f"{settings['parent_steps']:,} steps.")
    exact = {float(alpha): steps / settings["parent_steps"] for alpha, steps in settings["alphas"].items()}
    if any(abs(value - alpha) > 1e-9 for alpha, value in exact.items()):
        yield "Evaluated at alpha " + ", ".join(f"{value:.5f}" for value in exact.values()) + "."
    for count in groups:
        yield ""
        yield f"**G = {count}{' (multi-query)' if count == 1 else ''}**"
        yield ""
        yield from table(results, methods, count)
    yield ""
    yield "Goals:"
    yield ""
    for line in goals(results, groups):
        yield f"- {line}"
    if len(results.parents) > 1 and max(results.parents) - min(results.parents) > 1e-6:
        yield f"- The runs saw different parents: losses {sorted(results.parents)}"
    if missing:
        yield ""
        yield f"Missing or unfinished ({len(missing)} runs): {', '.join(missing)}."


# ---- All of it -----------------------------------------------------------------------------------------------------


def panels(results, methods, groups):
    """One panel for each G: (title, series); a series is (name, [(alpha, mean, deviation)])."""
    control = results.control()
    for count in groups:
        series = []
        if control:
            points = [(0.0, results.parent(), 0.0), *((float(alpha), loss, 0.0) for alpha, loss in control.items())]
            series.append(("parent, trained on", points))
        for method in methods:
            if method == "unconverted" or (count == 1 and "+" in method):
                continue
            points = [(float(alpha), results.mean(method, count, alpha), results.deviation(method, count, alpha))
                      for alpha in results.alphas if results.losses(method, count, alpha)]
            if points:
                series.append((method, points))
        yield f"G = {count}", series


def write(work, methods, groups, seeds, cases):
    """Writes results.json, table.md, loss.svg and loss-zoom.svg into the study's folder; the text of table.md."""
    results = Results(work)
    missing = [run_name(*case) for case in cases(methods, groups, seeds, results.settings["heads"])
               if not results.add(*case)]
    if not results.control():
        missing.insert(0, "control")
    text = "\n".join(document(results, methods, groups, seeds, missing)) + "\n"
    work = Path(work)
    (work / "table.md").write_text(text, encoding="utf-8")
    (work / "results.json").write_text(json.dumps({
        "settings": results.settings, "parent": None if math.isnan(results.parent()) else results.parent(),
        "control": results.control(),
        "runs": [{"method": method, "groups": count, "seed": seed, "losses": losses}
                 for (method, count, seed), losses in results.runs.items()],
        "goals": list(goals(results, groups)), "missing": missing}, indent=1) + "\n", encoding="utf-8")
    plots = list(panels(results, methods, groups))
    title = "Held-out loss after conversion to G key/value groups"
    (work / "loss.svg").write_text(study_plot.svg(title, plots, results.parent()), encoding="utf-8")
    gaps = [results.mean(MEAN, count, "0") - results.parent() for count in groups]
    gaps = [gap for gap in gaps if not math.isnan(gap)]
    if gaps:  # near the parent, where the best methods are told apart
        top = results.parent() + 0.15 * max(gaps)
        (work / "loss-zoom.svg").write_text(study_plot.svg(title + ", near the parent", plots, results.parent(), top),
                                            encoding="utf-8")
    return text
