from .open import open_checkpoint as open_checkpoint
from .scan import Hasher as Hasher
from .scan import Scan as Scan
from .scan import scan as scan
from .tensors import Checkpoint as Checkpoint
from .tensors import TensorInfo as TensorInfo
from .writer import CheckpointWriter as CheckpointWriter
