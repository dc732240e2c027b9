"""How a report is shown: one document, on the terminal, as Markdown and as HTML, with plots."""

from r4r_graph.evaluation.rendering.outputs import print_report, to_html, to_markdown, write_report
from r4r_graph.evaluation.rendering.plots import figures

__all__ = ["figures", "print_report", "to_html", "to_markdown", "write_report"]
