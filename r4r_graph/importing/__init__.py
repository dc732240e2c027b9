"""Public data sets of reviews, brought into the columns that everything else reads."""

from r4r_graph.importing.formats import FORMATS
from r4r_graph.importing.importer import import_reviews
from r4r_graph.importing.report import ImportProgress, ImportReport

__all__ = ["FORMATS", "ImportProgress", "ImportReport", "import_reviews"]
