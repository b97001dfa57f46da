"""Facts about machines. Code asks for the fact that it needs, never for the vendor.

Importing this package imports no torch; `detect()` does.
"""

from evenflow.platforms.platform import Platform as Platform
from evenflow.platforms.platform import detect as detect
