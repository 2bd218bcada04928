"""One rank of contention.py: averages a model step after step and writes down what each step took and by which plan."""

from __future__ import annotations

import argparse
import json
import random
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import dssync_pg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--mib", type=float, required=True, help="float32 parameters")
    parser.add_argument("--topology", required=True)
    parser.add_argument("--compute", type=float, default=0.0, help="median seconds of computing a step")
    parser.add_argument("--log", required=True, help="rank 0 writes a line of JSON a step")
    args = parser.parse_args()

    torch.set_num_threads(1)
    options = dssync_pg.Options(topology=args.topology)
    dist.init_process_group("dssync", timeout=timedelta(seconds=120), pg_options=options)
    rank = dist.get_rank()
    chance = random.Random(rank)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(round(args.mib))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = dssync_pg.attach(model, optimizer)
    for parameter in model:
        parameter.grad = torch.zeros_like(parameter)
    dist.barrier()
    with open(args.log if rank == 0 else "/dev/null", "w", buffering=1) as log:
        for step in range(args.steps):
            began = time.perf_counter()
            if args.compute:  # asleep: the emulated cluster has fewer cores than workers
                twice = 2 if chance.random() < 0.05 else 1
                time.sleep(args.compute * twice * chance.lognormvariate(0, 0.3))
            ready = time.perf_counter()
            optimizer.step()
            now = time.perf_counter()
            plan = {"kind": sync.plan.kind, "period": sync.plan.period, "delay": sync.plan.delay}
            log.write(json.dumps({"step": step, "step_s": now - began, "sync_s": now - ready, **plan}) + "\n")
        log.write(json.dumps({"plan_changes": sync.stats()["plan_changes"]}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
