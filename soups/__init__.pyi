from .config import LearnConfig as LearnConfig
from .errors import SoupError as SoupError
from .evaluate import predict as predict
from .ingredients import Zoo as Zoo
from .ingredients import open_zoo as open_zoo
from .pipeline import run as run
from .session import Session as Session
from .zoo import make_zoo as make_zoo
