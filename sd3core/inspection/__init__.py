"""Says what any stored object holds: facts, tables, pictures.

It reads parts, and writes nothing.
"""

from sd3core.inspection.anything import inspect_stored
from sd3core.inspection.findings import Findings, ShownRow

__all__ = ["Findings", "ShownRow", "inspect_stored"]
