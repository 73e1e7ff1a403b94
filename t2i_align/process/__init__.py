"""Pure mathematics of noising processes: no models, no configuration."""
