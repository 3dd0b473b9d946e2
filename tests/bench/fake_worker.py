"""Worker for the tests of the scheduler: it reports its environment, and fails in the ways that workers fail."""

import os
import signal
import time

from hvdtrain import process_activity


def prepare(settings):
    print("what is printed is no answer")
    if settings.get("unprepared") == settings["rank"]:
        raise RuntimeError("nothing is as it should be")

    def act(request):
        if request.get("killed") == settings["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.get("raising") == settings["rank"]:
            raise ValueError("a sentence of its own")
        if request.get("silent") == settings["rank"]:
            time.sleep(600)
        timed = {"seconds": settings["seconds"]} if "seconds" in settings else {}
        return timed | {
            "pid": os.getpid(),
            "settings": settings,
            "environ": dict(os.environ),
            "request": request,
            "cpus": sorted(os.sched_getaffinity(0)),
            "others": [process_activity.state(pid) for pid in request.get("look", [])],
        }

    return act
