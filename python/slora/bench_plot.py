"""A plot of a load: how long tokens took, over time and in all."""

from pathlib import Path
from typing import Any

from slora.errors import ConfigError

PANELS = [("time to first token", "time_to_first_token"), ("between tokens", "inter_token")]


def check(path: Path) -> None:
    """Raise ConfigError before the load runs if there could be no plot behind it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; hint: pip install 'slora[plot]'") from error
    kinds = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"--plot {str(path)!r}: the ending must be one of {', '.join(sorted(kinds))}; hint: .svg")


def plot(report: dict[str, Any], path: Path) -> None:
    """Write the plot; the file's ending says its kind."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for (title, key), (over_time, cumulative) in zip(PANELS, axes, strict=True):
        windows = [window for window in report["windows"] if window[key]["count"]]
        starts = [window["start_s"] for window in windows]
        for at, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            over_time.plot(starts, [window[key][f"{at}_ms"] for window in windows], style, label=at)
        over_time.set(
            title=f"{title}, over time", xlabel="seconds since the start", ylabel="milliseconds", ylim=(0, None)
        )
        over_time.legend()
        points = report[f"cumulative_{key}"]
        cumulative.step([ms for ms, _ in points], [share for _, share in points], where="post")
        cumulative.set(title=f"{title}, in all", xlabel="milliseconds", ylabel="share that took no longer", ylim=(0, 1))
        cumulative.set_xscale("log")
        cumulative.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cumulative.xaxis.set_major_formatter("{x:g}")
        cumulative.xaxis.set_minor_formatter(NullFormatter())
        for panel in (over_time, cumulative):
            panel.grid(alpha=0.3)
            if not points:
                panel.text(0.5, 0.5, "none", transform=panel.transAxes, ha="center")
    figure.suptitle(
        f"{report['completed']} of {report['sent']} requests completed, {report['requests_per_s']:.1f} a second, "
        f"{report['tokens_per_s']:.0f} tokens a second"
    )
    figure.savefig(path)
