"""Pictures and pages, drawn from tables."""
