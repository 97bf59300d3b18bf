"""The text and the JSON of `alma plan`."""

from pipeline.checks.plan_stages import RecipePlan, StagePlan
from pipeline.core.terminal import byte_size, plural, short
from pipeline.models.devices import RESERVED, USABLE, Cluster
from pipeline.train.layouts import Candidate, cheapest_change
from pipeline.train.run_summary import duration

GIB = 2**30


def lines(plan: RecipePlan, cluster: Cluster, price: float | None, top: int) -> list[str]:
    result = _cluster_lines(cluster)
    for stage in plan.stages:
        result += ["", *_stage_lines(stage, price, top)]
    for stage in plan.unplanned:
        result += ["", f"{stage.name}", f"  not planned: {stage.reason}"]
    result += ["", "Step times are arithmetic, tested on published runs of other frameworks, not on alma's:"]
    result += ["docs/plan.md says how far they were off; python benchmarks/plan.py prints each row."]
    return result


def _cluster_lines(cluster: Cluster) -> list[str]:
    device = cluster.device
    usable = f"{device.usable / GIB:.1f} of {device.memory / GIB:.1f} GiB"
    return [
        f"cluster    {cluster}: {plural(cluster.nodes, 'node')} of {cluster.local}, {device.peak / 1e12:,.4g} TFLOP/s"
        f" bf16, {device.bandwidth / 1e9:,.0f} GB/s of memory, {device.link / 1e9:,.0f} GB/s in a node and"
        f" {device.network / 1e9:,.3g} between nodes, per device and direction",
        f"           {usable} may be planned: {RESERVED / GIB:.0f} GiB are left to the driver and to NCCL, and"
        f" {1 - USABLE:.0%} to the allocator. {device.source}",
    ]


# ---- a stage ---------------------------------------------------------------------------------------------------------


def _stage_lines(stage: StagePlan, price: float | None, top: int) -> list[str]:
    size = stage.size
    result = [f"{stage.name}    {size.total:,} parameters, {stage.flops.full:.2e} FLOPs per token"]
    result += _current_lines(stage, price)
    result += [_data_line(stage), _disk_line(stage)]
    fitting = stage.fitting
    if not fitting:
        least = min(stage.found, key=lambda one: one.peak, default=None)
        if least is None:
            result.append("  no layout is possible on this number of devices")
        else:
            result.append(
                f"  nothing fits: the smallest is {least} with {least.peak / GIB:.1f} GiB; use more or larger devices"
            )
    elif stage.timed:
        result.append(
            f"  {len(fitting)} of {len(stage.found)} layouts fit; the fastest, and the fastest of each engine:"
        )
        result += _table(stage, _shown(fitting, top), price)
    else:
        result.append("  smallest layouts; the time depends on how long the answers become:")
        result += _table(stage, sorted(fitting, key=lambda one: one.peak)[:top], None)
    for reason, names in stage.refused.items():
        result.append(f"  refused: {', '.join(names)}: {reason}")
    return result


def _current_lines(stage: StagePlan, price: float | None) -> list[str]:
    if stage.current is None:
        return [f"  as written: not possible on {stage.cluster.count} devices: {stage.current_problem}"]
    current, device = stage.current, stage.cluster.device
    verdict = "fits" if current.fits(stage.cluster) else f"DOES NOT FIT {device.usable / GIB:.1f} GiB"
    timing = ""
    if stage.timed:
        timing = f"; {_speed(stage, current)}"
        timing += "".join(f", {text}" for text in (_time(stage, current), _cost(stage, current, price)) if text)
    result = [
        f"  as written: {current}: {current.peak / GIB:.1f} GiB, {verdict}{timing}",
        f"    memory   {_parts(current.memory, GIB, 'GiB')}",
    ]
    if stage.timed:
        result.append(f"    step     {current.step_seconds:.3g} s: {_shares(current)}")
    if not current.fits(stage.cluster):
        change = cheapest_change(current, stage.found, stage.cluster)
        if change is not None:
            result.append(f"    the smallest change that fits: {change}: {change.peak / GIB:.1f} GiB")
    return result


