from .errors import FleetError as FleetError
from .group import Group as Group
from .modes import refuse_training as refuse_training
from .recipes import Recipe as Recipe
from .train import JointTrainer as JointTrainer
from .train import TrainResult as TrainResult
from .train import train as train
