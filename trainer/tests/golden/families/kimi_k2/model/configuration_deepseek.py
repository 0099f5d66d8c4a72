from transformers import DeepseekV3Config as Base


class DeepseekV3Config(Base):
    model_type = "kimi_k2"
