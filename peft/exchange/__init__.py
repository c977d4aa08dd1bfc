"""Adapters in and out of the folders of Hugging Face's peft. Used, and not needed to understand a method."""
