"""What a run took, imports not counted, as one line."""

import resource
import time


def cpu_s() -> float:
    me, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return me.ru_utime + me.ru_stime + children.ru_utime + children.ru_stime


class Run:
    def __init__(self, name: str) -> None:
        self._name, self._cpu_s, self._start = name, cpu_s(), time.time()

    def ended(self, rows: int) -> None:
        wall_s, used_s = time.time() - self._start, cpu_s() - self._cpu_s
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        words = f"rows={rows} wall={wall_s:.2f}s rate={rows / wall_s:.0f}/s cpu={used_s:.1f}s rss={memory}MB"
        print(f"RESULT {self._name} {words}", flush=True)
