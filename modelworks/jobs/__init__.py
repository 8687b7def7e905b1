"""The work plane: a durable queue of leased jobs, the worker that runs each in a child process, and what a job does.

Public: `queue.Queue`, `collection.collect`; `python -m modelworks.jobs.worker` runs the jobs of one home.
"""
