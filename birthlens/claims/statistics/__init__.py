"""Statistics of the claims: small functions from runs to named numbers."""
