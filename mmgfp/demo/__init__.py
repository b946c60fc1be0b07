"""Datasets of the demo; importing this registers them in MMDetection."""

from mmgfp.demo.digits import DigitsDetection, DigitsSpec, write_digits

__all__ = ['DigitsDetection', 'DigitsSpec', 'write_digits']
