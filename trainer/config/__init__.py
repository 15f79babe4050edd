"""The config contract: schema and loading. Torch-free, shared by the launcher and the trainer."""
