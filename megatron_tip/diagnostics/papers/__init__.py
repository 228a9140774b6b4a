"""The papers' tables and figures of a bank, each with its data as CSV."""
