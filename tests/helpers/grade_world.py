"Sandboxes on a machine that stalls when a test says so; all else is the real sandbox"
from kat.envs.sandbox import JobResult


class StallingPool:
    "A `WarmPool` in which chosen jobs are cut off by the wall limit"
    def __init__(self, pool, stalls):
        self.pool, self.stalls = pool, stalls

    async def arun(self, job):
        if self.stalls(job): return JobResult('timeout', error='longer than 3 s', cause='wall')
        return await self.pool.arun(job)
