"""What a type does to a tensor, in nats, and how sure that is. A statistical model, no engine.

A probe measures the damage of one (tensor, type) pair. Others follow from damage = a e(t), with
e(t) the relative output error: log a is a Gaussian process over the types of a tensor, whose mean
comes from the same role in neighbouring layers (Rasmussen & Williams 2006, 2.2). Kernels that
round activations add their part. Error feedback takes its part off. Totals of whole maps are set
right by real files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from apreqel.model.qtypes import lookup
from apreqel.sensitivity.bench import TensorErrors
from apreqel.sensitivity.metrics import Estimate

Doubles = npt.NDArray[np.float64]

# Spread of log a between types of a tensor, measured on SmolLM2-135M (112 pairs): types with equal
# errors differ by this much each, and types apart in log error by a part that grows that slowly.
_BETWEEN_TYPES = 0.10
_ALONG_ERROR, _ERROR_SCALE = 0.30, 12.0
# Types of one tensor are probed on the same text, so that most of a probe's noise is common.
_COMMON_NOISE = 0.9
# Roles are alike over about this many layers; single tensors differ from their neighbours by this.
_LAYER_SCALE, _LEAST_ROLE_SPREAD = 2.0, 0.15
_UNKNOWN_SPREAD = 2.0

_Z95 = 1.959964

# Rounding in the engine's float32: a divergence below this is not told from none.
_ENGINE_NOISE_NATS = 5e-7

# What feedback takes off a tensor's output error comes off damage as this power of the ratio: it is
# made good where activations are large, which is not all where it hurts. Eleven whole files of
# SmolLM2-135M lay 0.2% off so, with a spread of 2.8%; by the ratio itself all are told 18% too low.
_FEEDBACK_POWER = 0.5

METRICS = ("kld", "perplexity")


@dataclass(frozen=True)
class Probe:
    """One (tensor, type) pair: mean KLD and change of the loss, in nats, by chunk of the text."""

    kld: Sequence[float]
    nll_change: Sequence[float]

    def estimate(self, metric: str = "kld") -> Estimate:
        """Over the chunks, which are the independent draws."""
        values = np.array(self.kld if metric == "kld" else self.nll_change)
        n = len(values)
        # Few draws tell their own spread badly: the variance of Student's t with n - 1 degrees.
        widened = math.sqrt((n - 1) / (n - 3)) if n > 3 else 3.0
        error = widened * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return Estimate(float(values.mean()), error, n)


@dataclass(frozen=True)
class Damage:
    """Nats with the standard deviation of their logarithm; `is_probed` where measured directly."""

    nats: float
    log_deviation: float
    is_probed: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """95%."""
        factor = math.exp(min(_Z95 * self.log_deviation, 50.0))
        return self.nats / factor, self.nats * factor

    @property
    def is_resolved(self) -> bool:
        """Whether it is known to within a factor of three either way."""
        return _Z95 * self.log_deviation < math.log(3)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: tensors of one role in neighbouring layers are alike."""

    role: str
    layer: int


@dataclass(frozen=True)
class KernelLoss:
    """A whole model in one type: KLD with dequantised weights, and of the real file."""

    dequantised_nats: float
    real_nats: float


@dataclass(frozen=True)
class Exchange:
    """Within a whole plan: how its KLD changes, in nats, when one tensor takes another type."""

    tensor: str
    chosen: str
    other: str
    nats: float
    standard_error: float


@dataclass(frozen=True)
class Knot:
    """A whole map that was measured as a real file, written with error feedback or without."""

    types: Mapping[str, str]
    kld: Estimate
    feedback: bool = False


