"""Many slides: finding them, their status files, reuse of what is done, the record of a run. No torch in here.

`manifest` lists the slides, `run` is the loop over them, `stage` decides what is reused, `ray_tasks` is what a worker
on another machine does, `record` and `status` are what a run writes of itself.
"""