def _data_line(stage: StagePlan) -> str:
    needed = stage.tokens_needed()
    if needed is None:
        return "  data: how many tokens it reads is known when its sources have been read"
    text = f"  data: reads {needed:,} tokens in {plural(needed // stage.step_tokens, 'step', ',')}"
    if not stage.reads_packed:
        return text
    if stage.tokens_present is None:
        return f"{text}; none are packed yet"
    return f"{text}; {stage.tokens_present:,} are packed: {needed / stage.tokens_present:.2f} epochs"


def _disk_line(stage: StagePlan) -> str:
    one, most = stage.checkpoint_bytes, stage.num_checkpoints
    return f"  disk: {byte_size(one)} per checkpoint, at most {most} at a time: {byte_size(most * one)}"


def _shown(fitting: list[Candidate], top: int) -> list[Candidate]:
    """The first ones, and the first of each value of `parallel`."""
    shown = fitting[:top]
    kinds = [one.keys["parallel"] for one in shown]
    for one in fitting[top:]:
        if one.keys["parallel"] not in kinds:
            kinds.append(one.keys["parallel"])
            shown.append(one)
    return shown


def _table(stage: StagePlan, candidates: list[Candidate], price: float | None) -> list[str]:
    width = max(len(str(one)) for one in candidates)
    result = []
    for number, one in enumerate(candidates, 1):
        row = f"  {number:3}  {str(one):{width}}  {one.peak / GIB:6.1f} GiB"
        if stage.timed:
            row += f"  {_speed(stage, one):32}"
            row += "".join(f"  {text}" for text in (_time(stage, one), _cost(stage, one, price)) if text)
        result.append(row.rstrip())
    return result


def _speed(stage: StagePlan, one: Candidate) -> str:
    return f"{short(one.tokens_per_second)} tokens/s, MFU {utilisation(stage, one):.1%}"


def utilisation(stage: StagePlan, one: Candidate) -> float:
    """Model FLOPs utilisation, attention in full."""
    return one.tokens_per_second * stage.flops.full / (stage.cluster.count * stage.cluster.device.peak)


def _time(stage: StagePlan, one: Candidate) -> str:
    hours = stage.hours(one)
    return "" if hours is None else duration(3600 * hours)


def device_hours_cost(stage: StagePlan, one: Candidate, price: float | None) -> float | None:
    hours = stage.hours(one)
    return None if hours is None or price is None else hours * stage.cluster.count * price


def _cost(stage: StagePlan, one: Candidate, price: float | None) -> str:
    total = device_hours_cost(stage, one, price)
    return "" if total is None else f"cost {total:,.0f}"


def _parts(parts: dict[str, float], unit: float, name: str) -> str:
    return ", ".join(f"{part} {value / unit:.1f}" for part, value in parts.items() if value) + f" {name}"


def _shares(one: Candidate) -> str:
    return ", ".join(f"{part} {value / one.step_seconds:.0%}" for part, value in one.seconds.items() if value)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_json(plan: RecipePlan, cluster: Cluster, price: float | None, top: int) -> dict:
    stages = {}
    for stage in plan.stages:
        stages[stage.name] = {
            "parameters": stage.size.total,
            "tokens_needed": stage.tokens_needed(),
            "tokens_present": stage.tokens_present,
            "checkpoint_bytes": stage.checkpoint_bytes,
            "checkpoints": stage.num_checkpoints,
            "as_written": stage.current and _candidate_json(stage, stage.current, price),
            "layouts": [_candidate_json(stage, one, price) for one in _shown(stage.fitting, top)],
            "refused": stage.refused,
        }
    return {
        "cluster": str(cluster),
        "usable_bytes": cluster.device.usable,
        "stages": stages,
        "not_planned": {stage.name: stage.reason for stage in plan.unplanned},
    }


def _candidate_json(stage: StagePlan, one: Candidate, price: float | None) -> dict:
    result = {"keys": one.keys, "fits": one.fits(stage.cluster), "memory": one.memory, "peak_bytes": one.peak}
    if stage.timed:
        result |= {
            "step_seconds": one.step_seconds,
            "step_parts": one.seconds,
            "tokens_per_second": one.tokens_per_second,
            "mfu": utilisation(stage, one),
            "hours": stage.hours(one),
            "cost": device_hours_cost(stage, one, price),
        }
    return result
