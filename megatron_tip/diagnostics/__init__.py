"""What was learnable: frozen contexts scored again, statistics, tables and figures, the report page."""
