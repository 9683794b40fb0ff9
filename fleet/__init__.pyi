from .errors import FleetError as FleetError
from .recipes import Recipe as Recipe
from .train import TrainResult as TrainResult
from .train import train as train
