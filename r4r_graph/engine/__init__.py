"""Engines: what turns prompts into text and into rating distributions."""
