"""Reinforcement of the reasoner, on TRL: `train` is the step, `rewards` what is rewarded."""
