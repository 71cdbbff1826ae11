"""Device programs that solvers and estimators share."""
