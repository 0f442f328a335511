"""What a run costs: hours, energy, money. Every price and rate is an argument, because they change by the month."""

from __future__ import annotations

import math


def run_hours(flops: float, *, peak_flops: float, mfu: float, n_devices: int = 1) -> float:
    """Wall-clock hours of `flops` FLOPs on `n_devices` devices of `peak_flops` FLOP/s each, used at `mfu`.

    Raises:
        ValueError: a number that is not positive, or `mfu` above 1.
    """
    _positive(flops=flops, peak_flops=peak_flops, mfu=mfu, n_devices=n_devices)
    if mfu > 1:
        raise ValueError(f"mfu={mfu}: give a fraction of the peak, above 0 and at most 1")
    return flops / (peak_flops * mfu * n_devices) / 3600


def run_energy_kwh(hours: float, *, watts: float, n_devices: int = 1, overhead: float = 1.2) -> float:
    """Energy in kWh of `n_devices` devices drawing `watts` each, times the building's `overhead` (PUE).

    Raises:
        ValueError: a number that is not positive, or `overhead` below 1.
    """
    _positive(hours=hours, watts=watts, n_devices=n_devices, overhead=overhead)
    if overhead < 1:
        raise ValueError(f"overhead={overhead}: total power over the devices' own, so at least 1")
    return hours * n_devices * watts * overhead / 1000


def run_price(hours: float, *, price_per_device_hour: float, n_devices: int = 1) -> float:
    """Rent of `n_devices` devices for `hours`, in the price's currency.

    Raises:
        ValueError: a number that is not positive.
    """
    _positive(hours=hours, price_per_device_hour=price_per_device_hour, n_devices=n_devices)
    return hours * n_devices * price_per_device_hour


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: give a positive number")
