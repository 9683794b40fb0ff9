from .reference import Segment as Segment
from .reference import delta_dot as delta_dot
from .reference import mix as mix
from .reference import row_norms as row_norms
