"""How measured numbers are named and written, in the terminal and in the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric's name, its unit, the factor from the recorded number to that unit, and which way is better."""

    name: str
    unit: str = ""
    factor: float = 1.0
    better: str = ""  # "lower", "higher", or not known
    short: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def head(self) -> str:
        """The name for a narrow column."""
        return f"{self.short or self.name}{f' {self.unit}' if self.unit else ''}"


METRICS = {
    "fd": Metric("Fréchet distance", better="lower"),
    "fd_inf": Metric("Fréchet distance at infinite samples", better="lower", short="FD∞"),
    "kid": Metric("Kernel distance (KID)", better="lower", short="KID"),
    "mmd": Metric("Kernel distance (Gaussian)", better="lower", short="MMD"),
    "psnr": Metric("PSNR", "dB", better="higher"),
    "accuracy": Metric("Accuracy", "%", 100, better="higher"),
    "clip_text": Metric("CLIP similarity to the text", better="higher", short="CLIP text"),
    "clip_image": Metric("CLIP similarity to the picture", better="higher", short="CLIP image"),
    "clip_direction": Metric("CLIP direction of the edit", better="higher", short="CLIP direction"),
    "ssim": Metric("SSIM", better="higher"),
    "lpips": Metric("LPIPS", better="lower"),
    "consistency": Metric("Consistency over time", better="higher", short="Consistency"),
    "flicker": Metric("Flicker", "%", 100, better="lower"),
    "dynamic_degree": Metric("Motion", "%", 100),
    "precision": Metric("Precision", "%", 100, better="higher"),
    "recall": Metric("Recall", "%", 100, better="higher"),
    "density": Metric("Density", better="higher"),
    "coverage": Metric("Coverage", "%", 100, better="higher"),
}
"""The metrics known by name, in the order in which they are shown; others follow, under their own names."""
DISTANCES = ("fd", "kid", "mmd", "fd_inf")
AGREEMENTS = ("psnr", "accuracy", "clip_text", "clip_image", "clip_direction", "ssim", "lpips")


def metric(key: str) -> Metric:
    return METRICS.get(key, Metric(key.replace("_", " ")))


def present(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any of the rows has a number for, in order."""
    found = {key: None for row in rows for key in row.get("metrics", {}) if reading(row["metrics"], key) is not None}
    return [key for key in METRICS if key in found] + [key for key in found if key not in METRICS]


def reading(metrics: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """A metric's value and standard error (0 where none is known) in its unit; None where it was not measured."""
    entry = metrics.get(key)
    value, error = (entry.get("value"), entry.get("error")) if isinstance(entry, Mapping) else (entry, None)
    if value is None or math.isnan(value):
        return None
    factor = metric(key).factor
    return value * factor, (error or 0.0) * factor if math.isfinite(error or 0.0) else 0.0


def number(value: float, error: float = 0.0, sign: bool = False) -> str:
    """The value to the digits that its error makes meaningful: 7.2 for an error of 0.3; else three significant ones."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = f"{value:{'+' if sign else ''},.{decimals(value, error)}f}"
    return text.replace("-", "−")


def decimals(value: float, error: float = 0.0) -> int:
    """Digits after the point: one of the error (two where it begins with 1), or three of a value without error."""
    if error > 0:
        exponent = math.floor(math.log10(float(f"{error:.1e}")))
        return max(0, -exponent + (float(f"{error:.1e}") < 2 * 10**exponent))
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0


def measured(value: float, error: float = 0.0) -> str:
    """ "7.2 ± 0.3", or the value alone where no error is known."""
    return f"{number(value, error)} ± {number(error, error)}" if error > 0 else number(value)


def duration(seconds: float) -> str:
    """ "12 ms", "1.3 s", "2 min 40 s", "1 h 5 min"."""
    if seconds < 0.9995:
        return f"{number(seconds * 1000)} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float) -> str:
    """Bytes as "none", "420 kB", "2.8 MB", "3.4 GB"."""
    if not size:
        return "none"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:.2g} {unit}" if size < 9.95 else f"{size:,.0f} {unit}"


def scale_text(scales: Sequence[float]) -> str:
    """ "3", or "1.5, 7.5"."""
    return ", ".join(f"{scale:g}" for scale in scales)


def candidate_text(prior: str, scales: Sequence[float]) -> str:
    """ "base, scale 3"."""
    return f"{prior}, scale{'s' if len(scales) > 1 else ''} {scale_text(scales)}"


def plain(value: Any) -> str:
    """Any JSON value as words."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}".replace("-", "−")
        case Mapping():
            return "; ".join(f"{str(key).replace('_', ' ')}: {plain(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(plain(item) for item in value)
    return str(value)
