"""Engines that run exported models, opened and timed in one way."""

from mmgfp.runtimes.base import RUNTIMES, Session, open_model

__all__ = ['RUNTIMES', 'Session', 'open_model']
