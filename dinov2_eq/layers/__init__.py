"""The layers of vision transformers and of their heads."""
