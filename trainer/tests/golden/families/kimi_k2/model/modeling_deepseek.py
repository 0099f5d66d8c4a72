from transformers import DeepseekV3ForCausalLM as Base

from .configuration_deepseek import DeepseekV3Config


class DeepseekV3ForCausalLM(Base):
    config_class = DeepseekV3Config
