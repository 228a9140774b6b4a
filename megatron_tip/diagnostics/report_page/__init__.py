"""`megatron-tip report`: one HTML file about one or several runs, whole by itself."""

from megatron_tip.diagnostics.report_page.page import write_report_page

__all__ = ["write_report_page"]
