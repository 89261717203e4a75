"""Gates for the speed, memory and quality of quantised Z-Image Turbo variants."""

__version__ = "0.1.0"
