from .adapter import Adapter as Adapter
from .adapter import is_adapter as is_adapter
from .adapter import open_adapter as open_adapter
from .applied import AppliedAdapter as AppliedAdapter
from .applied import applied as applied
from .combining import combine_adapters as combine_adapters
from .extracting import extract_adapter as extract_adapter
