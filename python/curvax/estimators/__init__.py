"""Stochastic estimators: the trace, the diagonal and the spectral density, with error bars."""
