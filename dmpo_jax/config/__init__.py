"""The configuration: which keys there are, which values they may have, and which of them decide a run's results."""

from dmpo_jax.config.identity import NOT_OF_EVALUATION, deciding, differences, fingerprint
from dmpo_jax.config.renamed import current
from dmpo_jax.config.validation import CHOICES, Config, ConfigError, flatten, validate

__all__ = (
  "CHOICES",
  "NOT_OF_EVALUATION",
  "Config",
  "ConfigError",
  "current",
  "deciding",
  "differences",
  "fingerprint",
  "flatten",
  "validate",
)
