"""What the `zimage` fixture gives a test: measurements of one variant, and the gate to hand them to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pytest_zimage.baselines.store import Found
from pytest_zimage.catalog import Variant, Workload
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import BaselineError
from pytest_zimage.judging.dispatch import DISPATCH
from pytest_zimage.judging.gate import gate
from pytest_zimage.judging.memory import HELD, RETURNED, unsaid
from pytest_zimage.judging.parity import PARITY
from pytest_zimage.judging.quality import DRIFT
from pytest_zimage.judging.twins import emulation
from pytest_zimage.outcomes import plain_nodeid
from pytest_zimage.reports.benchmark_bridge import replay
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.metrics import Sample, take
from pytest_zimage.verdict.rows import QUANTISED, SOUND


@dataclass(frozen=True)
class Measurement:
    """One metric of one variant, measured at least once in this session."""

    metric: str
    sample: Sample = field(default_factory=Sample)
    """What the first run says, in the metric's unit; image scores are taken when they are judged."""


class ZImage:
    """One variant under test."""

    def __init__(self, request: pytest.FixtureRequest, session: ZImageSession, variant: Variant) -> None:
        self._request = request
        self._session = session
        self.variant = variant

    @property
    def workload(self) -> Workload:
        return self._session.workload

    @property
    def record(self) -> RunRecord:
        """Everything the session's first run of this variant observed; it is made on first need."""
        return self._session.run(self.variant, 0)

    def warm_latency(self) -> Measurement:
        """Seconds per image once warm; the rounds also reach pytest-benchmark's report."""
        measurement = self.measure("warm_latency")
        replay(
            self._request,
            measurement.sample.rounds,
            group=f"{self._session.workload.name} {self._session.machine.device_class.name}",
            extra_info={"variant": self.variant.name, "phases_s": measurement.sample.phases},
        )
        return measurement

    def cold_load(self) -> Measurement:
        """Seconds of a fresh process from an empty page cache to the first image."""
        return self.measure("cold_load")

    def rss_peak(self) -> Measurement:
        """Highest resident memory of the process, bytes."""
        return self.measure("rss_peak")

    def working_set(self) -> Measurement:
        """Highest resident memory less what the process held before it loaded anything, bytes."""
        return self.measure("working_set")

    def device_peak(self) -> Measurement:
        """Highest device memory held by tensors, bytes. Skips the test on the CPU.

        On unified memory it is part of the machine's memory, so it must not be added to resident sizes.
        """
        return self.measure("device_peak")

    def gpu_process_peak(self) -> Measurement:
        """Highest device memory of the process, as nvidia-smi lists it, bytes: with its context.

        Skips the test where NVML does not say, as on the CPU and on some devices with unified memory.
        """
        return self.measure("gpu_process_peak")

    def memory_held(self) -> Measurement:
        """Whether the device holds the weights once, and its peak is they and what drawing takes. Skips as the next."""
        return self._unless_unsaid(HELD)

    def memory_returned(self) -> Measurement:
        """Whether the device's memory is free again once the variant is gone. Skips the test where nothing tells."""
        return self._unless_unsaid(RETURNED)

    def disk_bytes(self) -> Measurement:
        return self.measure("disk_bytes")

    def weight_bytes(self) -> Measurement:
        """Bytes held by weights, by storage type."""
        return self.measure("weight_bytes")

    def tensors(self) -> Measurement:
        """Number of weight tensors, by storage type."""
        return self.measure("tensors")

    def linears(self) -> Measurement:
        """Number of linears, by how they compute."""
        return self.measure("linears")

    def dispatch(self) -> Measurement:
        """Calls of one image by `operation: backend`, and of the transformer's linears by how they computed."""
        return self.measure(DISPATCH)

    def quantised_layers(self) -> Measurement:
        """Whether what says it computes quantised does: by the trace, or else by the images of the variant's twin.

        Skips the test where there is neither.
        """
        if self.record.dispatch is not None or not self.variant.twin:
            self.measure(DISPATCH, (f"{self.variant.name} names no twin", *emulation(self.record)))
        return Measurement(QUANTISED)

    def forwards(self) -> Measurement:
        """Transformer forwards of one image."""
        return self.measure("forwards")

    def sound_images(self) -> Measurement:
        """Whether the variant's images are images at all: not blank, uniform or saturated."""
        return Measurement(SOUND)

    def clip_score(self) -> Measurement:
        """Cosine of image and text, by prompt and seed."""
        return Measurement("clip_score")

    def lpips(self) -> Measurement:
        """Perceptual distance to the reference's image of the same prompt and seed, made in the same build."""
        return Measurement("lpips")

    def lpips_to_recorded(self) -> Measurement:
        """Perceptual distance to the variant's own recorded image of the same prompt and seed."""
        return Measurement(DRIFT)

    def psnr(self) -> Measurement:
        """Peak signal-to-noise ratio against that image, dB."""
        return Measurement("psnr")

    def ssim(self) -> Measurement:
        """Structural similarity to that image."""
        return Measurement("ssim")

    def parity(self) -> Measurement:
        """Whether another engine draws the same pictures. Skips the test where none is named."""
        if self._session.other_engine is None:
            pytest.skip("zimage parity: no other engine is named: --zimage-parity ENGINE")
        return Measurement(PARITY)

    def _unless_unsaid(self, name: str) -> Measurement:
        if reason := unsaid(self._session, self.record, name):
            pytest.skip(f"zimage {name}: {reason}")
        return Measurement(name)

    def measure(self, metric: str, besides: Sequence[str] = ()) -> Measurement:
        """Raises a `ZImageError` if the run fails; `besides` is told with the reason of a skip."""
        sample = take(metric, self.record)
        if sample.unavailable and (sample.not_its_own or not self._stored(metric)):
            pytest.skip(f"zimage {metric}: {'; '.join((sample.unavailable, *besides))}")
        return Measurement(metric, sample)

    def _stored(self, metric: str) -> bool:
        """Whether a baseline has the metric: then a machine that cannot say it any more is an error, not a skip."""
        try:
            return isinstance(self._session.store.find(self._session.key(self.variant), metric), Found)
        except BaselineError:
            return False

    def gate(self, *measurements: Measurement) -> None:
        """Judge each measurement against its baseline; the test fails with the delta report of those that regressed.

        With `--update-baselines`, record them instead.
        """
        if not measurements:
            raise TypeError("gate() needs at least one measurement, for example zimage.warm_latency()")
        names = tuple(measurement.metric for measurement in measurements)
        gate(self._session, plain_nodeid(self._request.node), self.variant, names)
