"""The papers' tables and figures for a bank, each with its data as CSV."""
