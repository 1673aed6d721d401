"""Crossbar hardware model: energy, latency and area of an exported network on a named chip.

    activity = measure(network, pixels)                      # counts of real spikes
    report = build_report(network, activity, "fefet32")      # or "spikesim65", or the path of a chip file
    render_html(report), to_csv(report), summary(report), report.to_json()

Without a network: `build_report(w := ms_resnet(18, (2, 48, 48), 10), uniform(w, 0.1))`. docs/hardware-model.md has the
formulas and what is not modelled.
"""

from .activity import Activity, Load, load_activity, measure, save_activity, uniform
from .config import Chip, Constant, chip_schema, load_chip, shipped_chips
from .cost import physical_cost, prepare, spikesim_cost
from .crossbar import AdcAccuracy, AnalogAccuracy, CrossbarNetwork, Devices, adc_accuracy, analog_accuracy, analog_grid
from .mapping import Workload, from_network, ms_resnet, named_workload
from .report import Report, build_report, render_html, summary, to_csv

__all__ = [
    "Activity",
    "AdcAccuracy",
    "AnalogAccuracy",
    "Chip",
    "Constant",
    "CrossbarNetwork",
    "Devices",
    "Load",
    "Report",
    "Workload",
    "adc_accuracy",
    "analog_accuracy",
    "analog_grid",
    "build_report",
    "chip_schema",
    "from_network",
    "load_activity",
    "load_chip",
    "measure",
    "ms_resnet",
    "named_workload",
    "physical_cost",
    "prepare",
    "render_html",
    "save_activity",
    "shipped_chips",
    "spikesim_cost",
    "summary",
    "to_csv",
    "uniform",
]
