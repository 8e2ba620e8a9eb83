"""The damage model: what a quant type does to a tensor, in nats, and how sure that is.

Damage is how far the model's predictions move from the original's. A probe measures it for one
(tensor, type) pair. Others follow from damage = a e(t), with e(t) the relative output error: log a
is a Gaussian process over the types of a tensor, whose mean comes from the same role in
neighbouring layers (Rasmussen & Williams 2006, 2.2). Kernels that round activations add their part,
rounding anew takes its part off, and real files set right what whole type maps add up to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from apreqel.arrays import Doubles
from apreqel.estimates import Z95, Estimate
from apreqel.model.qtypes import lookup
from apreqel.sensitivity.measurement import KernelLoss, Probe, Sensitivity, TensorSensitivity

# Spread of log a between types of a tensor, measured on SmolLM2-135M with rows of 768 (154 pairs,
# Q2_K to Q5_K): types with equal errors differ by this much each, and types apart in log error by
# a part that grows that slowly. Over a factor of 14 in error damage grew as the error does.
_BETWEEN_TYPES = 0.08
_BETWEEN_TYPES_OF = {"attn_q": 0.12, "attn_k": 0.2, "attn_v": 0.22}
_ALONG_ERROR, _ERROR_SCALE = 0.15, 12.0
# Types of one tensor are probed on the same text, so that most of a probe's noise is common.
_COMMON_NOISE = 0.9
# Roles are alike over about this many layers; single tensors differ from their neighbours by this.
_LAYER_SCALE, _LEAST_ROLE_SPREAD = 2.0, 0.15
# In these roles a grows with the power of the output; over layers left out, one at a time, that
# takes the spread of log a from 0.93 to 0.70 (ffn_down), from 0.29 to 0.19 (ffn_gate).
_BY_POWER = ("ffn_gate", "ffn_up", "ffn_down", "attn_q", "attn_k")
_UNKNOWN_SPREAD = 2.0

# Rounding in the engine's float32: a divergence below this is not told from none.
_ENGINE_NOISE_NATS = 5e-7

# What rounding anew takes off a tensor's output error comes off damage as this power of the ratio:
# it is less wrong where activations are large, which is not all where it hurts. Three whole files
# of SmolLM2-135M (rows of 768) were predicted 1% too low to 14% too high so; by the ratio itself
# two of them are told 14 and 26% too low.
_ROUNDING_POWER = 0.5


@dataclass(frozen=True)
class Damage:
    """Nats with the standard deviation of their logarithm; `is_probed` where measured directly."""

    nats: float
    log_deviation: float
    is_probed: bool = False

    @property
    def interval(self) -> tuple[float, float]:
        """95%."""
        factor = math.exp(min(Z95 * self.log_deviation, 50.0))
        return self.nats / factor, self.nats * factor

    @property
    def is_resolved(self) -> bool:
        """Whether it is known to within a factor of three either way."""
        return Z95 * self.log_deviation < math.log(3)


@dataclass(frozen=True)
class Swap:
    """Within a whole plan: how its KLD changes, in nats, when one tensor takes another type."""

    tensor: str
    chosen: str
    other: str
    nats: float
    standard_error: float


@dataclass(frozen=True)
class MeasuredFile:
    """A whole type map that was measured as a real file, rounded anew or by ggml alone."""

    types: Mapping[str, str]
    kld: Estimate
    is_rounded: bool = False
    key: str = ""  # what it is kept under


@dataclass(frozen=True, eq=False)
class DamageModel:
    """Damage of every (tensor, type) pair, of whole type maps, and their intervals.

    Built from records, and another one (`dataclasses.replace`) where more is known: what probing
    measured (`tensors`, `kernels`), whole maps as real files, swaps probed around the plan at hand,
    and, for files that are rounded anew, the output error after over before by tensor and type.
    `plain` asks for files as ggml rounds them all the same.
    """

    tensors: Mapping[str, TensorSensitivity]
    kernels: Mapping[str, KernelLoss] = field(default_factory=dict)
    files: Sequence[MeasuredFile] = ()
    swaps: Sequence[Swap] = ()
    rounding_ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metric: str = "kld"

    # -- what it is built from --

    @cached_property
    def _files(self) -> Sequence[tuple[MeasuredFile, float]]:
        """Files that tell how damages add up, each with the sum of its tensors' damages.

        Real files tell KL divergence only.
        """
        usable = [f for f in self.files if self.rounding_ratios or not f.is_rounded]
        rows = [
            (f, self.damage_sum(f.types, plain=not f.is_rounded))
            for f in usable
            if self.metric == "kld"
        ]
        return [(f, total) for f, total in rows if f.kld.mean > 0 and total > 0]

    @cached_property
    def _probes(self) -> Mapping[str, Mapping[str, Estimate]]:
        """Probes on fewer chunks are brought to the level of the whole text.

        By how much harder or easier those chunks are, for the pairs that were probed on all.
        """
        rows = [p.kld for t in self.tensors.values() for p in t.probes.values()]
        most = max((len(r) for r in rows), default=0)
        full = np.array([r for r in rows if len(r) == most]).reshape(-1, max(most, 1))
        full = full[full.mean(axis=1) > 0]
        share = np.ones(max(most, 1))
        if self.metric == "kld" and len(full):
            share = (full / full.mean(axis=1, keepdims=True)).mean(axis=0)

        def leveled(probe: Probe) -> Estimate:
            found = probe.estimate(self.metric)
            hardness = float(share[: found.count].mean())
            return Estimate(found.mean / hardness, found.standard_error / hardness, found.count)

        return {
            name: {type_name: leveled(probe) for type_name, probe in t.probes.items()}
            for name, t in self.tensors.items()
        }

    # -- single tensors --

    def damage(self, name: str, type_name: str, plain: bool = False) -> Damage:
        """Of this tensor alone in this type, kernels included. 0 for a type that was not
        measured: the tensor's own."""
        return self.table(name, plain).get(type_name, Damage(0.0, 0.0, True))

    def table(self, name: str, plain: bool = False) -> Mapping[str, Damage]:
        """`damage` of all measured types of a tensor."""
        return (self._plain if plain else self._rounded)[name]

    @cached_property
    def _rounded(self) -> Mapping[str, Mapping[str, Damage]]:
        """Of weights rounded anew; what kernels lose stays."""

        def rounded(name: str, type_name: str, damage: Damage) -> Damage:
            ratio = self.rounding_ratios.get(name, {}).get(type_name, 1.0)
            kernel = min(damage.nats, self._kernel_part(name, type_name))
            return replace(damage, nats=kernel + ratio**_ROUNDING_POWER * (damage.nats - kernel))

        return {
            name: {type_name: rounded(name, type_name, d) for type_name, d in table.items()}
            for name, table in self._plain.items()
        }

    @cached_property
    def _plain(self) -> Mapping[str, Mapping[str, Damage]]:
        """Of weights as ggml rounds them, first by what is known of the tensor, then by swaps."""
        tables: dict[str, dict[str, Damage]] = {}
        for name, tensor in self.tensors.items():
            tables[name] = {}
            if not tensor.errors.is_run:
                tables[name] = dict.fromkeys(tensor.errors.weights, Damage(0.0, 0.0, True))
                continue
            for type_name, error in tensor.errors.weights.items():
                log_a, deviation = self._posteriors[name][type_name]
                nats = error * math.exp(log_a) + self._kernel_part(name, type_name)
                is_probed = type_name in self._probes[name]
                tables[name][type_name] = Damage(nats, deviation, is_probed)
        for swap in self.swaps if self.metric == "kld" else ():
            table = tables.get(swap.tensor, {})
            if swap.other in table:
                table[swap.other] = _swapped(table, swap)
        return tables

    def _kernel_part(self, name: str, type_name: str) -> float:
        activation = lookup(type_name).activation
        factors = self._kernel_factors
        usual = factors.get((activation, ""), factors["", ""])
        factor = factors.get((activation, self.tensors[name].role), usual)
        return factor * self._kernel_loss(name, activation)

    def _kernel_loss(self, name: str, activation: str) -> float:
        """What rounding its activations does to a tensor's share, before scaling."""
        error = self.tensors[name].errors.kernels.get(activation, 0.0)
        if error <= 0:
            return 0.0
        return error * math.exp(self._posteriors[name][f"kernel {activation}"][0])

    @cached_property
    def _kernel_factors(self) -> Mapping[tuple[str, str], float]:
        """By activation type and role: the loss of its tensors, measured over predicted.

        At most 10. With the role "" of all tensors; with no activation either, what is usual, as
        activation types that were not measured round in the same steps.
        """
        found: dict[tuple[str, str], float] = {}
        for key, loss in self.kernels.items():
            type_name, _, role = key.partition(" ")
            activation = lookup(type_name).activation
            predicted = sum(
                self._kernel_loss(name, activation)
                for name, t in self.tensors.items()
                if type_name in t.errors.weights and role in ("", t.role)
            )
            if predicted > 0:
                ratio = (loss.real_nats - loss.dequantised_nats) / predicted
                found[activation, role] = min(max(ratio, 0.1), 10.0)
        usual = float(np.median(list(found.values()))) if found else 1.0
        return {("", ""): usual} | found

    # -- the process --

    def _observed(self, name: str) -> tuple[list[str], Doubles, Doubles, Doubles]:
        """(types, log errors, log a, relative noise) of a tensor's probes."""
        weights = self.tensors[name].errors.weights
        kept = [
            (t, p)
            for t, p in self._probes[name].items()
            if weights.get(t, 0) > 0 and math.isfinite(p.standard_error)
        ]
        deviations = np.hypot([p.standard_error for _, p in kept], _ENGINE_NOISE_NATS)
        # Where it is below that, or a loss fell by chance, a probe says only that a is not large.
        levels = np.maximum([p.mean for _, p in kept], deviations / 4)
        noise = deviations / levels
        errors = np.log([weights[t] for t, _ in kept])
        return [t for t, _ in kept], errors, np.log(levels) - errors, noise

    def _own_part(self, name: str) -> float:
        """Variance of log a of each type by itself."""
        return _BETWEEN_TYPES_OF.get(self.tensors[name].role, _BETWEEN_TYPES) ** 2

    @cached_property
    def _own_levels(self) -> Mapping[str, float]:
        """log a of the probed tensors, each from its own probes alone."""
        levels = {}
        for name in self.tensors:
            types, errors, log_a, noise = self._observed(name)
            if types:
                own = self._own_part(name) * np.eye(len(types))
                covariance = _along(errors, errors) + own + _noise(noise)
                weights = np.linalg.solve(covariance, np.ones(len(types)))
                levels[name] = float(weights @ log_a / weights.sum())
        return levels

    def _prior(self, name: str) -> tuple[float, float]:
        """(mean, variance) of log a from the same role in other layers, near ones first."""
        place = self.tensors[name]

        def usual(other: TensorSensitivity) -> float:
            return math.log(other.errors.power or 1.0) if other.role in _BY_POWER else 0.0

        others = [
            (abs(t.layer - place.layer), level - usual(t) + usual(place))
            for other, level in self._own_levels.items()
            if other != name and (t := self.tensors[other]).role == place.role
        ]
        if len(others) < 3:
            everything = list(self._own_levels.values())
            return float(np.mean(everything)) if everything else 0.0, _UNKNOWN_SPREAD**2
        weights = np.exp([-distance / _LAYER_SCALE for distance, _ in others])
        levels = np.array([level for _, level in others])
        mean = float(weights @ levels / weights.sum())
        spread = float(weights @ (levels - mean) ** 2 / weights.sum())
        return mean, max(spread, _LEAST_ROLE_SPREAD**2)

    @cached_property
    def _posteriors(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        return {name: self._posterior(name) for name in self.tensors}

    def _posterior(self, name: str) -> dict[str, tuple[float, float]]:
        """(mean, standard deviation) of log a for every type, and for kernels' rounding."""
        errors = self.tensors[name].errors
        levels = dict(errors.weights) | {f"kernel {k}": e for k, e in errors.kernels.items()}
        wanted = [t for t, e in levels.items() if e > 0]
        x = np.log([levels[t] for t in wanted])
        types, at, log_a, noise = self._observed(name)
        mean, variance = self._prior(name)
        means = np.full(len(x), mean)
        own = self._own_part(name)
        variances = np.full(len(x), variance + _ALONG_ERROR**2 + own)
        if types:
            same = np.array([[t == known for known in types] for t in wanted])
            cross = variance + _along(x, at) + own * same
            covariance = variance + _along(at, at) + own * np.eye(len(types)) + _noise(noise)
            gain = np.linalg.solve(covariance, cross.T).T
            means = mean + gain @ (log_a - mean)
            variances = np.maximum(variances - (gain * cross).sum(axis=1), 1e-6)
        found = zip(means.tolist(), np.sqrt(variances).tolist(), strict=True)
        # The mean stands for types with an error of exactly 0.
        return dict.fromkeys(levels, (mean, 0.0)) | dict(zip(wanted, found, strict=True))

    # -- whole type maps --

    def damage_sum(self, types: Mapping[str, str], plain: bool = False) -> float:
        """The sum of the damages of a map's tensors: what the solver adds up."""
        return sum(self.damage(name, types.get(name, ""), plain).nats for name in self.tensors)

    def predicted(self, types: Mapping[str, str], plain: bool = False) -> Damage:
        """What a real file with this map should measure, with its uncertainty."""
        parts = [self.damage(name, types.get(name, ""), plain) for name in self.tensors]
        total = sum(p.nats for p in parts)
        if total <= 0:
            return Damage(0.0, 0.0)
        independent = sum((p.nats * p.log_deviation) ** 2 for p in parts) / total**2
        return Damage(self.file_nats(total), math.sqrt(independent + self.scale_deviation**2))

    @cached_property
    def _scale(self) -> tuple[Doubles, Doubles]:
        """(log of the damages' sum, log of measured over it) of the measured files, by sum."""
        known = sorted((math.log(s), math.log(f.kld.mean / s)) for f, s in self._files)
        if not known:
            return np.zeros(1), np.zeros(1)
        x, y = np.array(known).T
        # A line, or with few files a constant: single files scatter, and the total must grow with
        # the sum, whatever the noise.
        if len(x) < 3 or np.ptp(x) < 0.3:
            return x[:1], np.full(1, y.mean())
        slope, offset = np.polyfit(x, y, 1)
        slope = min(max(float(slope), -0.9), 1.0)
        ends = np.array([x[0], x[-1]])
        offset = float(np.mean(y - slope * x))
        return ends, offset + slope * ends

    @cached_property
    def scale_deviation(self) -> float:
        """Standard deviation of the logarithm of measured over predicted totals."""
        if not self._files:
            return 0.25  # no real file was measured: what a first fit was off by
        off = [math.log(f.kld.mean / self.file_nats(total)) for f, total in self._files]
        noise = float(np.mean([f.kld.standard_error / f.kld.mean for f, _ in self._files]))
        degrees = max(1, len(off) - len(self._scale[0]))
        return math.sqrt(sum(r * r for r in off) / degrees + noise**2)

    def file_nats(self, damage_sum: float) -> float:
        """What a real file measures whose tensors' damages add up to this."""
        if damage_sum <= 0:
            return damage_sum
        x, y = self._scale
        return damage_sum * math.exp(float(np.interp(math.log(damage_sum), x, y)))

    def sum_for(self, nats: float) -> float:
        """The sum of damages whose real file measures `nats`: the inverse of `file_nats`."""
        if nats <= 0:
            return 0.0
        x, y = self._scale
        log_nats = math.log(nats)
        if log_nats <= x[0] + y[0]:
            return math.exp(log_nats - y[0])
        if log_nats >= x[-1] + y[-1]:
            return math.exp(log_nats - y[-1])
        return math.exp(float(np.interp(log_nats, x + y, x)))


def damage_model(sensitivity: Sensitivity) -> DamageModel:
    """What probing alone tells."""
    return DamageModel(sensitivity.tensors, sensitivity.kernels)


def _swapped(table: Mapping[str, Damage], swap: Swap) -> Damage:
    """The damage of `swap.other` with what the swap showed: by both differences' precision."""
    chosen, other = table.get(swap.chosen, Damage(0.0, 0.0, True)), table[swap.other]
    expected = other.nats - chosen.nats
    doubt = (other.nats * other.log_deviation) ** 2 + (chosen.nats * chosen.log_deviation) ** 2
    weight = doubt / (doubt + swap.standard_error**2 + 1e-30)
    nats = chosen.nats + expected + weight * (swap.nats - expected)
    # A tensor's damage in the plan may be less than alone, but nothing is gained by damage.
    return Damage(max(nats, 0.1 * other.nats), other.log_deviation * math.sqrt(1 - weight), True)


def _along(a: Doubles, b: Doubles) -> Doubles:
    """Covariance of log a between types with log errors `a` and `b`.

    Without the tensor's level, and what each type has by itself.
    """
    along: Doubles = _ALONG_ERROR**2 * np.exp(-np.abs(a[:, None] - b[None]) / _ERROR_SCALE)
    return along


def _noise(relative: Doubles) -> Doubles:
    """Of probes whose texts are parts of one another: the mean over the larger part is in both."""
    variances = relative**2
    common: Doubles = _COMMON_NOISE * np.minimum.outer(variances, variances)
    np.fill_diagonal(common, variances + 1e-9)
    return common


def expected_gain(gap: Doubles, deviation: Doubles) -> Doubles:
    """How much a value that now lies `gap` behind is expected to win by (Jones et al. 1998)."""
    from scipy.special import ndtr

    deviation = np.maximum(deviation, 1e-30)
    z = np.minimum(gap / deviation, 37)  # beyond that nothing is expected
    density = np.exp(-0.5 * np.square(np.maximum(z, -37))) / math.sqrt(2 * math.pi)
    gain: Doubles = np.maximum(0.0, deviation * (density - z * ndtr(-z)))
    return gain
