"""ending.py WHO HOW: runs processes that work in step until something happens to one of them."""

import os
import signal
import sys
import time

from jax._src.distributed import global_state

from jaxrl_stable import distributed
from jaxrl_stable.distributed import watch
from jaxrl_stable.distributed.preemption import StopRequest
from jaxrl_stable.program import errors_in_one_line

who, how = int(sys.argv[1]), sys.argv[2]
distributed.initialize()
with watch.together(), errors_in_one_line(False), StopRequest() as stop:
    for step in range(100):
        if stop.agreed():
            print(f"stops after step {step}", flush=True)
            break
        if step == 3 and how == "same fault":
            raise ValueError("everybody sees this")
        if step != 3 or global_state.process_id != who:
            # The others once wait on the host, where no broken connection alerts them.
            time.sleep(0.05 + 60 * (step == 3 and how == "killed in peace"))
            continue
        if how.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "fault":
            raise ValueError("the reward is faulty; mend it")
        if how == "bug":
            raise KeyError("a bug")