class DamageModel:
    """Damage of every (tensor, type) pair, of whole maps, and their intervals.

    With `gains`, of files written with error feedback: by tensor and type the output error with it
    over that without. `feedback=False` asks for files without it all the same.
    """

    def __init__(
        self,
        errors: Mapping[str, TensorErrors],
        probes: Mapping[str, Mapping[str, Probe]],
        places: Mapping[str, Place],
        kernels: Mapping[str, KernelLoss] | None = None,
        knots: Sequence[Knot] = (),
        exchanges: Sequence[Exchange] = (),
        metric: str = "kld",
        gains: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.errors, self._metric, self._gains = errors, metric, gains or {}
        self._places = places
        self._probes = {
            name: {t: p.estimate(metric) for t, p in known.items()}
            for name, known in probes.items()
        }
        self._level_out_chunks(probes)
        self._own_levels = {
            name: level for name in errors if (level := self._own_level(name)) is not None
        }
        self._posteriors: dict[str, dict[str, tuple[float, float]]] = {}
        self._kernel_factors = self._measured_kernel_factors(kernels or {})
        self._tables: dict[tuple[str, bool], dict[str, Damage]] = {}
        self._exchanges = exchanges if metric == "kld" else ()
        real = knots if metric == "kld" else ()  # real files tell KLD
        self._knots = [k for k in real if self._gains or not k.feedback]

    # -- single tensors --

    def damage(self, name: str, type_name: str, feedback: bool = True) -> Damage:
        """Of this tensor alone in this type, kernels included. 0 for a type that was not
        measured: the tensor's own."""
        return self.table(name, feedback).get(type_name, Damage(0.0, 0.0, True))

    def table(self, name: str, feedback: bool = True) -> dict[str, Damage]:
        """`damage` of all measured types of a tensor."""
        if (name, feedback) not in self._tables:
            if feedback:
                made = {
                    t: self._with_feedback(name, t, d) for t, d in self.table(name, False).items()
                }
            else:
                posterior = self._posterior(name)
                made = {t: self._with_kernel(name, t, posterior) for t in self.errors[name].weights}
                for exchange in self._exchanges:
                    if exchange.tensor == name:
                        self._exchange(made, exchange)
            self._tables[name, feedback] = made
        return self._tables[name, feedback]

    def _with_feedback(self, name: str, type_name: str, damage: Damage) -> Damage:
        """Of weights that are moved against rounding; what kernels lose stays."""
        gain = self._gains.get(name, {}).get(type_name, 1.0) ** _FEEDBACK_POWER
        kernel = min(damage.nats, self._kernel_part(name, type_name))
        return replace(damage, nats=kernel + gain * (damage.nats - kernel))

    def _exchange(self, table: dict[str, Damage], exchange: Exchange) -> None:
        """Take in what an exchange showed: its difference and the model's, by their precision."""
        own = Damage(0.0, 0.0, True)  # the tensor's own type
        chosen, other = (table.get(t, own) for t in (exchange.chosen, exchange.other))
        if exchange.other not in table:
            return
        expected = other.nats - chosen.nats
        doubt = (other.nats * other.log_deviation) ** 2 + (chosen.nats * chosen.log_deviation) ** 2
        weight = doubt / (doubt + exchange.standard_error**2 + 1e-30)
        nats = chosen.nats + expected + weight * (exchange.nats - expected)
        # A tensor's damage in the plan may be less than alone, but nothing is gained by damage.
        table[exchange.other] = Damage(
            max(nats, 0.1 * other.nats), other.log_deviation * math.sqrt(1 - weight), True
        )

    def _with_kernel(
        self, name: str, type_name: str, posterior: Mapping[str, tuple[float, float]]
    ) -> Damage:
        log_a, deviation = posterior[type_name]
        weights = self.errors[name].weights[type_name] * math.exp(log_a)
        kernel = self._kernel_part(name, type_name)
        return Damage(weights + kernel, deviation, type_name in self._probes.get(name, {}))

    def _kernel_part(self, name: str, type_name: str) -> float:
        kind = lookup(type_name).activation
        return self._kernel_factors.get(kind, 1.0) * self._kernel_loss(name, kind)

    def _kernel_loss(self, name: str, kind: str) -> float:
        """What rounding its activations to `kind` does to a tensor's share, before scaling."""
        error = self.errors[name].kernels.get(kind, 0.0)
        if error <= 0:
            return 0.0
        return error * math.exp(self._posterior(name)[f"kernel {kind}"][0])

    def _measured_kernel_factors(self, kernels: Mapping[str, KernelLoss]) -> dict[str, float]:
        """By activation type: loss of whole models, measured over predicted; at most 10."""
        ratios: dict[str, list[float]] = {}
        for type_name, loss in kernels.items():
            kind = lookup(type_name).activation
            predicted = sum(
                self._kernel_loss(n, kind) for n, e in self.errors.items() if type_name in e.weights
            )
            if predicted > 0:
                ratio = (loss.real_nats - loss.dequantised_nats) / predicted
                ratios.setdefault(kind, []).append(min(max(ratio, 0.1), 10.0))
        found = {kind: float(np.median(values)) for kind, values in ratios.items()}
        if found:  # kinds that were not measured round in the same steps
            usual = float(np.median(list(found.values())))
            found = {kind: found.get(kind, usual) for kind in ("Q8_0", "Q8_1", "Q8_K")}
        return found

    # -- the process --

    def _level_out_chunks(self, probes: Mapping[str, Mapping[str, Probe]]) -> None:
        """Bring probes on fewer chunks to the level of the whole text.

        By how much harder or easier those chunks are, for the pairs that were probed on all.
        """
        rows = [p.kld for known in probes.values() for p in known.values()]
        most = max((len(r) for r in rows), default=0)
        full = np.array([r for r in rows if len(r) == most]).reshape(-1, max(most, 1))
        full = full[full.mean(axis=1) > 0]
        if self._metric != "kld" or not len(full):
            return
        share = (full / full.mean(axis=1, keepdims=True)).mean(axis=0)
        for known in self._probes.values():
            for t, p in known.items():
                hardness = float(share[: p.count].mean())
                known[t] = Estimate(p.mean / hardness, p.standard_error / hardness, p.count)

    def _observed(self, name: str) -> tuple[list[str], Doubles, Doubles, Doubles]:
        """(types, log errors, log a, relative noise) of a tensor's probes."""
        weights = self.errors[name].weights
        kept = [
            (t, p)
            for t, p in self._probes.get(name, {}).items()
            if weights.get(t, 0) > 0 and math.isfinite(p.standard_error)
        ]
        deviations = np.hypot([p.standard_error for _, p in kept], _ENGINE_NOISE_NATS)
        # Where it is below that, or a loss fell by chance, a probe says only that a is not large.
        levels = np.maximum([p.mean for _, p in kept], deviations / 4)
        noise = deviations / levels
        errors = np.log([weights[t] for t, _ in kept])
        return [t for t, _ in kept], errors, np.log(levels) - errors, noise

    def _own_level(self, name: str) -> tuple[float, float] | None:
        """(log a, its variance) of a tensor from its own probes alone."""
        _, errors, log_a, noise = self._observed(name)
        if not len(log_a):
            return None
        covariance = _between(errors, errors) + _noise(noise)
        weights = np.linalg.solve(covariance, np.ones(len(log_a)))
        return float(weights @ log_a / weights.sum()), float(1 / weights.sum())

    def _prior(self, name: str) -> tuple[float, float]:
        """(mean, variance) of log a from the same role in other layers, near ones first."""
        place = self._places[name]
        others = [
            (abs(self._places[other].layer - place.layer), level)
            for other, (level, _) in self._own_levels.items()
            if other != name and self._places[other].role == place.role
        ]
        if len(others) < 3:
            everything = [level for level, _ in self._own_levels.values()]
            mean = float(np.mean(everything)) if everything else 0.0
            return mean, _UNKNOWN_SPREAD**2
        weights = np.exp([-distance / _LAYER_SCALE for distance, _ in others])
        levels = np.array([level for _, level in others])
        mean = float(weights @ levels / weights.sum())
        spread = float(weights @ (levels - mean) ** 2 / weights.sum())
        return mean, max(spread, _LEAST_ROLE_SPREAD**2)

    def _posterior(self, name: str) -> dict[str, tuple[float, float]]:
        """(mean, standard deviation) of log a for every type, and for kernels' rounding."""
        if name in self._posteriors:
            return self._posteriors[name]
        errors = self.errors[name]
        levels = dict(errors.weights) | {f"kernel {k}": e for k, e in errors.kernels.items()}
        wanted = [t for t, e in levels.items() if e > 0]
        x = np.log([levels[t] for t in wanted])
        types, at, log_a, noise = self._observed(name)
        mean, variance = self._prior(name)
        means = np.full(len(x), mean)
        variances = np.full(len(x), variance + _ALONG_ERROR**2 + _BETWEEN_TYPES**2)
        if types:
            own = np.array([[t == known for known in types] for t in wanted]) * _BETWEEN_TYPES**2
            cross = variance + _between(x, at, own_part=own)
            gain = np.linalg.solve(variance + _between(at, at) + _noise(noise), cross.T).T
            means = mean + gain @ (log_a - mean)
            variances = np.maximum(variances - (gain * cross).sum(axis=1), 1e-6)
        found = dict(zip(wanted, zip(means, np.sqrt(variances), strict=True), strict=True))
        nothing = {t: (mean, 0.0) for t in levels if t not in found}  # an error of exactly 0
        self._posteriors[name] = {t: (float(m), float(s)) for t, (m, s) in found.items()} | nothing
        return self._posteriors[name]

    # -- whole maps --

    def raw_total(self, types: Mapping[str, str], feedback: bool = True) -> float:
        """The sum of the damages of a map's tensors: what the solver adds up."""
        return sum(self.damage(name, types.get(name, ""), feedback).nats for name in self.errors)

    def total(self, types: Mapping[str, str], feedback: bool = True) -> Damage:
        """What a real file with this map should measure, with its uncertainty."""
        parts = [self.damage(name, types.get(name, ""), feedback) for name in self.errors]
        raw = sum(p.nats for p in parts)
        if raw <= 0:
            return Damage(0.0, 0.0)
        independent = sum((p.nats * p.log_deviation) ** 2 for p in parts) / raw**2
        return Damage(self.nats(raw), math.sqrt(independent + self.scale_deviation**2))

    @cached_property
    def _scale(self) -> tuple[Doubles, Doubles]:
        """(log raw total, log measured / raw) of the measured maps, by raw total."""
        known = sorted(
            (math.log(raw), math.log(k.kld.mean / raw))
            for k in self._knots
            if k.kld.mean > 0 and (raw := self.raw_total(k.types, k.feedback)) > 0
        )
        if not known:
            return np.zeros(1), np.zeros(1)
        x, y = np.array(known).T
        # A line, or with few knots a constant: single files scatter, and the total must grow with
        # the sum, whatever the noise.
        if len(x) < 3 or np.ptp(x) < 0.3:
            return x[:1], np.full(1, y.mean())
        slope, offset = np.polyfit(x, y, 1)
        slope = min(max(float(slope), -0.9), 1.0)
        ends = np.array([x[0], x[-1]])
        offset = float(np.mean(y - slope * x))
        return ends, offset + slope * ends

    @property
    def scale_deviation(self) -> float:
        """Standard deviation of the logarithm of measured over predicted totals."""
        x, y = self._scale
        residuals = [
            math.log(k.kld.mean) - math.log(raw) - float(np.interp(math.log(raw), x, y))
            for k in self._knots
            if k.kld.mean > 0 and (raw := self.raw_total(k.types, k.feedback)) > 0
        ]
        noise = [k.kld.standard_error / k.kld.mean for k in self._knots if k.kld.mean > 0]
        if not residuals:
            return 0.25  # no real file was measured: what a first fit was off by
        degrees = max(1, len(residuals) - len(x))
        return math.sqrt(sum(r * r for r in residuals) / degrees + float(np.mean(noise)) ** 2)

    def nats(self, raw: float) -> float:
        """What a sum of damages measures as a real file."""
        if raw <= 0:
            return raw
        x, y = self._scale
        return raw * math.exp(float(np.interp(math.log(raw), x, y)))

    def raw(self, nats: float) -> float:
        """The sum of damages that measures as `nats`: the inverse of `nats`."""
        if nats <= 0:
            return 0.0
        x, y = self._scale
        log_nats = math.log(nats)
        if log_nats <= x[0] + y[0]:
            return math.exp(log_nats - y[0])
        if log_nats >= x[-1] + y[-1]:
            return math.exp(log_nats - y[-1])
        return math.exp(float(np.interp(log_nats, x + y, x)))


def _between(a: Doubles, b: Doubles, own_part: Doubles | None = None) -> Doubles:
    """Covariance of log a between types with log errors `a` and `b`, without the tensor's level."""
    if own_part is None:  # a against itself
        own_part = np.eye(len(a)) * _BETWEEN_TYPES**2
    along: Doubles = _ALONG_ERROR**2 * np.exp(-np.abs(a[:, None] - b[None]) / _ERROR_SCALE)
    return along + own_part


def _noise(relative: Doubles) -> Doubles:
    """Of probes whose texts are parts of one another: the mean over the larger part is in both."""
    variances = relative**2
    common: Doubles = _COMMON_NOISE * np.minimum.outer(variances, variances)
    np.fill_diagonal(common, variances + 1e-9)
    return common


def expected_gain(gap: Doubles, deviation: Doubles) -> Doubles:
    """How much a value that now lies `gap` behind is expected to win by (Jones et al. 1998)."""
    from scipy.special import ndtr

    deviation = np.maximum(deviation, 1e-300)
    z = gap / deviation
    density = np.exp(-0.5 * np.square(np.minimum(np.abs(z), 37))) / math.sqrt(2 * math.pi)
    gain: Doubles = np.maximum(0.0, deviation * (density - z * ndtr(-z)))
    return gain
