"""The trained model as a Hugging Face folder; importing this registers its classes.

So that inside the checkout `AutoModel.from_pretrained(folder)` and `AutoProcessor` need no remote
code: they take the classes of `modeling` and `processing`, with the compiled ops.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from train.model.export.configuration import HearkenConfig
from train.model.export.modeling import HearkenModel
from train.model.export.processing import HearkenProcessor

__all__ = ["HearkenConfig", "HearkenModel", "HearkenProcessor"]

AutoConfig.register(HearkenConfig.model_type, HearkenConfig)
AutoModel.register(HearkenConfig, HearkenModel)
AutoProcessor.register(HearkenConfig, HearkenProcessor)
