"""How much the variant occupies: in memory, on the device, on disk."""


def test_peak_memory(zimage):
    """The process's highest resident memory."""
    zimage.gate(zimage.rss_peak())


def test_working_set(zimage):
    """The same less what the process held before it loaded anything."""
    zimage.gate(zimage.working_set())


def test_device_memory(zimage):
    """The most device memory the variant's tensors held at once."""
    zimage.gate(zimage.device_peak())


def test_process_memory(zimage):
    """The most device memory that the driver counted for the process, as the published FP8 tables have it."""
    zimage.gate(zimage.gpu_process_peak())


def test_weights_held_once(zimage):
    """The device holds each weight once; the peak is the weights and what drawing takes on top."""
    zimage.gate(zimage.memory_held())


def test_memory_returned(zimage):
    """After the variant has closed, the device's memory is free again, within 64 MiB."""
    zimage.gate(zimage.memory_returned())


def test_disk(zimage):
    """Bytes of the variant's files."""
    zimage.gate(zimage.disk_bytes())


def test_weights(zimage):
    """Bytes and tensors of the loaded weights, by storage type: a file quietly dequantised on load shows up here."""
    zimage.gate(zimage.weight_bytes(), zimage.tensors())


def test_linears(zimage):
    """How the linears compute: plain, cast, weight-only, or with quantised activations."""
    zimage.gate(zimage.linears())
