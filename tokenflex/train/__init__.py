"""A run from its first step to its last: stages, the loop, what a step minimises, who is told of it, what is saved.

`run.Run` has the stages of a run, `trainer.Trainer` its loop.
"""
